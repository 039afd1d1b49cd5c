"""The `shapes` benchmark: generated scenes of look-alike objects with expressions that single one out.

    flowseg data make-shapes --out data/shapes --num-images 6000 --seed 0

The result is a RefCOCO directory like any other. `scene` says what stands where, `render` paints it, `expressions` finds what
can be said, `generator` puts sets together, `refcoco_writer` writes the layout, and `shapes` opens the prepared benchmark.
`multi_task` (with `reasoning_questions` and `chat`) writes scenes in the layouts of ReasonSeg, COCO panoptic and LLaVA, and
`toy_dataset` an example of your own data.
"""

from flowseg_jax.synthetic.generator import generate

__all__ = ["generate"]

"""The model and the samples of the diagnostics that run the model: the only place that knows how an evaluation feeds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flowseg_jax.data.batch import Batch, BatchShape
from flowseg_jax.data.batching import LengthBound
from flowseg_jax.data.evaluation import EvalData
from flowseg_jax.data.prompts import Prompts
from flowseg_jax.data.records import Sample
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, postprocess
from flowseg_jax.evaluation.benchmark import PHRASES, TEXT_STEP, Benchmark
from flowseg_jax.models import flowseg
from flowseg_jax.writers import heartbeat

# (model, batch, truth on the grid [B, K, h, w], share of image [B, h, w]) -> ({name: [B, K, ...]}, mask logits [B, K, N, h, w])
Function = Callable[[flowseg.FlowSeg, Batch, jax.Array, jax.Array], tuple[dict[str, jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One sample of a diagnostic.

    Attributes:
        sample: what was asked.
        values: what the diagnostic's function gave for it, without the leading [B, K].
        iou: [N] in [0, 1], at the original size; 0 for logits that are no numbers.
        masks: bool [N, H, W]. truth: bool [H, W]. ignored: bool [H, W]. image: uint8 [H, W, 3].
            All four are None in a sample whose pixels were let go of.
    """

    sample: Sample
    values: Mapping[str, np.ndarray]
    iou: np.ndarray
    masks: np.ndarray | None
    truth: np.ndarray | None
    ignored: np.ndarray | None
    image: np.ndarray | None

    def figures(self, **more: Any) -> Measured:
        """Without its pixels, which would fill the memory if all samples kept theirs, and with more values."""
        values = {**self.values, **more}
        return dataclasses.replace(self, values=values, masks=None, truth=None, ignored=None, image=None)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model and the first images of a split.

    Attributes:
        benchmark: the model and the prepared data set.
        split: which split. images: how many of its images, None for all.
    """

    benchmark: Benchmark
    split: str
    images: int | None = None

    def __post_init__(self):
        self.benchmark.data.check_split(self.split)
        if self.images is not None and self.images < 1:
            raise UserError(f"--images must be at least 1, got {self.images}")

    @property
    def about(self) -> dict[str, Any]:
        """What was measured, as it stands in the JSON."""
        return {"checkpoint": dict(self.benchmark.checkpoint), "split": self.split, "images": self.images}

    def data(self, prompts: Prompts | None = None) -> EvalData:
        """The samples, asked in the given wording (None: the model's); whatever the wording, the shapes are the same."""
        mark, cfg = self.benchmark, self.benchmark.cfg
        entries = mark.data.index(self.split)[: self.images]
        bound = LengthBound(dataclasses.replace(mark.prompts, vary=True), mark.tokenizer, cfg.visual_tokens)
        asked = {sample.sentence for entry in entries for sample in entry.samples}
        longest = sorted(bound.phrase_lengths(sorted(asked)), reverse=True)[:PHRASES]
        text = -(-bound.needed(longest, task=mark.data.task) // TEXT_STEP) * TEXT_STEP
        shape = BatchShape(mark.batch, text, PHRASES, 1, cfg.sam.image_size, cfg.siglip.image_size)
        return EvalData(
            mark.data,
            self.split,
            mark.tokenizer,
            shape,
            prompts=prompts or mark.prompts,
            visual_tokens=cfg.visual_tokens,
            max_images=self.images,
        )

    def measure(self, function: Function, name: str) -> Iterator[Measured]:
        """Runs a diagnostic's function over all samples, jitted, and brings its masks to the original sizes.

        Args:
            function: see `Function`; it is traced.
            name: of the diagnostic, for the line of progress.

        Raises:
            UserError: the split holds no expression.
        """
        mark, data = self.benchmark, self.data()
        return measure(mark.graphdef, mark.params, data, function, name)


def measure(graphdef: Any, params: Any, data: Any, function: Function, name: str) -> Iterator[Measured]:
    """`Source.measure` for any model and any iterable of `EvalBatch`es that knows its number of `samples`."""
    if not data.samples:
        raise UserError("the split holds no expression to measure; prepare it, or choose another split")
    run = jax.jit(lambda params, *inputs: function(flowseg.bind(graphdef, params), *inputs))
    on_grid = jax.jit(lambda truth, where: (postprocess.truth_on_grid(truth, where), postprocess.image_on_grid(where)))
    restore = jax.jit(postprocess.restore)
    grid, done = None, 0
    with heartbeat(f"diagnose {name}: compiling") as beat:
        for batch in data:
            if grid is None:
                look = lambda params, batch: flowseg.bind(graphdef, params).segment(batch).mask_logits  # noqa: E731
                grid = jax.eval_shape(look, params, batch.batch).shape[-2:]
            where = postprocess.geometry(
                batch.batch.scaled_size, batch.sizes, grid=grid, padded_size=batch.batch.images.shape[1]
            )
            rows, phrases = batch.batch.phrase_mask.shape
            pack = lambda masks, count: postprocess.pack_truth(masks, rows, count, where.bucket)  # noqa: B023, E731
            truth = postprocess.Truth(pack(batch.truth, phrases), pack(batch.once, phrases), pack(batch.ignored, 1))
            values, logits = run(params, batch.batch, *on_grid(truth.union, where))
            values, restored = jax.device_get((values, restore(logits, where, truth)))
            for b, samples in enumerate(batch.samples):
                for k, sample in enumerate(samples):
                    yield Measured(
                        sample,
                        {key: value[b, k] for key, value in values.items()},
                        np.array(
                            [
                                metrics.iou(*pair) if finite else 0.0
                                for *pair, finite in zip(
                                    restored.intersection[b, k], restored.union[b, k], restored.finite[b, k], strict=True
                                )
                            ]
                        ),
                        np.array([postprocess.unpack_mask(mask, batch.sizes[b]) for mask in restored.masks[b, k]]),
                        batch.truth[b][k],
                        batch.ignored[b][0],
                        batch.images[b],
                    )
            done += sum(len(samples) for samples in batch.samples)
            beat.message = f"diagnose {name}: {done}/{data.samples} samples"

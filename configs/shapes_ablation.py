"""The paper's ablation at tiny size: stage 3 with one of `VARIANTS`, from components that were trained without any of them.

    python -m experiments.ablation      # makes the components, then all runs; docs/results.md has the protocol
    python train.py --config=configs/shapes_ablation.py:sr_cr --workdir=runs/sr_cr    # one run, once the components are there

What the image and the text give is frozen: both encoders, their projectors, the language model, the connector and the pixel
decoder. The mask decoder begins as stage 1 left it and learns, with the variant's parts and with what joins it to the language
model.
"""

import dataclasses

from flowseg_jax.configs.stage3_mixed import tiny_stage
from ml_collections import ConfigDict

from flowseg_jax.errors import UserError, did_you_mean

RUNS, DATA = "runs/ablation", "data/ablation"
FROZEN = ("sam", "siglip", "visual_projector", "seg_projector", "llm", "connector", "pixel_decoder")
VARIANTS = {  # (what differs in semantic_flow, boundary.enabled)
    "baseline": ({"mode": "off"}, False),
    "sr": ({"mode": "sr"}, False),
    "sr_cr": ({"mode": "sr_cr"}, False),
    "sr_cr_bar": ({"mode": "sr_cr"}, True),
    "cr": ({"mode": "cr"}, False),
    "sr_residual": ({"mode": "sr", "norm": "residual"}, False),
    "sr_even": ({"mode": "sr", "gate_bias": 0.0}, False),
}


def get_config(variant: str = "sr_cr_bar") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r} of the ablation{did_you_mean(variant, VARIANTS)}")
    flow, refines = VARIANTS[variant]
    config, model = tiny_stage()
    parts = {
        "semantic_flow": dataclasses.replace(model.semantic_flow, **flow),
        "boundary": dataclasses.replace(model.boundary, enabled=refines),
    }
    config.model = ConfigDict(dataclasses.replace(model, **parts).to_dict())
    config.num_steps = 500
    config.log_every = 50
    config.checkpoint_every = 250
    config.checkpoint.keep = 1
    config.init_from = (f"{RUNS}/stage2/model", f"{RUNS}/stage1/model")  # stage 1's SAM last, as in stage 3
    config.data.dir = f"{DATA}/shapes/prepared"
    config.data.objects = "referred"
    config.data.random_prompts = False
    config.data.update(max_phrases=4, max_masks=4, text_length=200)
    config.optimizer.param_groups = ((f"({'|'.join(FROZEN)})/.*", None), (".*", 1.0))
    config.optimizer.losses.language_weight = 0.0
    return config

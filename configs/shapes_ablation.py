"""The paper's ablation at tiny size: one of `baseline`, `sr`, `sr_cr` and `sr_cr_bar`, in a few minutes on two CPU cores.

    python train.py --config=configs/shapes_ablation.py:sr_cr --workdir=runs/ablation_sr_cr

`python -m experiments.ablation` runs all of them over several seeds and compares; its docstring says what is held equal.
"""

import dataclasses

from flowseg_jax.configs.shapes_tiny import get_config as shapes_tiny
from ml_collections import ConfigDict

from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system.paths import ROOT

SOURCE = "checkpoints/shapes_tiny"
SHARED = ("sam", "siglip", "visual_projector", "seg_projector", "llm", "connector", "pixel_decoder")  # from SOURCE, frozen
VARIANTS = {  # (semantic_flow.mode, boundary.enabled), each with one thing more than the one before
    "baseline": ("off", False),
    "sr": ("sr", False),
    "sr_cr": ("sr_cr", False),
    "sr_cr_bar": ("sr_cr", True),
}


def get_config(variant: str = "sr_cr_bar") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r} of the ablation{did_you_mean(variant, VARIANTS)}")
    mode, refines = VARIANTS[variant]
    config = shapes_tiny()
    model = FlowSegConfig.from_dict(read_model_config(ROOT / SOURCE)["model"])
    parts = {
        "mask_decoder": dataclasses.replace(model.mask_decoder, num_layers=3, num_queries=16),  # a step in half the time
        "semantic_flow": dataclasses.replace(model.semantic_flow, mode=mode),
        "boundary": dataclasses.replace(model.boundary, enabled=refines),
    }
    config.model = ConfigDict(dataclasses.replace(model, num_classes=0, **parts).to_dict())
    config.num_steps = 500
    config.log_every = 50
    config.checkpoint_every = 200
    config.init_from = tuple(f"{component}={SOURCE}" for component in SHARED)
    config.data.tokenizer = f"{SOURCE}/tokenizer"
    config.optimizer.param_groups = ((f"({'|'.join(SHARED)})/.*", None), (".*", 1.0))
    config.optimizer.losses.language_weight = 0.0
    return config

"""What `make demo` trains: the last stage alone, as the paper's third stage begins where the first two ended.

The encoders, the pixel decoder and the language model come from the model in `checkpoints/` and stay as they are. The mask
decoder, which chooses by the sentence, is trained from nothing, with semantic flow and boundary refinement.
"""

import dataclasses

from flowseg_jax.configs.shapes_tiny import get_config as shapes_tiny
from ml_collections import ConfigDict

from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system.paths import ROOT

SOURCE = "checkpoints/shapes_tiny"
SHARED = ("sam", "siglip", "visual_projector", "seg_projector", "llm", "connector", "pixel_decoder")  # from SOURCE, frozen


def get_config() -> ConfigDict:
    config = shapes_tiny()
    model = FlowSegConfig.from_dict(read_model_config(ROOT / SOURCE)["model"])
    decoder = dataclasses.replace(model.mask_decoder, num_layers=3, num_queries=16)  # a step in half the time
    config.model = ConfigDict(dataclasses.replace(model, num_classes=0, mask_decoder=decoder).to_dict())
    config.num_steps = 1200
    config.checkpoint_every = 100
    config.log_every = 20
    config.init_from = tuple(f"{component}={SOURCE}" for component in SHARED)
    config.data.tokenizer = f"{SOURCE}/tokenizer"
    config.optimizer.param_groups = ((f"({'|'.join(SHARED)})/.*", None), (".*", 1.0))
    config.optimizer.losses.language_weight = 0.0
    return config

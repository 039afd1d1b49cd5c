"""FlowSeg around a real language model: SmolLM2-135M-Instruct (Q4_1 weights) with its own tokenizer, on the `shapes` benchmark.

    make smollm2                                                  # fetches the weights and converts them to data/smollm2
    python train.py --config=configs/shapes_smollm2.py            # the language model is frozen
    python train.py --config=configs/shapes_smollm2.py:lora       # it learns through adapters
    python train.py --config=configs/shapes_smollm2.py:full       # all of it learns

A language model of this size costs two cores seconds a step, too much to learn to see from nothing beside it: the vision
components and the mask decoder are those of the shipped tiny model and stay as they are. What joins them to the language model
is new: it learns to put images into the model's words, and the model's words into the conditions that the decoder knows.
"""

import dataclasses

from flowseg_jax.configs.shapes_tiny import get_config as shapes_tiny
from ml_collections import ConfigDict

from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.system.paths import ROOT

LANGUAGE_MODEL, VISION = "data/smollm2", "checkpoints/shapes_tiny"
COMPONENTS = ("siglip", "sam", "connector", "pixel_decoder", "mask_decoder", "boundary", "background_embed")  # of VISION


def get_config(learns: str = "frozen") -> ConfigDict:
    if learns not in ("frozen", "lora", "full"):
        raise UserError(f"the language model is 'frozen', 'lora' or 'full', got {learns!r}")
    llm = dataclasses.replace(LanguageConfig.smollm2_135m(), remat="none")
    config = shapes_tiny()
    config.num_steps = 250
    config.batch_size = 4
    config.checkpoint_every = 50
    config.init_from = (LANGUAGE_MODEL, *(f"{component}={VISION}" for component in COMPONENTS))
    model = FlowSegConfig.from_dict(read_model_config(ROOT / VISION)["model"])
    config.model = ConfigDict(dataclasses.replace(model, llm=llm, num_classes=0).to_dict())
    config.data.tokenizer = f"{LANGUAGE_MODEL}/tokenizer"
    config.data.max_phrases = 6
    config.data.text_length = 336
    rates = {"frozen": (("llm/.*", None),), "lora": (), "full": (("llm/.*", 0.04),)}
    config.optimizer.param_groups = ((f"({'|'.join(COMPONENTS)})(/.*)?", None), *rates[learns], (".*", 1.0))
    if learns != "full":
        config.optimizer.losses.language_weight = 0.0
    if learns == "lora":
        config.lora.targets = ("llm/layers/.*",)
    return config

"""Stage 3 of FlowSeg around Qwen3-4B: everything learns, all tasks in one batch. For 16 chips of 16 GB or more.

    python train.py --config=configs/stage3_mixed.py --plan --topology=v5e:4x4     # memory and collectives, no chip needed

Batch and learning rates are the scaffold's (4 images a device on 16 devices, encoders at a tenth of the rate); groups of
negatives are FlowSeg's 8. An image brings its 1,753 visual tokens and up to eight referring conversations behind them.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs.shapes_tiny import get_config as shapes_tiny
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language import LanguageConfig


def get_config() -> ConfigDict:
    config = shapes_tiny()
    config.steps = 20_000
    config.batch_size = 64
    config.log_every = 10
    config.checkpoint_every = 500
    model = dataclasses.replace(
        FlowSegConfig.full(LanguageConfig.qwen3_4b()), named_pass="flow", negatives_group=8, exclude_same_target=True
    )
    config.model = ConfigDict(model.to_dict())

    config.data.dir = "data/mixed"
    config.data.images = 0
    config.data.masks = 32
    config.data.text = 2304  # 18 * 128
    config.data.vary_prompts = True

    config.optimizer.learning_rate = 4e-5
    config.optimizer.b2 = 0.999
    config.optimizer.groups = ((r"(sam|siglip)/.*", 0.1), (".*", 1.0))
    config.optimizer.losses.update(language=1.0, class_gain=1.0, points=12544, vocabulary_chunk=512)

    config.mesh.update(data=1, fsdp=-1)
    return config

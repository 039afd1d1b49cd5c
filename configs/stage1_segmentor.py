"""Stage 1 of FlowSeg: SAM, connector and mask decoder learn to propose masks of COCO's panoptic categories, without language.

    python train.py --config=configs/stage1_segmentor.py         # starts from SAM ViT-L: convert_weights sam SRC weights/sam_l
    python train.py --config=configs/stage1_segmentor.py:tiny    # two cores, miniature data

36 epochs, batch, rates, clipping and large-scale jitter are X-SAM's (16 devices of 4 images).
"""

from __future__ import annotations

import dataclasses

from flowseg_jax.configs.stage3_mixed import SETS, stage
from ml_collections import ConfigDict

from flowseg_jax.models.semantic_flow import SemanticFlowConfig


def get_config(size: str = "qwen3_4b") -> ConfigDict:
    """`size` is "tiny" or the language model of the later stages, on which nothing here depends."""
    config, model = stage(size)
    model = dataclasses.replace(
        model,
        components="segmentor",
        num_classes=17 if size == "tiny" else 133,
        generic_pass="off",
        semantic_flow=SemanticFlowConfig(mode="off"),
        negatives_group_size=1,
    )
    config.data.tokenizer = ""
    config.data.update(text_length=8, max_phrases=1)  # nothing is said
    if size == "tiny":
        config.num_steps = 400
        config.data.dir = "data/stages/panoptic"
        config.data.max_masks = 12
    else:
        config.init_from = ("weights/sam_l",)
        config.num_steps = 36 * SETS["data/coco_panoptic"] // config.batch_size  # 36 epochs
        config.data.dir = "data/coco_panoptic"
        config.data.held_out = ("data/refcoco", "data/refcoco+", "data/refcocog")
        config.data.max_masks = 128
        config.data.lsj_scale_range = (0.1, 2.0)
        config.optimizer.learning_rate = 1e-4
        config.optimizer.max_grad_norm = 0.01
        config.optimizer.param_groups = (("sam/.*", 0.1), (".*", 1.0))
    config.model = ConfigDict(model.to_dict())
    return config

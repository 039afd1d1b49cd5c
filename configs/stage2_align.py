"""Stage 2 of FlowSeg: the two projectors learn to put images into the language model's words; everything else is frozen.

    python train.py --config=configs/stage2_align.py            # around Qwen3-4B; or :qwen3_1b7, :phi3_mini
    python train.py --config=configs/stage2_align.py:tiny       # two cores, miniature data

It starts from stage 1's SAM and from converted components (`flowseg convert siglip2 SRC weights/siglip2`, `flowseg convert
qwen3
SRC weights/qwen3_4b`). One epoch of LLaVA-558k, batch and rates are X-SAM's. A tiny language model has read nothing
before: at that size it learns here too.
"""

from __future__ import annotations

import dataclasses

from flowseg_jax.configs.stage3_mixed import stage
from ml_collections import ConfigDict

IMAGES = 558_128


def get_config(llm: str = "qwen3_4b") -> ConfigDict:
    config, model = stage(llm)
    model = dataclasses.replace(model, components="vlm", generic_pass="off", negatives_group_size=1)
    config.data.update(max_phrases=1, max_masks=1, pad_to_square=True)
    config.optimizer.losses.language_weight = 1.0
    if llm == "tiny":
        config.init_from = ("sam=runs/stage1_segmentor/model",)
        config.num_steps = 300
        config.data.dir = "data/stages/chat"
        config.data.text_length = 220
        config.optimizer.param_groups = (("sam/.*", None), (".*", 1.0))
    else:
        config.init_from = ("sam=runs/stage1_segmentor/model", "weights/siglip2", f"weights/{llm}")
        config.batch_size = 256
        config.num_steps = IMAGES // config.batch_size
        config.data.dir = "data/llava_558k"
        config.data.text_length = 2048  # 1,753 visual tokens and a caption
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 0.0
        config.optimizer.param_groups = (("(visual|seg)_projector/.*", 1.0), (".*", None))
        config.optimizer.frozen_dtype = "bfloat16"
    config.model = ConfigDict(model.to_dict())
    return config

"""Stage 3 of FlowSeg: everything learns, all tasks in one batch.

    python train.py --config=configs/stage3_mixed.py                    # around Qwen3-4B; for 16 chips of 16 GB or more
    python train.py --config=configs/stage3_mixed.py:qwen3_1b7          # or another preset, or tiny (two cores, miniature data)
    flowseg plan --config=configs/stage3_mixed.py --topology=v5e:4x4     # memory and collectives, no chip needed

The recipe is that of `base`; two epochs and groups of 8 negatives are FlowSeg's. An image brings its 1,753 visual tokens, and
after them up to eight referring conversations, a question that names as many of 128 categories as the text has room for, or a
chat.
"""

from __future__ import annotations

import dataclasses

from flowseg_jax.configs.base import get_config as base
from flowseg_jax.configs.shapes_tiny import get_config as shapes_tiny
from ml_collections import ConfigDict

from flowseg_jax.data.mixture import repeat_factor_counts
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import PRESETS

# Training images of each set as published; how many there really are, training says when it starts.
SETS = {
    "data/llava_mix665k": 624_610,
    "data/coco_panoptic": 118_287,
    "data/refcoco": 16_994,
    "data/refcoco+": 16_992,
    "data/refcocog": 21_899,
    "data/reasonseg": 239,
}
TINY_SETS = {  # of miniature data -> share
    "data/stages/shapes/prepared": 0.5,
    "data/stages/reasonseg": 0.05,
    "data/stages/panoptic": 0.3,
    "data/stages/chat": 0.15,
}
TINY_TOKENIZER, TINY_VOCAB = "data/stages/tokenizer", 640


def stage(llm: str) -> tuple[ConfigDict, FlowSegConfig]:
    """What the three stages have in common around a language model, or at tiny size: a config to complete, and its model."""
    if llm == "tiny":
        return tiny_stage()
    if llm not in PRESETS:
        raise UserError(f"no language model {llm!r} for a stage{did_you_mean(llm, [*PRESETS, 'tiny'])}")
    return base(llm), FlowSegConfig.full(PRESETS[llm]())


def tiny_stage() -> tuple[ConfigDict, FlowSegConfig]:
    """What the three stages have in common at tiny size."""
    config = shapes_tiny()
    config.log_every = 10
    config.checkpoint_every = 100
    config.data.shapes_images = 0
    config.data.tokenizer = TINY_TOKENIZER
    config.data.random_prompts = True
    return config, dataclasses.replace(FlowSegConfig.tiny(TINY_VOCAB), generic_pass="off")


def get_config(llm: str = "qwen3_4b") -> ConfigDict:
    config, model = stage(llm)
    model = dataclasses.replace(model, generic_pass="with_flow", exclude_same_target=True)
    # Stage 1's SAM last: stage 2's copy of it rests in bfloat16.
    config.init_from = ("runs/stage2_align/model", "runs/stage1_segmentor/model")
    config.data.objects = "referred"
    if llm == "tiny":
        config.num_steps = 400
        config.data.mixture = tuple(TINY_SETS.items())
        config.data.update(max_phrases=6, max_masks=12, max_names=10, text_length=420)
    else:
        model = dataclasses.replace(model, negatives_group_size=8)
        config.num_steps = 2 * sum(repeat_factor_counts(list(SETS.values()))) // config.batch_size  # two epochs
        config.data.mixture = tuple((directory, 0.0) for directory in SETS)
        config.data.update(max_phrases=8, max_masks=32, max_names=128, text_length=2304)  # 18 * 128 tokens
    config.model = ConfigDict(model.to_dict())
    return config

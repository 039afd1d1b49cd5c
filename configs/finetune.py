"""Your own expressions, from any trained model. See docs/data.md.

    flowseg data prepare --layout jsonl --source my.jsonl --out data/mine
    python train.py --config=configs/finetune.py --workdir=runs/mine                      # from the shipped tiny model
    python train.py --config=configs/finetune.py:MODEL --config.data.dir=DIR --workdir=runs/mine

Only what reads learns: a few images teach words, and would make the components that see forget more than they can learn. With
thousands of images unlike those that the model knows, let everything learn: --config.optimizer.param_groups='((".*", 1.0),)'.
"""

from __future__ import annotations

import dataclasses

from flowseg_jax.configs.base import get_config as base
from ml_collections import ConfigDict

from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system.paths import ROOT

PHRASES, TOKENS = 4, 56  # expressions of one image; tokens of each


def get_config(checkpoint: str = "") -> ConfigDict:
    """`checkpoint` is a model directory; empty: the shipped tiny model."""
    checkpoint = checkpoint or str(ROOT / "checkpoints" / "shapes_tiny")
    stored = read_model_config(checkpoint)
    # Categories and names are those of the checkpoint's own training data: here, expressions alone are learned.
    model = dataclasses.replace(
        FlowSegConfig.from_dict(stored["model"], f"{checkpoint}/config.json: model"), num_classes=0, generic_pass="off"
    )
    model.require_full_model(checkpoint)
    config = base()
    config.init_from = (checkpoint,)
    config.num_steps = 150
    config.batch_size = max(4, model.negatives_group_size)
    config.log_every = 10
    config.checkpoint_every = 50
    config.model = ConfigDict(model.to_dict())
    config.data.dir = "data/mine"
    config.data.tokenizer = f"{checkpoint}/tokenizer"
    config.data.chat_template = stored["extra"].get("prompts", {}).get("chat", config.data.chat_template)
    config.data.random_prompts = False
    config.data.objects = "referred"
    config.data.update(max_phrases=PHRASES, max_masks=PHRASES, text_length=model.num_visual_tokens + 8 + PHRASES * TOKENS)
    config.optimizer.param_groups = (("(llm|llm_projector)/.*", 1.0), (".*", None))
    config.optimizer.learning_rate = 2e-4 if model.mask_decoder.embed_dim < 256 else 2e-5
    config.optimizer.b2 = 0.98
    config.optimizer.losses.update(language_weight=0.0, class_loss_scale=4.0, logits_chunk_size=4096)
    config.optimizer.losses.num_points = 0 if model.sam.image_size < 256 else 12544
    config.mesh.update(data=-1, fsdp=1)
    return config

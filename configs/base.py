"""The published recipe of full-size FlowSeg: what its three stages have in common. What differs stands in a stage's file.

    python train.py --config=configs/stage3_mixed.py    # and stage1_segmentor, stage2_align

Batch, rates, warm-up, decay and clipping are X-SAM's (4 images a device on 16 devices, encoders at a tenth of the rate). Every
key has a line of help: `python train.py --list-keys`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import PRESETS

CHAT_TEMPLATES = {"phi3_mini": "phi3_chat", "llama3_8b": "llama3_chat"}
CHAT_TEMPLATES |= dict.fromkeys(("qwen3_8b", "qwen3_14b", "qwen3_32b"), "qwen3_wothinking")  # or else they think first


def get_config(llm: str = "qwen3_4b") -> ConfigDict:
    """`llm` names the language model."""
    if llm not in PRESETS:
        raise UserError(f"no language model {llm!r}{did_you_mean(llm, PRESETS)}")
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 10_000
    config.batch_size = 64
    config.log_every = 10
    config.trackers = ()
    config.eval_every = 0
    config.eval_split = "val"
    config.eval_images = 64
    config.eval_data = ""
    config.checkpoint_every = 500
    config.checkpoint = ConfigDict({"keep": 2, "keep_every": 0, "best": (), "local_dir": "", "local_every": 0})
    config.init_from = ()
    config.model = ConfigDict(FlowSegConfig.full(PRESETS[llm]()).to_dict())

    config.data = ConfigDict()
    config.data.dir = "data/shapes"
    config.data.shapes_images = 0
    config.data.shapes_mix = ()
    config.data.seed = 0
    config.data.mixture = ()
    config.data.held_out = ()
    config.data.objects = "all"
    config.data.text_length = 2304  # 1,753 visual tokens and up to eight expressions
    config.data.max_phrases = 8
    config.data.max_masks = 32
    config.data.max_names = 0
    config.data.explanation_prob = 0.5
    config.data.lsj_scale_range = ()
    config.data.pad_to_square = False
    config.data.tokenizer = f"weights/{llm}/tokenizer"
    config.data.chat_template = CHAT_TEMPLATES.get(llm, "qwen3_instruct")
    config.data.random_prompts = True
    config.data.curriculum = ()
    config.data.num_threads = 1
    config.data.num_workers = 0

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 4e-5
    config.optimizer.warmup_fraction = 0.03
    config.optimizer.weight_decay = 0.05
    config.optimizer.max_grad_norm = 1.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.param_groups = ((r"(sam|siglip)/.*", 0.1), (".*", 1.0))
    config.optimizer.grad_accum_steps = 1
    config.optimizer.max_skipped_updates = 10
    config.optimizer.frozen_dtype = "float32"
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "cosine"
    config.optimizer.decay_fraction = 0.2
    config.optimizer.layer_decay = 1.0
    config.optimizer.losses = ConfigDict(
        {
            "language_weight": 1.0,
            "class_weight": 2.0,
            "class_loss_scale": 1.0,
            "mask_weight": 5.0,
            "dice_weight": 5.0,
            "no_object_weight": 0.1,
            "num_points": 12544,
            "oversample_ratio": 3.0,
            "importance_sample_ratio": 0.75,
            "generic_weight": 1.0,
            "closed_vocab_weight": 1.0,
            "logits_chunk_size": 512,
        }
    )

    config.lora = ConfigDict({"targets": (), "rank": 16, "alpha": 32.0, "dropout": 0.0, "rslora": False, "dora": False})
    config.ema = ConfigDict({"decay": 0.0, "warmup": True, "export": True})
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1, "slices": 0})
    return config

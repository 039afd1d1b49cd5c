"""The default: a tiny FlowSeg trained from scratch on the embedded `shapes` benchmark, on two CPU cores."""

from flowseg_jax.configs.base import get_config as base
from ml_collections import ConfigDict

from flowseg_jax.models.config import FlowSegConfig


def get_config() -> ConfigDict:
    config = base()
    config.num_steps = 2000
    config.batch_size = 8
    config.log_every = 20
    config.checkpoint_every = 200
    config.model = ConfigDict(FlowSegConfig.tiny(vocab_size=512, num_classes=384).to_dict())
    config.data.shapes_images = 6000  # generated and prepared once
    config.data.text_length = 368  # the 72 visual tokens included
    config.data.max_masks = 12
    config.data.tokenizer = ""  # a small one, trained on the data set
    config.data.random_prompts = False
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.98
    config.optimizer.param_groups = ((".*", 1.0),)
    config.optimizer.losses.update(language_weight=0.1, class_loss_scale=4.0, num_points=0, logits_chunk_size=4096)
    config.mesh.update(data=-1, fsdp=1)
    return config

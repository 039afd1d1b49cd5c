"""What `make demo` trains: the last stage alone, as the paper's third stage begins where the first two ended.

The encoders, the pixel decoder and the language model come from the model in `checkpoints/` and stay as they are. The mask
decoder, which chooses by the sentence, is trained from nothing, with semantic flow and boundary refinement.
"""

from flowseg_jax.configs.shapes_ablation import get_config as shapes_ablation
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = shapes_ablation("sr_cr_bar")
    config.num_steps = 1200
    config.checkpoint_every = 100
    config.log_every = 20
    return config

"""What `checkpoints/shapes_tiny` was trained with: `shapes_tiny` for longer, on more scenes with more of the hard expressions.

The scenes are drawn from another seed than the benchmark's, which stays unseen: `eval.py` evaluates on `data/shapes`.
"""

from flowseg_jax.configs.shapes_tiny import get_config as shapes_tiny
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = shapes_tiny()
    config.num_steps = 9000
    config.checkpoint_every = 250
    config.data.dir = "data/shapes_shipped"
    config.data.shapes_images = 20_000
    config.data.seed = 1
    config.data.shapes_mix = (
        ("attribute", 0.25),
        ("superlative", 0.20),
        ("relation", 0.22),
        ("ordinal", 0.14),
        ("negation", 0.13),
        ("two-hop", 0.06),
    )
    return config

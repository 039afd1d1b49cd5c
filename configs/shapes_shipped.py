"""What `checkpoints/shapes_tiny` was trained with, in three runs: `coarse`, `fine` and `final`.

    python train.py --config=configs/shapes_shipped.py:coarse --workdir=runs/coarse
    python train.py --config=configs/shapes_shipped.py:fine   --workdir=runs/fine     # stopped after 2,641 steps
    python train.py --config=configs/shapes_shipped.py:final  --workdir=runs/final

`coarse` is `shapes_tiny` for longer, with masks of 24 x 24 cells. `fine` keeps its encoders and its language model and gets
masks of 48 x 48 cells and a larger mask decoder. `final` goes on from there with referring expressions alone, more of the hard
ones, and expressions that refer to nothing. The scenes are drawn from another seed than the benchmark's, which stays unseen:
`eval.py` evaluates on `data/shapes`.
"""

from flowseg_jax.configs.shapes_tiny import get_config as shapes_tiny
from ml_collections import ConfigDict

from flowseg_jax.errors import UserError, did_you_mean

ENCODERS = ("sam", "siglip", "llm")
SIZE = {"coarse": (20_000, 9000), "fine": (40_000, 10_000), "final": (40_000, 3300)}  # images, steps
MIX = {  # shares of the generated expressions
    "coarse": (
        ("attribute", 0.25),
        ("superlative", 0.20),
        ("relation", 0.22),
        ("ordinal", 0.14),
        ("negation", 0.13),
        ("two-hop", 0.06),
    ),
    "fine": (
        ("attribute", 0.20),
        ("superlative", 0.20),
        ("relation", 0.20),
        ("ordinal", 0.20),
        ("negation", 0.14),
        ("two-hop", 0.06),
    ),
    "final": (
        ("attribute", 0.19),
        ("superlative", 0.18),
        ("relation", 0.17),
        ("ordinal", 0.21),
        ("negation", 0.10),
        ("two-hop", 0.05),
        ("no-target", 0.10),
    ),
}


def get_config(part: str = "final") -> ConfigDict:
    if part not in MIX:
        raise UserError(f"no part {part!r} of the shipped model's training{did_you_mean(part, MIX)}")
    config = shapes_tiny()
    config.data.shapes_mix = MIX[part]
    config.data.dir = f"data/shapes_{part}"
    config.data.seed = 1
    config.checkpoint_every = 250
    config.data.shapes_images, config.num_steps = SIZE[part]
    if part == "coarse":
        return config

    config.model.connector.channels = (96, 96, 96, 96)
    config.model.connector.scales = (4, 2, 1, 0.5)
    config.model.connector_hidden_layers = (1, 2, 3, 4)
    config.model.pixel_decoder.update(
        channels=(192, 96, 48, 24), strides=(32, 16, 8, 4), num_levels=3, embed_dim=96, mask_dim=96, num_heads=4, mlp_dim=192
    )
    config.model.mask_decoder.update(embed_dim=96, num_heads=4, mlp_dim=384, num_layers=6, num_queries=20)
    if part == "fine":
        config.init_from = tuple(f"{component}=runs/coarse/model" for component in ENCODERS)
        config.optimizer.param_groups = ((f"({'|'.join(ENCODERS)})/.*", 0.5), (".*", 1.0))
        return config

    config.model.num_classes = 0
    config.model.generic_pass = "off"
    config.init_from = ("runs/fine/model",)
    config.data.tokenizer = "runs/fine/tokenizer"
    config.optimizer.learning_rate = 6e-4
    config.optimizer.losses.language_weight = 0.0
    return config

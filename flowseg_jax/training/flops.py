"""How much arithmetic a training step is, from the model's sizes alone: what its MFU is measured against.

Counted are matrix products, a multiplication and an addition as two FLOPs, as the mathematics asks for them: causal attention
at the pairs that may see each other, a window's padding because SAM attends to it, every decoder pass, and nothing that is
computed twice to save memory. Left out, together below one percent at full size: norms, softmax and other element-wise work,
resizing, sampling (of deformable attention, of points), boundary refinement, the Hungarian assignment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.losses import LossConfig
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.siglip import SiglipConfig
from flowseg_jax.types import BatchShape

# Where a part's input comes from. "embedding" is the table that words are looked up in: no arithmetic, but gradients end there.
INPUTS = {
    "sam": (),
    "siglip": (),
    "embedding": (),
    "connector": ("sam",),
    "visual_projector": ("siglip",),
    "seg_projector": ("sam",),
    "llm": ("visual_projector", "seg_projector", "embedding"),
    "head": ("llm",),
    "llm_projector": ("llm",),
    "pixel_decoder": ("connector",),
    "mask_decoder": ("pixel_decoder", "llm_projector"),
    "masks": ("mask_decoder", "pixel_decoder"),
}


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of a forward pass over one image, by what their backward pass takes.

    Attributes:
        weights: products with parameters. The gradient of the input costs as much again, that of the parameters too.
        pairs: products of activations, as in attention: both gradients or none.
        decisions: products that only decide something (where to attend, what to match) and have no gradient.
    """

    param_products: float = 0.0
    activation_products: float = 0.0
    no_grad_products: float = 0.0

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(
            self.param_products + other.param_products,
            self.activation_products + other.activation_products,
            self.no_grad_products + other.no_grad_products,
        )

    def __mul__(self, times: float) -> FlopCount:
        return FlopCount(self.param_products * times, self.activation_products * times, self.no_grad_products * times)

    @property
    def forward(self) -> float:
        return self.param_products + self.activation_products + self.no_grad_products

    def training(self, trained: float, reached: bool) -> float:
        """Forward and backward.

        Args:
            trained: share of the part's parameters that are trained. A part that is, even partly, hands gradients down within.
            reached: whether anything that the input depends on is trained.
        """
        back = float(reached or trained > 0)
        return self.param_products * (1 + back + trained) + self.activation_products * (1 + 2 * back) + self.no_grad_products


def _linear(rows: float, d_in: float, d_out: float) -> float:
    return 2.0 * rows * d_in * d_out


def _attention(queries: float, keys: float, width: float) -> float:
    """Scores and their product with the values, over all heads together."""
    return 4.0 * queries * keys * width


def sam(cfg: SamConfig, last: int) -> FlopCount:
    """Layers 1 to `last`. The relative positions are a product of every query with two tables."""
    grid, width = cfg.grid_size, cfg.hidden_size

    def layer(size: int) -> FlopCount:
        positions = (-(-grid // size) * size) ** 2  # the last windows are filled up
        projections = 4 * _linear(positions, width, width) + 2 * _linear(positions, width, size)
        return FlopCount(projections + 2 * _linear(grid**2, width, cfg.mlp_dim), _attention(positions, size**2, width))

    whole = sum(i < last for i in cfg.global_attn_indexes)
    patches = FlopCount(_linear(grid**2, 3 * cfg.patch_size**2, width))
    return patches + layer(cfg.window_size) * (last - whole) + layer(grid) * whole


def siglip(cfg: SiglipConfig, layers: int) -> FlopCount:
    tokens, width = cfg.num_patches, cfg.hidden_size
    weights = 4 * _linear(tokens, width, width) + 2 * _linear(tokens, width, cfg.intermediate_size)
    patches = FlopCount(_linear(tokens, 3 * cfg.patch_size**2, width))
    return patches + FlopCount(weights, _attention(tokens, tokens, width)) * layers


def language(cfg: LanguageConfig, tokens: int) -> FlopCount:
    """The layers without the head, over `tokens` in a row. Conversations packed into segments see less than is counted."""
    queries, keys = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    window = min(cfg.sliding_window or tokens, tokens)
    pairs = window * (window + 1) / 2 + (tokens - window) * window
    projections = 2 * _linear(tokens, cfg.hidden_size, queries) + 2 * _linear(tokens, cfg.hidden_size, keys)
    return (
        FlopCount(projections + 3 * _linear(tokens, cfg.hidden_size, cfg.intermediate_size), _attention(pairs, 1, queries))
        * cfg.num_hidden_layers
    )


def projector(tokens: float, d_in: int, d_out: int) -> FlopCount:
    """Two layers, as wide as what comes out."""
    return FlopCount(_linear(tokens, d_in, d_out) + _linear(tokens, d_out, d_out))


def connector(cfg: ConnectorConfig, grid: int) -> FlopCount:
    rows = (-(-grid // cfg.pad_multiple) * cfg.pad_multiple) ** 2
    total = 0.0
    for width, scale in zip(cfg.channels, cfg.scales, strict=True):
        total += _linear(rows, width, cfg.hidden_channels) + _linear(rows, 9 * cfg.hidden_channels, cfg.hidden_channels)
        total += _linear(rows, cfg.hidden_channels, width * scale)
    return FlopCount(total)


def levels(model: FlowSegConfig) -> tuple[int, ...]:
    """Pixels of the maps that enter the pixel decoder, low to high resolution."""
    cfg = model.connector
    side = -(-model.sam.grid_size // cfg.pad_multiple) * cfg.pad_multiple
    return tuple(round(side * cfg.scales[i]) ** 2 for i in cfg.low_to_high_order)


def mask_pixels(cfg: PixelDecoderConfig, levels: tuple[int, ...]) -> int:
    """Pixels of the mask features: the last map that a stage adds, or the finest one that is encoded."""
    return levels[-1] if cfg.fpn_stages else levels[cfg.encoder_levels - 1]


def pixel_decoder(cfg: PixelDecoderConfig, levels: tuple[int, ...]) -> FlopCount:
    encoded, width = cfg.encoder_levels, cfg.embed_dim
    tokens, samples = sum(levels[:encoded]), cfg.num_heads * encoded * cfg.num_points
    total = sum(_linear(pixels, c, width) for pixels, c in zip(levels[:encoded], cfg.channels, strict=False))
    layer = 2 * _linear(tokens, width, width) + _linear(tokens, width, 3 * samples) + 2 * _linear(tokens, width, cfg.mlp_dim)
    total += layer * cfg.num_layers
    first = len(levels) - cfg.fpn_stages
    for pixels, channels in zip(levels[first:], cfg.channels[first:], strict=True):
        total += _linear(pixels, channels, width) + _linear(pixels, 9 * width, width)
    return FlopCount(total + _linear(mask_pixels(cfg, levels), width, cfg.mask_dim))


def mask_decoder(
    cfg: MaskDecoderConfig, flow: str, levels: tuple[int, ...], passes: int, conditions: int, classes: int = 0
) -> FlopCount:
    """All layers and predictions of `passes` passes over an image with so many conditions each.

    Keys and values of the memory are projected once an image; attention masks are decisions.
    """
    d, queries, named = cfg.embed_dim, passes * cfg.num_queries, passes * conditions
    mask_width = cfg.mask_dim or d

    def attention(rows: float, keys_of: float, pairs: float) -> FlopCount:
        return FlopCount(2 * _linear(rows, d, d) + 2 * _linear(keys_of, d, d), _attention(pairs, 1, d))

    layer = attention(queries, queries, queries * cfg.num_queries)  # among the queries of a pass
    layer += FlopCount(2 * _linear(queries, d, cfg.mlp_dim))
    if flow in ("sr", "sr_cr"):
        layer += attention(queries, named, queries * conditions) + FlopCount(_linear(queries, 2 * d, d))
    if flow in ("cr", "sr_cr"):
        layer += attention(named, queries, queries * conditions)
    predictions = FlopCount(2 * _linear(queries, d, d) + _linear(queries, d, mask_width), 2.0 * queries * conditions * d)
    if classes:
        predictions += FlopCount(_linear(cfg.num_queries, d, classes + 1))
    total = layer * cfg.num_layers + predictions * (cfg.num_layers + 1)
    for i in range(cfg.num_layers):
        pixels = levels[i % cfg.num_levels]
        total += attention(queries, pixels, queries * pixels) + FlopCount(no_grad_products=2.0 * queries * pixels * mask_width)
    return total


def masks(cfg: MaskDecoderConfig, pixels: int, passes: int, targets: int, points: int) -> FlopCount:
    """The masks of the matched queries, and what all queries of all passes are at the matcher's points (0: every pixel)."""
    width = cfg.mask_dim or cfg.embed_dim
    matched = 2.0 * targets * pixels * width
    return FlopCount(0.0, matched, 2.0 * passes * cfg.num_queries * (points or pixels) * width) * (cfg.num_layers + 1)


def forward(model: FlowSegConfig, shape: BatchShape, losses: LossConfig) -> dict[str, FlopCount]:
    """The forward pass of training over one image, by part."""
    llm, width = model.llm.hidden_size, model.mask_decoder.embed_dim
    named, categories = model.generic_pass != "off", bool(model.num_classes)
    phrases = shape.max_phrases if model.has_language_model else 0
    passes = phrases + named + categories
    rows = 1 + max(model.negatives_group_size * phrases, shape.max_names if named else 0) if model.has_language_model else 0
    targets = phrases + (named + categories) * shape.max_masks
    side, maps = (model.sam.grid_size + 1) // 2, levels(model)
    head = _linear(shape.text_length - model.num_visual_tokens, llm, model.llm.vocab_size) if losses.language_weight else 0.0

    works = {
        "sam": sam(model.sam, max(*model.connector_hidden_layers, model.sam.num_hidden_layers - 1)),
        "siglip": siglip(model.siglip, model.siglip.num_hidden_layers - 1),
        "visual_projector": projector(model.siglip.num_patches, model.siglip.hidden_size, llm),
        "seg_projector": projector(side**2, 4 * model.sam.hidden_size, llm),
        "llm": language(model.llm, shape.text_length),
        "head": FlopCount(head),  # of the text after the visual tokens
        "llm_projector": projector(shape.text_length, llm, width),
        "connector": connector(model.connector, model.sam.grid_size),
        "pixel_decoder": pixel_decoder(model.pixel_decoder, maps),
        "mask_decoder": mask_decoder(model.mask_decoder, model.semantic_flow.mode, maps, passes, rows, model.num_classes),
        "masks": masks(model.mask_decoder, mask_pixels(model.pixel_decoder, maps), passes, targets, losses.num_points),
    }
    without = (
        () if model.has_language_model else ("siglip", "visual_projector", "seg_projector", "llm", "head", "llm_projector")
    )
    without += () if model.has_mask_decoder else ("llm_projector", "connector", "pixel_decoder", "mask_decoder", "masks")
    return {part: work for part, work in works.items() if part not in without}


def part_of(path: str, tied: bool) -> tuple[str, ...]:
    """The parts that a parameter belongs to; the table of a language model with tied embeddings is also its head."""
    top = path.split("/")[0]
    if path.startswith("llm/embed_tokens"):
        return ("embedding", "head") if tied else ("embedding",)
    if path.startswith("llm/lm_head"):
        return ("head",)
    return ({"boundary": "masks", "background_embed": "mask_decoder", "category_head": "mask_decoder"}.get(top, top),)


def step_flops(model: FlowSegConfig, shape: BatchShape, losses: LossConfig, trainable: Any, frozen: Any) -> dict[str, float]:
    """FLOPs of one training step over a whole batch, by part.

    A trained part costs three times its forward pass. A frozen one costs its forward pass alone where nothing before it is
    trained; otherwise the gradient has to pass through it, which costs one more, and two more for its attention.

    Args:
        model, shape, losses: of the run.
        trainable, frozen: the parameters, arrays or abstract ones, as in `TrainState`.
    """
    sizes: dict[str, list[int]] = {part: [0, 0] for part in INPUTS}
    for learns, tree in ((1, trainable), (0, frozen)):
        for path, x in flatten_params(tree).items():
            for part in part_of(path, model.llm.tie_word_embeddings):
                sizes[part][learns] += x.size
    trained = {part: learns / max(learns + rests, 1) for part, (rests, learns) in sizes.items()}

    def reached(part: str) -> bool:
        return any(trained[before] > 0 or reached(before) for before in INPUTS[part])

    works = forward(model, shape, losses)
    return {part: shape.batch * work.training(trained[part], reached(part)) for part, work in works.items()}


def total(by_part: Mapping[str, float]) -> float:
    return sum(by_part.values())

"""The config of a checkpoint, read off the shapes of its tensors.

X-SAM and segment-anything write no `config.json`. What shapes cannot tell (numbers of heads, RoPE, the side of SigLIP's image)
comes from presets that must agree with the shapes, and any value can be set by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from convert_weights.families import XSamStage1Config
from convert_weights.ops import Shape
from convert_weights.sources import TensorInfo
from flowseg_jax.errors import UserError
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language_config import PRESETS, LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig

STRIDES = (32, 16, 8, 4)

XSAM_LLMS = ("qwen3_4b", "qwen3_1b7", "phi3_mini")  # those that X-SAM was published with: width and depth say which


class Shapes:
    """The shapes of a checkpoint's tensors, with errors that name what is not there."""

    def __init__(self, entries: Mapping[str, TensorInfo], name: str):
        self._entries, self._name = entries, name

    def __getitem__(self, tensor: str) -> Shape:
        if tensor not in self._entries:
            raise UserError(f"{self._name} holds no {tensor}: its sizes cannot be read off; is it a checkpoint of this family?")
        return self._entries[tensor].shape

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._entries

    def count(self, before: str) -> int:
        """How many numbers 0, 1, ... follow `before` in the names."""
        pattern = re.compile(re.escape(before) + r"(\d+)\.")
        found = [int(match.group(1)) for match in map(pattern.match, self._entries) if match]
        return max(found, default=-1) + 1


def sam_from_shapes(shapes: Shapes, prefix: str = "segmentor.encoder.") -> SamConfig:
    """All sizes of SAM's encoder, in transformers' or segment-anything's naming.

    A layer whose position table fits the whole grid is a global one.
    """
    meta = f"{prefix}patch_embed.proj.weight" in shapes
    patches, blocks = ("patch_embed.proj", "blocks") if meta else ("patch_embed.projection", "layers")
    _, grid, _, width = shapes[f"{prefix}pos_embed"]
    patch = shapes[f"{prefix}{patches}.weight"][-1]
    layers = shapes.count(f"{prefix}{blocks}.")
    tables = [shapes[f"{prefix}{blocks}.{i}.attn.rel_pos_h"] for i in range(layers)]
    is_global = [rows == 2 * grid - 1 for rows, _ in tables]
    windows = {(rows + 1) // 2 for (rows, _), whole in zip(tables, is_global, strict=True) if not whole}
    if len(windows) > 1:
        raise UserError(f"{prefix}: layers with windows of {len(windows)} sizes, {sorted(windows)}; one size is supported")
    return SamConfig(
        image_size=grid * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // tables[0][1],
        mlp_dim=shapes[f"{prefix}{blocks}.0.mlp.lin1.weight"][0],
        window_size=windows.pop() if windows else 1,
        global_attn_indexes=tuple(i for i, whole in enumerate(is_global) if whole),
    )


def connector_from_shapes(shapes: Shapes, sam: SamConfig) -> tuple[ConnectorConfig, tuple[int, ...]]:
    """The connector, and the layers that it reads: the last quarters of the encoder, as X-SAM has them."""
    levels = shapes.count("seg_connector.model.")
    hidden, width = shapes["seg_connector.model.0.model.0.weight"][:2]
    scales = tuple(shapes[f"seg_connector.model.{i}.model.4.weight"][0] / width for i in range(levels))
    scales = tuple(int(scale) if scale == int(scale) else scale for scale in scales)
    return ConnectorConfig((width,) * levels, hidden, scales), quarters(sam.num_hidden_layers, levels)


def quarters(layers: int, levels: int) -> tuple[int, ...]:
    """The last `levels` of the four quarter points of an encoder: 12, 18, 24 of 24."""
    return tuple(round(layers * i / 4) for i in range(1, 5))[-levels:]


def decoders_from_shapes(shapes: Shapes, channels: Sequence[int]) -> tuple[PixelDecoderConfig, MaskDecoderConfig]:
    """Both decoders with 8 heads (X-SAM's number); the points a head samples follow from it."""
    pixel, decoder, heads = "segmentor.pixel_decoder.", "segmentor.decoder.", PixelDecoderConfig.num_heads
    levels, width = shapes[f"{pixel}level_embed"]
    samples = shapes[f"{pixel}encoder.layers.0.self_attn.attention_weights.weight"][0]
    mask_width = shapes[f"{pixel}mask_projection.weight"][0]
    queries, query_width = shapes[f"{decoder}queries_features.weight"]
    return (
        PixelDecoderConfig(
            tuple(channels),
            STRIDES[: len(channels)],
            embed_dim=width,
            mask_dim=mask_width,
            num_layers=shapes.count(f"{pixel}encoder.layers."),
            num_heads=heads,
            num_points=max(samples // (heads * levels), 1),
            mlp_dim=shapes[f"{pixel}encoder.layers.0.fc1.weight"][0],
        ),
        MaskDecoderConfig(
            embed_dim=query_width,
            num_queries=queries,
            num_layers=shapes.count(f"{decoder}decoder.layers."),
            num_heads=heads,
            mlp_dim=shapes[f"{decoder}decoder.layers.0.fc1.weight"][0],
            num_levels=levels,
            mask_dim=None if mask_width == query_width else mask_width,
        ),
    )


def llm_from_shapes(shapes: Shapes, chosen: LanguageConfig | None) -> LanguageConfig:
    """X-SAM's preset that has the checkpoint's width and depth, or `chosen`; the vocabulary is the table's."""
    vocab, width = shapes["llm.model.embed_tokens.weight"]
    layers = shapes.count("llm.model.layers.")
    known = [chosen] if chosen is not None else [PRESETS[name]() for name in XSAM_LLMS]
    fitting = [cfg for cfg in known if (cfg.hidden_size, cfg.num_hidden_layers) == (width, layers)]
    if not fitting:
        expected = (
            f"--llm has width {known[0].hidden_size} and {known[0].num_hidden_layers}"
            if chosen is not None
            else "no preset has these"
        )
        raise UserError(
            f"the checkpoint's language model has width {width} and {layers} layers, {expected}; "
            "give --llm DIR with its config.json"
        )
    return dataclasses.replace(fitting[0], vocab_size=vocab)


def siglip_from_shapes(shapes: Shapes, chosen: SiglipConfig | None, vision: str) -> SiglipConfig:
    """The vision encoder: heads and image size of `chosen` (SigLIP2-so400m/14-384 by default), the rest from the shapes."""
    prefix = f"{vision}.vision_model."
    base = chosen or SiglipConfig.so400m_14_384()
    width, _, _, patch = shapes[f"{prefix}embeddings.patch_embedding.weight"]
    tokens = shapes[f"{prefix}embeddings.position_embedding.weight"][0]
    if (base.hidden_size, base.patch_size, base.num_patches) != (width, patch, tokens):
        raise UserError(
            f"the checkpoint's vision encoder has width {width}, patches of {patch} and {tokens} tokens, the config has "
            f"{base.hidden_size}, {base.patch_size} and {base.num_patches}; give --siglip DIR with its config.json"
        )
    mlp = shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0]
    return dataclasses.replace(base, num_hidden_layers=shapes.count(f"{prefix}encoder.layers."), intermediate_size=mlp)


def stage1_from_shapes(shapes: Shapes) -> XSamStage1Config:
    """X-SAM's stage-1 segmentor."""
    sam = sam_from_shapes(shapes)
    connector, layers = connector_from_shapes(shapes, sam)
    heads = [f"segmentor.class_predictor.{name}weight" for name in ("predictor.", "")]
    head = next((name for name in heads if name in shapes), heads[0])
    return XSamStage1Config(
        sam, connector, layers, *decoders_from_shapes(shapes, connector.out_channels), num_classes=shapes[head][0] - 1
    )


def xsam_from_shapes(
    shapes: Shapes, llm: LanguageConfig | None, siglip: SiglipConfig | None, mode: str, dtype: str
) -> FlowSegConfig:
    """The model that an X-SAM checkpoint is, or becomes.

    Args:
        mode: "off" leaves X-SAM as it is; "sr" and "sr_cr" add the semantic flow and BAR so that the model still starts as
            what it was (residual norm, zero-initialised outputs).
        dtype: what the network computes in.
    """
    if "llm.model.embed_tokens.weight" not in shapes and "segmentor.encoder.pos_embed" in shapes:
        raise UserError("a checkpoint of X-SAM's first stage (no language model): use flowseg convert xsam_stage1 ...")
    aaai = "visual_encoder.vision_model.embeddings.patch_embedding.weight" in shapes
    sam = sam_from_shapes(shapes)
    connector, layers = connector_from_shapes(shapes, sam)
    pixel, decoder = decoders_from_shapes(shapes, connector.out_channels)
    return FlowSegConfig(
        sam=sam,
        siglip=siglip_from_shapes(shapes, siglip, "visual_encoder" if aaai else "vision_encoder"),
        llm=llm_from_shapes(shapes, llm),
        connector=connector,
        pixel_decoder=pixel,
        mask_decoder=dataclasses.replace(decoder, logit_clamp=500.0 if aaai else 50.0),
        connector_hidden_layers=layers,
        semantic_flow=SemanticFlowConfig(mode=mode, norm="post" if mode == "off" else "residual"),
        boundary=BoundaryConfig(enabled=mode != "off"),
        dtype=dtype,
    )

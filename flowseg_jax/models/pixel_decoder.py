"""The pixel decoder: from a feature pyramid to the levels that the mask decoder attends to, and to the mask features.

Mask2Former's multi-scale deformable encoder with an FPN on top, as Hugging Face's `Mask2FormerPixelDecoder` and X-SAM have it.
Levels are ordered LOW to HIGH resolution throughout, maps are NHWC. Positions, sampling coordinates and the
softmax over the sampled points are float32; the rest computes in the dtype of the features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear, make_param, zeros
from flowseg_jax.models.stack import scan_layers, stack_layers
from flowseg_jax.ops.msda import IMPLEMENTATIONS, msda
from flowseg_jax.ops.resize import resize

Shapes = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """The pixel decoder.

    Attributes:
        channels: width of each incoming map, low to high resolution.
        strides: nominal stride of each incoming map, low to high resolution. They decide only how many FPN stages follow the
            encoder, log2(finest encoder stride / common_stride).
        embed_dim: model width D, a multiple of 4.
        mask_dim: width of the mask features.
        num_layers: encoder layers.
        num_heads: attention heads.
        num_points: sampled points per head and level.
        mlp_dim: hidden width of the feed-forward layers.
        num_levels: how many maps, counted from the lowest resolution, enter the encoder; None: all.
        common_stride: nominal stride at which the FPN ends.
        norm_groups: groups of the GroupNorms.
        remat: rematerialisation policy of the encoder layers ("none", "full", "attention", "dots").
        deformable_attention_impl: implementation of deformable attention (`ops.msda`): "auto", "gather", "packed_gather",
            "dense" or "pallas".
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    embed_dim: int = 256
    mask_dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    mlp_dim: int = 1024
    num_levels: int | None = None
    common_stride: int = 4
    norm_groups: int = 32
    remat: str = "attention"
    deformable_attention_impl: str = "auto"

    def __post_init__(self):
        known = ("auto", *IMPLEMENTATIONS)
        if self.deformable_attention_impl not in known:
            raise UserError(
                f"pixel_decoder.deformable_attention_impl is {self.deformable_attention_impl!r}"
                f"{did_you_mean(self.deformable_attention_impl, known)}; known are {', '.join(known)}"
            )
        if not self.channels or len(self.channels) != len(self.strides):
            raise UserError(
                f"pixel_decoder: {len(self.channels)} channels {self.channels} and {len(self.strides)} strides {self.strides}; "
                "give one of each for every feature map, low to high resolution"
            )
        if any(low < high for low, high in zip(self.strides, self.strides[1:], strict=False)):
            raise UserError(f"pixel_decoder.strides {self.strides} must go from low to high resolution (largest first)")
        if not 1 <= self.encoder_levels <= len(self.channels):
            raise UserError(f"pixel_decoder.num_levels is {self.num_levels} with {len(self.channels)} feature maps")
        if self.embed_dim % 4 or self.embed_dim % self.num_heads or self.embed_dim % self.norm_groups:
            raise UserError(
                f"pixel_decoder.embed_dim {self.embed_dim} must be a multiple of 4, of num_heads ({self.num_heads}) "
                f"and of norm_groups ({self.norm_groups})"
            )
        if self.fpn_stages > len(self.channels):
            raise UserError(
                f"pixel_decoder: strides {self.strides} ask for {self.fpn_stages} FPN stages with {len(self.channels)} feature "
                "maps; add a finer map or raise common_stride"
            )

    @classmethod
    def mask2former(cls, channels: tuple[int, ...] = (2048, 1024, 512), **changes) -> PixelDecoderConfig:
        """The sizes of mask2former-swin-large that X-SAM uses; 1 to 4 maps of stride 32, 16, 8, 4, all of which are encoded."""
        strides = (32, 16, 8, 4)[: len(channels)]
        return cls(**{"channels": tuple(channels), "strides": strides, **changes})

    @classmethod
    def tiny(cls) -> PixelDecoderConfig:
        return cls(
            channels=(192, 96, 48),
            strides=(32, 16, 8),
            embed_dim=64,
            mask_dim=64,
            num_layers=1,
            num_heads=2,
            num_points=2,
            mlp_dim=128,
            remat="none",
        )

    @property
    def encoder_levels(self) -> int:
        """L, the number of levels in the encoder and in the output."""
        return len(self.channels) if self.num_levels is None else self.num_levels

    @property
    def fpn_stages(self) -> int:
        finest = min(self.strides[: self.encoder_levels])
        return max(0, int(math.log2(finest) - math.log2(self.common_stride)))


def sine_position_embedding(height: int, width: int, dim: int) -> Float[Array, "h w d"]:
    """Sine position embedding of a height x width map, float32 [height, width, dim].

    The first dim/2 channels encode the row, the others the column; sines on even and cosines on odd channels, frequencies
    10000^(-2i/(dim/2)), positions 1..n scaled to (0, 2 pi] (HF `Mask2FormerSinePositionEmbedding`, normalize=True).
    """
    if dim % 4:
        raise ValueError(f"sine_position_embedding: dim {dim} is not a multiple of 4")
    half = dim // 2
    frequency = 10000.0 ** (-2 * (np.arange(half) // 2) / half)

    def table(size: int) -> Array:
        # Only the two [size, half] tables become constants of the program; the map is broadcast on the device.
        angle = np.arange(1, size + 1)[:, None] / (size + 1e-6) * 2 * np.pi * frequency
        even = np.arange(half) % 2 == 0
        return jnp.asarray(np.where(even, np.sin(angle), np.cos(angle)), jnp.float32)

    rows = jnp.broadcast_to(table(height)[:, None], (height, width, half))
    columns = jnp.broadcast_to(table(width)[None], (height, width, half))
    return jnp.concatenate([rows, columns], axis=-1)


def reference_points(shapes: Shapes) -> Float[Array, "n 2"]:
    """Pixel centres (x, y) in [0, 1] of all levels, flattened row by row, level after level: float32 [sum h*w, 2]."""
    points = []
    for height, width in shapes:
        x = (jnp.arange(width, dtype=jnp.float32) + 0.5) / width
        y = (jnp.arange(height, dtype=jnp.float32) + 0.5) / height
        points.append(jnp.stack(jnp.meshgrid(x, y), axis=-1).reshape(-1, 2))
    return jnp.concatenate(points)


def init_sampling_offsets(heads: int, levels: int, points: int) -> np.ndarray:
    """Initial sampling offsets (x, y) in pixels, float32, flattened from [heads, levels, points, 2].

    Head h points along the angle 2 pi h / heads; its point k lies k + 1 pixels away, measured in the larger coordinate.
    """
    angle = 2 * np.pi * np.arange(heads) / heads
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    steps = np.arange(1, points + 1)
    grid = direction[:, None, None] * steps[None, None, :, None]
    return np.broadcast_to(grid, (heads, levels, points, 2)).reshape(-1).astype(np.float32)


class DeformableAttention(nnx.Module):
    """Multi-scale deformable self-attention (HF `Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention`)."""

    def __init__(self, cfg: PixelDecoderConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.num_levels, self.num_points = cfg.num_heads, cfg.encoder_levels, cfg.num_points
        self.impl = cfg.deformable_attention_impl
        samples = self.num_heads * self.num_levels * self.num_points
        grid = init_sampling_offsets(self.num_heads, self.num_levels, self.num_points)
        # Both matrices start Xavier-uniform, not at zero as in Deformable DETR: that is what X-SAM trains from.
        self.sampling_offsets = Linear(
            cfg.embed_dim,
            2 * samples,
            rngs=rngs,
            axes=("embed", "heads"),
            bias_init=lambda key, shape, dtype=jnp.float32: jnp.asarray(grid, dtype),
        )
        self.attention_weights = Linear(cfg.embed_dim, samples, rngs=rngs, axes=("embed", "heads"))
        self.value_proj = Linear(cfg.embed_dim, cfg.embed_dim, rngs=rngs, axes=("embed", "heads"))
        self.output_proj = Linear(cfg.embed_dim, cfg.embed_dim, rngs=rngs, axes=("heads", "embed"))

    def __call__(
        self, x: Float[Array, "b n d"], positions: Float[Array, "n d"], reference: Float[Array, "n 2"], shapes: Shapes
    ) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        value = self.value_proj(x).reshape(b, n, self.num_heads, d // self.num_heads)
        # float32 from here on: half precision would move the sampling points by visible fractions of a pixel.
        query = x.astype(jnp.float32) + positions
        offsets = self.sampling_offsets(query).reshape(b, n, self.num_heads, self.num_levels, self.num_points, 2)
        sizes = jnp.asarray([(width, height) for height, width in shapes], jnp.float32)
        locations = reference[:, None, None, None] + offsets / sizes[:, None]
        weights = self.attention_weights(query).reshape(b, n, self.num_heads, self.num_levels * self.num_points)
        weights = jax.nn.softmax(weights).reshape(b, n, self.num_heads, self.num_levels, self.num_points)
        return self.output_proj(msda(value, shapes, locations, weights, impl=self.impl).astype(x.dtype))


class EncoderLayer(nnx.Module):
    """Post-norm: deformable attention, residual, LayerNorm; ReLU feed-forward, residual, LayerNorm."""

    def __init__(self, cfg: PixelDecoderConfig, *, rngs: nnx.Rngs):
        self.self_attn = DeformableAttention(cfg, rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(cfg.embed_dim, rngs=rngs)
        self.fc1 = Linear(cfg.embed_dim, cfg.mlp_dim, rngs=rngs, axes=("embed", "mlp"))
        self.fc2 = Linear(cfg.mlp_dim, cfg.embed_dim, rngs=rngs, axes=("mlp", "embed"))
        self.final_layer_norm = LayerNorm(cfg.embed_dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], positions: Float[Array, "n d"], reference: Float[Array, "n 2"], shapes: Shapes
    ) -> Float[Array, "b n d"]:
        x = self.self_attn_layer_norm(x + self.self_attn(x, positions, reference, shapes))
        return self.final_layer_norm(x + self.fc2(jax.nn.relu(self.fc1(x))))


class ConvGroupNorm(nnx.Module):
    """Convolution followed by GroupNorm."""

    def __init__(self, cfg: PixelDecoderConfig, d_in: int, kernel: int, *, bias: bool, rngs: nnx.Rngs):
        self.conv = Conv(d_in, cfg.embed_dim, kernel, padding=kernel // 2, rngs=rngs, axes=("embed", None), bias=bias)
        self.norm = GroupNorm(cfg.embed_dim, cfg.norm_groups, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w d"]:
        return self.norm(self.conv(x))


class PixelDecoder(nnx.Module):
    """Feature pyramid -> (mask features, encoded levels).

    An FPN stage takes one of the finest incoming maps, low to high resolution, adds the upsampled result so far and applies a
    3x3 convolution. With three maps of stride 32, 16, 8 the one stage therefore reads the stride-8 map again, and masks have
    stride 8; with a fourth, encoded map of stride 4 there is no stage, and masks have stride 4; with a fourth map that is not
    encoded (`num_levels=3`, the original Mask2Former) the stage brings masks to stride 4.
    """

    def __init__(self, cfg: PixelDecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        levels, stages = cfg.encoder_levels, cfg.fpn_stages
        self.input_projections = nnx.List([ConvGroupNorm(cfg, c, 1, bias=True, rngs=rngs) for c in cfg.channels[:levels]])
        self.level_embed = make_param(rngs, zeros, (levels, cfg.embed_dim), (None, None))
        self.layers = stack_layers(lambda r: EncoderLayer(cfg, rngs=r), cfg.num_layers, rngs)
        finest = cfg.channels[len(cfg.channels) - stages :]
        self.lateral_convs = nnx.List([ConvGroupNorm(cfg, c, 1, bias=False, rngs=rngs) for c in finest])
        self.output_convs = nnx.List([ConvGroupNorm(cfg, cfg.embed_dim, 3, bias=False, rngs=rngs) for _ in finest])
        self.mask_projection = Conv(cfg.embed_dim, cfg.mask_dim, 1, rngs=rngs, axes=("embed", None))

    def positions(self, shapes: Shapes) -> Float[Array, "n d"]:
        """Sine positions plus the level's learned embedding, flattened over all levels, float32."""
        maps = [sine_position_embedding(h, w, self.cfg.embed_dim).reshape(h * w, -1) for h, w in shapes]
        return jnp.concatenate([table + self.level_embed[i] for i, table in enumerate(maps)])

    def encode(
        self, maps: tuple[Float[Array, "b _ _ d"], ...], out: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "b _ _ d"], ...]:
        """Runs the deformable encoder over projected maps of one width; returns maps of the same sizes.

        `out`, if given, gets the positions and the output of every layer (see `__call__`).
        """
        shapes = tuple(x.shape[1:3] for x in maps)
        x = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)
        positions, reference = self.positions(shapes), reference_points(shapes)

        def body(layer: EncoderLayer, x: Array, _) -> tuple[Array, Array | None]:
            x = layer(x, positions, reference, shapes)
            return x, None if out is None else x

        x, layers = scan_layers(self.layers, body, x, policy=self.cfg.remat)
        if out is not None:
            out |= {"pixel_decoder/positions": positions, "pixel_decoder/encoder_layers": list(layers)}
        ends = np.cumsum([h * w for h, w in shapes])[:-1].tolist()
        parts = jnp.split(x, ends, axis=1)
        return tuple(part.reshape(part.shape[0], h, w, -1) for part, (h, w) in zip(parts, shapes, strict=True))

    def __call__(
        self, features: tuple[Float[Array, "b _ _ _"], ...], out: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "b h w m"], tuple[Float[Array, "b _ _ d"], ...]]:
        """Decodes a pyramid.

        Args:
            features: one map [B, h, w, channels[i]] per level, low to high resolution; sizes need no fixed ratio.
            out: if given, it gets "pixel_decoder/input_projections" (the maps that enter the encoder),
                "pixel_decoder/positions" [N, D], "pixel_decoder/encoder_layers" (a list of [B, N, D]) and
                "pixel_decoder/multi_scale_features".

        Returns:
            mask features [B, h, w, mask_dim], and the encoded levels, low to high resolution, each [B, h, w, embed_dim].

        Raises:
            ValueError: the number of maps or a map's channels differ from the config.
        """
        found = tuple(x.shape[-1] for x in features)
        if found != tuple(self.cfg.channels):
            raise ValueError(f"PixelDecoder: maps of {found} channels, configured for {tuple(self.cfg.channels)}")
        projected = tuple(project(x) for project, x in zip(self.input_projections, features, strict=False))
        levels = self.encode(projected, out)
        if out is not None:
            out |= {"pixel_decoder/input_projections": projected, "pixel_decoder/multi_scale_features": levels}
        top = levels[-1]
        for lateral_conv, output_conv, x in zip(
            self.lateral_convs, self.output_convs, features[len(features) - len(self.lateral_convs) :], strict=True
        ):
            side = lateral_conv(x)
            if top.shape[1:3] != side.shape[1:3]:
                top = jnp.moveaxis(resize(jnp.moveaxis(top, -1, 1), side.shape[1:3]), 1, -1).astype(side.dtype)
            top = jax.nn.relu(output_conv(side + top))
        return self.mask_projection(top), levels

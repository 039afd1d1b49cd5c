"""What joins the components: token projectors, pixel shuffle and the segmentation connector.

The segmentation connector turns SAM's hidden states, which are all on one grid, into the feature pyramid that the pixel
decoder reads, as X-SAM does. All maps are NHWC.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flowseg_jax.errors import UserError
from flowseg_jax.models.layers import Conv, LayerNorm, Linear, gelu, normal_init, torch_default_init


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """The segmentation connector.

    Attributes:
        channels: width of each incoming map, one per selected encoder layer (shallow to deep).
        hidden_channels: width between the convolutions.
        scales: by how much the connector scales the sides of each map: a whole number, or one over a whole number.
    """

    channels: tuple[int, ...]
    hidden_channels: int
    scales: tuple[float, ...] = (2, 1, 0.5)

    def __post_init__(self):
        if not self.scales or len(self.channels) != len(self.scales):
            raise UserError(
                f"connector: {len(self.channels)} channels {self.channels} and {len(self.scales)} scales {self.scales}; "
                "give one of each for every selected encoder layer"
            )
        for width, scale in zip(self.channels, self.scales, strict=True):
            up, down = _factors(scale)
            if width % max(up, down):
                raise UserError(f"connector: width {width} with scale {scale} needs a width divisible by {max(up, down)}")

    @classmethod
    def sam_large(cls) -> ConnectorConfig:
        """Layers 12, 18, 24 of SAM ViT-L become maps of stride 8, 16, 32."""
        return cls(channels=(1024, 1024, 1024), hidden_channels=512)

    @classmethod
    def tiny(cls) -> ConnectorConfig:
        return cls(channels=(96, 96, 96), hidden_channels=48)

    @property
    def low_to_high_order(self) -> tuple[int, ...]:
        """Indices of the incoming maps, sorted so that the outgoing maps go from low to high resolution."""
        return tuple(sorted(range(len(self.scales)), key=lambda i: self.scales[i]))

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Width of each outgoing map, low to high resolution: the pixel decoder's `channels`."""
        return tuple(_widths(self.channels[i], self.scales[i])[1] for i in self.low_to_high_order)

    @property
    def pad_multiple(self) -> int:
        """Height and width are padded to a multiple of this, the same for all maps so that the levels stay aligned."""
        return max(2, *(_factors(scale)[1] for scale in self.scales))


def _factors(scale: float) -> tuple[int, int]:
    """(up, down) of a scale: 2 -> (2, 1), 0.5 -> (1, 2)."""
    if scale > 0:
        up, down = round(scale), round(1 / scale)
        if scale >= 1 and up == scale:
            return up, 1
        if scale < 1 and abs(scale * down - 1) < 1e-6:
            return 1, down
    raise UserError(f"pixel shuffle: scale {scale} is neither a whole number nor one over a whole number")


def _widths(width: int, scale: float) -> tuple[int, int]:
    """Channels (before, after) the pixel shuffle of a map of `width`: width * scale and width / scale."""
    up, down = _factors(scale)
    return width * up // down, width * down // up


def pixel_shuffle(x: Float[Array, "b h w c"], scale: float) -> Float[Array, "b y x d"]:
    """Trades channels for resolution: [B, h, w, C] -> [B, h*scale, w*scale, C/scale^2].

    The order of channels is that of InternVL and X-SAM, not that of `torch.nn.PixelShuffle`, and its two directions are not
    inverses of each other: shrinking numbers a block's pixels row by row, enlarging column by column.

    Args:
        x: NHWC map.
        scale: a whole number (enlarges) or one over a whole number (shrinks).

    Raises:
        ValueError: the block does not divide the map's sides (shrinking) or the channels (enlarging).
    """
    b, h, w, c = x.shape
    up, down = _factors(scale)
    if h % down or w % down:
        raise ValueError(f"pixel_shuffle: {h}x{w} map is not divisible by {down}; pad it first (pad_to_multiple)")
    if c % (up * up):
        raise ValueError(f"pixel_shuffle: {c} channels are not divisible by {up * up} (scale {scale})")
    if down > 1:
        x = x.reshape(b, h // down, down, w // down, down, c).swapaxes(2, 3)
        return x.reshape(b, h // down, w // down, down * down * c)
    c = c // (up * up)
    x = x.reshape(b, h, w, up, up, c).transpose(0, 1, 4, 2, 3, 5)  # [b, h, dh, w, dw, c]; the column offset dw came first
    return x.reshape(b, h * up, w * up, c)


def pad_to_multiple(x: Float[Array, "b h w c"], multiple: int = 2) -> Float[Array, "b y x c"]:
    """Zeros at the bottom and right until both sides are multiples of `multiple`."""
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


class MlpProjector(nnx.Module):
    """Linear - GELU(erf) - Linear with biases, PyTorch's default initial values (X-SAM's `DynamicProjector`)."""

    def __init__(self, d_in: int, hidden: int, d_out: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(
            d_in, hidden, rngs=rngs, axes=("embed", "mlp"), init=torch_default_init(d_in), bias_init=torch_default_init(d_in)
        )
        self.linear_2 = Linear(
            hidden,
            d_out,
            rngs=rngs,
            axes=("mlp", "embed"),
            init=torch_default_init(hidden),
            bias_init=torch_default_init(hidden),
        )

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return self.linear_2(gelu(self.linear_1(x)))


class ConnectorLevel(nnx.Module):
    """One map: 1x1, 3x3, 1x1 convolution, each followed by a channel LayerNorm, then pixel shuffle; no activation function."""

    def __init__(self, width: int, hidden: int, scale: float, multiple: int, *, rngs: nnx.Rngs):
        inner, _ = _widths(width, scale)
        options = {"rngs": rngs, "axes": ("embed", None), "bias": False, "init": normal_init(0.02)}
        self.conv1 = Conv(width, hidden, 1, **options)
        self.norm1 = LayerNorm(hidden, rngs=rngs, eps=1e-6)
        self.conv2 = Conv(hidden, hidden, 3, padding=1, **options)
        self.norm2 = LayerNorm(hidden, rngs=rngs, eps=1e-6)
        self.conv3 = Conv(hidden, inner, 1, **options)
        self.norm3 = LayerNorm(inner, rngs=rngs, eps=1e-6)
        self.scale, self.multiple = scale, multiple

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b y x o"]:
        x = pad_to_multiple(x, self.multiple)
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        x = self.norm3(self.conv3(x))
        return pixel_shuffle(x, self.scale)


class SegConnector(nnx.Module):
    """Encoder hidden states -> feature pyramid. `levels[i]` belongs to the i-th incoming map."""

    def __init__(self, cfg: ConnectorConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.levels = nnx.List(
            [
                ConnectorLevel(width, cfg.hidden_channels, scale, cfg.pad_multiple, rngs=rngs)
                for width, scale in zip(cfg.channels, cfg.scales, strict=True)
            ]
        )

    def __call__(self, maps: tuple[Float[Array, "b h w _"], ...]) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Applies each level to its map.

        Args:
            maps: NHWC hidden states of the selected encoder layers, shallow to deep, all on the encoder's grid.

        Returns:
            Maps of `cfg.out_channels` channels, LOW to HIGH resolution.
        """
        if len(maps) != len(self.levels):
            raise ValueError(f"SegConnector: {len(maps)} maps for {len(self.levels)} levels")
        return tuple(self.levels[i](maps[i]) for i in self.cfg.low_to_high_order)

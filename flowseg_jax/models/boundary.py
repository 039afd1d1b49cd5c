"""BAR, boundary-aware refinement: a bounded correction of the mask logits in the uncertain band along their boundary.

    B  = 1[dilate(M_prob) - erode(M_prob) > eps]
    dM = alpha * tanh(f_refine([M_raw || f_comp(F)]))
    M  = M_raw + dM * B

It refines the masks that are used: the selected one at inference, the matched ones in training. Outside B the logits are
bit-identical to M_raw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flowseg_jax.models.layers import Conv, make_param, zeros
from flowseg_jax.ops.dot import einsum
from flowseg_jax.ops.morphology import boundary_band


@dataclasses.dataclass(frozen=True)
class BoundaryConfig:
    """Sizes and switches of BAR.

    Attributes:
        enabled: if False, BAR has no parameters and masks stay as they are.
        kernel_size: side of the morphological window, in mask-logit pixels.
        threshold: on the morphological gradient of the probabilities (paper: epsilon = 0.1).
        hidden_channels: width of the compressed pixel features.
        identity_init: what is zero at the start, so that masks stay as they are: "alpha", or the last convolution ("conv").
            With both at zero there would be no gradient.
    """

    enabled: bool = True
    kernel_size: int = 3
    threshold: float = 0.1
    hidden_channels: int = 16
    identity_init: str = "alpha"

    def __post_init__(self):
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"boundary.kernel_size is {self.kernel_size}: it must be odd and at least 3")
        if self.identity_init not in ("alpha", "conv"):
            raise ValueError(f"boundary.identity_init is {self.identity_init!r}: choose alpha or conv")


def conv3x3_to_one_channel(tap: Callable[[int, int], Float[Array, "*b h w"]]) -> Float[Array, "*b h w"]:
    """A 3 x 3 convolution with a border of zeros; `tap(y, x)` is the input times one entry of the kernel, not yet shifted."""

    def shifted(y: int, x: int) -> Array:
        taps = tap(y, x)
        h, w = taps.shape[-2:]
        return jnp.pad(taps, [(0, 0)] * (taps.ndim - 2) + [(1, 1), (1, 1)])[..., y : y + h, x : x + w]

    return sum(shifted(y, x) for y in range(3) for x in range(3))


class BoundaryRefinement(nnx.Module):
    """BAR on any number of masks per image."""

    def __init__(self, width: int, cfg: BoundaryConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.feature_proj = Conv(width, cfg.hidden_channels, 1, rngs=rngs, init=init)
        # f_refine is one 3x3 convolution of [mask || features] to one channel; channel 0 is the mask.
        self.refine_conv = Conv(
            1 + cfg.hidden_channels, 1, 3, padding=1, rngs=rngs, init=zeros if cfg.identity_init == "conv" else init
        )
        self.alpha = make_param(rngs, zeros if cfg.identity_init == "alpha" else nnx.initializers.ones, (1,), (None,))
        self.kernel_size, self.threshold = cfg.kernel_size, cfg.threshold

    def __call__(self, masks: Float[Array, "b n h w"], features: Float[Array, "b h w d"]) -> Float[Array, "b n h w"]:
        """Refines mask logits with the mask features of their images.

        Args:
            masks: mask logits [B, N, h, w]; computed in float32.
            features: mask features [B, h, w, D].

        Returns:
            float32 [B, N, h, w].
        """
        masks = masks.astype(jnp.float32)
        band = self.band(masks)
        # The convolution is linear in its channels, so the features' share is computed once per image, not once per mask. With
        # one output channel it is a product with nine taps, each shifted: compilers are slow on convolutions this thin.
        kernel, compressed = self.refine_conv.kernel[..., 0], self.feature_proj(features)
        # Sixteen rows for nine taps: XLA's GPU compiler finds no tiles for nine.
        rows = jnp.pad(kernel[:, :, 1:].reshape(9, -1), ((0, 7), (0, 0))).astype(compressed.dtype)
        of_features = einsum("bhwc,tc->tbhw", compressed, rows)
        shared = conv3x3_to_one_channel(lambda y, x: of_features[3 * y + x])
        own = conv3x3_to_one_channel(lambda y, x: masks * kernel[y, x, 0])
        delta = jnp.tanh(own + shared[:, None] + self.refine_conv.bias[...]) * self.alpha[...]
        return jnp.where(band > 0, masks + delta, masks)

    def band(self, masks: Float[Array, "*b h w"]) -> Float[Array, "*b h w"]:
        """B of mask logits: 1 where they may change (near a boundary of the mask), else 0. Without a gradient."""
        return jax.lax.stop_gradient(boundary_band(jax.nn.sigmoid(masks), self.kernel_size, self.threshold))

"""BAR, boundary-aware refinement: a bounded correction of the mask logits inside the uncertain band, and nowhere else.

    B  = 1[dilate(M_prob) - erode(M_prob) > eps]
    dM = alpha * tanh(f_refine([M_raw || f_comp(F)]))
    M  = M_raw + dM * B

It acts on the masks that are used: the selected one at inference, the matched ones in training. Outside B the logits are
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
        enabled: without it no parameter exists and masks pass unchanged.
        kernel_size: side of the morphological window, in mask-logit pixels.
        threshold: on the morphological gradient of the probabilities (paper: epsilon = 0.1).
        hidden_channels: width of the compressed pixel features.
        identity_init: what makes the module start as the identity: "alpha" = 0, or a zero last "conv" (never both: no
            gradient).
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
    """A 3 x 3 convolution with a border of zeros, from the maps that its taps (y, x) give before they are moved."""

    def moved(y: int, x: int) -> Array:
        taps = tap(y, x)
        h, w = taps.shape[-2:]
        return jnp.pad(taps, [(0, 0)] * (taps.ndim - 2) + [(1, 1), (1, 1)])[..., y : y + h, x : x + w]

    return sum(moved(y, x) for y in range(3) for x in range(3))


class BoundaryRefinement(nnx.Module):
    """BAR on any number of masks an image."""

    def __init__(self, width: int, cfg: BoundaryConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.feature_proj = Conv(width, cfg.hidden_channels, 1, rngs=rngs, init=init)
        # f_refine is one 3x3 convolution of [mask || features] to one channel; channel 0 is the mask.
        self.refine_conv = Conv(
            1 + cfg.hidden_channels, 1, 3, padding=1, rngs=rngs, init=zeros if cfg.identity_init == "conv" else init
        )
        self.alpha = make_param(rngs, zeros if cfg.identity_init == "alpha" else nnx.initializers.ones, (1,), (None,))
        self.kernel, self.eps = cfg.kernel_size, cfg.threshold

    def __call__(self, masks: Float[Array, "b n h w"], features: Float[Array, "b h w d"]) -> Float[Array, "b n h w"]:
        """Refines mask logits [B, N, h, w] with the mask features [B, h, w, D] of their images; float32 in and out."""
        masks = masks.astype(jnp.float32)
        band = self.band(masks)
        # The convolution is linear in its channels: the features' share is computed once an image, not once a mask. And to one
        # channel it is a product with its nine taps, each moved to its place: compilers need long for convolutions this thin.
        kernel, compressed = self.refine_conv.kernel[..., 0], self.feature_proj(features)
        # Sixteen rows for nine taps: XLA's GPU compiler finds no tiles for nine.
        rows = jnp.pad(kernel[:, :, 1:].reshape(9, -1), ((0, 7), (0, 0))).astype(compressed.dtype)
        of_features = einsum("bhwc,tc->tbhw", compressed, rows)
        shared = conv3x3_to_one_channel(lambda y, x: of_features[3 * y + x])
        own = conv3x3_to_one_channel(lambda y, x: masks * kernel[y, x, 0])
        delta = jnp.tanh(own + shared[:, None] + self.refine_conv.bias[...]) * self.alpha[...]
        return jnp.where(band > 0, masks + delta, masks)

    def band(self, masks: Float[Array, "*b h w"]) -> Float[Array, "*b h w"]:
        """B, 1 where mask logits may change and 0 elsewhere: where the probabilities rise or fall. Without a gradient."""
        return jax.lax.stop_gradient(boundary_band(jax.nn.sigmoid(masks), self.kernel, self.eps))

"""Morphology on probability maps: where a mask's boundary is (FlowSeg's boundary-aware refinement)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def boundary_band(prob: Float[Array, "*b h w"], kernel: int, eps: float) -> Float[Array, "*b h w"]:
    """1 where dilation minus erosion of `prob` exceeds `eps`, else 0: the band of pixels along a mask's boundary.

    Args:
        prob: probabilities (or any map).
        kernel: side of the square window, odd, pixels.
        eps: threshold on the morphological gradient, in the units of `prob`.

    Returns:
        Zeros and ones in the dtype of `prob`, without a gradient. The map's edge is never a boundary: pixels outside it take
        part neither in the maximum nor in the minimum.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"band: the window needs an odd side, got {kernel}")
    prob = jax.lax.stop_gradient(prob)
    dilated, eroded = _window(prob, -jnp.inf, jax.lax.max, kernel), _window(prob, jnp.inf, jax.lax.min, kernel)
    return (dilated.astype(jnp.float32) - eroded.astype(jnp.float32) > eps).astype(prob.dtype)


def _window(x: Array, identity: float, reduce, kernel: int) -> Array:
    """Extremum over the square window around each pixel: along rows, then along columns, which is the same and cheaper."""
    for axis in (x.ndim - 2, x.ndim - 1):
        shape = [1] * x.ndim
        shape[axis] = kernel
        x = jax.lax.reduce_window(x, jnp.array(identity, x.dtype), reduce, shape, [1] * x.ndim, "SAME")
    return x

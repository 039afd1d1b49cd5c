"""Morphology on probability maps: where a mask's boundary is (FlowSeg's boundary-aware refinement)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def boundary_band(prob: Float[Array, "*b h w"], kernel_size: int, threshold: float) -> Float[Array, "*b h w"]:
    """1 where dilation minus erosion of `prob` exceeds `threshold`, else 0: the band of pixels along a mask's boundary.

    Args:
        prob: probabilities (or any map).
        kernel_size: side of the square window, odd, pixels.
        threshold: on the morphological gradient, in the units of `prob`.

    Returns:
        Zeros and ones in the dtype of `prob`, without a gradient. The map's edge is never a boundary: pixels outside it take
        part neither in the maximum nor in the minimum.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"boundary_band: kernel_size {kernel_size} must be odd")
    prob = jax.lax.stop_gradient(prob)
    dilated = _window(prob, -jnp.inf, jax.lax.max, kernel_size)
    eroded = _window(prob, jnp.inf, jax.lax.min, kernel_size)
    return (dilated.astype(jnp.float32) - eroded.astype(jnp.float32) > threshold).astype(prob.dtype)


def _window(x: Array, identity: float, reduce, kernel_size: int) -> Array:
    """Extremum over the square window around each pixel: along rows, then along columns, which is the same and cheaper."""
    for axis in (x.ndim - 2, x.ndim - 1):
        shape = [1] * x.ndim
        shape[axis] = kernel_size
        x = jax.lax.reduce_window(x, jnp.array(identity, x.dtype), reduce, shape, [1] * x.ndim, "SAME")
    return x

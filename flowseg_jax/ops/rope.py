"""Rotary position embedding in the half-split layout of Hugging Face's Llama, after an RMS norm where a model has one.

In plain JAX a TPU writes halves of heads, float32 copies and broadcast factors to memory: several times the arithmetic of the
attention's projections. There one kernel reads the heads, and writes them normalised and rotated.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float

from flowseg_jax.ops.portable import kernels_allowed

LANES = 128  # the only head width that the kernel takes: a head is a register's row
MIN_TOKENS = 16  # with fewer there is little to gain


def rms_norm(x: Float[Array, "*b d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """RMS norm over the last axis; statistics in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)


def apply_rope(x: Float[Array, "b t h e"], cos: Float[Array, "b t r"], sin: Float[Array, "b t r"]) -> Float[Array, "b t h e"]:
    """Rotates the pairs (x[i], x[i + E/2]) by their angles, in float32; returns the dtype of x."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def norm_rope(
    x: Float[Array, "b t h e"],
    scale: Float[Array, " e"] | None,
    cos: Float[Array, "b t r"],
    sin: Float[Array, "b t r"],
    *,
    eps: float = 0.0,
) -> Float[Array, "b t h e"]:
    """`apply_rope(rms_norm(x, scale, eps), cos, sin)`; without the norm where `scale` is None. Angles get no gradient."""
    axes = jax.sharding.get_abstract_mesh().axis_types
    whole = AxisType.Auto not in axes  # the compiler cannot divide a kernel
    if not (kernels_allowed() and whole and x.shape[1] >= MIN_TOKENS and x.shape[3] == LANES):
        return _plain(eps, x, scale, cos, sin)
    return _norm_rope(eps, x, scale, cos, sin)


def _plain(eps: float, x: Array, scale: Array | None, cos: Array, sin: Array) -> Array:
    return apply_rope(x if scale is None else rms_norm(x, scale, eps), cos, sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_rope(eps: float, x: Array, scale: Array | None, cos: Array, sin: Array) -> Array:
    from flowseg_jax.ops import rope_kernel  # Pallas takes long to import, and a CPU has no use for it

    return jax.lax.platform_dependent(
        x, scale, cos, sin, tpu=functools.partial(rope_kernel.forward, eps), default=functools.partial(_plain, eps)
    )


def _norm_rope_forward(eps: float, *operands: Array | None) -> tuple[Array, tuple]:
    return _norm_rope(eps, *operands), operands


def _norm_rope_backward(eps: float, saved: tuple, cotangent: Array) -> tuple:
    from flowseg_jax.ops import rope_kernel

    def plain(x: Array, scale: Array | None, cos: Array, sin: Array, cotangent: Array) -> tuple[Array, Array | None]:
        return jax.vjp(lambda x, scale: _plain(eps, x, scale, cos, sin), x, scale)[1](cotangent)

    kernel = functools.partial(rope_kernel.backward, eps)
    found = jax.lax.platform_dependent(*saved, cotangent, tpu=kernel, default=plain)
    return *found, *map(jnp.zeros_like, saved[2:])


_norm_rope.defvjp(_norm_rope_forward, _norm_rope_backward)

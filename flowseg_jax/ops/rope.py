"""Rotary position embedding in the half-split layout of Hugging Face's Llama, after an RMS norm where a model has one.

In plain JAX a TPU writes halves of heads, float32 copies and broadcast factors to memory: several times the arithmetic of the
attention's projections. There one kernel reads the heads, and writes them normalised and rotated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jaxtyping import Array, Float

from flowseg_jax.ops.portable import kernels_allowed

LANES = 128  # the only head width that the kernel takes: a head is a register's row
MIN_TOKENS = 256  # with fewer there is little to gain
TOKENS = 128  # a step of the kernel
HEADS = 8  # at most, a step


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
    return jax.lax.platform_dependent(
        x, scale, cos, sin, tpu=functools.partial(kernel_forward, eps), default=functools.partial(_plain, eps)
    )


def _norm_rope_forward(eps: float, *operands: Array | None) -> tuple[Array, tuple]:
    return _norm_rope(eps, *operands), operands


def _norm_rope_backward(eps: float, saved: tuple, cotangent: Array) -> tuple:
    def plain(x: Array, scale: Array | None, cos: Array, sin: Array, cotangent: Array) -> tuple[Array, Array | None]:
        return jax.vjp(lambda x, scale: _plain(eps, x, scale, cos, sin), x, scale)[1](cotangent)

    kernel = functools.partial(kernel_backward, eps)
    found = jax.lax.platform_dependent(*saved, cotangent, tpu=kernel, default=plain)
    return *found, *map(jnp.zeros_like, saved[2:])


_norm_rope.defvjp(_norm_rope_forward, _norm_rope_backward)


def kernel_forward(
    eps: float, x: Array, scale: Array | None, cos: Array, sin: Array, *, interpret: bool = False
) -> Float[Array, "b t h e"]:
    """`norm_rope` as a kernel; `interpret` runs it on any platform, to be tested."""
    (out,) = _call(_forward_kernel, eps, [x], scale, cos, sin, False, interpret)
    return out


def kernel_backward(
    eps: float, x: Array, scale: Array | None, cos: Array, sin: Array, cotangent: Array, *, interpret: bool = False
) -> tuple[Array, Array | None]:
    """The gradients of `x` and `scale`."""
    dx, *sums = _call(_backward_kernel, eps, [x, cotangent], scale, cos, sin, scale is not None, interpret)
    return dx, None if scale is None else sums[0].sum((0, 1, 2)).astype(scale.dtype)


def _call(
    kernel: Callable,
    eps: float,
    inputs: list[Array],
    scale: Array | None,
    cos: Array,
    sin: Array,
    with_sums: bool,
    interpret: bool,
) -> list[Array]:
    b, t, h, e = inputs[0].shape
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -t % TOKENS), (0, 0)))  # noqa: E731
    heads = math.gcd(h, HEADS)
    grid = b, -(-t // TOKENS), h // heads
    of_heads = pl.BlockSpec((1, TOKENS, heads * e), lambda i, j, k: (i, j, k))
    of_angles = pl.BlockSpec((1, TOKENS, e), lambda i, j, k: (i, j, 0))
    scales = [] if scale is None else [scale.reshape(1, e)]
    dtype, padded = inputs[0].dtype, grid[1] * TOKENS
    sums = [jax.ShapeDtypeStruct((b, grid[1], 8, e), jnp.float32)] * with_sums
    name = f"norm and rotate {kernel.__name__.split('_')[1]} {heads} heads {dtype}{'' if scales else ' without norm'}"
    out, *sums = pl.pallas_call(
        functools.partial(kernel, eps, bool(scales)),
        grid=grid,
        in_specs=[
            *[of_heads] * len(inputs),
            *[pl.BlockSpec((1, e), lambda i, j, k: (0, 0))] * len(scales),
            *[of_angles] * 2,
        ],
        out_specs=[of_heads, *[pl.BlockSpec((1, 1, 8, e), lambda i, j, k: (i, j, 0, 0))] * len(sums)],
        out_shape=[jax.ShapeDtypeStruct((b, padded, h * e), dtype), *sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        metadata={"kernel": name, "steps": str(math.prod(grid)), "bodies": str(math.prod(grid))},
    )(
        *(pad(x.reshape(b, t, h * e)) for x in inputs),
        *scales,
        pad(jnp.concatenate([cos, cos], -1)),
        pad(jnp.concatenate([-sin, sin], -1)),
    )
    return [out[:, :t].reshape(b, t, h, e), *sums]


def _swapped(x: Array) -> Array:
    """Both halves of the lanes in each other's place."""
    return pltpu.roll(x, LANES // 2, 1)


def _forward_kernel(eps: float, normed: bool, x_ref, *refs) -> None:
    cos_ref, sin_ref, out_ref = refs[normed:]
    cos, sin = cos_ref[0], sin_ref[0]
    for start in range(0, x_ref.shape[2], LANES):
        head = slice(start, start + LANES)
        x = x_ref[0, :, head]
        if normed:
            x = rms_norm(x, refs[0][0], eps)
        x = x.astype(jnp.float32)
        out_ref[0, :, head] = (x * cos + _swapped(x) * sin).astype(out_ref.dtype)


def _backward_kernel(eps: float, normed: bool, x_ref, cotangent_ref, *refs) -> None:
    cos_ref, sin_ref, dx_ref, *sums = refs[normed:]
    cos, sin = cos_ref[0], sin_ref[0]
    if normed:

        @pl.when(pl.program_id(2) == 0)
        def _():
            sums[0][...] = jnp.zeros_like(sums[0])

    for start in range(0, x_ref.shape[2], LANES):
        head = slice(start, start + LANES)
        cotangent = cotangent_ref[0, :, head].astype(jnp.float32)
        slope = cotangent * cos + _swapped(cotangent * sin)
        if normed:
            x = x_ref[0, :, head].astype(jnp.float32)
            factor = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
            x = x * factor
            sums[0][0, 0] += (slope * x).reshape(-1, 8, LANES).sum(0)
            slope = slope * refs[0][...].astype(dx_ref.dtype).astype(jnp.float32)
            slope = factor * (slope - x * (slope * x).mean(-1, keepdims=True))
        dx_ref[0, :, head] = slope.astype(dx_ref.dtype)

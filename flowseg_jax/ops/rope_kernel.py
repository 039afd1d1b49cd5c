"""The Pallas kernel of `ops.rope` for TPUs: it reads heads, and writes them normalised and rotated."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from flowseg_jax.ops.rope import LANES, rms_norm

TOKENS = 128  # a step
HEADS = 8  # at most, a step


def forward(
    eps: float, x: Array, scale: Array | None, cos: Array, sin: Array, *, interpret: Any = False
) -> Float[Array, "b t h e"]:
    """`norm_rope` as a kernel; `interpret` runs it on any platform, to be tested."""
    (out,) = _call(_forward_kernel, eps, [x], scale, cos, sin, False, interpret)
    return out


def backward(
    eps: float, x: Array, scale: Array | None, cos: Array, sin: Array, cotangent: Array, *, interpret: Any = False
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
    interpret: Any,
) -> list[Array]:
    b, t, h, e = inputs[0].shape
    # Sums over tokens need zeros beyond the last one. Otherwise what is there is not written.
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -t % TOKENS), (0, 0))) if with_sums else x  # noqa: E731
    heads = math.gcd(h, HEADS)
    grid = b, -(-t // TOKENS), h // heads
    of_heads = pl.BlockSpec((1, TOKENS, heads * e), lambda i, j, k: (i, j, k))
    of_angles = pl.BlockSpec((1, TOKENS, e), lambda i, j, k: (i, j, 0))
    scales = [] if scale is None else [scale.reshape(1, e)]
    dtype, padded = inputs[0].dtype, grid[1] * TOKENS if with_sums else t
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

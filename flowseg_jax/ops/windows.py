"""Maps divided into square windows, and windows put together again: what SAM attends inside.

A row of a window is 14 tokens, which fill no register, so that XLA takes several copies between layouts on a TPU. There a
kernel moves each row of each window once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float

from flowseg_jax.ops.portable import kernels_allowed

LANES = 128
TOKENS = 16  # the kernel takes rows of windows that fill whole registers of two bytes a value


def split_windows(x: Float[Array, "b g g w"], side: int) -> Float[Array, "n t w"]:
    """Windows of `side` x `side` tokens, those of an image row by row; zeros fill the last ones."""
    return _split(side, x.shape[1], x)


def join_windows(x: Float[Array, "n t w"], side: int, grid: int) -> Float[Array, "b g g w"]:
    """The maps of `grid` x `grid` tokens that `split_windows` divided; what filled the last windows is dropped."""
    return _join(side, grid, x)


def _plain_split(side: int, grid: int, x: Array) -> Array:
    b, *_, w = x.shape
    count = -(-grid // side)
    missing = count * side - grid
    x = jnp.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0)))
    return x.reshape(b, count, side, count, side, w).swapaxes(2, 3).reshape(-1, side * side, w)


def _plain_join(side: int, grid: int, x: Array) -> Array:
    count, w = -(-grid // side), x.shape[-1]
    x = x.reshape(-1, count, count, side, side, w).swapaxes(2, 3)
    return x.reshape(-1, count * side, count * side, w)[:, :grid, :grid]


def _run(name: str, side: int, grid: int, x: Array) -> Array:
    plain = functools.partial({"split": _plain_split, "join": _plain_join}[name], side, grid)
    divided = AxisType.Auto in jax.sharding.get_abstract_mesh().axis_types  # the compiler cannot divide a kernel
    if not kernels_allowed() or divided or x.shape[-1] % LANES or side * grid % TOKENS:
        return plain(x)
    from flowseg_jax.ops import windows_kernel  # Pallas takes long to import, and a CPU has no use for it

    kernel = functools.partial(getattr(windows_kernel, name), side, grid)
    return jax.lax.platform_dependent(x, tpu=kernel, default=plain)


# Each is the other's transpose.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _split(side: int, grid: int, x: Array) -> Array:
    return _run("split", side, grid, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _join(side: int, grid: int, x: Array) -> Array:
    return _run("join", side, grid, x)


_split.defvjp(lambda *x: (_split(*x), None), lambda side, grid, _, cotangent: (_join(side, grid, cotangent),))
_join.defvjp(lambda *x: (_join(*x), None), lambda side, grid, _, cotangent: (_split(side, grid, cotangent),))

"""The Pallas kernels of `ops.windows` for TPUs.

A step has one row of windows and one register's width of channels. Rows of windows start anywhere in a register; moving them is
simplest in float32, where a register's rows can be read and written one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from flowseg_jax.ops.windows import LANES


def split(side: int, grid: int, x: Float[Array, "b g g w"], *, interpret: bool = False) -> Float[Array, "n t w"]:
    """`split_windows`; `interpret` runs it on any platform, to be tested."""
    b, *_, w = x.shape
    out = jax.ShapeDtypeStruct((b * (-(-grid // side)) ** 2, side * side, w), x.dtype)
    return _call(_split_kernel, side, grid, x.reshape(b, grid * grid, w), out, interpret)


def join(side: int, grid: int, x: Float[Array, "n t w"], *, interpret: bool = False) -> Float[Array, "b g g w"]:
    """`join_windows`; `interpret` as above."""
    b, w = len(x) // (-(-grid // side)) ** 2, x.shape[-1]
    out = jax.ShapeDtypeStruct((b, grid * grid, w), x.dtype)
    return _call(_join_kernel, side, grid, x, out, interpret).reshape(b, grid, grid, w)


def _call(kernel: Callable, side: int, grid: int, x: Array, out: jax.ShapeDtypeStruct, interpret: bool) -> Array:
    count, (windows, maps) = -(-grid // side), (x, out) if kernel is _join_kernel else (out, x)
    # The last row of windows has fewer tokens than the others: what a block has beyond the map is not read or written.
    of_maps = pl.BlockSpec((None, side * grid, LANES), lambda b, i, c: (b, i, c))
    of_windows = pl.BlockSpec((count, side * side, LANES), lambda b, i, c: (b * count + i, 0, c))
    specs = (of_windows, of_maps) if windows is x else (of_maps, of_windows)
    steps = maps.shape[0], count, maps.shape[2] // LANES
    name = f"{kernel.__name__.split('_')[1]} windows {side}x{side} of {grid}x{grid} {x.dtype}"
    return pl.pallas_call(
        functools.partial(kernel, side, grid),
        grid=steps,
        in_specs=[specs[0]],
        out_specs=specs[1],
        out_shape=out,
        scratch_shapes=[
            pltpu.VMEM((side * grid, LANES), jnp.float32),
            pltpu.VMEM((count, side * side, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        metadata={"kernel": name, "steps": str(math.prod(steps)), "bodies": str(math.prod(steps))},
    )(x)


def _rows(side: int, grid: int) -> list[tuple[int, slice, slice]]:
    """Of all rows of windows: the window, where its tokens are in the map, and where in the window."""
    found = []
    for window in range(-(-grid // side)):
        size = min(side, grid - window * side)
        for row in range(side):
            start = row * grid + window * side
            found.append((window, slice(start, start + size), slice(row * side, row * side + size)))
    return found


def _split_kernel(side: int, grid: int, x_ref, out_ref, map_ref, windows_ref) -> None:
    there = (grid - pl.program_id(1) * side) * grid
    token = jax.lax.broadcasted_iota(jnp.int32, map_ref.shape, 0)
    map_ref[...] = jnp.where(token < there, x_ref[...].astype(jnp.float32), 0.0)
    if grid % side:
        windows_ref[-1] = jnp.zeros_like(windows_ref[-1])
    for window, of_map, of_window in _rows(side, grid):
        windows_ref[window, of_window] = map_ref[of_map]
    out_ref[...] = windows_ref[...].astype(out_ref.dtype)


def _join_kernel(side: int, grid: int, x_ref, out_ref, map_ref, windows_ref) -> None:
    windows_ref[...] = x_ref[...].astype(jnp.float32)
    for window, of_map, of_window in _rows(side, grid):
        map_ref[of_map] = windows_ref[window, of_window]
    out_ref[...] = map_ref[...].astype(out_ref.dtype)

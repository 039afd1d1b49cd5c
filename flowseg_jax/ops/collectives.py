"""Collectives inside `jax.shard_map`, where every exchange between devices is written out.

A loss inside `shard_map` is the sum of what its devices return. The transposes of these exchanges are exact for that sum: a
gathered weight's gradient comes back added up over all devices and divided among them again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

SHARD_AXIS = "fsdp"  # the mesh axis whose devices hold parts of a parameter
TENSOR_AXIS = "tensor"  # the mesh axis over which a product may be computed in parts: heads, hidden units
WHOLE = PartitionSpec()


def squarest_grid(devices: int) -> tuple[int, int]:
    """(rows, columns) of the squarest grid of that many devices, rows <= columns."""
    rows = next(n for n in range(math.isqrt(devices), 0, -1) if devices % n == 0)
    return rows, devices // rows


def all_gather_2d(x: Array, axis: int) -> Array:
    """The whole array of which every device of `SHARD_AXIS` holds one part along `axis`.

    Devices are taken as a grid: first along its rows, then along its columns. So the transpose scatters in two steps as well,
    which the TPU compiler turns into true reduce-scatters; one step over all devices it turns into an all-reduce of the
    whole array, of which each device keeps its part.
    """
    for groups in reversed(_grid(jax.lax.axis_size(SHARD_AXIS))):
        x = jax.lax.all_gather(x, SHARD_AXIS, axis=axis % x.ndim, tiled=True, axis_index_groups=groups)
    return x


def reduce_scatter_2d(x: Array, axis: int) -> Array:
    """The sum over the devices of `SHARD_AXIS`, of which each keeps its part along `axis`: the transpose of `all_gather_2d`."""
    for groups in _grid(jax.lax.axis_size(SHARD_AXIS)):
        x = jax.lax.psum_scatter(x, SHARD_AXIS, scatter_dimension=axis % x.ndim, tiled=True, axis_index_groups=groups)
    return x


def _grid(devices: int) -> list[list[list[int]]]:
    """The groups of the exchange along columns, then of that along rows; exchanges with nobody are left out."""
    rows, columns = squarest_grid(devices)
    index = [[row * columns + column for column in range(columns)] for row in range(rows)]
    steps = [[list(group) for group in zip(*index, strict=True)], index]
    return [groups for groups in steps if len(groups[0]) > 1]


def all_to_all_rows(x: Array) -> Array:
    """From a part [v, w / n] of a matrix's columns to this device's part [ceil(v / n), w] of its rows, missing rows zero."""
    devices = jax.lax.axis_size(SHARD_AXIS)
    x = jnp.pad(x, ((0, -x.shape[0] % devices), (0, 0)))
    return jax.lax.all_to_all(x, SHARD_AXIS, split_axis=0, concat_axis=1, tiled=True)


def on_each_device(run: Callable, *arrays: Array, spec: PartitionSpec = WHOLE) -> Any:
    """Runs on each device of the mesh axes that are left to the compiler, which cannot divide a kernel.

    Args:
        run: from arrays to an array or several.
        spec: the part of each array, and of each result, that a device has; by default all of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not axes:
        return run(*arrays)
    return jax.shard_map(run, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False)(*arrays)


@dataclasses.dataclass(frozen=True)
class DataParallelGroup:
    """The devices among which a batch is divided, for use inside `shard_map`; outside of it, no axes.

    Attributes:
        axes: mesh axes, major to minor; device i holds the i-th part of the batch.
    """

    axes: tuple[str, ...] = ()

    def batch_offset(self, images: int) -> int | Int[Array, ""]:
        """The place in the whole batch of the first of this device's images."""
        return jax.lax.axis_index(self.axes) * images if self.axes else 0

    def gather_group(self, x: Float[Array, " b *d"] | Int[Array, " b *d"], group_size: int) -> Array:
        """Rows of this device's images and of those that complete their groups, [max(B, size), ...], in order."""
        b = x.shape[0]
        if b % group_size == 0:
            return x
        parts = [self.axes[i:] for i in reversed(range(len(self.axes)))]
        axes = next(part for part in parts if b * jax.lax.axis_size(part) % group_size == 0)  # the nearest that hold groups
        everything = jax.lax.all_gather(x, axes, axis=0, tiled=True)
        first = DataParallelGroup(axes).batch_offset(b) // group_size * group_size
        return jax.lax.dynamic_slice_in_dim(everything, first, group_size)


SINGLE_DEVICE = DataParallelGroup()

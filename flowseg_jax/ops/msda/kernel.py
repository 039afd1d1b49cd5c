"""Deformable attention as one Pallas kernel for TPU: no gather, no scatter, no sort, nothing but the results in memory.

A TPU gathers slowly and multiplies fast. So sampling is a product here: the points of a query are a row of weights over the
pixels, almost all of them zero, and that row times the values is the result. It is made where it is used, in vector memory,
one row of a map for one block of queries at a time. What keeps this from costing queries times pixels is that queries which
stand side by side look at nearby pixels: a block visits only the rows between the first and the last that any of its points
touches. Exact for every input, and fast for points that stay near their queries, as those of deformable attention do.

Layouts put what is long into the lanes: the values of a head are [e, pixels], points and results [.., queries]. Every row of a
map starts at a multiple of the 128 lanes, and only as many of its lanes are computed with as it has pixels. The values of one
head, all levels of them, stay in vector memory while the blocks of queries go by.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flowseg_jax.ops.collectives import TENSOR_AXIS, WHOLE, on_each_device
from flowseg_jax.ops.msda.chunks import Shapes
from flowseg_jax.ops.msda.dense import tent

LANES, SUBLANES = 128, 8
BLOCK = 256  # queries at a time
# Of the 64 MiB of vector memory that the smallest of the TPUs from v5e on has: what the kernels may take, and how much of that
# the values and their gradient.
VMEM_BYTES = 48 * 2**20
RESIDENT_BYTES = 32 * 2**20
REACH = 4  # pixels; Deformable DETR starts its points at 1 to 4


@dataclasses.dataclass(frozen=True)
class Level:
    """How a map's pixels lie in the lanes.

    Attributes:
        height, width: of the map.
        start: lane of its first pixel.
    """

    height: int
    width: int
    start: int

    @property
    def pitch(self) -> int:
        """Lanes from one row to the next."""
        return -(-self.width // LANES) * LANES

    @property
    def size(self) -> int:
        """Lanes of a row that are computed with: its pixels, and zeros up to whole registers of two bytes a value."""
        return -(-self.width // (2 * SUBLANES)) * 2 * SUBLANES

    @property
    def end(self) -> int:
        return self.start + self.height * self.pitch

    @classmethod
    def lay(cls, shapes: Shapes) -> tuple[Level, ...]:
        """The levels one after the other."""
        found, start = [], 0
        for height, width in shapes:
            found.append(cls(height, width, start))
            start = found[-1].end
        return tuple(found)

    def lanes(self, row: Array) -> pl.Slice:
        """Where a row's pixels are."""
        return pl.ds(pl.multiple_of(self.start + row * self.pitch, LANES), self.size)

    def columns(self, x: Array) -> list[Array]:
        """The distance of every column from each of the points [k, q], k times [pixels, q]."""
        column = jax.lax.broadcasted_iota(jnp.int32, (self.size, 1), 0).astype(jnp.float32)
        return [x[k : k + 1] - column for k in range(len(x))]

    def rows(self, x: Array, y: Array) -> tuple[Array, Array]:
        """The first row that any of the points touches, and the end of those that they do."""
        inside = (x > -1) & (x < self.width) & (y > -1) & (y < self.height)
        top = jnp.floor(y)
        first = jnp.min(jnp.where(inside, top, self.height)).astype(jnp.int32)
        last = jnp.max(jnp.where(inside, top + 1, -1)).astype(jnp.int32)
        return jnp.maximum(first, 0), jnp.minimum(last, self.height - 1) + 1


def resident_bytes(shapes: Shapes, e: int, itemsize: int) -> int:
    """Vector memory that the values of a head and their gradient take in the backward pass, each twice: one is on its way."""
    return 2 * Level.lay(shapes)[-1].end * e * (itemsize + 4)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernels of both directions, with the interface of the other implementations.

    Attributes:
        interpret: run them as array code on any platform, to test them.
    """

    interpret: Any

    def forward(self, shapes: Shapes, chunk: int, value: Array, points: Array, weights: Array) -> Array:
        """[b, q, h, e] in the dtype of `value`; points in pixels."""
        return self._on_each_device(self._forward, shapes, value, points, weights)

    def backward(
        self, shapes: Shapes, chunk: int, cotangent: Array, value: Array, points: Array, weights: Array
    ) -> tuple[Array, Array, Array]:
        """Gradients of value, points and weights."""
        return self._on_each_device(self._backward, shapes, cotangent, value, points, weights)

    def _on_each_device(self, run: Callable, shapes: Shapes, *arrays: Array) -> Any:
        """Heads, the third axis of all arrays, are divided over `TENSOR_AXIS` where that fits."""
        devices = jax.sharding.get_abstract_mesh().shape.get(TENSOR_AXIS, 1)
        spec = PartitionSpec(None, None, TENSOR_AXIS) if arrays[0].shape[2] % devices == 0 else WHOLE
        return on_each_device(functools.partial(run, shapes), *arrays, spec=spec)

    def _forward(self, shapes: Shapes, value: Array, points: Array, weights: Array) -> Array:
        levels = Level.lay(shapes)
        blocks, values = _lanes_of_points(points, weights), _lanes_of_values(value, levels)
        out = jax.ShapeDtypeStruct((*values.shape[:3], blocks[0].shape[3]), value.dtype)
        return _queries_first(_call(_forward_kernel, levels, blocks, values, [out], [], self.interpret)[0], points.shape[1])

    def _backward(
        self, shapes: Shapes, cotangent: Array, value: Array, points: Array, weights: Array
    ) -> tuple[Array, Array, Array]:
        levels = Level.lay(shapes)
        values, transposed = jax.vjp(functools.partial(_lanes_of_values, levels=levels), value)
        blocks = (*_lanes_of_points(points, weights), _queries_last(cotangent))
        of_points = jax.ShapeDtypeStruct(blocks[0].shape, jnp.float32)
        of_values = jax.ShapeDtypeStruct(values.shape, jnp.float32)
        *found, dvalues = _call(_backward_kernel, levels, blocks, values, [of_points] * 3, [of_values], self.interpret)
        dx, dy, dweights = (_queries_first(x, points.shape[1]).reshape(weights.shape) for x in found)
        return *transposed(dvalues.astype(value.dtype)), jnp.stack([dx, dy], -1), dweights


def _queries_last(x: Array, padding: float = 0.0) -> Array:
    """[b, q, h, n] -> [b, h, n, q], queries padded to whole blocks."""
    x = jnp.moveaxis(x, 1, 3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % _block(x.shape[3]))), constant_values=padding)


def _queries_first(x: Array, queries: int) -> Array:
    return jnp.moveaxis(x, 3, 1)[:, :queries]


def _block(queries: int) -> int:
    return min(BLOCK, -(-queries // LANES) * LANES)


def _lanes_of_points(points: Array, weights: Array) -> tuple[Array, Array, Array]:
    """x, y and weights as [b, h, l * k, q]. A padded query lies outside, where it makes no block visit more rows."""
    x, y, weights = (x.reshape(*x.shape[:3], -1).astype(jnp.float32) for x in (points[..., 0], points[..., 1], weights))
    return _queries_last(x), _queries_last(y, padding=-2.0), _queries_last(weights)


def _lanes_of_values(value: Array, levels: Sequence[Level]) -> Array:
    """[b, n, h, e] -> [b, h, e, lanes]."""
    b, _, h, e = value.shape
    out, start = [], 0
    for level in levels:
        maps = value[:, start : start + level.height * level.width].reshape(b, level.height, level.width, h, e)
        start += level.height * level.width
        maps = jnp.pad(maps, ((0, 0), (0, 0), (0, level.pitch - level.width), (0, 0), (0, 0)))
        out.append(maps.transpose(0, 3, 4, 1, 2).reshape(b, h, e, -1))
    return jnp.concatenate(out, -1)


def _call(
    kernel: Callable,
    levels: Sequence[Level],
    blocks: Sequence[Array],
    values: Array,
    block_outputs: list[jax.ShapeDtypeStruct],
    value_outputs: list[jax.ShapeDtypeStruct],
    interpret: Any,
) -> Sequence[Array]:
    """Runs a kernel for every image, head and block of queries, the last of which see the same values one after the other."""
    b, h, _, queries = blocks[0].shape
    block = _block(queries)
    of_block = lambda x: pl.BlockSpec((None, None, x.shape[2], block), lambda i, j, k: (i, j, 0, k))  # noqa: E731
    of_head = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j, k: (i, j, 0, 0))  # noqa: E731
    return pl.pallas_call(
        functools.partial(kernel, levels),
        grid=(b, h, queries // block),
        in_specs=[*map(of_block, blocks), of_head(values)],
        out_specs=[*map(of_block, block_outputs), *map(of_head, value_outputs)],
        out_shape=[*block_outputs, *value_outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        metadata=_metadata(kernel, levels, blocks, values, (b * h, queries // block)),
    )(*blocks, values)


def _metadata(
    kernel: Callable, levels: Sequence[Level], blocks: Sequence[Array], values: Array, steps: tuple[int, int]
) -> dict[str, str]:
    """What a plan prices the kernel by (`aot.pricing`): which code it is, how often a step runs, and each level's loop.

    How many rows a block visits depends on its points. A plan assumes that they lie at most `REACH` pixels from the query.
    """
    maps = " ".join(f"{level.height}x{level.width}" for level in levels)
    shapes = f"{blocks[0].shape[2]} points {values.shape[2]} channels {values.dtype}"
    queries, pixels = steps[1] * _block(blocks[0].shape[3]), sum(level.height * level.width for level in levels)
    share = _block(blocks[0].shape[3]) / min(queries, pixels)  # of every map, if queries are pixels of the same maps
    visits = [steps[0] * steps[1] * min(x.height, math.ceil(x.height * share + 2 * REACH)) for x in levels]
    name = f"deformable attention {kernel.__name__.split('_')[1]} {maps} {shapes}"
    return {"kernel": name, "steps": str(math.prod(steps)), "bodies": " ".join(map(str, visits))}


def _points_of(level: int, levels: int, ref) -> slice:
    """Where a level's points stand among those of all levels."""
    each = ref.shape[0] // levels
    return slice(level * each, (level + 1) * each)


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _forward_kernel(levels, x_ref, y_ref, weights_ref, values_ref, out_ref):
    out = jnp.zeros(out_ref.shape, jnp.float32)
    for index, level in enumerate(levels):
        points = _points_of(index, len(levels), x_ref)
        x, y, weights = x_ref[points], y_ref[points], weights_ref[points]
        columns = [jnp.maximum(1 - jnp.abs(distance), 0.0) for distance in level.columns(x)]

        def visit(row, out, level=level, y=y, weights=weights, columns=columns):
            rows = weights * tent(y - row.astype(jnp.float32))[0]
            dense = sum(rows[k : k + 1] * column for k, column in enumerate(columns))
            values = values_ref[:, level.lanes(row)]
            return out + _product(values, dense.astype(values.dtype), (1, 0))

        out = jax.lax.fori_loop(*level.rows(x, y), visit, out)
    out_ref[...] = out.astype(out_ref.dtype)


def _backward_kernel(levels, x_ref, y_ref, weights_ref, out_ref, values_ref, dx_ref, dy_ref, dweights_ref, dvalues_ref):
    """`out_ref` holds the cotangent of the block's results; the gradient of the values grows from block to block."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        @pl.loop(0, dvalues_ref.shape[1] // LANES)
        def _(start):
            lanes = pl.ds(pl.multiple_of(start * LANES, LANES), LANES)
            dvalues_ref[:, lanes] = jnp.zeros((dvalues_ref.shape[0], LANES), jnp.float32)

    out = out_ref[...]
    queries = out.shape[1]
    of_registers = lambda x: x.reshape(-1, SUBLANES, queries).sum(0)  # noqa: E731
    for index, level in enumerate(levels):
        points = _points_of(index, len(levels), x_ref)
        x, y, weights = x_ref[points], y_ref[points], weights_ref[points]
        columns = [tent(distance) for distance in level.columns(x)]

        def visit(row, sums, level=level, y=y, weights=weights, columns=columns):
            lanes = level.lanes(row)
            rows, slopes = tent(y - row.astype(jnp.float32))
            dense = sum((weights * rows)[k : k + 1] * column for k, (column, _) in enumerate(columns))
            dvalues_ref[:, lanes] += _product(out, dense.astype(out.dtype), (1, 1))
            pixels = _product(values_ref[:, lanes], out, (0, 0))  # [pixels, q]: each pixel's part in the loss
            added = []
            for k, (column, slope) in enumerate(columns):
                across, aslant = of_registers(pixels * column), of_registers(pixels * slope)
                added += [aslant * rows[k : k + 1], across * slopes[k : k + 1], across * rows[k : k + 1]]
            return [old + new for old, new in zip(sums, added, strict=True)]

        zero = jnp.zeros((SUBLANES, queries), jnp.float32)
        sums = jax.lax.fori_loop(*level.rows(x, y), visit, [zero] * (3 * len(weights)))
        sums = [x.sum(0, keepdims=True) for x in sums]
        dx_ref[points] = weights * jnp.concatenate(sums[0::3])
        dy_ref[points] = weights * jnp.concatenate(sums[1::3])
        dweights_ref[points] = jnp.concatenate(sums[2::3])

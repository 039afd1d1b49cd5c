"""Deformable attention by gathers of rows from a table of the values.

An implementation is a table and a way to read it: which rows a query's points need, and with which coefficients. The rest is
the same for all tables, the derivative included. The derivative is written out: each chunk of queries adds its part to one
gradient of the table, where automatic differentiation would make a new one for every chunk and add them up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flowseg_jax.ops.dot import einsum
from flowseg_jax.ops.msda.chunks import Shapes, chunked, join, split
from flowseg_jax.ops.points import pixel_corners


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table of c pixels per row, and how it is read.

    Attributes:
        table: (shapes, value) -> [rows, c * e], linear in the value.
        taps: (shapes, points, weights) -> coefficients [b, q, h, t, c] and rows [b, q, h, t].
        combine: (table, coefficients, rows) -> [b, q, h, e] in float32.
    """

    table: Callable[[Shapes, Array], Array]
    taps: Callable[[Shapes, Array, Array], tuple[Array, Array]]
    combine: Callable[[Array, Array, Array], Array]

    def forward(self, shapes: Shapes, chunk: int, value: Array, points: Array, weights: Array) -> Array:
        """[b, q, h, e] in the dtype of `value`; points in pixels."""
        table = self.table(shapes, value)

        def sampler(points: Array, weights: Array) -> Array:
            return self.combine(table, *self.taps(shapes, points, weights)).astype(value.dtype)

        return chunked(sampler, chunk, points, weights)

    def backward(
        self, shapes: Shapes, chunk: int, cotangent: Array, value: Array, points: Array, weights: Array
    ) -> tuple[Array, Array, Array]:
        """Gradients of value, points and weights."""
        e = value.shape[-1]
        table, transposed = jax.vjp(functools.partial(self.table, shapes), value)

        def body(gradient: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            points, weights, cotangent = xs
            coefficients, of_taps, index = jax.vjp(functools.partial(self.taps, shapes), points, weights, has_aux=True)
            pixels = _take(table, index).reshape(*index.shape, -1, e)
            dots = einsum("bqhtce,bqhe->bqhtc", pixels, cotangent)
            added = coefficients[..., None] * cotangent[:, :, :, None, None].astype(jnp.float32)
            gradient = gradient.at[index].add(added.reshape(*index.shape, -1), mode="promise_in_bounds")
            return gradient, of_taps(dots)

        parts = tuple(split(x, chunk) for x in (points, weights, cotangent))
        gradient, found = jax.lax.scan(body, jnp.zeros(table.shape, jnp.float32), parts)
        return *transposed(gradient.astype(table.dtype)), *(join(x, points.shape[1]) for x in found)


def _pixels(shapes: Shapes, value: Array) -> Array:
    """The values as they lie in memory, one row per pixel and head."""
    return value.reshape(-1, value.shape[-1])


def _pixel_taps(shapes: Shapes, points: Array, weights: Array) -> tuple[Array, Array]:
    """Four rows per point."""
    b, h = points.shape[0], points.shape[2]
    coefficients, index, start = [], [], 0
    each = sum(height * width for height, width in shapes)
    for level, (height, width) in enumerate(shapes):
        x, y = points[:, :, :, level, :, 0], points[:, :, :, level, :, 1]
        for row, column, weight in pixel_corners(x, y, height, width):
            coefficients.append(weight * weights[:, :, :, level])
            index.append(_row_of(start + row * width + column, each, b, h))
        start += height * width
    return jnp.concatenate(coefficients, -1)[..., None], jnp.concatenate(index, -1)


def _patches(shapes: Shapes, value: Array) -> Array:
    """The 2 x 2 patches of the zero-padded maps, one row per patch and head; patch (0, 0) begins at pixel (-1, -1)."""
    b, _, h, e = value.shape
    tables, start = [], 0
    for height, width in shapes:
        level = value[:, start : start + height * width].reshape(b, height, width, h, e)
        level = jnp.pad(level, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
        patches = [level[:, y : y + height + 1, x : x + width + 1] for y in (0, 1) for x in (0, 1)]
        tables.append(jnp.concatenate(patches, -1).reshape(b, (height + 1) * (width + 1), h, 4 * e))
        start += height * width
    return jnp.concatenate(tables, 1).reshape(-1, 4 * e)


def _patch_taps(shapes: Shapes, points: Array, weights: Array) -> tuple[Array, Array]:
    """One row per point."""
    b, h = points.shape[0], points.shape[2]
    coefficients, index, start = [], [], 0
    each = sum((height + 1) * (width + 1) for height, width in shapes)
    for level, (height, width) in enumerate(shapes):
        x, y = points[:, :, :, level, :, 0], points[:, :, :, level, :, 1]
        left, top = jnp.floor(x), jnp.floor(y)
        # A point that touches no pixel has no patch.
        inside = (top >= -1) & (top < height) & (left >= -1) & (left < width)
        row = jnp.clip(top + 1, 0, height).astype(jnp.int32)
        column = jnp.clip(left + 1, 0, width).astype(jnp.int32)
        index.append(_row_of(start + row * (width + 1) + column, each, b, h))
        right, down = x - left, y - top
        corners = jnp.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], -1)
        coefficients.append(jnp.where(inside, weights[:, :, :, level], 0.0)[..., None] * corners)
        start += (height + 1) * (width + 1)
    return jnp.concatenate(coefficients, -2), jnp.concatenate(index, -1)


def _row_of(place: Array, each: int, b: int, h: int) -> Array:
    """The table's row of place [b, q, h, k] among the `each` places of an image."""
    return (place + each * jnp.arange(b)[:, None, None, None]) * h + jnp.arange(h)[:, None]


def _accumulate(table: Array, coefficients: Array, index: Array) -> Array:
    """Adds up one tap after the other, which XLA:CPU makes one loop of: nothing is written but the result."""
    # Not fused into that loop as well, which would compute them for every channel again.
    coefficients, index = jax.lax.optimization_barrier((coefficients, index))
    return sum(coefficients[:, :, :, t] * _take(table, index[..., t]) for t in range(index.shape[-1]))


def _contract(table: Array, coefficients: Array, index: Array) -> Array:
    """One product. Never `(gathered * coefficients).sum()`: XLA:CPU would fuse the gather into the sum, ten times slower."""
    gathered = _take(table, index).reshape(*coefficients.shape, -1)
    coefficients = coefficients.astype(table.dtype)
    return einsum("bqhtc,bqhtce->bqhe", coefficients, gathered)


def _take(table: Array, index: Array) -> Array:
    return table.at[index].get(mode="promise_in_bounds")


GATHER = Rows(_pixels, _pixel_taps, _accumulate)
PACKED_GATHER = Rows(_patches, _patch_taps, _contract)

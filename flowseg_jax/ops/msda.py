"""Multi-scale deformable attention: each query reads a few freely placed points of several feature maps (Deformable DETR).

    out[q, h] = sum over l, k of  weights[q, h, l, k] * bilinear(value of level l and head h, locations[q, h, l, k])

Sampling is that of `ops.points`: coordinates over the map's outer edges, neighbours outside it count as zero. There is no fused
kernel; three formulations of the same function are kept, because what is fast depends on the machine:

    gather   four row gathers a point from the values as they lie in memory, folded by one product. CPU.
    packed   one gather a point from a table that holds each 2 x 2 patch side by side: four times the memory of the values, a
             quarter of the gathers, and rows that fill an accelerator's lanes. GPU and TPU.
    tent     no gather at all: the weights of all points become a dense map, multiplied with the values. Exact but slow: an
             oracle, and a way out where gathers are the bottleneck.

Queries are processed in chunks whose samples are recomputed in the backward pass, so that memory stays bounded: at 1,024 pixels
the samples of one layer would take a gigabyte an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowseg_jax.ops.points import corners

Shapes = tuple[tuple[int, int], ...]
Sampler = Callable[[Array, Array], Array]  # (locations, weights) of some queries -> [b, q, h, e]

CHUNK_BYTES = 32 * 2**20  # float32 samples an image above which queries are processed in chunks of that many


def msda(
    value: Float[Array, "b n h e"],
    shapes: Shapes,
    locations: Float[Array, "b q h l k 2"],
    weights: Float[Array, "b q h l k"],
    *,
    impl: str = "auto",
    chunk: int | None = None,
) -> Float[Array, "b q h*e"]:
    """Multi-scale deformable attention.

    Args:
        value: projected features of all levels, row-major and one level after the other: n = sum of height * width.
        shapes: static (height, width) of each level.
        locations: sampling points (x, y), 0 and 1 the edges of the level's map; points outside contribute zeros. Computed in
            float32 whatever their dtype.
        weights: attention weights, normalised by the caller over levels and points.
        impl: "gather", "packed", "tent" or "auto" (by the platform that the program is compiled for).
        chunk: queries at a time. None: all, unless their samples exceed `CHUNK_BYTES` an image.

    Returns:
        Heads side by side, in the dtype of `value`; sums accumulate in float32.

    Raises:
        ValueError: an unknown `impl`, or shapes that do not fit.
    """
    b, n, h, e = value.shape
    queries, levels, points = locations.shape[1], len(shapes), locations.shape[4]
    if sum(y * x for y, x in shapes) != n or locations.shape != (b, queries, h, levels, points, 2):
        raise ValueError(f"msda: value {value.shape}, shapes {shapes} and locations {locations.shape} do not fit")
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"msda: weights {weights.shape} and locations {locations.shape} do not fit")
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"msda: implementation {impl!r}; known are auto, {', '.join(IMPLEMENTATIONS)}")
    if chunk is None:
        samples = 4 * queries * h * levels * points * 4 * e  # bytes; four pixels a point
        chunk = -(-queries // -(-samples // CHUNK_BYTES))
    arrays = jnp.asarray(value), jnp.asarray(locations, jnp.float32), jnp.asarray(weights)
    return _msda(shapes, impl, chunk, *arrays).reshape(b, queries, h * e)


def _gather(value: Array, shapes: Shapes) -> Sampler:
    """Four rows a point, straight from the values."""
    b, n, h, e = value.shape
    rows = value.reshape(b * n * h, e)

    def sampler(locations: Array, weights: Array) -> Array:
        index, coefficient = [], []
        start = jnp.arange(b)[:, None, None, None] * n  # [b, q, h, k]
        head = jnp.arange(h)[:, None]
        for level, (height, width) in enumerate(shapes):
            for row, column, weight in corners(locations[:, :, :, level], height, width):
                index.append((start + row * width + column) * h + head)
                coefficient.append(weight * weights[:, :, :, level])
            start = start + height * width
        return _fold(rows, jnp.concatenate(index, -1), jnp.concatenate(coefficient, -1)[..., None], e)

    return sampler


def _packed(value: Array, shapes: Shapes) -> Sampler:
    """One row a point, from a table of the 2 x 2 patches of the zero-padded maps."""
    b, _, h, e = value.shape
    tables, start = [], 0
    for height, width in shapes:
        level = value[:, start : start + height * width].reshape(b, height, width, h, e)
        level = jnp.pad(level, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
        patches = [level[:, y : y + height + 1, x : x + width + 1] for y in (0, 1) for x in (0, 1)]
        tables.append(jnp.concatenate(patches, -1).reshape(b, (height + 1) * (width + 1), h, 4 * e))
        start += height * width
    table = jnp.concatenate(tables, 1)
    n = table.shape[1]
    rows = table.reshape(b * n * h, 4 * e)

    def sampler(locations: Array, weights: Array) -> Array:
        index, coefficient = [], []
        start = jnp.arange(b)[:, None, None, None] * n
        head = jnp.arange(h)[:, None]
        for level, (height, width) in enumerate(shapes):
            x = locations[:, :, :, level, :, 0] * width - 0.5
            y = locations[:, :, :, level, :, 1] * height - 0.5
            left, top = jnp.floor(x), jnp.floor(y)
            # Patch (top, left) starts at row -1: a point beyond it touches no pixel at all.
            inside = (top >= -1) & (top < height) & (left >= -1) & (left < width)
            row = jnp.clip(top + 1, 0, height).astype(jnp.int32)
            column = jnp.clip(left + 1, 0, width).astype(jnp.int32)
            index.append((start + row * (width + 1) + column) * h + head)
            fx, fy = x - left, y - top
            weight = jnp.where(inside, weights[:, :, :, level], 0.0)
            corner = jnp.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], -1)
            coefficient.append(weight[..., None] * corner)
            start = start + (height + 1) * (width + 1)
        return _fold(rows, jnp.concatenate(index, -1), jnp.concatenate(coefficient, -2), e)

    return sampler


def _tent(value: Array, shapes: Shapes) -> Sampler:
    """Dense weight maps: bilinear sampling is a product of two tents, and a query's points add up before the values."""
    b, _, h, e = value.shape

    def tent(position: Array, size: int) -> Array:
        return jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] * size - 0.5 - jnp.arange(size)))

    def sampler(locations: Array, weights: Array) -> Array:
        out, start = 0.0, 0
        for level, (height, width) in enumerate(shapes):
            maps = value[:, start : start + height * width].reshape(b, height, width, h, e)
            rows = tent(locations[:, :, :, level, :, 1], height) * weights[:, :, :, level, :, None]
            columns = tent(locations[:, :, :, level, :, 0], width)
            dense = jnp.einsum("bqhky,bqhkx->bqhyx", rows, columns).astype(value.dtype)
            out += jnp.einsum("bqhyx,byxhe->bqhe", dense, maps, preferred_element_type=jnp.float32)
            start += height * width
        return out.astype(value.dtype)

    return sampler


IMPLEMENTATIONS: dict[str, Callable[[Array, Shapes], Sampler]] = {"gather": _gather, "packed": _packed, "tent": _tent}


def _fold(rows: Array, index: Array, coefficient: Array, e: int) -> Array:
    """Sum over t and c of coefficient [b, q, h, t, c] * rows[index [b, q, h, t]] seen as [c, e].

    A product, never `(gathered * coefficient).sum()`: XLA:CPU would fuse the gather into the sum and run ten times slower.
    """
    gathered = rows.at[index].get(mode="promise_in_bounds")
    gathered = gathered.reshape(*index.shape[:3], -1, e)
    coefficient = coefficient.reshape(*index.shape[:3], -1).astype(rows.dtype)
    return jnp.einsum("bqht,bqhte->bqhe", coefficient, gathered, preferred_element_type=jnp.float32).astype(rows.dtype)


def _chunked(impl: str, shapes: Shapes, chunk: int, value: Array, locations: Array, weights: Array) -> Array:
    """One formulation over chunks of queries; what a chunk samples is recomputed in its backward pass."""
    sampler = IMPLEMENTATIONS[impl](value, shapes)
    queries = locations.shape[1]
    if chunk >= queries:
        return sampler(locations, weights)
    parts = -(-queries // chunk)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, parts * chunk - queries), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], parts, chunk, *x.shape[2:]), 1, 0)

    body = jax.checkpoint(lambda xs: sampler(*xs), prevent_cse=False)
    out = jnp.moveaxis(jax.lax.map(body, (split(locations), split(weights))), 0, 1)
    return out.reshape(out.shape[0], parts * chunk, *out.shape[3:])[:, :queries]


def _select(impl: str, apply: Callable[[str], Callable], *args: Array):
    if impl != "auto":
        return apply(impl)(*args)
    return jax.lax.platform_dependent(*args, cpu=apply("gather"), default=apply("packed"))


# A custom derivative rule, so that a choice of platform is made inside each pass: differentiating through the choice would keep
# what the branches not taken need as well.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _msda(shapes: Shapes, impl: str, chunk: int, value: Array, locations: Array, weights: Array) -> Array:
    return _select(impl, lambda name: functools.partial(_chunked, name, shapes, chunk), value, locations, weights)


def _msda_forward(shapes, impl, chunk, value, locations, weights):
    return _msda(shapes, impl, chunk, value, locations, weights), (value, locations, weights)


def _msda_backward(shapes, impl, chunk, saved, cotangent):
    def backward(name: str) -> Callable:
        return lambda cotangent, *saved: jax.vjp(functools.partial(_chunked, name, shapes, chunk), *saved)[1](cotangent)

    return _select(impl, backward, cotangent, *saved)


_msda.defvjp(_msda_forward, _msda_backward)

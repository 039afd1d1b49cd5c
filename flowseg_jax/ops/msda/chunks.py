"""Queries in chunks: what an implementation computes for each sampled point then exists for one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

Shapes = tuple[tuple[int, int], ...]  # (height, width) of each level


def split(x: Array, chunk: int) -> Array:
    """[b, q, ...] -> [parts, b, chunk, ...]. Missing queries are zeros, which have no weight and so no effect."""
    b, queries = x.shape[:2]
    parts = -(-queries // chunk)
    x = jnp.pad(x, ((0, 0), (0, parts * chunk - queries), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(b, parts, chunk, *x.shape[2:]), 1, 0)


def join(x: Array, queries: int) -> Array:
    """The inverse of `split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]


def chunked(sampler: Callable[[Array, Array], Array], chunk: int, points: Array, weights: Array) -> Array:
    """`sampler(points, weights)`, chunk by chunk; a derivative recomputes a chunk instead of keeping what it made."""
    queries = points.shape[1]
    if chunk >= queries:
        return sampler(points, weights)
    body = jax.checkpoint(lambda xs: sampler(*xs), prevent_cse=False)
    return join(jax.lax.map(body, (split(points, chunk), split(weights, chunk))), queries)

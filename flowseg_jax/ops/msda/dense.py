"""Deformable attention without a gather: dense weight maps, multiplied with the values.

Bilinear sampling is a product of two tents, one over the rows and one over the columns of a map, and the points of a query add
up before they meet the values.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flowseg_jax.ops.dot import einsum
from flowseg_jax.ops.msda.chunks import Shapes, chunked


def tent(distance: Array) -> tuple[Array, Array]:
    """The weight of a pixel at this distance (point minus pixel), and its derivative: at a kink that to the right of it."""
    near = (distance >= -1) & (distance < 1)
    slope = jnp.where(near, jnp.where(distance < 0, 1.0, -1.0), 0.0)
    return jnp.where(near, 1 + slope * distance, 0.0), slope


def forward(shapes: Shapes, chunk: int, value: Array, points: Array, weights: Array) -> Array:
    """[b, q, h, e] in the dtype of `value`; points in pixels."""
    b, _, h, e = value.shape

    def weigh(position: Array, size: int) -> Array:
        return tent(position[..., None] - jnp.arange(size))[0]

    def sampler(points: Array, weights: Array) -> Array:
        out, start = 0.0, 0
        for level, (height, width) in enumerate(shapes):
            maps = value[:, start : start + height * width].reshape(b, height, width, h, e)
            rows = weigh(points[:, :, :, level, :, 1], height) * weights[:, :, :, level, :, None]
            columns = weigh(points[:, :, :, level, :, 0], width)
            dense = jnp.einsum("bqhky,bqhkx->bqhyx", rows, columns).astype(value.dtype)
            out += einsum("bqhyx,byxhe->bqhe", dense, maps)
            start += height * width
        return out.astype(value.dtype)

    return chunked(sampler, chunk, points, weights)


def backward(
    shapes: Shapes, chunk: int, cotangent: Array, value: Array, points: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Gradients of value, points and weights."""
    return jax.vjp(functools.partial(forward, shapes, chunk), value, points, weights)[1](cotangent)

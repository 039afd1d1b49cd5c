"""The four pixels that bilinear sampling at a point reads, and their weights."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Corners = list[tuple[Int[Array, "*b"], Int[Array, "*b"], Float[Array, "*b"]]]


def corners(points: Float[Array, "*b 2"], height: int, width: int) -> Corners:
    """The four (row, column, weight) of bilinear sampling at `points`, as `pixel_corners` has them.

    Coordinates and weights are float32 whatever the dtype of the points.
    """
    points = points.astype(jnp.float32)
    return pixel_corners(points[..., 0] * width - 0.5, points[..., 1] * height - 0.5, height, width)


def pixel_corners(x: Float[Array, "*b"], y: Float[Array, "*b"], height: int, width: int) -> Corners:
    """The four (row, column, weight) of bilinear sampling at points in pixels, the centre of the first pixel at 0.

    Rows and columns are clipped into the map and the weight of a neighbour outside it is zero, so that a gather may promise
    that its indices are in bounds.
    """
    left, top = jnp.floor(x), jnp.floor(y)
    out = []
    for row, row_weight in ((top, top + 1 - y), (top + 1, y - top)):
        for column, column_weight in ((left, left + 1 - x), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = jnp.where(inside, row_weight * column_weight, 0.0)
            # Clipped before the conversion: a float beyond int32 would wrap.
            row_index = jnp.clip(row, 0, height - 1).astype(jnp.int32)
            column_index = jnp.clip(column, 0, width - 1).astype(jnp.int32)
            out.append((row_index, column_index, weight))
    return out

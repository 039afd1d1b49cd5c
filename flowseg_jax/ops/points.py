"""Sampling maps at points, as torch's `grid_sample(mode="bilinear", padding_mode="zeros", align_corners=False)` does.

A point is (x, y) in [0, 1], the image's outer edges; the centre of pixel i of n lies at (i + 0.5) / n. Each point reads its
four neighbouring pixels, a neighbour outside the map counting as zero. The four reads stay four gathers whose results are
added, which XLA fuses into one loop; one gather summed over an axis of four is an order of magnitude slower on CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

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


def sample(maps: Float[Array, "n h w"], points: Float[Array, "n p 2"]) -> Float[Array, "n p"]:
    """Bilinear samples of each map at its own points, in float32."""
    n, h, w = maps.shape
    flat = maps.reshape(n, h * w)
    return sum(weight * _take(flat, row * w + column) for row, column, weight in corners(points, h, w))


def sample_features(features: Float[Array, "h w d"], points: Float[Array, "p 2"]) -> Float[Array, "p d"]:
    """Bilinear samples of one feature map, all channels of a point at once; weights in float32, result in the map's dtype.

    Sampling is linear: where mask logits are queries times features, sampling the features once and multiplying afterwards
    equals sampling every query's mask, at a fraction of the work (the matcher's cost uses this).
    """
    h, w, d = features.shape
    flat = jnp.reshape(features, (h * w, d))
    out = 0.0
    for row, column, weight in corners(points, h, w):
        out += weight[:, None] * flat.at[row * w + column].get(mode="promise_in_bounds")
    return out.astype(features.dtype)


def sample_packed(
    masks: UInt8[Array, "n s bytes"], points: Float[Array, "n p 2"], width: int | None = None
) -> Float[Array, "n p"]:
    """`sample` of binary masks packed eight pixels a byte along the width, first pixel in the highest bit (`np.packbits`).

    Only the bytes that the points need are read: the masks are never unpacked. `width` is the masks' in pixels, None where it
    fills the bytes.
    """
    n, h, nbytes = masks.shape
    width = nbytes * 8 if width is None else width
    flat = masks.reshape(n, h * nbytes)
    out = 0.0
    for row, column, weight in corners(points, h, width):
        byte = _take(flat, row * nbytes + column // 8)
        out += weight * (byte >> (7 - column % 8).astype(jnp.uint8) & 1)
    return out


def uncertain_points(
    logits: Float[Array, "n c"], candidates: Float[Array, "n c 2"], extra: Float[Array, "n e 2"], keep: int
) -> Float[Array, "n {keep}+e 2"]:
    """PointRend's points: the `keep` candidates whose sampled logit is nearest to zero, then the `extra` ones.

    Args:
        logits: mask logits sampled at the candidates.
        candidates: uniform random points, three times as many as points are wanted in the usual setting.
        extra: uniform random points kept whatever their logit.
        keep: how many candidates stay, in the order in which they come. Of equally uncertain ones the first stay.

    Returns:
        Points without a gradient.
    """
    logits, candidates, extra = map(jax.lax.stop_gradient, (logits, candidates, extra))
    return jnp.concatenate([_of_smallest(jnp.abs(logits), candidates, keep), extra], axis=1)


def _of_smallest(magnitude: Float[Array, "n c"], candidates: Float[Array, "n c 2"], keep: int) -> Float[Array, "n {keep} 2"]:
    """The candidates of the `keep` smallest magnitudes, in the order in which they come: no sort.

    Bit by bit from the highest the `keep`-th smallest magnitude is found, by counting; non-negative floats compare as their
    bits do. What is smaller stays, and of what equals it as many as are wanting. `top_k` orders what it keeps, which nobody
    asks for: the TPU compiler makes a full sort of it, and on a CPU it takes most of the losses' time.
    """
    n, count = magnitude.shape
    bits = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)

    def refine(step: Array, threshold: Array) -> Array:
        trial = threshold + (1 << (30 - step))
        return jnp.where((bits < trial).sum(1, keepdims=True) < keep, trial, threshold)

    threshold = jax.lax.fori_loop(0, 31, refine, jnp.zeros((n, 1), jnp.int32))
    smaller, equal = bits < threshold, bits == threshold
    wanting = keep - smaller.sum(1, keepdims=True)
    stays = smaller | (equal & (jnp.cumsum(equal, 1) <= wanting))
    # The others go to places of their own behind the end, where they are dropped: no two have the same.
    place = jnp.where(stays, jnp.cumsum(stays, 1) - 1, keep + jnp.arange(count))
    out = jnp.zeros((n, keep, 2), candidates.dtype)
    return out.at[jnp.arange(n)[:, None], place].set(candidates, mode="drop", unique_indices=True)


def _take(flat: Array, index: Int[Array, "n p"]) -> Array:
    return jnp.take_along_axis(flat, index, axis=1, mode="promise_in_bounds")

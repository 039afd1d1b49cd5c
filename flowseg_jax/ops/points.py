"""Sampling maps at points, as torch's `grid_sample(mode="bilinear", padding_mode="zeros", align_corners=False)` does.

A point is (x, y) in [0, 1], the image's outer edges; the centre of pixel i of n lies at (i + 0.5) / n. Each point reads its
four neighbouring pixels, a neighbour outside the map counting as zero.

There are two forms. On CPUs and GPUs the four reads are four gathers whose results are added, which XLA fuses into one loop;
one gather summed over an axis of four is an order of magnitude slower on CPU. A TPU reads scalars one by one, about 14 cycles
each, and has matrix units that are idle meanwhile: there a read is a product, with a row of weights for each point.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from flowseg_jax.ops.dot import matmul_f32

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


@jax.custom_vjp
def sample_points(maps: Float[Array, "n h w"], points: Float[Array, "n p 2"]) -> Float[Array, "n p"]:
    """Bilinear samples of each map at its own points, in float32.

    The gradient of the maps adds each point's share to four pixels: a scatter. On TPUs both directions are products with two
    tents instead, one along each axis: bilinear sampling reads pixel (y, x) with the weight tent(y - y_p) tent(x - x_p).
    """
    return _read(maps, points)


def _read(maps: Float[Array, "n h w"], points: Float[Array, "n p 2"]) -> Float[Array, "n p"]:
    return jax.lax.platform_dependent(maps, points, tpu=_read_by_products, default=_gather)


def _tents(at: Float[Array, "*p"], size: int) -> Float[Array, "*p size"]:
    """The weight of each of `size` pixels along one axis for a point at `at`."""
    return jnp.maximum(1 - jnp.abs(at.astype(jnp.float32)[..., None] * size - 0.5 - jnp.arange(size)), 0)


def _read_by_products(maps: Float[Array, "n h w"], points: Float[Array, "n p 2"]) -> Float[Array, "n p"]:
    """`_gather` without a gather, one map at a time: the weights of all maps at once would be gigabytes."""
    _, h, w = maps.shape

    def one(operands: tuple[Array, Array]) -> Array:
        pixels, at = operands
        return (matmul_f32(_tents(at[1], h), pixels.astype(jnp.float32), 1, 0) * _tents(at[0], w)).sum(-1)

    return jax.lax.map(one, (maps, jnp.moveaxis(points, -1, 1)))


def _gather(maps: Float[Array, "n h w"], points: Float[Array, "n p 2"]) -> Float[Array, "n p"]:
    n, h, w = maps.shape
    flat = maps.reshape(n, h * w)
    return sum(weight * _take(flat, row * w + column) for row, column, weight in corners(points, h, w))


def _scatter(points: Float[Array, "n p 2"], cotangent: Float[Array, "n p"], h: int, w: int) -> Float[Array, "n h w"]:
    """`_gather` transposed. One axis of places: with an axis for the maps, as JAX transposes, it takes a CPU twice as long."""
    n = len(points)
    first, out = jnp.arange(n)[:, None] * h * w, jnp.zeros(n * h * w, jnp.float32)
    for row, column, weight in corners(points, h, w):
        out = out.at[first + row * w + column].add(weight * cotangent, mode="promise_in_bounds")
    return out.reshape(n, h, w)


def _spread(points: Float[Array, "n p 2"], cotangent: Float[Array, "n p"], h: int, w: int) -> Float[Array, "n h w"]:
    """`_scatter` without a scatter."""
    return matmul_f32(_tents(points[..., 1], h) * cotangent[..., None], _tents(points[..., 0], w), 1, 1, batch=1)


def _sample_forward(maps: Array, points: Array) -> tuple[Array, tuple[Array, Array]]:
    return _read(maps, points), (maps, points)


def _sample_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    maps, points = saved
    h, w = maps.shape[1:]

    scatter, spread = (functools.partial(form, h=h, w=w) for form in (_scatter, _spread))
    of_maps = jax.lax.platform_dependent(points, cotangent, tpu=spread, default=scatter)
    (of_points,) = jax.vjp(lambda p: _read(maps, p), points)[1](cotangent)
    return of_maps.astype(maps.dtype), of_points


sample_points.defvjp(_sample_forward, _sample_backward)


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


def sample_packed_masks(
    masks: UInt8[Array, "n s bytes"], points: Float[Array, "n p 2"], width: int | None = None
) -> Float[Array, "n p"]:
    """`sample` of binary masks packed eight pixels a byte along the width, first pixel in the highest bit (`np.packbits`).

    Only the bytes that the points need are read: the masks are never unpacked. `width` is the masks' in pixels, None where it
    fills the bytes.
    """
    width = masks.shape[2] * 8 if width is None else width
    forms = (functools.partial(form, width=width) for form in (_packed_by_products, _packed_gather))
    by_products, gather = forms
    return jax.lax.platform_dependent(masks, points, tpu=by_products, default=gather)


def _packed_gather(masks: UInt8[Array, "n s bytes"], points: Float[Array, "n p 2"], width: int) -> Float[Array, "n p"]:
    n, h, nbytes = masks.shape
    flat = masks.reshape(n, h * nbytes)
    out = 0.0
    for row, column, weight in corners(points, h, width):
        byte = _take(flat, row * nbytes + column // 8)
        out += weight * (byte >> (7 - column % 8).astype(jnp.uint8) & 1)
    return out


def _packed_by_products(masks: UInt8[Array, "n s bytes"], points: Float[Array, "n p 2"], width: int) -> Float[Array, "n p"]:
    """`_packed_gather` without a gather, one mask at a time. A 0/1 row picks a point's row of bytes: a sum of one term, and a
    byte is exact in bfloat16. A second such sum, over the row, picks the byte."""
    _, h, nbytes = masks.shape

    def one(operands: tuple[Array, Array]) -> Array:
        mask, at = operands[0].astype(jnp.bfloat16), operands[1].T
        rows: dict[int, Array] = {}
        out = 0.0
        for corner, (row, column, weight) in enumerate(corners(at, h, width)):
            if corner // 2 not in rows:  # the corners come row by row
                rows[corner // 2] = matmul_f32(jax.nn.one_hot(row, h, dtype=jnp.bfloat16), mask, 1, 0)
            chosen = jnp.arange(nbytes) == (column // 8)[:, None]
            byte = jnp.where(chosen, rows[corner // 2], 0).sum(1).astype(jnp.int32)
            out += weight * (byte >> (7 - column % 8) & 1)
        return out

    return jax.lax.map(one, (masks, jnp.moveaxis(points, -1, 1)))


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

    Non-negative floats compare as their bits do. From the highest bit on, of the candidates that are alike so far those with a
    zero stay if there is room for all of them, and else those with a one go. `top_k` would also order what it keeps, which is
    not needed: the TPU compiler makes a full sort of it, and on a CPU it takes most of the losses' time.

    Magnitudes are read inside the loop alone. A compiler that fuses what made them into a second reader may round them
    differently there, and a threshold found in one copy need not be in the other.
    """
    n, count = magnitude.shape
    bits = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)

    def decide(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        stays, alike, room = state
        zero = alike & (bits >> (30 - step) & 1 == 0)
        zeros = zero.sum(1, keepdims=True)
        fit = zeros <= room
        return stays | (zero & fit), alike & (zero ^ fit), jnp.where(fit, room - zeros, room)

    start = jnp.zeros((n, count), bool), jnp.ones((n, count), bool), jnp.full((n, 1), keep)
    stays, alike, room = jax.lax.fori_loop(0, 31, decide, start)
    stays |= alike & (_running_count(alike) <= room)  # ties: the first
    compact, by_products = functools.partial(_compact, keep=keep), functools.partial(_compact_by_products, keep=keep)
    return jax.lax.platform_dependent(stays, candidates, tpu=by_products, default=compact)


def _compact(stays: Bool[Array, "n c"], candidates: Float[Array, "n c 2"], keep: int) -> Float[Array, "n {keep} 2"]:
    """The `keep` candidates that stay, in the order in which they come.

    Where the j-th is: the first candidate at which j have been counted. Counts never fall, and places that come in order need
    not be sorted by a compiler; place 0 is for what comes before the first.
    """
    n, count = stays.shape
    counted = _running_count(stays)
    first = jnp.full((n, keep + 1), count, jnp.int32)
    at = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (n, count))
    first = first.at[jnp.arange(n)[:, None], counted].min(at, mode="promise_in_bounds", indices_are_sorted=True)
    return jnp.take_along_axis(candidates, first[:, 1:, None], axis=1, mode="promise_in_bounds")


def _compact_by_products(
    stays: Bool[Array, "n c"], candidates: Float[Array, "n c 2"], keep: int, block: int = 256
) -> Float[Array, "n {keep} 2"]:
    """`_compact` without a scatter or a gather: the block in which j have been counted, then the place inside it.

    A 0/1 row picks the block: sums of one term, exact in float32, and in bfloat16 for counts of at most 256.
    """
    padded = jnp.pad(stays, ((0, 0), (0, -stays.shape[1] % block))).reshape(len(stays), -1, block)
    within = _count_within(padded)
    ends = jnp.cumsum(within[..., -1].astype(jnp.int32), 1)
    values = jnp.pad(candidates, ((0, 0), (0, padded[0].size - stays.shape[1]), (0, 0))).reshape(*padded.shape, 2)
    wanted = jnp.arange(1, keep + 1)

    def one(operands: tuple[Array, Array, Array]) -> Array:
        within, ends, values = operands
        before = ends < wanted[:, None]  # [keep, blocks]
        pick = jax.nn.one_hot(before.sum(1), len(ends), dtype=jnp.float32)
        counts = matmul_f32(pick.astype(jnp.bfloat16), within.astype(jnp.bfloat16), 1, 0)
        earlier = jnp.where(before, ends, 0).max(1)
        place = (counts < (wanted - earlier)[:, None]).sum(1)
        here = jnp.arange(block) == place[:, None]
        axes = (matmul_f32(pick, values[..., axis], 1, 0) for axis in range(2))
        return jnp.stack([jnp.where(here, x, 0).sum(1) for x in axes], -1)

    return jax.lax.map(one, (within, ends, values))


def _running_count(flags: Bool[Array, "n c"], block: int = 64) -> Int[Array, "n c"]:
    """`jnp.cumsum(flags, 1)`. A product counts within blocks, exactly: a CPU takes less than half the time for it."""
    n, c = flags.shape
    within = _count_within(jnp.pad(flags, ((0, 0), (0, -c % block))).reshape(n, -1, block))
    blocks_before = jnp.cumsum(within[..., -1], 1) - within[..., -1]
    return (within + blocks_before[..., None]).reshape(n, -1)[:, :c].astype(jnp.int32)


def _count_within(blocks: Bool[Array, "n b k"]) -> Float[Array, "n b k"]:
    """Inclusive counts along the last axis."""
    return matmul_f32(blocks.astype(jnp.float32), jnp.triu(jnp.ones((blocks.shape[-1],) * 2, jnp.float32)), 2, 0)


def _take(flat: Array, index: Int[Array, "n p"]) -> Array:
    return jnp.take_along_axis(flat, index, axis=1, mode="promise_in_bounds")

"""Sampling maps at points, as torch's `grid_sample(mode="bilinear", padding_mode="zeros", align_corners=False)` does.

A point is (x, y) in [0, 1], the image's outer edges; the centre of pixel i of n lies at (i + 0.5) / n. Each point reads its
four neighbouring pixels, a neighbour outside the map counting as zero.

There are two forms. On CPUs and GPUs the four reads are four gathers whose results are added, which XLA fuses into one loop;
one gather summed over an axis of four is an order of magnitude slower on CPU. A TPU reads scalars one by one, about 14 cycles
each: there kernels look maps up in vector memory (`kernel`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from flowseg_jax.ops.dot import matmul_f32
from flowseg_jax.ops.points.corners import corners, pixel_corners
from flowseg_jax.ops.portable import kernels_allowed

__all__ = ["corners", "pixel_corners", "sample_features", "sample_packed_masks", "sample_points", "uncertain_points"]


@jax.custom_vjp
def sample_points(maps: Float[Array, "n h w"], points: Float[Array, "n p 2"]) -> Float[Array, "n p"]:
    """Bilinear samples of each map at its own points, in float32.

    The gradient of the maps adds each point's share to four pixels: a scatter. On TPUs it is a product of two tents instead,
    one along each axis: bilinear sampling reads pixel (y, x) with the weight tent(y - y_p) tent(x - x_p).
    """
    return _read(maps, points)


def _read(maps: Float[Array, "n h w"], points: Float[Array, "n p 2"]) -> Float[Array, "n p"]:
    return _by_platform(maps, points, default=_gather, tpu=lambda kernel: kernel.reads(*maps.shape[1:]) and kernel.read)


def _by_platform(*operands: Array, default: Callable, tpu: Callable) -> Array:
    """`default`, and on a TPU what `tpu` chooses from the kernels; it may choose nothing."""
    if not kernels_allowed():
        return default(*operands)
    from flowseg_jax.ops.points import kernel  # Pallas takes long to import, and a CPU has no use for it

    chosen = tpu(kernel)
    return jax.lax.platform_dependent(*operands, tpu=chosen, default=default) if chosen else default(*operands)


def _tents(at: Float[Array, "*p"], size: int) -> Float[Array, "*p size"]:
    """The weight of each of `size` pixels along one axis for a point at `at`."""
    return jnp.maximum(1 - jnp.abs(at.astype(jnp.float32)[..., None] * size - 0.5 - jnp.arange(size)), 0)


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
    (of_points,) = jax.vjp(lambda p: _gather(maps, p), points)[1](cotangent)
    return of_maps.astype(maps.dtype), of_points


sample_points.defvjp(_sample_forward, _sample_backward)


def sample_features(features: Float[Array, "h w d"], points: Float[Array, "p 2"]) -> Float[Array, "p d"]:
    """Bilinear samples of one feature map, all channels of a point at once; weights in float32, result in the map's dtype.

    Sampling is linear: where mask logits are queries times features, sampling the features once and multiplying afterwards
    equals sampling every query's mask, at a fraction of the work (the matcher's cost uses this).
    """
    return _by_platform(features, points, default=_gather_features, tpu=lambda _: _gather_patches)


def _gather_features(features: Float[Array, "h w d"], points: Float[Array, "p 2"]) -> Float[Array, "p d"]:
    h, w, d = features.shape
    flat = jnp.reshape(features, (h * w, d))
    out = 0.0
    for row, column, weight in corners(points, h, w):
        out += weight[:, None] * flat.at[row * w + column].get(mode="promise_in_bounds")
    return out.astype(features.dtype)


def _gather_patches(features: Float[Array, "h w d"], points: Float[Array, "p 2"]) -> Float[Array, "p d"]:
    """`_gather_features` with one read for each point, of a table that holds the four pixels of each place side by side."""
    h, w, d = features.shape
    padded = jnp.pad(features, ((1, 1), (1, 1), (0, 0)))
    sides = slice(None, -1), slice(1, None)
    table = jnp.concatenate([padded[row, column] for row in sides for column in sides], -1).reshape(-1, 4 * d)
    at = points.astype(jnp.float32) * jnp.asarray([w, h], jnp.float32) - 0.5
    left, top = (jnp.clip(jnp.floor(at[:, axis]), -1, n - 1).astype(jnp.int32) + 1 for axis, n in ((0, w), (1, h)))
    found = table.at[top * (w + 1) + left].get(mode="promise_in_bounds")
    weights = [weight for _, _, weight in corners(points, h, w)]
    return sum(weight[:, None] * found[:, n * d : (n + 1) * d] for n, weight in enumerate(weights)).astype(features.dtype)


def sample_packed_masks(
    masks: UInt8[Array, "n s bytes"], points: Float[Array, "n p 2"], width: int | None = None
) -> Float[Array, "n p"]:
    """`sample` of binary masks packed eight pixels a byte along the width, first pixel in the highest bit (`np.packbits`).

    Only the bytes that the points need are read: the masks are never unpacked. `width` is the masks' in pixels, None where it
    fills the bytes.
    """
    width = masks.shape[2] * 8 if width is None else width
    fits = lambda kernel: kernel.reads(-(-width // 32), masks.shape[1])  # noqa: E731
    tpu = lambda kernel: fits(kernel) and functools.partial(kernel.read_packed, width=width)  # noqa: E731
    return _by_platform(masks, points, default=functools.partial(_packed_gather, width=width), tpu=tpu)


def _packed_gather(masks: UInt8[Array, "n s bytes"], points: Float[Array, "n p 2"], width: int) -> Float[Array, "n p"]:
    n, h, nbytes = masks.shape
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
    fits = lambda kernel: kernel.chooses(candidates.shape[1])  # noqa: E731
    tpu = lambda kernel: fits(kernel) and functools.partial(kernel.of_smallest, keep=keep)  # noqa: E731
    kept = _by_platform(jnp.abs(logits), candidates, default=functools.partial(_of_smallest, keep=keep), tpu=tpu)
    return jnp.concatenate([kept, extra], axis=1)


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
    return _compact(stays, candidates, keep)


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

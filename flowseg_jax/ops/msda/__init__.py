"""Multi-scale deformable attention: each query reads a few freely placed points of several feature maps (Deformable DETR).

    out[q, h] = sum over l, k of  weights[q, h, l, k] * bilinear(value of level l and head h, locations[q, h, l, k])

Sampling is that of `ops.points`: coordinates over the map's outer edges, neighbours outside it count as zero. What is fast
depends on the machine, so the same function and its derivative are written four times:

    gather         gathers the four pixels of a point; results add up inside one fused loop, so that no sample is ever stored.
                   For CPUs.
    packed_gather  one gather per point, from a table that holds each 2 x 2 patch side by side: four times the memory of the
                   values, a quarter of the gathers, and rows that fill an accelerator's lanes. For GPUs.
    dense          no gather at all: the weights of all points become a dense map, which is multiplied with the values. Slow,
                   but plain array code: the tests compare the others with it.
    pallas         the products of `dense` inside a TPU kernel, which visits only the pixels near a block of queries and stores
                   nothing but results. For TPUs.

All have the same derivative, at the kinks (points on pixel centres) too: that to the right of the kink, as PyTorch has it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowseg_jax.ops.msda import dense, gather
from flowseg_jax.ops.msda.chunks import Shapes
from flowseg_jax.ops.portable import cpu_only, kernels_allowed
from flowseg_jax.ops.remat import keepable

CHUNK_BYTES = 32 * 2**20  # float32 samples per image; with more, queries are processed in chunks
FORMULATIONS = {"gather": gather.GATHER, "packed_gather": gather.PACKED_GATHER, "dense": dense}
IMPLEMENTATIONS = ("gather", "packed_gather", "dense", "pallas")


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
        impl: one of `IMPLEMENTATIONS`, or "auto": by the platform that the program is compiled for, "pallas" not inside
            `without_kernels`. "pallas" is for TPU; on CPU it is interpreted, slowly.
        chunk: queries at a time, for all but "pallas". None: all, unless their samples exceed `CHUNK_BYTES` per image.

    Returns:
        Heads side by side, in the dtype of `value`; sums accumulate in float32.

    Raises:
        UserError: an unknown `impl`.
        ValueError: shapes that do not fit.
    """
    b, n, h, e = value.shape
    queries, levels, points = locations.shape[1], len(shapes), locations.shape[4]
    if sum(y * x for y, x in shapes) != n or locations.shape != (b, queries, h, levels, points, 2):
        raise ValueError(f"msda: value {value.shape}, shapes {shapes} and locations {locations.shape} do not fit")
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"msda: weights {weights.shape} and locations {locations.shape} do not fit")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"msda has no implementation {impl!r}: choose auto, {', '.join(IMPLEMENTATIONS)}")
    if chunk is None:
        samples = 4 * queries * h * levels * points * 4 * e  # bytes; four pixels per point
        chunk = -(-queries // -(-samples // CHUNK_BYTES))
    # Pixel coordinates, the centre of the first pixel at 0. From two pixels outside the map on, a point reads nothing.
    size = jnp.asarray([(width, height) for height, width in shapes], jnp.float32)[:, None]
    pixels = jnp.clip(jnp.asarray(locations, jnp.float32) * size - 0.5, -2, size + 1)
    arrays = jnp.asarray(value), pixels, jnp.asarray(weights)
    return _msda(tuple(shapes), impl, min(chunk, queries), *arrays).reshape(b, queries, h * e)


def _select(impl: str, shapes: Shapes, value: Array) -> dict[str, str]:
    """The implementation for each platform, "default" for those not named."""
    if impl == "pallas":
        return {"cpu": "interpreted", "default": "pallas"}
    if impl != "auto":
        return {"default": impl}
    if cpu_only():
        return {"default": "gather"}
    from flowseg_jax.ops.msda import kernel

    fits = kernels_allowed() and kernel.resident_bytes(shapes, value.shape[-1], value.dtype.itemsize) <= kernel.RESIDENT_BYTES
    return {"cpu": "gather", "tpu": "pallas" if fits else "packed_gather", "default": "packed_gather"}


def _formulation(name: str) -> Any:
    if name in FORMULATIONS:
        return FORMULATIONS[name]
    from flowseg_jax.ops.msda import kernel  # Pallas takes long to import, and a CPU has no use for it

    return kernel.Kernel(interpret=name == "interpreted")


def _run(impl: str, shapes: Shapes, direction: str, chunk: int, *arrays: Array):
    """`forward` or `backward` of the platform's implementation."""
    chosen = _select(impl, shapes, arrays[-3])
    branches = {
        platform: functools.partial(getattr(_formulation(name), direction), shapes, chunk) for platform, name in chosen.items()
    }
    return jax.lax.platform_dependent(*arrays, **branches)


# A custom derivative rule, so that a choice of platform is made inside each pass: differentiating through the choice would keep
# what the branches not taken need as well.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _msda(shapes: Shapes, impl: str, chunk: int, value: Array, points: Array, weights: Array) -> Array:
    return _run(impl, shapes, "forward", chunk, value, points, weights)


def _msda_forward(shapes, impl, chunk, value, points, weights):
    return keepable(_msda(shapes, impl, chunk, value, points, weights)), (value, points, weights)


def _msda_backward(shapes, impl, chunk, saved, cotangent):
    gradients = _run(impl, shapes, "backward", chunk, cotangent, *saved)
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, saved, strict=True))


_msda.defvjp(_msda_forward, _msda_backward)

"""Bilinear resizing as two small matrix products, one per axis.

The matrices equal torch's `interpolate(mode="bilinear", align_corners=False, antialias=False)`: pixel i of n covers
[i / n, (i + 1) / n] of the axis, samples beyond the first or last pixel's centre repeat it, and no low-pass filter is applied
when shrinking. Being linear, a chain of resizes and crops is one matrix per axis: a mask goes from the decoder's grid to the
original image's pixels in one step, on the device, without the intermediate maps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=256)
def bilinear_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "out in"]:
    """The float32 matrix that resizes an axis of `size_in` samples to `size_out`. Read-only: calls share it."""
    if size_in < 1 or size_out < 1:
        raise ValueError(f"bilinear_matrix: sizes must be positive, got {size_in} -> {size_out}")
    low, high, fraction = _taps(size_in, size_out)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    matrix.setflags(write=False)
    return matrix


def _taps(size_in: int, size_out: int) -> tuple[Int[np.ndarray, " out"], Int[np.ndarray, " out"], Float[np.ndarray, " out"]]:
    """The two samples that each new sample lies between, and how far it is on the way from the first to the second."""
    # In float32 and in torch's order of operations: at 1,000 samples its rounding is visible in the weights.
    scale = np.float32(size_in) / np.float32(size_out)
    position = np.maximum(scale * (np.arange(size_out, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    low = np.minimum(position.astype(np.int32), size_in - 1)
    return low, np.minimum(low + 1, size_in - 1), position - low.astype(np.float32)


def resize(x: Float[Array, "*b h w"], size: tuple[int, int]) -> Float[Array, "*b H W"]:
    """`x` resized to `size` = (H, W), computed in float32, in the dtype of x."""
    before = x.shape[-2:]
    if size == before:
        return x
    products = functools.partial(_by_products, before, size)
    if size[0] < before[0]:
        return products(x)
    return jax.lax.platform_dependent(x, cpu=functools.partial(_by_rows, before, size), default=products)


def _by_products(before: tuple[int, int], size: tuple[int, int], x: Float[Array, "*b h w"]) -> Float[Array, "*b H W"]:
    return apply_matrices(x, *map(bilinear_matrix, before, size)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_rows(before: tuple[int, int], size: tuple[int, int], x: Float[Array, "*b h w"]) -> Float[Array, "*b H W"]:
    """The same on a CPU: a row of the result is a sum of two rows, which takes less time than a product."""
    wide = product(x.astype(jnp.float32), bilinear_matrix(before[1], size[1]).T)
    low, high, fraction = _taps(before[0], size[0])
    above, below = (jnp.take(wide, rows, axis=-2, mode="clip") for rows in (low, high))
    return (above * (1 - fraction)[:, None] + below * fraction[:, None]).astype(x.dtype)


def _by_rows_backward(before: tuple[int, int], size: tuple[int, int], _: None, cotangent: Array) -> tuple[Array]:
    matrices = (bilinear_matrix(*sizes).T for sizes in zip(before, size, strict=True))
    return (apply_matrices(cotangent, *matrices).astype(cotangent.dtype),)


_by_rows.defvjp(lambda *x: (_by_rows(*x), None), _by_rows_backward)


def apply_matrices(
    x: Float[Array, "*b h w"], rows: Float[Array, "... H h"], cols: Float[Array, "... W w"]
) -> Float[Array, "*b H W"]:
    """rows x cols^T in full float32: the result decides pixels of masks, which a bfloat16 product would flip.

    The leading axes of the matrices broadcast against those of x, as in `matmul`.
    """
    x, cols = x.astype(jnp.float32), jnp.swapaxes(jnp.asarray(cols), -1, -2)
    if rows.shape[-2] * x.shape[-1] <= x.shape[-2] * cols.shape[-1]:  # the smaller intermediate map first
        return product(product(jnp.asarray(rows), x), cols)
    return product(jnp.asarray(rows), product(x, cols))


def restore_matrices(
    mask_size: tuple[int, int], padded_size: int, scaled: tuple[int, int], original: tuple[int, int], out: tuple[int, int]
) -> tuple[Float[np.ndarray, "H h"], Float[np.ndarray, "W w"]]:
    """The matrices that bring a mask of the padded square input back to the original image, as X-SAM does.

    Per axis: upsample the mask to the encoder's input, crop the part that holds the image, resize that to the original size.

    Args:
        mask_size: (h, w) of the mask logits, which cover the whole padded input.
        padded_size: side of the mask encoder's square input, pixels.
        scaled: (h', w') of the resized image in the top left of that square.
        original: (height, width) of the original image.
        out: (H, W) of the result, at least `original`; rows and columns beyond the original are zero, so that images of
            different sizes share one static shape.

    Returns:
        rows [H, h] and cols [W, w] for `apply_matrices`, float32, made on the host.
    """
    matrices = []
    for axis in range(2):
        if not (0 < scaled[axis] <= padded_size and 0 < original[axis] <= out[axis]):
            sizes = f"scaled {scaled}, padded {padded_size}, original {original}, out {out}"
            raise ValueError(f"restore_matrices: {sizes} do not fit")
        upsample = bilinear_matrix(mask_size[axis], padded_size)[: scaled[axis]]
        matrix = np.zeros((out[axis], mask_size[axis]), np.float32)
        matrix[: original[axis]] = bilinear_matrix(scaled[axis], original[axis]) @ upsample
        matrices.append(matrix)
    return matrices[0], matrices[1]

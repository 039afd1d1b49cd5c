"""The matrix product of every layer: float32 accumulation, in one place.

A bfloat16 product that accumulates in bfloat16 is wrong in the last digits, and on a CPU several times slower than one that
accumulates in float32 and rounds once. And float32 operands keep all their digits: by default a TPU would round them to
bfloat16 and a GPU to TF32, although whoever computes in float32 needs more than that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowseg_jax.ops.portable import cpu_only

TILE = 8  # rows that a TPU keeps together: arrays of whole tiles are joined, parted and reshaped without being moved


def precision(*operands: Array) -> jax.lax.Precision | None:
    """The precision of a product: all digits for float32 operands; None, the platform's default, for others."""
    exact = all(x.dtype == jnp.float32 for x in operands)
    return jax.lax.Precision.HIGHEST if exact else None


def dot(x: Float[Array, "*b i"], w: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """x @ w over the last axis of x, accumulated in float32, in the dtype of x.

    For a CPU, x is a matrix: XLA would write the operands of the gradient of w to memory transposed, which takes it longer than
    the product. On a TPU, axes that do not fill its tiles cannot be joined without a copy.
    """
    if x.size == x.shape[-1]:  # one row, see `matmul_f32`
        return matmul_f32(x.reshape(1, -1), w, 1, 0).reshape(*x.shape[:-1], -1).astype(x.dtype)
    if cpu_only():
        return matmul_f32(x.reshape(-1, x.shape[-1]), w, 1, 0).astype(x.dtype).reshape(*x.shape[:-1], w.shape[1])
    return matmul_f32(x, w, x.ndim - 1, 0).astype(x.dtype)


def matmul_f32(x: Array, y: Array, i: int, j: int, *, batch: int = 0) -> Array:
    """The product over axis i of x and axis j of y in float32, for each element of their first `batch` axes.

    On a CPU, XLA multiplies a single bfloat16 row (a token that is decoded) without its matrix library, at a tenth of the speed
    of two rows. So such a row gets a row of zeros beside it.
    """
    if x.dtype == jnp.bfloat16 and x.ndim == 2 and (batch, i, len(x)) == (0, 1, 1):
        return matmul_f32(jnp.pad(x, ((0, 1), (0, 0))), y, i, j)[:1]
    same = tuple(range(batch))
    dimensions = ((i,), (j,)), (same, same)
    return jax.lax.dot_general(x, y, dimensions, precision=precision(x, y), preferred_element_type=jnp.float32)


def einsum(spec: str, *operands: Array) -> Array:
    """`jnp.einsum` in float32."""
    return jnp.einsum(spec, *operands, precision=precision(*operands), preferred_element_type=jnp.float32)

"""The matrix product of every layer: float32 accumulation, in one place.

A bfloat16 product that accumulates in bfloat16 is both wrong in the last digits and, on CPU, several times slower than one that
accumulates in float32 and rounds once. And a float32 product is one of float32 numbers: by default a TPU rounds them to
bfloat16 and a GPU to TF32, where somebody has chosen float32 because that is not enough.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def precision(*operands: Array) -> jax.lax.Precision | None:
    """What float32 operands ask for: all their digits. None, the platform's own way, for others."""
    exact = all(x.dtype == jnp.float32 for x in operands)
    return jax.lax.Precision.HIGHEST if exact else None


def dot(x: Float[Array, "*b i"], w: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """x @ w over the last axis of x, accumulated in float32, in the dtype of x."""
    return product(x, w, x.ndim - 1, 0).astype(x.dtype)


def product(x: Array, y: Array, i: int, j: int, *, batch: int = 0) -> Array:
    """The product over axis i of x and axis j of y in float32, for each element of their first `batch` axes."""
    same = tuple(range(batch))
    dimensions = ((i,), (j,)), (same, same)
    return jax.lax.dot_general(x, y, dimensions, precision=precision(x, y), preferred_element_type=jnp.float32)


def einsum(spec: str, *operands: Array) -> Array:
    """`jnp.einsum` in float32."""
    return jnp.einsum(spec, *operands, precision=precision(*operands), preferred_element_type=jnp.float32)

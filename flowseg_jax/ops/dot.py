"""The matrix product of every layer: float32 accumulation, in one place.

A bfloat16 product that accumulates in bfloat16 is both wrong in the last digits and, on CPU, several times slower than one that
accumulates in float32 and rounds once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(x: Float[Array, "*b i"], w: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """x @ w over the last axis of x, accumulated in float32, in the dtype of x."""
    y = jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def product(x: Array, y: Array, i: int, j: int, *, batch: int = 0) -> Array:
    """The product over axis i of x and axis j of y in float32, for each element of their first `batch` axes."""
    same = tuple(range(batch))
    return jax.lax.dot_general(x, y, (((i,), (j,)), (same, same)), preferred_element_type=jnp.float32)


def einsum(spec: str, *operands: Array) -> Array:
    """`jnp.einsum` accumulated in float32, in the dtype of the first operand."""
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32).astype(operands[0].dtype)

"""SAM's attention inside windows on a TPU: one kernel, from projected queries, keys and values to the result.

A window is small: all its scores fit into a step. What is slow in plain JAX is everything around them, arrays whose last axes
of 14 or 196 fill no register and copies between layouts. Here nothing but queries, keys, values and results is in memory. The
query times the table of relative positions gives a number for every offset; of these each query picks the rows and columns of
its window, inside a register. The backward pass computes the scores again and keeps nothing.

Two heads of 64 lie side by side in the lanes. To compute with one of them, the other one's lanes are zero in one operand, which
costs nothing: a product over 64 lanes takes as long as one over 128.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from flowseg_jax.ops.attention.grid import HEAD, MAX_SIDE
from flowseg_jax.ops.attention.xla import BLOCKED
from flowseg_jax.ops.dot import matmul_f32

LANES = 128
KEYS = MAX_SIDE**2
COLUMNS = 2 * MAX_SIDE  # lane of the first offset of columns; those of rows are before it
NOTHING = LANES - 1  # a lane that is always zero


def forward(
    q: Float[Array, "n t w"],
    k: Float[Array, "n t w"],
    v: Float[Array, "n t w"],
    rows: Float[Array, "r e"],
    columns: Float[Array, "r e"],
    *,
    interpret: Any = False,
) -> Float[Array, "n t w"]:
    """`rel_pos_attention` of windows; `interpret` runs it on any platform, to be tested."""
    (out,) = _call(_forward_kernel, [q, k, v], _table(rows, columns, q.dtype), [q], interpret)
    return out


def backward(
    q: Float[Array, "n t w"],
    k: Float[Array, "n t w"],
    v: Float[Array, "n t w"],
    rows: Float[Array, "r e"],
    columns: Float[Array, "r e"],
    cotangent: Float[Array, "n t w"],
    *,
    interpret: Any = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """The gradients of all five operands."""
    table, transposed = jax.vjp(functools.partial(_table, dtype=q.dtype), rows, columns)
    *found, of_table = _call(_backward_kernel, [q, k, v, cotangent], table, [q, k, v, table], interpret)
    return *found, *transposed(of_table.astype(table.dtype))


def _table(rows: Array, columns: Array, dtype: jnp.dtype) -> Float[Array, "offsets lanes"]:
    """Both tables below each other, each offset's vector in the lanes of either head."""
    tables = [jnp.pad(x, ((0, COLUMNS - len(x)), (0, 0))) for x in (rows, columns)]
    table = jnp.pad(jnp.concatenate(tables), ((0, LANES - 2 * COLUMNS), (0, 0)))
    return jnp.concatenate([table, table], 1).astype(dtype)


@functools.cache
def _places(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a window's rows and columns are.

    Returns:
        pick [tokens, 128]: for each query, lane y the offset from it to row y and lane 16 + x that to column x.
        put [tokens, 128]: the other way round, lane y or 16 + x for each offset.
        keys [256, 128]: 1 in lanes y and 16 + x of each key.
    """
    count = -(-(side**2) // MAX_SIDE) * MAX_SIDE
    pick, put = (np.full((count, LANES), NOTHING, np.int32) for _ in range(2))
    keys = np.zeros((KEYS, LANES), np.float32)
    for token in range(side**2):
        for axis, here in enumerate(divmod(token, side)):
            for there in range(side):
                lane, offset = MAX_SIDE * axis + there, COLUMNS * axis + here - there + side - 1
                pick[token, lane], put[token, offset] = offset, lane
            keys[token, MAX_SIDE * axis + here] = 1
    return pick, put, keys


def _call(kernel: Callable, inputs: Sequence[Array], table: Array, outputs: Sequence[Array], interpret: Any) -> Sequence[Array]:
    """Runs a kernel for every window and pair of heads. Results are shaped as `outputs`."""
    n, tokens, width = inputs[0].shape
    side = math.isqrt(tokens)
    pick, put, keys = _places(side)
    grid = n, width // LANES
    # Blocks are larger than the arrays: what is beyond a window's tokens is neither computed with nor written.
    of_queries = pl.BlockSpec((None, len(pick), LANES), lambda i, j: (i, 0, j))
    of_keys = pl.BlockSpec((None, KEYS, LANES), lambda i, j: (i, 0, j))
    whole = lambda x: pl.BlockSpec(x.shape, lambda i, j: (0, 0))  # noqa: E731
    constants = [table, jnp.asarray(pick), jnp.asarray(put), jnp.asarray(keys, table.dtype)]
    specs = [whole(x) if x is table else of_keys if at in (1, 2) else of_queries for at, x in enumerate(outputs)]
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32 if x is table else x.dtype) for x in outputs]
    name = f"window {kernel.__name__.split('_')[1]} {side}x{side} {table.dtype}"
    return pl.pallas_call(
        functools.partial(kernel, tokens),
        grid=grid,
        in_specs=[of_queries, of_keys, of_keys, *[of_queries] * (len(inputs) - 3), *map(whole, constants)],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        metadata={"kernel": name, "steps": str(math.prod(grid)), "bodies": str(math.prod(grid))},
    )(*inputs, *constants)


def _permute(values: Array, lane: Array) -> Array:
    """values[i, lane[i, j]], [tokens, 128], register by register."""
    parts = [
        jnp.take_along_axis(values[start : start + 8], lane[start : start + 8], axis=1, mode="promise_in_bounds")
        for start in range(0, len(values), 8)
    ]
    return jnp.concatenate(parts)


def _real(ref, tokens: int) -> Array:
    """A block, zero where it is beyond a window's tokens."""
    inside = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0) < tokens
    return jnp.where(inside, ref[...].astype(jnp.float32), 0.0).astype(ref.dtype)


def _half(x: Array, head: int) -> Array:
    """Zero in the lanes of the other head."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = lane >= HEAD if head else lane < HEAD
    return jnp.where(mine, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _weights(tokens: int, q: Array, k: Array, table: Array, pick: Array, keys: Array) -> tuple[Array, Array]:
    """The softmax of one head, float32 [queries, keys], and its scaled queries."""
    scaled = (q.astype(jnp.float32) * HEAD**-0.5).astype(q.dtype)
    near = _permute(matmul_f32(q, table, 1, 1), pick).astype(q.dtype)
    scores = matmul_f32(scaled, k, 1, 1) + matmul_f32(near, keys, 1, 1)
    scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < tokens, scores, BLOCKED)
    weights = jnp.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True), scaled


def _forward_kernel(tokens: int, q_ref, k_ref, v_ref, table_ref, pick_ref, put_ref, keys_ref, out_ref) -> None:
    q, k, v = (_real(ref, tokens) for ref in (q_ref, k_ref, v_ref))
    out = jnp.zeros(q.shape, jnp.float32)
    for head in range(2):
        weights, _ = _weights(tokens, _half(q, head), k, table_ref[...], pick_ref[...], keys_ref[...])
        out += _half(matmul_f32(weights.astype(v.dtype), v, 1, 0), head)
    out_ref[...] = out.astype(out_ref.dtype)


def _backward_kernel(
    tokens: int,
    q_ref,
    k_ref,
    v_ref,
    ct_ref,
    table_ref,
    pick_ref,
    put_ref,
    keys_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dtable_ref,
) -> None:
    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _():
        dtable_ref[...] = jnp.zeros_like(dtable_ref)

    q, k, v, ct = (_real(ref, tokens) for ref in (q_ref, k_ref, v_ref, ct_ref))
    table, keys = table_ref[...], keys_ref[...]
    dq, dk, dv = jnp.zeros(q.shape, jnp.float32), jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for head in range(2):
        mine, of_result = _half(q, head), _half(ct, head)
        weights, scaled = _weights(tokens, mine, k, table, pick_ref[...], keys)
        slopes = matmul_f32(of_result, v, 1, 1)
        slopes = (weights * (slopes - (weights * slopes).sum(1, keepdims=True))).astype(q.dtype)
        near = _permute(matmul_f32(slopes, keys, 1, 0), put_ref[...]).astype(q.dtype)
        dq += _half(matmul_f32(slopes, k, 1, 0) * HEAD**-0.5 + matmul_f32(near, table, 1, 0), head)
        dk += matmul_f32(slopes, scaled, 0, 0)
        dv += matmul_f32(weights.astype(v.dtype), of_result, 0, 0)
        dtable_ref[...] += matmul_f32(near, mine, 0, 0)
    for ref, found in ((dq_ref, dq), (dk_ref, dk), (dv_ref, dv)):
        ref[...] = found.astype(ref.dtype)

"""Attention over a grid of keys with decomposed relative positions (SAM), in the form that suits a CPU: they are added.

Written as more columns of queries and keys (`fold_rel_pos`), they can be computed by any kernel, but the product of queries and
keys takes three times the work at SAM's sizes. Added to scores that fit into a CPU's cache, they cost next to nothing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowseg_jax.ops.dot import einsum, matmul_f32

# Float32 scores of a chunk of queries: 32 queries of SAM's global attention. Twice as many take XLA:CPU half as long again.
CHUNK_BYTES = 8 * 2**20
# What the kernel of windows takes: heads of this width, and as many patches a side as have places in a register's lanes.
HEAD, LANES = 64, 128
MAX_SIDE = 16


def is_window(side: int, heads: int, width: int) -> bool:
    """Whether the kernel of windows takes this: `side` x `side` patches, `heads` heads of `width`."""
    return 8 <= side <= MAX_SIDE and width == HEAD and heads % 2 == 0


def gather_rel_pos(table: Float[Array, "r e"], size: int) -> Float[Array, "q k e"]:
    """R[q, k] = table[q - k + size - 1] for q, k < size.

    Taken by a product with a 0/1 tensor: the transpose of an indexed read would be a scatter in every layer's backward pass.
    """
    offset = np.arange(size)[:, None] - np.arange(size)[None, :] + size - 1
    return einsum("qkr,re->qke", jax.nn.one_hot(offset, 2 * size - 1, dtype=table.dtype), table).astype(table.dtype)


def rel_pos_operands(
    heads: int, q: Float[Array, "n t w"], rows: Float[Array, "r e"], columns: Float[Array, "r e"]
) -> tuple[Float[Array, "n t h e"], Float[Array, "n t h y"], Float[Array, "n t h x"]]:
    """The scaled queries, and the products of the unscaled ones with the relative positions of all rows and columns."""
    n, t, _ = q.shape
    side = math.isqrt(t)
    q = q.reshape(n, side, side, heads, -1)
    of_rows = einsum("nyxhe,yke->nyxhk", q, gather_rel_pos(rows.astype(q.dtype), side))
    of_columns = einsum("nyxhe,xke->nyxhk", q, gather_rel_pos(columns.astype(q.dtype), side))
    operands = q * q.shape[-1] ** -0.5, of_rows.astype(q.dtype), of_columns.astype(q.dtype)
    return tuple(x.reshape(n, t, heads, -1) for x in operands)


def fold_rel_pos(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t h e"],
    rows: Float[Array, "b s h y"],
    columns: Float[Array, "b s h x"],
) -> tuple[Float[Array, "b s h _"], Float[Array, "b t h _"]]:
    """Queries [q, rows, columns] and keys [k, onehot(y), onehot(x)], whose plain product is q k^T + rows[y] + columns[x].

    Zeros fill what is wider than a kernel's lanes up to whole ones: nothing has to copy it for that.
    """
    e, height, width = k.shape[-1], rows.shape[-1], columns.shape[-1]
    missing = -(e + height + width) % LANES if e + height + width > LANES else 0
    place = np.concatenate([np.eye(height).repeat(width, 0), np.tile(np.eye(width), (height, 1))], -1)
    place = jnp.asarray(np.pad(place, ((0, 0), (e, missing))), k.dtype)
    # Added to zeros, which is exact: a concatenation would write the places to memory for every batch element and head.
    wide = jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, height + width + missing))) + place[:, None]
    return jnp.concatenate([q, rows, columns, jnp.zeros((*q.shape[:3], missing), q.dtype)], -1), wide


def forward(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t h e"],
    v: Float[Array, "b t h f"],
    rows: Float[Array, "b s h y"],
    columns: Float[Array, "b s h x"],
) -> tuple[Float[Array, "b s h f"], Float[Array, "b h s"]]:
    """softmax(q k^T + rows[y] + columns[x]) v, and the logarithm of each query's softmax sum, as `xla.forward` has them."""
    return jax.lax.map(lambda image: _image(*image), (q, k, v, rows, columns))


def _image(q: Array, k: Array, v: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
    q, k, v, rows, columns = (x.swapaxes(0, 1) for x in (q, k, v, rows, columns))  # heads first
    h, s, _ = q.shape
    parts = -(-s // max(1, CHUNK_BYTES // (4 * h * k.shape[1])))
    size = -(-s // parts)

    def attend(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, rows, columns = chunk
        scores = matmul_f32(q, k, 2, 2, batch=1).reshape(h, size, rows.shape[-1], columns.shape[-1])
        scores = (scores + rows[..., None] + columns[..., None, :]).reshape(h, size, -1)
        peak = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        out = matmul_f32(weights.astype(v.dtype), v, 2, 1, batch=1) / total
        return out.astype(v.dtype), peak + jnp.log(total)

    def split(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, parts * size - s), (0, 0))).reshape(h, parts, size, -1).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(h, parts * size, -1)[:, :s]

    out, logsum = map(join, jax.lax.map(attend, (split(q), split(rows), split(columns))))
    return out.swapaxes(0, 1), logsum[..., 0]

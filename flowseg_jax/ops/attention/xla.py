"""Attention in plain JAX: any platform, any mask.

The form is chosen for what XLA:CPU makes of it. Products over explicit [batch * kv head, rows, width] operands are faster than
the four-axis einsum. And with the softmax's sum divided out after the product with the values, so that nothing but an exp
stands between the two products, the forward pass without a mask becomes one kernel that never writes the scores to memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flowseg_jax.ops.attention.mask import AttentionMask
from flowseg_jax.ops.dot import TILE, einsum, matmul_f32

# Above WHOLE_BYTES of float32 scores, queries are processed in chunks of CHUNK_BYTES of them a batch element (128 queries of
# SAM's global attention): near a CPU's cache size, which is faster than larger chunks.
WHOLE_BYTES = 512 * 2**20
CHUNK_BYTES = 32 * 2**20
BLOCKED = -1e30  # score of a key that must not be attended to: finite, so that a row of them has no NaN

Mask = AttentionMask | Bool[Array, "#b #h #s t"] | None


def forward(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    mask: Mask,
    scale: float,
    chunk: int | None = None,
) -> tuple[Float[Array, "b s h f"], Float[Array, "b h s"]]:
    """The result, and the logarithm of each query's softmax sum in float32, 1e30 for a query that may attend to no key."""
    b, s, h, _ = q.shape
    groups = k.shape[2]
    q, k, v, mask = _by_group(q, groups), _by_head(k), _by_head(v), _grouped_mask(mask, groups)
    parts, size = _parts(b, s, h, k.shape[1], chunk)
    if parts == 1:
        out, logsum = _attend(q, mask, k, v, scale)
    else:
        xs = _split(q, parts, size), _split_mask(mask, parts, size)
        out, logsum = jax.lax.map(lambda x: _attend(x[0], _or_whole(x[1], mask), k, v, scale), xs)
        out, logsum = _join(out, s), _join(logsum, s)
    return _by_query(out), logsum.reshape(b, h, s)


def backward(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    mask: Mask,
    scale: float,
    out: Float[Array, "b s h f"],
    logsum: Float[Array, "b h s"],
    cotangent: Float[Array, "b s h f"],
    chunk: int | None = None,
) -> tuple[Float[Array, "b s h e"], Float[Array, "b t g e"], Float[Array, "b t g f"]]:
    """Gradients of q, k and v. The scores are computed again instead of being kept."""
    b, s, h, _ = q.shape
    groups = k.shape[2]
    mean = expected_slope(out, cotangent)
    rows = [x.reshape(b, groups, h // groups, s, 1) for x in (logsum, mean)]
    queries = (_by_group(q, groups), _by_group(cotangent, groups), *rows)
    k, v, mask = _by_head(k), _by_head(v), _grouped_mask(mask, groups)
    parts, size = _parts(b, s, h, k.shape[1], chunk)
    if parts == 1:
        dq, dk, dv = _differentiate(queries, mask, k, v, scale)
    else:

        def add(total, x):
            dq, *found = _differentiate(x[0], _or_whole(x[1], mask), k, v, scale)
            return tuple(map(jnp.add, total, found)), dq

        xs = tuple(_split(x, parts, size) for x in queries), _split_mask(mask, parts, size)
        (dk, dv), dq = jax.lax.scan(add, tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v)), xs)
        dq = _join(dq, s)
    dk, dv = (x.reshape(b, groups, *x.shape[1:]).swapaxes(1, 2).astype(k.dtype) for x in (dk, dv))
    return _by_query(dq), dk, dv


def expected_slope(out: Float[Array, "b s h f"], cotangent: Float[Array, "b s h f"]) -> Float[Array, "b h s"]:
    """The mean, weighted by attention, of the gradients of a query's weights: what softmax subtracts from each of them."""
    return einsum("bshf,bshf->bhs", out, cotangent)


def _attend(q: Array, mask: Array | None, k: Array, v: Array, scale: float) -> tuple[Array, Array]:
    """q [b, g, r, s, e], k [b*g, t, e], v [b*g, t, f], mask broadcasting to [b, g, r, s, t] -> [b, g, r, s, f] and [.., 1]."""
    scores = _scores(q, mask, k, scale)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    out = matmul_f32(weights.astype(v.dtype), v, 2, 1, batch=1) / total
    logsum = peak + jnp.log(total)
    if mask is not None:
        out, logsum = jnp.where(peak > BLOCKED, out, 0.0), jnp.where(peak > BLOCKED, logsum, -BLOCKED)
    return out.astype(v.dtype).reshape(*q.shape[:4], -1), logsum.reshape(*q.shape[:4], 1)


def _differentiate(
    queries: tuple[Array, ...], mask: Array | None, k: Array, v: Array, scale: float
) -> tuple[Array, Array, Array]:
    """`queries`: q, cotangent, logsum and mean (the product of the result with its cotangent), [b, g, r, s, *] each.

    The gradients of k and v are in float32, to be added up over chunks.
    """
    q = queries[0]
    weights = jnp.exp(_scores(q, mask, k, scale) - _flat(queries[2]))  # 0 where blocked, for a query without keys too
    flat, cotangent, mean = _flat(q), _flat(queries[1]), _flat(queries[3])
    dv = matmul_f32(weights.astype(v.dtype), cotangent, 1, 1, batch=1)
    slopes = (weights * (matmul_f32(cotangent, v, 2, 2, batch=1) - mean) * scale).astype(k.dtype)
    dq = matmul_f32(slopes, k, 2, 1, batch=1).astype(q.dtype).reshape(q.shape)
    return dq, matmul_f32(slopes, flat, 1, 1, batch=1), dv


def _scores(q: Array, mask: Array | None, k: Array, scale: float) -> Array:
    """float32 [b*g, r*s, t]."""
    if mask is None:
        return matmul_f32(_flat(q), k, 2, 2, batch=1) * scale
    # Masked while batch and heads are two axes: over one of both the TPU compiler writes the mask to memory for every head.
    b, g, r, s, e = q.shape
    scores = matmul_f32(q.reshape(b, g, r * s, e), k.reshape(b, g, -1, e), 3, 3, batch=2) * scale
    return jnp.where(mask, scores.reshape(b, g, r, s, -1), BLOCKED).reshape(b * g, r * s, -1)


def _by_group(x: Array, groups: int) -> Array:
    """[b, s, h, n] -> [b, g, r, s, n], r the query heads of a key/value head."""
    b, s, h, n = x.shape
    return x.reshape(b, s, groups, h // groups, n).transpose(0, 2, 3, 1, 4)


def _by_head(x: Array) -> Array:
    """[b, t, g, n] -> [b*g, t, n]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _by_query(x: Array) -> Array:
    """[b, g, r, s, n] -> [b, s, h, n]."""
    return x.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], x.shape[3], -1, x.shape[4])


def _flat(x: Array) -> Array:
    """[b, g, r, s, n] -> [b*g, r*s, n]."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[4])


def _grouped_mask(mask: Mask, groups: int) -> Array | None:
    """As [#b, #g, #r, #s, t]."""
    if mask is None:
        return None
    mask = mask.materialize() if isinstance(mask, AttentionMask) else mask
    heads = (groups, mask.shape[1] // groups) if mask.shape[1] > 1 else (1, 1)
    return mask.reshape(mask.shape[0], *heads, *mask.shape[2:])


def _parts(b: int, s: int, h: int, t: int, chunk: int | None) -> tuple[int, int]:
    """(number of chunks, queries a chunk)."""
    whole = 4 * s * t * h
    if chunk is None:
        chunk = s if b * whole <= WHOLE_BYTES else max(1, s * CHUNK_BYTES // whole)
    parts = -(-s // chunk)
    size = -(-s // parts)
    if parts > 1 and size > TILE:
        size = -(-size // TILE) * TILE
    return -(-s // size), size


def _split(x: Array, parts: int, size: int) -> Array:
    """[b, g, r, s, n] -> [parts, b, g, r, size, n]; missing queries are zeros (False: they attend to nothing)."""
    b, g, r, s, n = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, parts * size - s), (0, 0)))
    return jnp.moveaxis(x.reshape(b, g, r, parts, size, n), 3, 0)


def _split_mask(mask: Array | None, parts: int, size: int) -> Array | None:
    """None where there is nothing to split: no mask, or one for all queries."""
    return None if mask is None or mask.shape[3] == 1 else _split(mask, parts, size)


def _or_whole(part: Array | None, mask: Array | None) -> Array | None:
    return mask if part is None else part


def _join(x: Array, s: int) -> Array:
    """[parts, b, g, r, size, n] -> [b, g, r, s, n]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :s]

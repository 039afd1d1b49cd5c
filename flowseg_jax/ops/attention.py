"""Scaled dot-product attention: grouped-query, float32 softmax, bounded memory.

The form is chosen for what XLA:CPU makes of it. Products over explicit [batch * kv head, rows, width] operands are faster than
the four-axis einsum. And with the softmax's sum divided out after the product with the values, so that nothing but an exp
stands between the two products, the forward pass without a mask becomes one kernel that never writes the scores to memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Above WHOLE_BYTES of float32 scores, queries are processed in chunks of CHUNK_BYTES of them a batch element (128 queries of
# SAM's global attention): near a CPU's cache size, which is faster than larger chunks.
WHOLE_BYTES = 512 * 2**20
CHUNK_BYTES = 32 * 2**20
BLOCKED = -1e30  # score of a key that must not be attended to: finite, so that a row of them has no NaN


def attention(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    *,
    mask: Bool[Array, "#b #h #s t"] | None = None,
    scale: float | None = None,
    chunk: int | None = None,
) -> Float[Array, "b s h f"]:
    """softmax(scale * q k^T) v, each query head h reading key/value head h // (H / G).

    Args:
        q: queries; H must be a multiple of G.
        k: keys.
        v: values; their width F may differ from E.
        mask: True where query s may attend to key t; axes of size 1 broadcast, but for the keys. None allows every key.
        scale: factor on the scores, default E ** -0.5.
        chunk: queries computed at a time. A chunk's scores are recomputed in the backward pass, so no buffer holds all S x T of
            them. None: all at once, unless the float32 scores exceed `WHOLE_BYTES`.

    Returns:
        Array in the dtype of v; products accumulate in float32. A query that may attend to no key gets zeros.

    Raises:
        ValueError: shapes that do not fit.
    """
    (b, s, h, e), (t, g) = q.shape, k.shape[1:3]
    if h % g or k.shape != (b, t, g, e) or v.shape[:3] != (b, t, g):
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    if mask is not None:
        if mask.ndim != 4 or mask.shape[3] != t or any(m not in (1, n) for m, n in zip(mask.shape, (b, h, s), strict=False)):
            raise ValueError(f"attention: mask {mask.shape} does not broadcast to {(b, h, s, t)}")
        heads = (g, h // g) if mask.shape[1] == h else (1, 1)
        mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
    scale = e**-0.5 if scale is None else scale
    q = q.reshape(b, s, g, h // g, e).transpose(0, 2, 3, 1, 4)
    k = k.swapaxes(1, 2).reshape(b * g, t, e)
    v = v.swapaxes(1, 2).reshape(b * g, t, v.shape[3])

    if chunk is None:
        whole = 4 * s * t * h
        chunk = s if b * whole <= WHOLE_BYTES else max(1, s * CHUNK_BYTES // whole)
    parts = -(-s // chunk)
    if parts == 1:
        out = _attend(q, k, v, mask, scale)
    else:
        size = -(-s // parts)
        xs = (_split(q, parts, size), None if mask is None or mask.shape[3] == 1 else _split(mask, parts, size))
        body = jax.checkpoint(lambda x: _attend(x[0], k, v, mask if x[1] is None else x[1], scale), prevent_cse=False)
        out = jnp.moveaxis(jax.lax.map(body, xs), 0, 3).reshape(b, g, h // g, parts * size, -1)[:, :, :, :s]
    return out.transpose(0, 3, 1, 2, 4).reshape(b, s, h, -1)


def _split(x: Array, parts: int, size: int) -> Array:
    """[b, g, r, s, n] -> [parts, b, g, r, size, n]; missing queries are zeros (False: they attend to nothing)."""
    b, g, r, s, n = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, parts * size - s), (0, 0)))
    return jnp.moveaxis(x.reshape(b, g, r, parts, size, n), 3, 0)


def _attend(q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
    """q [b, g, r, s, e], k [b*g, t, e], v [b*g, t, f], mask broadcasting to [b, g, r, s, t] -> [b, g, r, s, f]."""
    b, g, r, s, e = q.shape
    scores = _batched(q.reshape(b * g, r * s, e), k, 2) * scale
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, (b, g, r, s, k.shape[1])).reshape(scores.shape), scores, BLOCKED)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # a shift: it cancels, and so does its gradient
    weights = jnp.exp(scores - peak)
    out = _batched(weights.astype(v.dtype), v, 1) / weights.sum(-1, keepdims=True)
    if mask is not None:
        out = jnp.where(peak > BLOCKED, out, 0.0)
    return out.astype(v.dtype).reshape(b, g, r, s, -1)


def _batched(x: Array, y: Array, axis: int) -> Array:
    """Batched product over the last axis of x and `axis` of y, accumulated and returned in float32."""
    return jax.lax.dot_general(x, y, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)

"""Attention on a GPU: cuDNN's fused kernel, by way of `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flowseg_jax.ops.attention.mask import AttentionMask


def takes(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    mask: AttentionMask | Bool[Array, "#b #h #s t"] | None,
) -> bool:
    """Whether cuDNN is there and computes this, gradients too: JAX refuses by dtype, head width, length and kind of GPU."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    try:
        jax.eval_shape(lambda q, k, v, mask: jax.vjp(lambda *x: _attend(*x, mask, 1.0), q, k, v)[0], q, k, v, mask)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def forward(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    mask: AttentionMask | Bool[Array, "#b #h #s t"] | None,
    scale: float,
) -> tuple[Float[Array, "b s h f"], Float[Array, "b h s"]]:
    """The result, and zeros in the place of `xla.forward`'s logarithms, which stay inside cuDNN."""
    b, s, h, _ = q.shape
    return _attend(q, k, v, mask, scale), jnp.zeros((b, h, s), jnp.float32)


def backward(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    mask: AttentionMask | Bool[Array, "#b #h #s t"] | None,
    scale: float,
    out: Float[Array, "b s h f"],
    logsum: Float[Array, "b h s"],
    cotangent: Float[Array, "b s h f"],
) -> tuple[Float[Array, "b s h e"], Float[Array, "b t g e"], Float[Array, "b t g f"]]:
    """As `xla.backward`. The forward kernel runs again: its own residuals are not to be had from outside."""
    return jax.vjp(lambda q, k, v: _attend(q, k, v, mask, scale), q, k, v)[1](cotangent)


def _attend(q: Array, k: Array, v: Array, mask: AttentionMask | Array | None, scale: float) -> Array:
    mask = mask.materialize() if isinstance(mask, AttentionMask) else mask
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], mask.shape[3]))
    width = v.shape[3]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[3] - width)))  # JAX wants values as wide as keys
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")[..., :width]
    if mask is None:
        return out
    # cuDNN adds a large negative number to blocked scores: a query without keys would get the mean of all values.
    return jnp.where(mask.any(-1).swapaxes(1, 2)[..., None], out, 0)

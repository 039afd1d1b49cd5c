"""The forward kernel of attention on a TPU (`flash`)."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from flowseg_jax.ops.attention.blocks import Blocks, Loops
from flowseg_jax.ops.attention.flash_call import Mask, Step, call, in_order, lay
from flowseg_jax.ops.attention.xla import BLOCKED
from flowseg_jax.ops.dot import matmul_f32


def run(scale: float, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    """`flash.forward` on one device."""
    s, f, blocks = q.shape[1], v.shape[3], Blocks.of(q, k)
    # Queries need no padding: each has a column of its own, and what is beyond the last is never written.
    q, k, v = lay(q, 1), lay(k, blocks.keys), lay(v, blocks.keys)
    out, logsum = call(
        _attend,
        blocks,
        Loops.by_query(blocks, in_order(mask)),
        scale,
        mask,
        inputs=[("q", q), ("k", k), ("k", v)],
        outputs=[("q", v.shape[3], v.dtype), ("s", 1, jnp.dtype(jnp.float32))],
        scratch=[(blocks.together, rows, blocks.queries) for rows in (1, 1, v.shape[3])],
    )
    return out[..., :f], logsum[:, :, 0, :s]


def _attend(step: Step, q_ref, k_ref, v_ref, out_ref, logsum_ref, peak_ref, total_ref, sum_ref) -> None:
    """The forward kernel. `sum_ref` collects weighted values, transposed like the scores: [width, queries]."""

    @pl.when(step.first)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, BLOCKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def attend(head) -> None:
        scores, v = step.scores(step.of_head(q_ref, head)[...], k_ref[0]), v_ref[0]
        peak = jnp.maximum(peak_ref[head], scores.max(0, keepdims=True))
        weights, decay = jnp.exp(scores - peak), jnp.exp(peak_ref[head] - peak)
        peak_ref[head] = peak
        total_ref[head] = total_ref[head] * decay + weights.sum(0, keepdims=True)
        sum_ref[head] = sum_ref[head] * decay + matmul_f32(v, weights.astype(v.dtype), 0, 0)

    def finish(head) -> None:
        found = peak_ref[head] > BLOCKED  # what was added up before a query's first key has decayed to nothing
        total = jnp.where(found, total_ref[head], 1.0)
        step.of_head(out_ref, head)[...] = jnp.where(found, sum_ref[head] / total, 0.0).T.astype(out_ref.dtype)
        logsum_ref[0, head] = jnp.where(found, peak_ref[head] + jnp.log(total), -BLOCKED)

    @pl.when(step.active)
    def _():
        step.share_mask()
        step.each_head(attend)

    @pl.when(step.last)
    def _():
        step.each_head(finish)

"""The backward kernel of attention on a TPU (`flash`): the gradients of queries, keys and values in one pass over all blocks.

The weights are computed once for all three. The sums of keys and values live through the innermost loop, over queries. Those of
all queries stay in the chip's memory until the last keys are done.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from flowseg_jax.ops.attention.blocks import Blocks, Loops
from flowseg_jax.ops.attention.flash_call import LANES, Mask, Step, call, in_order, lay, pad
from flowseg_jax.ops.attention.mask import AttentionMask
from flowseg_jax.ops.dot import matmul_f32

HELD_BYTES = 32 * 2**20  # of the chip's memory, for the gradients of all queries that read the same keys


def run(
    scale: float, q: Array, k: Array, v: Array, cotangent: Array, out: Array, logsum: Array, mask: Mask
) -> tuple[Array, Array, Array]:
    """`flash.backward` on one device. Queries that are too many at a time come in several parts."""
    s, blocks = q.shape[1], Blocks.of(q, k)
    most = HELD_BYTES // (blocks.repeat * (q.shape[3] + -q.shape[3] % LANES) * (4 + 2 * q.dtype.itemsize))
    size = max(most // blocks.queries, 1) * blocks.queries
    if s <= size:
        return _differentiate_all(scale, q, k, v, cotangent, out, logsum, mask)
    dqs, total = [], (0.0, 0.0)
    for start in range(0, s, size):
        part = slice(start, start + size)
        of_part = (x[:, part] for x in (q, cotangent, out))
        q_part, *others = of_part
        dq, *found = _differentiate_all(scale, q_part, k, v, *others, logsum[:, :, part], _of_queries(mask, part))
        dqs.append(dq)
        total = tuple(x + y.astype(jnp.float32) for x, y in zip(total, found, strict=True))
    return jnp.concatenate(dqs, 1), *(x.astype(k.dtype) for x in total)


def _of_queries(mask: Mask, part: slice) -> Mask:
    if isinstance(mask, AttentionMask):
        queries = jax.tree.map(lambda x: x[:, part], mask.queries)
        return dataclasses.replace(mask, queries=queries, in_order=False)
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]


def _differentiate_all(
    scale: float, q: Array, k: Array, v: Array, cotangent: Array, out: Array, logsum: Array, mask: Mask
) -> tuple[Array, Array, Array]:
    (s, e), (t, f), blocks = q.shape[1::2], v.shape[1::2], Blocks.of(q, k)
    q, cotangent, out = (lay(x, blocks.queries) for x in (q, cotangent, out))
    k, v = lay(k, blocks.keys), lay(v, blocks.keys)
    logsum = pad(logsum[:, :, None], 3, blocks.queries)
    all_rows = blocks.parts, blocks.rows, blocks.together
    dq, dk, dv = call(
        _differentiate,
        blocks,
        Loops.by_key(blocks, in_order(mask)),
        scale,
        mask,
        inputs=[("q", q), ("k", k), ("k", v), ("q", cotangent), ("s", logsum), ("once", out)],
        outputs=[("all", q.shape[3], q.dtype), ("k", k.shape[3], k.dtype), ("k", v.shape[3], v.dtype)],
        scratch=[
            (*all_rows, blocks.queries, q.shape[3]),
            (*all_rows, 1, blocks.queries),
            (blocks.keys, k.shape[3]),
            (blocks.keys, v.shape[3]),
        ],
    )
    return dq[:, :s, :, :e], dk[:, :t, :, :e], dv[:, :t, :, :f]


def _differentiate(
    step: Step,
    q_ref,
    k_ref,
    v_ref,
    ct_ref,
    logsum_ref,
    out_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dq_sum_ref,
    mean_ref,
    dk_sum_ref,
    dv_sum_ref,
) -> None:
    """The kernel. `mean_ref` has what `xla.expected_slope` gives; the factor on the scores comes last."""
    block, heads = step.rows

    def start(head) -> None:
        dq_sum_ref[heads, block, head] = jnp.zeros_like(dq_sum_ref[heads, block, head])
        of_values = (step.of_head(ref, head)[...].astype(jnp.float32) for ref in (out_ref, ct_ref))
        mean_ref[heads, block, head] = math.prod(of_values).T.sum(0, keepdims=True)

    def differentiate(head) -> None:
        q, k, ct = step.of_head(q_ref, head)[...], k_ref[0], step.of_head(ct_ref, head)[...]
        weights, slopes = step.slopes(q, k, v_ref[0], ct, logsum_ref[0, head], mean_ref[heads, block, head])
        dq_sum_ref[heads, block, head] += matmul_f32(slopes, k, 0, 0)
        dk_sum_ref[...] += matmul_f32(slopes, q, 1, 0)
        dv_sum_ref[...] += matmul_f32(weights, ct, 1, 0)

    def finish(head) -> None:
        total = dq_sum_ref[heads, block, head] * step.scale
        step.of_row(dq_ref, head, *total.shape)[...] = total.astype(dq_ref.dtype)

    @pl.when(step.first_keys)
    def _():
        step.each_head(start)

    @pl.when(step.first)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(step.active)
    def _():
        step.share_mask()
        step.each_head(differentiate)

    @pl.when(step.last_keys)
    def _():
        step.each_head(finish)

    @pl.when(step.last)
    def _():
        dk_ref[0] = (dk_sum_ref[...] * step.scale).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)

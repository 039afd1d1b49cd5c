"""Attention on a TPU: a Pallas kernel that keeps the scores on the chip (FlashAttention: Dao et al., arXiv:2205.14135).

JAX's own TPU kernels know causal masks and segments that are equal. Here all segments attend to a prefix, and windows count
positions. So `mask.may_attend` is evaluated for each block, and blocks in which no query may attend to any key are skipped. A
mask that is a matrix, as the mask decoder has, comes block by block.

Scores are held transposed, keys by queries: what exists once per query (peak, sum, segment) is then a row, the shape in which
a TPU holds a vector. Heads lie side by side in the last axis, padded to whole lanes, so nothing is transposed outside. Query
heads that read the same keys share a step: their mask is evaluated once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float

from flowseg_jax.ops.attention.blocks import Blocks, Loops, metadata
from flowseg_jax.ops.attention.mask import AttentionMask, may_attend
from flowseg_jax.ops.attention.xla import BLOCKED
from flowseg_jax.ops.collectives import TENSOR_AXIS
from flowseg_jax.ops.dot import matmul_f32

LANES = 128
Mask = AttentionMask | Bool[Array, "#b 1 #s t"] | None
NOBODY = (np.iinfo(np.int32).min, -1, 0)  # the fields of a token that sees nothing and is seen by nothing


def forward(
    q: Float[Array, "b s h e"], k: Float[Array, "b t g e"], v: Float[Array, "b t g f"], mask: Mask, scale: float
) -> tuple[Float[Array, "b s h f"], Float[Array, "b h s"]]:
    """As `xla.forward`, for an `AttentionMask`, a matrix that is the same for all heads, or none."""
    return _on_each_device(functools.partial(_forward, scale), "qkk", "qs", (q, k, v), mask)


def backward(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    mask: Mask,
    scale: float,
    out: Float[Array, "b s h f"],
    logsum: Float[Array, "b h s"],
    cotangent: Float[Array, "b s h f"],
) -> tuple[Float[Array, "b s h e"], Float[Array, "b t g e"], Float[Array, "b t g f"]]:
    """As `xla.backward`, for the masks of `forward`."""
    arrays = (q, k, v, cotangent, out, logsum)
    return _on_each_device(functools.partial(_backward, scale), "qkkqqs", "qkk", arrays, mask)


def _on_each_device(run: Callable, layouts: str, results: str, arrays: Sequence[Array], mask: Mask) -> tuple[Array, ...]:
    """Runs on the parts of a device: the compiler cannot divide a kernel along the axes of a mesh that are left to it.

    `TENSOR_AXIS` divides heads, other axes the batch, each where it fits. `layouts` are "q" and "k" for [batch, tokens, heads,
    width] and "s" for [batch, heads, tokens].
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    if not ours:
        return run(*arrays, mask)
    if isinstance(mask, Array):
        mask = jnp.broadcast_to(mask, (arrays[0].shape[0], *mask.shape[1:]))
    batch, heads = [], None
    for axis in ours:
        if axis == TENSOR_AXIS:
            heads = axis if all(x.shape[2] % mesh.shape[axis] == 0 for x in arrays[:2]) else None
        elif arrays[0].shape[0] % np.prod([mesh.shape[other] for other in (*batch, axis)]) == 0:
            batch.append(axis)
    batch = tuple(batch) or None
    specs = dict.fromkeys("qk", PartitionSpec(batch, None, heads)) | {"s": PartitionSpec(batch, heads)}
    shared = jax.shard_map(
        run,
        in_specs=(*(specs[layout] for layout in layouts), PartitionSpec(batch)),
        out_specs=tuple(specs[layout] for layout in results),
        axis_names=set(ours),
        check_vma=False,
    )
    return shared(*arrays, mask)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step inside a kernel.

    Attributes:
        first, last: whether it begins or ends the innermost loop.
        active: whether any query sees any key.
        allowed: () -> which query sees which key, [keys, queries]; None: all see all.
        scale: of the scores.
        heads: query heads of the step.
        bias_ref: where several heads share a mask, what it adds to their scores.
    """

    first: Array
    last: Array
    active: Array | bool
    allowed: Callable[[], Array] | None
    scale: float
    heads: int
    bias_ref: Any

    def each_head(self, run: Callable[[Any], None]) -> None:
        """Runs for one head after the other, given its number."""
        if self.heads == 1:
            run(0)
        else:
            jax.lax.fori_loop(0, self.heads, lambda head, _: run(head), None)

    def share_mask(self) -> None:
        """Before the scores of several heads."""
        if self.bias_ref is not None:
            self.bias_ref[...] = jnp.where(self.allowed(), 0.0, BLOCKED)

    def of_head(self, ref: Any, head: Any) -> Any:
        """The part of a block [1, queries, heads * width] that belongs to a head."""
        width = ref.shape[2] // self.heads
        return ref.at[0, :, slice(None) if self.heads == 1 else pl.ds(pl.multiple_of(head * width, LANES), width)]

    def scores(self, q: Array, k: Array) -> Array:
        """float32 [keys, queries]."""
        scores = matmul_f32(k, q, 1, 1) * self.scale
        if self.bias_ref is not None:
            return scores + self.bias_ref[...]
        return scores if self.allowed is None else jnp.where(self.allowed(), scores, BLOCKED)

    def slopes(self, q: Array, k: Array, v: Array, cotangent: Array, logsum: Array, mean: Array) -> tuple[Array, Array]:
        """The weights, and the gradients of the products of queries and keys: [keys, queries], ready for the next product."""
        weights = jnp.exp(self.scores(q, k) - logsum)
        slopes = weights * (matmul_f32(v, cotangent, 1, 1) - mean) * self.scale
        return weights.astype(q.dtype), slopes.astype(q.dtype)


def _forward(scale: float, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    s, f, blocks = q.shape[1], v.shape[3], Blocks.of(q, k)
    q, k, v = _lay(q, blocks.queries), _lay(k, blocks.keys), _lay(v, blocks.keys)
    out, logsum = _call(
        _attend,
        blocks,
        Loops.by_query(blocks, _in_order(mask)),
        scale,
        mask,
        inputs=[("q", q), ("k", k), ("k", v)],
        outputs=[("q", v.shape[3], v.dtype), ("s", 1, jnp.dtype(jnp.float32))],
        scratch=[(blocks.together, rows, blocks.queries) for rows in (1, 1, v.shape[3])],
    )
    return out[:, :s, :, :f], logsum[:, :, 0, :s]


def _backward(
    scale: float, q: Array, k: Array, v: Array, cotangent: Array, out: Array, logsum: Array, mask: Mask
) -> tuple[Array, Array, Array]:
    (s, e), (t, f), blocks = q.shape[1::2], v.shape[1::2], Blocks.of(q, k)
    q, cotangent, out = (_lay(x, blocks.queries) for x in (q, cotangent, out))
    k, v = _lay(k, blocks.keys), _lay(v, blocks.keys)
    logsum = _pad(logsum[:, :, None], 3, blocks.queries)
    inputs = [("q", q), ("k", k), ("k", v), ("q", cotangent), ("s", logsum)]
    dq, mean = _call(
        _differentiate_queries,
        blocks,
        Loops.by_query(blocks, _in_order(mask)),
        scale,
        mask,
        [*inputs, ("q", out)],
        outputs=[("q", q.shape[3], q.dtype), ("s", 1, jnp.dtype(jnp.float32))],
        scratch=[(blocks.together, blocks.queries, q.shape[3])],
    )
    dk, dv = _call(
        _differentiate_keys,
        blocks,
        Loops.by_key(blocks, _in_order(mask)),
        scale,
        mask,
        [*inputs, ("s", mean)],
        outputs=[("k", k.shape[3], k.dtype), ("k", v.shape[3], v.dtype)],
        scratch=[(blocks.keys, k.shape[3]), (blocks.keys, v.shape[3])],
    )
    return dq[:, :s, :, :e], dk[:, :t, :, :e], dv[:, :t, :, :f]


def _attend(step: _Step, q_ref, k_ref, v_ref, out_ref, logsum_ref, peak_ref, total_ref, sum_ref) -> None:
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


def _differentiate_queries(step: _Step, q_ref, k_ref, v_ref, ct_ref, logsum_ref, out_ref, dq_ref, mean_ref, sum_ref) -> None:
    """The kernel of the queries' gradient, and of what `xla.expected_slope` gives."""

    def start(head) -> None:
        sum_ref[head] = jnp.zeros_like(sum_ref[head])
        of_values = (step.of_head(ref, head)[...].astype(jnp.float32) for ref in (out_ref, ct_ref))
        mean_ref[0, head] = math.prod(of_values).T.sum(0, keepdims=True)

    @pl.when(step.first)
    def _():
        step.each_head(start)

    def differentiate(head) -> None:
        k, q, ct = k_ref[0], step.of_head(q_ref, head)[...], step.of_head(ct_ref, head)[...]
        _, slopes = step.slopes(q, k, v_ref[0], ct, logsum_ref[0, head], mean_ref[0, head])
        sum_ref[head] += matmul_f32(slopes, k, 0, 0)

    def finish(head) -> None:
        step.of_head(dq_ref, head)[...] = sum_ref[head].astype(dq_ref.dtype)

    @pl.when(step.active)
    def _():
        step.share_mask()
        step.each_head(differentiate)

    @pl.when(step.last)
    def _():
        step.each_head(finish)


def _differentiate_keys(
    step: _Step, q_ref, k_ref, v_ref, ct_ref, logsum_ref, mean_ref, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref
) -> None:
    """The kernel of the keys' and the values' gradients."""

    @pl.when(step.first)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def differentiate(head) -> None:
        q, ct = step.of_head(q_ref, head)[...], step.of_head(ct_ref, head)[...]
        weights, slopes = step.slopes(q, k_ref[0], v_ref[0], ct, logsum_ref[0, head], mean_ref[0, head])
        dk_sum_ref[...] += matmul_f32(slopes, q, 1, 0)
        dv_sum_ref[...] += matmul_f32(weights, ct, 1, 0)

    @pl.when(step.active)
    def _():
        step.share_mask()
        step.each_head(differentiate)

    @pl.when(step.last)
    def _():
        dk_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)


def _call(
    kernel: Callable,
    blocks: Blocks,
    loops: Loops,
    scale: float,
    mask: Mask,
    inputs: Sequence[tuple[str, Array]],
    outputs: Sequence[tuple[str, int, jnp.dtype]],
    scratch: Sequence[tuple[int, ...]],
) -> list[Array]:
    """Runs a kernel over all blocks.

    Args:
        kernel: takes the step, then the references of inputs, outputs and scratch.
        blocks, loops: the division and the order.
        scale, mask: of the scores.
        inputs: kind and array: "q" and "k" [batch, tokens, heads, width], "s" [batch, heads, 1, tokens].
        outputs: kind, width and dtype.
        scratch: shapes of the float32 sums that live through the innermost loop.
    """
    batch = inputs[0][1].shape[0]
    steps, together = (batch, *loops.steps), blocks.together
    s, t = blocks.rows * blocks.queries, blocks.columns * blocks.keys
    is_rule = isinstance(mask, AttentionMask)
    described = () if mask is None else _describe(mask, blocks) if is_rule else (_lay_matrix(mask, batch, blocks),)
    ahead = 0  # arrays that a step knows before its data is there: the active blocks, and the order of the steps
    if is_rule:
        orders = [] if loops.order is None else [jnp.asarray(loops.order)]
        described, ahead = (described[0], *orders, *described[1:]), 1 + len(orders)

    def spec(shape: tuple[int, ...], index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *at: index(*loops.place(*at)))

    def block(kind: str, width: int) -> pl.BlockSpec:
        if kind == "q":
            return spec((1, blocks.queries, together * width), lambda b, h, g, i, j: (b, i, h))
        if kind == "k":
            return spec((1, blocks.keys, width), lambda b, h, g, i, j: (b, j, g))
        return spec((1, together, 1, blocks.queries), lambda b, h, g, i, j: (b, h, 0, i))

    def result(kind: str, width: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        shapes = {
            "q": (batch, s, blocks.heads * width),
            "k": (batch, t, blocks.groups * width),
            "s": (batch, blocks.heads, 1, s),
        }
        return jax.ShapeDtypeStruct(shapes[kind], dtype)

    shared = together > 1 and (mask is not None or blocks.real < t)
    scratch = [*scratch, (blocks.keys, blocks.queries)] if shared else scratch
    specs = [block(kind, x.shape[3]) for kind, x in inputs]
    if described and not is_rule:
        specs = [spec((1, blocks.keys, blocks.queries), lambda b, h, g, i, j: (b, j, i)), *specs]
    elif described:
        rows = spec((1, 3, blocks.queries), lambda b, h, g, i, j: (b, 0, i))
        columns = spec((1, blocks.keys, 3), lambda b, h, g, i, j: (b, j, 0))
        specs = [rows, columns, *specs]

    def body(*refs) -> None:
        at = [pl.program_id(axis) for axis in range(len(steps))]
        b, _, _, i, j = loops.place(*at, *refs[:ahead])
        first, last = at[-1] == 0, at[-1] == steps[-1] - 1
        active, allowed = True, None
        if is_rule:
            active_ref, *order_refs = refs[:ahead]
            for order_ref in order_refs:
                first, last = (order_ref[n, at[-1]] > 0 for n in (3, 4))
            queries_ref, keys_ref, *refs = refs[ahead:]
            active = active_ref[b, i, j] > 0
            queries = lambda: [queries_ref[0, n : n + 1] for n in range(3)]  # noqa: E731
            keys = lambda: [keys_ref[0, :, n : n + 1] for n in range(3)]  # noqa: E731
            allowed = lambda: may_attend(queries(), keys(), mask.window)  # noqa: E731
        elif described:
            matrix_ref, *refs = refs
            allowed = lambda: matrix_ref[0].astype(jnp.int32) != 0  # noqa: E731
        elif blocks.real < t:
            key = lambda: jax.lax.broadcasted_iota(jnp.int32, (blocks.keys, blocks.queries), 0)  # noqa: E731
            allowed = lambda: key() < blocks.real - j * blocks.keys  # noqa: E731
        *refs, bias_ref = refs if shared else (*refs, None)
        kernel(_Step(first, last, active, allowed, scale, together, bias_ref), *refs)

    name, widths = kernel.__name__.strip("_"), [(kind, x.shape[3]) for kind, x in inputs if kind != "s"]
    found = pl.pallas_call(
        body,
        out_shape=[result(*output) for output in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=ahead,
            grid=steps,
            in_specs=specs,
            out_specs=[block(kind, width) for kind, width, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * (len(steps) - 1) + ("arbitrary",)),
        name=name,
        metadata=metadata(name, blocks, steps, widths, inputs[0][1].dtype, mask),
    )(*described, *(x if kind == "s" else x.reshape(*x.shape[:2], -1) for kind, x in inputs))
    shapes = {"q": (batch, s, blocks.heads, -1), "k": (batch, t, blocks.groups, -1), "s": (batch, blocks.heads, 1, s)}
    return [x.reshape(shapes[kind]) for x, (kind, *_) in zip(found, outputs, strict=True)]


def _in_order(mask: Mask) -> bool:
    return isinstance(mask, AttentionMask) and mask.in_order


def _describe(mask: AttentionMask, blocks: Blocks) -> tuple[Array, Array, Array]:
    """Which blocks of queries see anything in which blocks of keys, int32 [batch, rows, columns], and the tokens of both as
    rows [batch, 3, queries] and columns [batch, keys, 3]."""
    queries, keys = (
        jnp.stack([_pad(x, 1, size, fill) for x, fill in zip(jax.tree.leaves(tokens), NOBODY, strict=True)], axis)
        for tokens, size, axis in ((mask.queries, blocks.queries, 1), (mask.keys, blocks.keys, 2))
    )
    matrix = may_attend([queries[:, n, :, None] for n in range(3)], [keys[:, None, :, n] for n in range(3)], mask.window)
    blockwise = matrix.reshape(-1, blocks.rows, blocks.queries, blocks.columns, blocks.keys)
    return blockwise.any((2, 4)).astype(jnp.int32), queries, keys


def _lay_matrix(mask: Bool[Array, "#b 1 #s t"], batch: int, blocks: Blocks) -> Array:
    """A matrix as the scores are held, int8 [batch, keys, queries], False for padding."""
    found = mask[:, 0].swapaxes(1, 2).astype(jnp.int8)
    queries = blocks.rows * blocks.queries if mask.shape[2] == 1 else mask.shape[2]
    found = jnp.broadcast_to(found, (batch, found.shape[1], queries))
    return _pad(_pad(found, 1, blocks.keys), 2, blocks.queries)


def _lay(x: Array, size: int) -> Array:
    """[batch, tokens, heads, width] with tokens padded to whole blocks and widths to whole lanes, with zeros."""
    return _pad(_pad(x, 1, size), 3, LANES)


def _pad(x: Array, axis: int, multiple: int, fill: int = 0) -> Array:
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=fill)

"""Attention on a TPU: a Pallas kernel that keeps the scores on the chip (FlashAttention: Dao et al., arXiv:2205.14135).

JAX's own TPU kernels know causal masks and segments that are equal. Here all segments attend to a prefix, and windows count
positions. So `mask.may_attend` is evaluated for each block, and blocks in which no query may attend to any key are skipped.

Scores are held transposed, keys by queries: what exists once per query (peak, sum, segment) is then a row, the shape in which
a TPU holds a vector. Heads lie side by side in the last axis, padded to whole lanes, so nothing is transposed outside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from flowseg_jax.ops.attention.mask import AttentionMask, may_attend
from flowseg_jax.ops.attention.xla import BLOCKED, expected_slope
from flowseg_jax.ops.collectives import TENSOR_AXIS
from flowseg_jax.ops.dot import matmul_f32

LANES = 128
BLOCKS = (512, 384, 256, 128)  # tokens a block: the first of those that pad least
NOBODY = (np.iinfo(np.int32).min, -1, 0)  # the fields of a token that sees nothing and is seen by nothing


def forward(
    q: Float[Array, "b s h e"], k: Float[Array, "b t g e"], v: Float[Array, "b t g f"], mask: AttentionMask | None, scale: float
) -> tuple[Float[Array, "b s h f"], Float[Array, "b h s"]]:
    """As `xla.forward`, for an `AttentionMask` or none."""
    return _on_each_device(functools.partial(_forward, scale), "qkk", "qs", (q, k, v), mask)


def backward(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    mask: AttentionMask | None,
    scale: float,
    out: Float[Array, "b s h f"],
    logsum: Float[Array, "b h s"],
    cotangent: Float[Array, "b s h f"],
) -> tuple[Float[Array, "b s h e"], Float[Array, "b t g e"], Float[Array, "b t g f"]]:
    """As `xla.backward`, for an `AttentionMask` or none."""
    arrays = (q, k, v, cotangent, logsum, expected_slope(out, cotangent))
    return _on_each_device(functools.partial(_backward, scale), "qkkqss", "qkk", arrays, mask)


def _on_each_device(
    run: Callable, layouts: str, results: str, arrays: Sequence[Array], mask: AttentionMask | None
) -> tuple[Array, ...]:
    """Runs on the parts of a device: the compiler cannot divide a kernel along the axes of a mesh that are left to it.

    `TENSOR_AXIS` divides heads, other axes the batch, each where it fits. `layouts` are "q" and "k" for [batch, tokens, heads,
    width] and "s" for [batch, heads, tokens].
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    if not ours:
        return run(*arrays, mask)
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
class _Blocks:
    """How one call is divided.

    Attributes:
        queries, keys: tokens a block.
        rows, columns: blocks of queries and of keys.
        heads, groups: heads of queries, and of keys and values.
        real: keys that are no padding.
    """

    queries: int
    keys: int
    rows: int
    columns: int
    heads: int
    groups: int
    real: int

    @classmethod
    def of(cls, q: Array, k: Array) -> _Blocks:
        (s, h), (t, g) = q.shape[1:3], k.shape[1:3]
        queries, keys = (min(BLOCKS, key=lambda size: -n % size) for n in (s, t))
        return cls(queries, keys, -(-s // queries), -(-t // keys), h, g, t)

    @property
    def repeat(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.groups


@dataclasses.dataclass(frozen=True)
class _Loops:
    """The four nested loops of a kernel, over batch elements and ...; the last adds up what the others keep apart.

    Attributes:
        steps: of each loop but the first.
        place: what each step is about: (batch element, head, key/value head, block of queries, block of keys).
    """

    steps: tuple[int, int, int]
    place: Callable[..., tuple]

    @classmethod
    def by_query(cls, blocks: _Blocks) -> _Loops:
        """... heads, blocks of queries, blocks of keys."""
        place = lambda b, head, i, j, *_: (b, head, jax.lax.div(head, blocks.repeat), i, j)  # noqa: E731
        return cls((blocks.heads, blocks.rows, blocks.columns), place)

    @classmethod
    def by_key(cls, blocks: _Blocks) -> _Loops:
        """... key/value heads, blocks of keys, blocks of queries of all their heads."""

        def place(b, g, j, n, *_) -> tuple:
            return b, g * blocks.repeat + jax.lax.div(n, blocks.rows), g, jax.lax.rem(n, blocks.rows), j

        return cls((blocks.groups, blocks.columns, blocks.rows * blocks.repeat), place)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step inside a kernel.

    Attributes:
        first, last: whether it begins or ends the innermost loop.
        active: whether any query sees any key.
        allowed: () -> which query sees which key, [keys, queries]; None: all see all.
        scale: of the scores.
    """

    first: Array
    last: Array
    active: Array | bool
    allowed: Callable[[], Array] | None
    scale: float

    def scores(self, q: Array, k: Array) -> Array:
        """float32 [keys, queries]."""
        scores = matmul_f32(k, q, 1, 1) * self.scale
        return scores if self.allowed is None else jnp.where(self.allowed(), scores, BLOCKED)

    def slopes(self, q: Array, k: Array, v: Array, cotangent: Array, logsum: Array, mean: Array) -> tuple[Array, Array]:
        """The weights, and the gradients of the products of queries and keys: [keys, queries], ready for the next product."""
        weights = jnp.exp(self.scores(q, k) - logsum)
        slopes = weights * (matmul_f32(v, cotangent, 1, 1) - mean) * self.scale
        return weights.astype(q.dtype), slopes.astype(q.dtype)


def _forward(scale: float, q: Array, k: Array, v: Array, mask: AttentionMask | None) -> tuple[Array, Array]:
    s, f, blocks = q.shape[1], v.shape[3], _Blocks.of(q, k)
    q, k, v = _lay(q, blocks.queries), _lay(k, blocks.keys), _lay(v, blocks.keys)
    out, logsum = _call(
        _attend,
        blocks,
        _Loops.by_query(blocks),
        scale,
        mask,
        inputs=[("q", q), ("k", k), ("k", v)],
        outputs=[("q", v.shape[3], v.dtype), ("s", 1, jnp.dtype(jnp.float32))],
        scratch=[(1, blocks.queries), (1, blocks.queries), (v.shape[3], blocks.queries)],
    )
    return out[:, :s, :, :f], logsum[:, :, 0, :s]


def _backward(
    scale: float, q: Array, k: Array, v: Array, cotangent: Array, logsum: Array, mean: Array, mask: AttentionMask | None
) -> tuple[Array, Array, Array]:
    (s, e), (t, f), blocks = q.shape[1::2], v.shape[1::2], _Blocks.of(q, k)
    q, cotangent = _lay(q, blocks.queries), _lay(cotangent, blocks.queries)
    k, v = _lay(k, blocks.keys), _lay(v, blocks.keys)
    logsum, mean = (_pad(x[:, :, None], 3, blocks.queries) for x in (logsum, mean))
    inputs = [("q", q), ("k", k), ("k", v), ("q", cotangent), ("s", logsum), ("s", mean)]
    (dq,) = _call(
        _differentiate_queries,
        blocks,
        _Loops.by_query(blocks),
        scale,
        mask,
        inputs,
        outputs=[("q", q.shape[3], q.dtype)],
        scratch=[(blocks.queries, q.shape[3])],
    )
    dk, dv = _call(
        _differentiate_keys,
        blocks,
        _Loops.by_key(blocks),
        scale,
        mask,
        inputs,
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

    @pl.when(step.active)
    def _():
        scores, v = step.scores(q_ref[0], k_ref[0]), v_ref[0]
        peak = jnp.maximum(peak_ref[...], scores.max(0, keepdims=True))
        weights, decay = jnp.exp(scores - peak), jnp.exp(peak_ref[...] - peak)
        peak_ref[...] = peak
        total_ref[...] = total_ref[...] * decay + weights.sum(0, keepdims=True)
        sum_ref[...] = sum_ref[...] * decay + matmul_f32(v, weights.astype(v.dtype), 0, 0)

    @pl.when(step.last)
    def _():
        found = peak_ref[...] > BLOCKED  # what was added up before a query's first key has decayed to nothing
        total = jnp.where(found, total_ref[...], 1.0)
        out_ref[0] = jnp.where(found, sum_ref[...] / total, 0.0).T.astype(out_ref.dtype)
        logsum_ref[0, 0] = jnp.where(found, peak_ref[...] + jnp.log(total), -BLOCKED)


def _differentiate_queries(step: _Step, q_ref, k_ref, v_ref, ct_ref, logsum_ref, mean_ref, dq_ref, sum_ref) -> None:
    """The kernel of the queries' gradient."""

    @pl.when(step.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step.active)
    def _():
        k = k_ref[0]
        _, slopes = step.slopes(q_ref[0], k, v_ref[0], ct_ref[0], logsum_ref[0, 0], mean_ref[0, 0])
        sum_ref[...] += matmul_f32(slopes, k, 0, 0)

    @pl.when(step.last)
    def _():
        dq_ref[0] = sum_ref[...].astype(dq_ref.dtype)


def _differentiate_keys(
    step: _Step, q_ref, k_ref, v_ref, ct_ref, logsum_ref, mean_ref, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref
) -> None:
    """The kernel of the keys' and the values' gradients."""

    @pl.when(step.first)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(step.active)
    def _():
        q, ct = q_ref[0], ct_ref[0]
        weights, slopes = step.slopes(q, k_ref[0], v_ref[0], ct, logsum_ref[0, 0], mean_ref[0, 0])
        dk_sum_ref[...] += matmul_f32(slopes, q, 1, 0)
        dv_sum_ref[...] += matmul_f32(weights, ct, 1, 0)

    @pl.when(step.last)
    def _():
        dk_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)


def _call(
    kernel: Callable,
    blocks: _Blocks,
    loops: _Loops,
    scale: float,
    mask: AttentionMask | None,
    inputs: Sequence[tuple[str, Array]],
    outputs: Sequence[tuple[str, int, jnp.dtype]],
    scratch: Sequence[tuple[int, int]],
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
    steps = (batch, *loops.steps)
    s, t = blocks.rows * blocks.queries, blocks.columns * blocks.keys
    described = () if mask is None else _describe(mask, blocks)

    def spec(shape: tuple[int, ...], index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *at: index(*loops.place(*at)))

    def block(kind: str, width: int) -> pl.BlockSpec:
        if kind == "q":
            return spec((1, blocks.queries, width), lambda b, h, g, i, j: (b, i, h))
        if kind == "k":
            return spec((1, blocks.keys, width), lambda b, h, g, i, j: (b, j, g))
        return spec((1, 1, 1, blocks.queries), lambda b, h, g, i, j: (b, h, 0, i))

    def result(kind: str, width: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        shapes = {
            "q": (batch, s, blocks.heads * width),
            "k": (batch, t, blocks.groups * width),
            "s": (batch, blocks.heads, 1, s),
        }
        return jax.ShapeDtypeStruct(shapes[kind], dtype)

    specs = [block(kind, x.shape[3]) for kind, x in inputs]
    if described:
        rows = spec((1, 3, blocks.queries), lambda b, h, g, i, j: (b, 0, i))
        columns = spec((1, blocks.keys, 3), lambda b, h, g, i, j: (b, j, 0))
        specs = [rows, columns, *specs]

    def body(*refs) -> None:
        at = [pl.program_id(axis) for axis in range(4)]
        b, _, _, i, j = loops.place(*at)
        active, allowed = True, None
        if mask is not None:
            active_ref, queries_ref, keys_ref, *refs = refs
            active = active_ref[b, i, j] > 0
            queries = lambda: [queries_ref[0, n : n + 1] for n in range(3)]  # noqa: E731
            keys = lambda: [keys_ref[0, :, n : n + 1] for n in range(3)]  # noqa: E731
            allowed = lambda: may_attend(queries(), keys(), mask.window)  # noqa: E731
        elif blocks.real < t:
            key = lambda: jax.lax.broadcasted_iota(jnp.int32, (blocks.keys, blocks.queries), 0)  # noqa: E731
            allowed = lambda: key() < blocks.real - j * blocks.keys  # noqa: E731
        kernel(_Step(at[3] == 0, at[3] == steps[3] - 1, active, allowed, scale), *refs)

    name, widths = kernel.__name__.strip("_"), [(kind, x.shape[3]) for kind, x in inputs if kind != "s"]
    found = pl.pallas_call(
        body,
        out_shape=[result(*output) for output in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(described[:1]),  # the active blocks, which a step knows before its data is there
            grid=steps,
            in_specs=specs,
            out_specs=[block(kind, width) for kind, width, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        name=name,
        metadata=_metadata(name, blocks, steps, widths, inputs[0][1].dtype, mask),
    )(*described, *(x if kind == "s" else x.reshape(*x.shape[:2], -1) for kind, x in inputs))
    shapes = {"q": (batch, s, blocks.heads, -1), "k": (batch, t, blocks.groups, -1), "s": (batch, blocks.heads, 1, s)}
    return [x.reshape(shapes[kind]) for x, (kind, *_) in zip(found, outputs, strict=True)]


def _metadata(
    name: str,
    blocks: _Blocks,
    steps: tuple[int, ...],
    widths: Sequence[tuple[str, int]],
    dtype: jnp.dtype,
    mask: AttentionMask | None,
) -> dict[str, str]:
    """What a plan prices the kernel by (`aot.pricing`): which code it is, its steps, and those that find their block active.

    A mask's values are not known when a program is compiled: a plan counts the blocks that a causal one leaves.
    """
    masked = "masked" if mask is not None else "padded" if blocks.real < blocks.columns * blocks.keys else "plain"
    shape = f"{blocks.queries}x{blocks.keys} {' '.join(f'{kind}{width}' for kind, width in widths)}"
    active = np.ones((blocks.rows, blocks.columns), bool)
    if mask is not None:
        first = np.arange(blocks.rows)[:, None] * blocks.queries - np.arange(blocks.columns) * blocks.keys
        active = (first + blocks.queries > 0) & (mask.window is None or first - blocks.keys + 1 < mask.window)
    count = round(math.prod(steps) * active.mean())
    return {"kernel": f"{name} {shape} {dtype} {masked}", "steps": str(math.prod(steps)), "bodies": str(count)}


def _describe(mask: AttentionMask, blocks: _Blocks) -> tuple[Array, Array, Array]:
    """Which blocks of queries see anything in which blocks of keys, int32 [batch, rows, columns], and the tokens of both as
    rows [batch, 3, queries] and columns [batch, keys, 3]."""
    queries, keys = (
        jnp.stack([_pad(x, 1, size, fill) for x, fill in zip(jax.tree.leaves(tokens), NOBODY, strict=True)], axis)
        for tokens, size, axis in ((mask.queries, blocks.queries, 1), (mask.keys, blocks.keys, 2))
    )
    matrix = may_attend([queries[:, n, :, None] for n in range(3)], [keys[:, None, :, n] for n in range(3)], mask.window)
    blockwise = matrix.reshape(-1, blocks.rows, blocks.queries, blocks.columns, blocks.keys)
    return blockwise.any((2, 4)).astype(jnp.int32), queries, keys


def _lay(x: Array, size: int) -> Array:
    """[batch, tokens, heads, width] with tokens padded to whole blocks and widths to whole lanes, with zeros."""
    return _pad(_pad(x, 1, size), 3, LANES)


def _pad(x: Array, axis: int, multiple: int, fill: int = 0) -> Array:
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=fill)

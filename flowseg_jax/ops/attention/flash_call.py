"""What the kernels of attention have in common: how blocks of queries meet blocks of keys, and how a kernel is called.

`mask.may_attend` is evaluated for each block, and blocks in which no query may attend to any key are skipped. A mask that is a
matrix comes block by block. Query heads that read the same keys share a step: their mask is evaluated once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool

from flowseg_jax.ops.attention.blocks import Blocks, Loops, heads_a_body, metadata
from flowseg_jax.ops.attention.mask import AttentionMask, may_attend
from flowseg_jax.ops.attention.xla import BLOCKED
from flowseg_jax.ops.dot import matmul_f32

LANES = 128
STEP_BYTES = 16 * 2**20  # of the chip's memory, for what a step reads, computes and writes
Mask = AttentionMask | Bool[Array, "#b 1 #s t"] | None
NOBODY = (np.iinfo(np.int32).min, -1, 0)  # the fields of a token that sees nothing and is seen by nothing


@dataclasses.dataclass(frozen=True)
class Step:
    """One step inside a kernel.

    Attributes:
        first, last: whether it begins or ends the innermost loop.
        first_keys, last_keys: whether its block of keys is the first or the last that its queries meet.
        rows: the number of its block of queries, and of its heads, among those that read the same keys.
        active: whether any query sees any key.
        allowed: () -> which query sees which key, [keys, queries]; None: all see all.
        scale: of the scores.
        heads: query heads of the step.
        bias_ref: where several heads share a mask, what it adds to their scores.
    """

    first: Array
    last: Array
    first_keys: Array
    last_keys: Array
    rows: tuple[Array, Array]
    active: Array | bool
    allowed: Callable[[], Array] | None
    scale: float
    heads: int
    bias_ref: Any

    def each_head(self, run: Callable[[Any], None]) -> None:
        """Runs for one head after the other, given its number. Code for two at a time is shorter than twice."""
        size = heads_a_body(self.heads)

        def some(n, _) -> None:
            for head in range(size):
                run(n * size + head)

        if self.heads == 1:
            run(0)
        else:
            jax.lax.fori_loop(0, self.heads // size, some, None)

    def share_mask(self) -> None:
        """Before the scores of several heads."""
        if self.bias_ref is not None:
            self.bias_ref[...] = jnp.where(self.allowed(), 0.0, BLOCKED)

    def of_head(self, ref: Any, head: Any) -> Any:
        """The part of a block [1, queries, heads * width] that belongs to a head."""
        width = ref.shape[2] // self.heads
        return ref.at[0, :, slice(None) if self.heads == 1 else pl.ds(pl.multiple_of(head * width, LANES), width)]

    def of_row(self, ref: Any, head: Any, size: int, width: int) -> Any:
        """The part of all queries [1, tokens, heads * width] that belongs to a head and the step's block of queries."""
        block, heads = self.rows
        start, column = block * size, (heads * self.heads + head) * width
        return ref.at[0, pl.ds(pl.multiple_of(start, LANES), size), pl.ds(pl.multiple_of(column, LANES), width)]

    def scores(self, q: Array, k: Array) -> Array:
        """float32 [keys, queries]."""
        scores = matmul_f32(k, q, 1, 1) * self.scale
        if self.bias_ref is not None:
            return scores + self.bias_ref[...]
        return scores if self.allowed is None else jnp.where(self.allowed(), scores, BLOCKED)

    def slopes(self, q: Array, k: Array, v: Array, cotangent: Array, logsum: Array, mean: Array) -> tuple[Array, Array]:
        """The weights and the gradients of the scores, [keys, queries], ready for the next product."""
        weights = jnp.exp(self.scores(q, k) - logsum)
        slopes = weights * (matmul_f32(v, cotangent, 1, 1) - mean)
        return weights.astype(q.dtype), slopes.astype(q.dtype)


def call(
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
        inputs: kind and array: "q" and "k" [batch, tokens, heads, width], "s" [batch, heads, 1, tokens]; "once" as "q", but
            read for the first block of keys alone. The first one is of kind "q", and results of this kind have its tokens.
        outputs: kind, width and dtype; "all" as "q", but in the chip's memory until all that reads the same keys is done.
        scratch: shapes of the float32 sums.
    """
    batch = inputs[0][1].shape[0]
    steps, together = (batch, *loops.steps), blocks.together
    s, t = blocks.rows * blocks.queries, blocks.columns * blocks.keys
    is_rule = isinstance(mask, AttentionMask)
    described = () if mask is None else describe(mask, blocks) if is_rule else (_lay_matrix(mask, batch, blocks),)
    ahead = 0  # arrays that a step knows before its data is there: the active blocks, and the order of the steps
    if is_rule:
        orders = [] if loops.order is None else [jnp.asarray(loops.order)]
        described, ahead = (described[0], *orders, *described[1:]), 1 + len(orders)

    def spec(shape: tuple[int, ...], index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *at: index(*loops.place(*at)))

    def block(kind: str, width: int) -> pl.BlockSpec:
        if kind == "q":
            return spec((1, blocks.queries, together * width), lambda b, h, g, i, j: (b, i, h))
        if kind == "once":
            once = lambda j, n, last: jnp.where(j == 0, n, last)  # noqa: E731
            return spec(
                (1, blocks.queries, together * width),
                lambda b, h, g, i, j: (b, once(j, i, blocks.rows - 1), once(j, h, (g + 1) * blocks.parts - 1)),
            )
        if kind == "all":
            return spec((1, s, blocks.repeat * width), lambda b, h, g, i, j: (b, 0, g))
        if kind == "k":
            return spec((1, blocks.keys, width), lambda b, h, g, i, j: (b, j, g))
        return spec((1, together, 1, blocks.queries), lambda b, h, g, i, j: (b, h, 0, i))

    def result(kind: str, width: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        shapes = {
            "k": (batch, t, blocks.groups * width),
            "s": (batch, blocks.heads, 1, s),
        }
        return jax.ShapeDtypeStruct(shapes.get(kind, (batch, inputs[0][1].shape[1], blocks.heads * width)), dtype)

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
        b, h, g, i, j = loops.place(*at, *refs[:ahead])
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
        last_keys = (j == blocks.columns - 1) | (loops.order is not None and ~blocks.meet(i, j + 1))
        rows = i, h - g * blocks.parts
        kernel(Step(first, last, j == 0, last_keys, rows, active, allowed, scale, together, bias_ref), *refs)

    # What is held for all queries: results, of which two are in the chip's memory at a time, and sums.
    results = [2 * s * blocks.repeat * width * dtype.itemsize for kind, width, dtype in outputs if kind == "all"]
    held = sum(results) and sum(results) + sum(4 * math.prod(shape) for shape in scratch)
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(steps) - 2),
            vmem_limit_bytes=STEP_BYTES + held,
        ),
        name=name,
        metadata=metadata(name, blocks, steps, widths, inputs[0][1].dtype, mask),
    )(*described, *(x if kind == "s" else x.reshape(*x.shape[:2], -1) for kind, x in inputs))
    shapes = {"k": (batch, t, blocks.groups, -1), "s": (batch, blocks.heads, 1, s)}
    return [x.reshape(shapes.get(kind, (*x.shape[:2], blocks.heads, -1))) for x, (kind, *_) in zip(found, outputs, strict=True)]


def in_order(mask: Mask) -> bool:
    return isinstance(mask, AttentionMask) and mask.in_order


def describe(mask: AttentionMask, blocks: Blocks) -> tuple[Array, Array, Array]:
    """Which blocks of queries see anything in which blocks of keys, int32 [batch, rows, columns], and the tokens of both as
    rows [batch, 3, queries] and columns [batch, keys, 3]."""
    queries, keys = (
        jnp.stack([pad(x, 1, size, fill) for x, fill in zip(jax.tree.leaves(tokens), NOBODY, strict=True)], axis)
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
    return pad(pad(found, 1, blocks.keys), 2, blocks.queries)


def lay(x: Array, size: int) -> Array:
    """[batch, tokens, heads, width] with tokens padded to whole blocks and widths to whole lanes, with zeros."""
    b, t, h, e = x.shape
    if e % LANES:
        return pad(pad(x, 1, size), 3, LANES)
    return pad(x.reshape(b, t, h * e), 1, size).reshape(b, -1, h, e)  # flat, as kernels read it: nothing changes its layout


def pad(x: Array, axis: int, multiple: int, fill: int = 0) -> Array:
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=fill)

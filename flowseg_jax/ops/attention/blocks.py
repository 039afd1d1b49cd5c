"""How attention is divided into blocks for a kernel, and what a kernel tells about that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flowseg_jax.ops.attention.mask import AttentionMask

BLOCKS = (512, 384, 256, 128)  # tokens a block, one of these
BLOCK_COST = 112  # what a block costs beside its tokens, in tokens: from counted bundles
HEADS = 8  # query heads a step, at most


def tokens_a_block(count: int) -> int:
    """The cheapest of `BLOCKS` for so many tokens. Padding costs a copy, a tenth of it all."""
    return min(BLOCKS, key=lambda size: -(-count // size) * (size + BLOCK_COST) * (1.1 if count % size else 1))


@dataclasses.dataclass(frozen=True)
class Blocks:
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
    def of(cls, q: Array, k: Array) -> Blocks:
        (s, h), (t, g) = q.shape[1:3], k.shape[1:3]
        queries, keys = tokens_a_block(s), tokens_a_block(t)
        return cls(queries, keys, -(-s // queries), -(-t // keys), h, g, t)

    def meet(self, i: Any, j: Any) -> Any:
        """Whether the block i of queries has a token that is no earlier than the first one of the block j of keys."""
        return j * self.keys < (i + 1) * self.queries

    @property
    def repeat(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.groups

    @property
    def together(self) -> int:
        """Query heads of a step, one after the other: they read the same keys, values and mask."""
        return math.gcd(self.repeat, HEADS)

    @property
    def parts(self) -> int:
        """Steps for the query heads of a key/value head."""
        return self.repeat // self.together


@dataclasses.dataclass(frozen=True)
class Loops:
    """The nested loops of a kernel, over batch elements and ...; the last adds up what the others keep apart.

    Attributes:
        steps: of each loop but the first.
        place: what each step is about: (batch element, which query heads together, key/value head, block of queries, block of
            keys). It takes the numbers of the loops and, last, `order`.
        order: int32 [5, steps of the last loop] where that loop runs over pairs of blocks and leaves out those that are too
            late: which of a key/value head's query heads, the blocks of queries and keys, and whether a sum begins and ends.
            None where a loop runs over all blocks of one kind.
    """

    steps: tuple[int, ...]
    place: Callable[..., tuple]
    order: np.ndarray | None = None

    @classmethod
    def by_query(cls, blocks: Blocks, in_order: bool) -> Loops:
        """... heads (some together), blocks of queries, blocks of keys."""
        if in_order:
            pairs = [(0, i, j) for i in range(blocks.rows) for j in range(blocks.columns) if blocks.meet(i, j)]
            place = lambda b, head, n, *refs: (b, head, jax.lax.div(head, blocks.parts), refs[-1][1, n], refs[-1][2, n])  # noqa: E731
            return cls((blocks.heads // blocks.together, len(pairs)), place, _order(pairs, key=1))
        place = lambda b, head, i, j, *_: (b, head, jax.lax.div(head, blocks.parts), i, j)  # noqa: E731
        return cls((blocks.heads // blocks.together, blocks.rows, blocks.columns), place)

    @classmethod
    def by_key(cls, blocks: Blocks, in_order: bool) -> Loops:
        """... key/value heads, blocks of keys, blocks of queries of all their heads."""
        if in_order:
            kinds = range(blocks.columns), range(blocks.parts), range(blocks.rows)
            pairs = [(r, i, j) for j in kinds[0] for r in kinds[1] for i in kinds[2] if blocks.meet(i, j)]

            def place(b, g, n, *refs) -> tuple:
                return b, g * blocks.parts + refs[-1][0, n], g, refs[-1][1, n], refs[-1][2, n]

            return cls((blocks.groups, len(pairs)), place, _order(pairs, key=2))

        def place(b, g, j, n, *_) -> tuple:
            return b, g * blocks.parts + jax.lax.div(n, blocks.rows), g, jax.lax.rem(n, blocks.rows), j

        return cls((blocks.groups, blocks.columns, blocks.rows * blocks.parts), place)


def _order(pairs: Sequence[tuple[int, int, int]], key: int) -> np.ndarray:
    """`pairs`, and where the element `key` of them changes."""
    changes = np.diff([pair[key] for pair in pairs]) != 0
    return np.concatenate([np.transpose(pairs), [[True, *changes]], [[*changes, True]]]).astype(np.int32)


def heads_a_body(together: int) -> int:
    """Of so many query heads of a step, those in one pass of the loop over them. A loop has two passes or more."""
    return 2 if together > 2 else 1


def metadata(
    name: str,
    blocks: Blocks,
    steps: tuple[int, ...],
    widths: Sequence[tuple[str, int]],
    dtype: jnp.dtype,
    mask: AttentionMask | Array | None,
) -> dict[str, str]:
    """What a plan prices the kernel by (`aot.pricing`): which code it is, its steps, how often a body finds its block active.

    Where a step has several heads, other loops over them begin and end the sums of the same queries. A mask's values are not
    known when a program is compiled: a plan counts the blocks that a causal one leaves whose queries are the last of the keys.
    """
    if mask is not None:
        masked = "matrix" if not isinstance(mask, AttentionMask) else "causal" if mask.in_order else "masked"
    else:
        masked = "padded" if blocks.real < blocks.columns * blocks.keys else "plain"
    shape = f"{blocks.queries}x{blocks.keys} {' '.join(f'{kind}{width}' for kind, width in widths)}"
    active = np.ones((blocks.rows, blocks.columns), bool)
    if isinstance(mask, AttentionMask):
        earlier = blocks.columns * blocks.keys - blocks.rows * blocks.queries
        first = earlier + np.arange(blocks.rows)[:, None] * blocks.queries - np.arange(blocks.columns) * blocks.keys
        active = (first + blocks.queries > 0) & (mask.window is None or first - blocks.keys + 1 < mask.window)
    times = steps[0] * blocks.heads // heads_a_body(blocks.together)
    bodies = [times * active.sum()]
    if blocks.together > 1:
        masked += f" {blocks.together} heads"
        ends = [times * blocks.rows]
        bodies = {"attend": [*bodies, *ends], "differentiate": [*ends, *bodies, *ends]}[name]
    return {"kernel": f"{name} {shape} {dtype} {masked}", "steps": str(math.prod(steps)), "bodies": " ".join(map(str, bodies))}

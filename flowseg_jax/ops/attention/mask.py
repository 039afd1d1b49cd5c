"""Which tokens may attend to which: a rule about tokens, not a matrix, that a kernel evaluates where it needs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """What the rule needs to know of each token.

    Attributes:
        order: int [B, N], its place in the order of reading; no token attends to a later one.
        segment_ids: int [B, N]: 0 = prefix, which every token attends to; 1.. = attended to by its own segment only; -1 =
            padding, never attended to.
        position_ids: int [B, N], which a sliding window counts.
    """

    order: Int[Array, "b n"]
    segment_ids: Int[Array, "b n"]
    position_ids: Int[Array, "b n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query may attend to; a query that may attend to none gets zeros.

    Attributes:
        queries: the tokens that attend.
        keys: the tokens that are attended to.
        window: a query attends to keys less than this many positions back; None: to any.
        in_order: queries and keys are the same tokens, numbered as they stand. So a kernel knows before it runs which blocks
            of keys are too late for a block of queries.
    """

    queries: TokenInfo
    keys: TokenInfo
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    in_order: bool = dataclasses.field(default=False, metadata={"static": True})

    def materialize(self) -> Bool[Array, "b 1 s t"]:
        """The rule as a matrix."""
        queries = [x[:, None, :, None] for x in jax.tree.leaves(self.queries)]
        keys = [x[:, None, None, :] for x in jax.tree.leaves(self.keys)]
        return may_attend(queries, keys, self.window)


def may_attend(query: Sequence[Array], key: Sequence[Array], window: int | None) -> Array:
    """The rule itself, elementwise: the fields of `TokenInfo` of queries and of keys, which broadcast against each other."""
    order, segment, position = query
    key_order, key_segment, key_position = key
    allowed = (key_order <= order) & (key_segment != -1) & ((key_segment == 0) | (key_segment == segment))
    return allowed if window is None else allowed & (position - key_position < window)


def causal_mask(segment_ids: Int[Array, "b n"], position_ids: Int[Array, "b n"], window: int | None = None) -> AttentionMask:
    """The rule among the tokens of one row, which are read in the order in which they stand."""
    order = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    tokens = TokenInfo(order, segment_ids, position_ids)
    return AttentionMask(tokens, tokens, window, in_order=True)

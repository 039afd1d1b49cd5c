"""Who may attend to whom, said by what the tokens are and not by a matrix, so that a kernel decides it where it needs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """What a rule knows of each token.

    Attributes:
        order: int [B, N], its place in the reading order. Nobody sees what is read later.
        segments: int [B, N]: 0 = prefix, seen by all; 1.. = seen by its own segment only; -1 = padding, seen by nobody.
        positions: int [B, N], what a sliding window counts.
    """

    order: Int[Array, "b n"]
    segments: Int[Array, "b n"]
    positions: Int[Array, "b n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query may attend to; a query that may attend to none gets zeros.

    Attributes:
        queries: tokens that look.
        keys: tokens that are looked at.
        window: a key is seen less than so many positions back; None: from anywhere.
    """

    queries: TokenInfo
    keys: TokenInfo
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def materialize(self) -> Bool[Array, "b 1 s t"]:
        """The rule written out."""
        queries = [x[:, None, :, None] for x in jax.tree.leaves(self.queries)]
        keys = [x[:, None, None, :] for x in jax.tree.leaves(self.keys)]
        return may_attend(queries, keys, self.window)


def may_attend(query: Sequence[Array], key: Sequence[Array], window: int | None) -> Array:
    """The rule itself, elementwise: the fields of `Tokens` of queries and of keys, which broadcast against each other."""
    order, segment, position = query
    key_order, key_segment, key_position = key
    allowed = (key_order <= order) & (key_segment != -1) & ((key_segment == 0) | (key_segment == segment))
    return allowed if window is None else allowed & (position - key_position < window)


def causal_mask(segments: Int[Array, "b n"], positions: Int[Array, "b n"], window: int | None = None) -> AttentionMask:
    """The rule among the tokens of one row, read in the order in which they stand."""
    order = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    tokens = TokenInfo(order, segments, positions)
    return AttentionMask(tokens, tokens, window)

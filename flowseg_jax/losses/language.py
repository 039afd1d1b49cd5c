"""The next-token loss."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flowseg_jax.ops.dot import TILE
from flowseg_jax.ops.vocabulary import ShardedEmbedding, cross_entropy
from flowseg_jax.types import IGNORE_INDEX


def next_token_loss(
    hidden_states: Float[Array, "b t w"], lm_head: ShardedEmbedding, labels: Int[Array, "b t"], chunk_size: int, first: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the cross-entropies of the next token over all labels, and the number of labels.

    Logits exist for `chunk_size` tokens at a time. There is no label before `first`: the tokens before it (in training the
    visual ones) are not multiplied with the vocabulary, except for the last few, which fill a tile.
    """
    length = labels.shape[1]
    first = max(1, first - (first - length) % TILE)
    x, y = hidden_states[:, first - 1 : -1].reshape(-1, hidden_states.shape[-1]), labels[:, first:].reshape(-1)
    has_label = y != IGNORE_INDEX
    total = jnp.where(has_label, cross_entropy(x, lm_head, y, chunk_size), 0).sum()
    return total, has_label.sum(dtype=jnp.float32)

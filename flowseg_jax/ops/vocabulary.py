"""The embedding table, the largest matrix of the model: looking up rows, and the cross-entropy of the next token.

A table that is sharded over devices is never gathered. Each device holds some of the rows; it looks up the tokens of all
devices and returns zeros for rows that others hold. The logits of a token likewise exist in parts, of which only the maximum
and the sum of exponentials are exchanged.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flowseg_jax.ops.collectives import SHARD_AXIS, all_gather_2d, all_to_all_rows, reduce_scatter_2d
from flowseg_jax.ops.dot import TILE, einsum, matmul_f32

GATHERED_BYTES = 1 << 28  # of the hidden states of all devices, at most, that exist at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedEmbedding:
    """The rows of an embedding table, or those of this device.

    Attributes:
        weight: [V, W], or [ceil(V / devices), W] of a sharded table.
        size: V, the number of rows of the whole table.
        sharded: whether each device of `SHARD_AXIS` holds a part.
    """

    weight: Float[Array, "v w"]
    size: int = dataclasses.field(metadata={"static": True})
    sharded: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def whole(cls, table: Float[Array, "v w"]) -> ShardedEmbedding:
        return cls(table, table.shape[0])

    @classmethod
    def from_fsdp_shard(cls, table: Float[Array, "v c"]) -> ShardedEmbedding:
        """From a device's part of the columns. Tables are stored so, because a vocabulary may have any number of rows."""
        return cls(all_to_all_rows(table), table.shape[0], sharded=True)

    @property
    def row_offset(self) -> int | Int[Array, ""]:
        """The first row of this device."""
        return jax.lax.axis_index(SHARD_AXIS) * self.weight.shape[0] if self.sharded else 0


def embedding_lookup(vocabulary: ShardedEmbedding, tokens: Int[Array, "b t"]) -> Float[Array, "b t w"]:
    """The rows of the tokens. Ids below zero or beyond the vocabulary read the nearest row; the caller overwrites them."""
    tokens = jnp.clip(tokens, 0, vocabulary.size - 1)
    if not vocabulary.sharded:
        return jnp.take(vocabulary.weight, tokens, axis=0, mode="clip")
    t = tokens.shape[1]
    local = all_gather_2d(jnp.pad(tokens, ((0, 0), (0, -t % TILE))), 0) - vocabulary.row_offset
    mine = (local >= 0) & (local < vocabulary.weight.shape[0])
    found = _read(vocabulary.weight, jnp.where(mine, local, vocabulary.weight.shape[0]))
    return reduce_scatter_2d(found, 0)[:, :t]


@jax.custom_vjp
def _read(rows: Float[Array, "v w"], index: Int[Array, "b t"]) -> Float[Array, "b t w"]:
    """Rows by index, zeros for an index beyond them.

    The gradient is a product with the one-hot matrix of the index. As a scatter, XLA would sort the tokens of all devices.
    """
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _read_forward(rows: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return _read(rows, index), (rows, index)


def _read_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    rows, index = saved

    def add(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        index, cotangent = inputs
        one_hot = (jnp.arange(rows.shape[0])[:, None] == index).astype(cotangent.dtype)
        return total + matmul_f32(one_hot, cotangent, 1, 0), None

    total, _ = jax.lax.scan(add, jnp.zeros(rows.shape, jnp.float32), (index, cotangent))
    return total.astype(rows.dtype), None


_read.defvjp(_read_forward, _read_backward)


def cross_entropy(
    hidden: Float[Array, "n w"], vocabulary: ShardedEmbedding, labels: Int[Array, " n"], chunk: int
) -> Float[Array, " n"]:
    """-log softmax(hidden @ rows.T)[label] of each token in float32; a label outside the vocabulary counts as logit 0.

    Args:
        hidden: final hidden states; their dtype is the dtype that the products are computed in.
        vocabulary: of the language head.
        labels: the next token of each.
        chunk: tokens of one device whose logits exist at a time; they are computed again in the backward pass. A device with
            a part of the words takes the tokens of all devices, as many times more at once. It gathers their hidden states,
            `GATHERED_BYTES` at a time.
    """
    rows = vocabulary.weight.astype(jnp.float32)  # the chunks' gradients are added up in their dtype
    if not vocabulary.sharded:
        peak, total, picked = _scan_logits(hidden, rows, labels, chunk, rows.shape[0])
        return peak + jnp.log(total) - picked
    here = jnp.minimum(vocabulary.size - vocabulary.row_offset, rows.shape[0])
    devices = jax.lax.axis_size(SHARD_AXIS)

    def of_all_devices(inputs: tuple[Array, Array]) -> Array:
        hidden, labels = inputs
        local_labels = all_gather_2d(labels, 0) - vocabulary.row_offset
        peak, total, picked = _scan_logits(all_gather_2d(hidden, 0), rows, local_labels, devices * chunk, here)
        highest = jax.lax.pmax(jax.lax.stop_gradient(peak), SHARD_AXIS)  # a shift: it cancels, and so does its gradient
        total = reduce_scatter_2d(total * jnp.exp(peak - highest), 0)
        mine = jax.lax.axis_index(SHARD_AXIS) * hidden.shape[0]
        return jax.lax.dynamic_slice_in_dim(highest, mine, hidden.shape[0]) + jnp.log(total) - reduce_scatter_2d(picked, 0)

    count, width = hidden.shape
    at_once = max(TILE, GATHERED_BYTES // (devices * width * hidden.dtype.itemsize) // TILE * TILE)
    if count <= at_once:
        return of_all_devices((hidden, labels))
    # In rounds, whose states are gathered again in the backward pass: none of them outlives its round.
    padding = -count % at_once
    rounds = (
        jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, at_once, width),
        jnp.pad(labels, (0, padding)).reshape(-1, at_once),
    )
    return jax.lax.map(jax.checkpoint(of_all_devices), rounds).reshape(-1)[:count]


def _scan_logits(hidden: Array, rows: Array, labels: Array, chunk: int, exists: int | Array) -> tuple[Array, Array, Array]:
    """(max, sum of exp(logit - max), logit of the label or 0) of each token over the first `exists` rows."""
    count, width = hidden.shape
    chunk = max(1, min(chunk, count))
    padding = -count % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, width)
    labels = jnp.pad(labels, (0, padding)).reshape(-1, chunk)
    word = jnp.arange(rows.shape[0])

    @jax.checkpoint
    def part(inputs):
        hidden, labels = inputs
        logits = einsum("nw,vw->nv", hidden, rows.astype(hidden.dtype))
        logits = jnp.where(word < exists, logits, -1e30)
        peak = jax.lax.stop_gradient(logits.max(-1))
        known = (labels >= 0) & (labels < exists)
        # Picked by comparison, not by index: the gradient of an indexed read would be a scatter into all logits.
        picked = jnp.where(word == jnp.where(known, labels, -1)[:, None], logits, 0).sum(-1)
        return peak, jnp.exp(logits - peak[:, None]).sum(-1), picked

    return tuple(x.reshape(-1)[:count] for x in jax.lax.map(part, (hidden, labels)))

"""The language model's cache of keys and values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far: S slots per row, of static shape, filled from the front with real tokens only.

    Keys are stored rotated, so the index of a slot only says in which order tokens were read.

    Attributes:
        keys: [layers, B, S, G * E], rotated, in the dtype computed in. Heads lie side by side, as products write them and TPU
            kernels read them: with an axis of heads, a TPU would change the layout of every layer's keys.
        values: [layers, B, S, G * E].
        position_ids: int [B, S], rotary position of each slot's token.
        segment_ids: int [B, S], segment of each slot's token; -1 = empty slot, never attended to.
    """

    keys: Float[Array, "l b s d"]
    values: Float[Array, "l b s d"]
    position_ids: Int[Array, "b s"]
    segment_ids: Int[Array, "b s"]

    @classmethod
    def empty(cls, num_layers: int, batch_size: int, capacity: int, width: int, dtype: jnp.dtype) -> KVCache:
        """A cache of `capacity` empty slots per row; `width` is that of all key/value heads together."""
        zeros = jnp.zeros((num_layers, batch_size, capacity, width), dtype)
        position_ids = jnp.zeros((batch_size, capacity), jnp.int32)
        return cls(zeros, zeros, position_ids, jnp.full((batch_size, capacity), -1, jnp.int32))

    @property
    def lengths(self) -> Int[Array, " b"]:
        """Filled slots of each row."""
        return (self.segment_ids != -1).sum(1, dtype=jnp.int32)

    def with_capacity(self, extra: int) -> KVCache:
        """The same cache with `extra` more empty slots per row."""
        pad = lambda x, axis, fill: jnp.pad(  # noqa: E731
            x, [(0, extra if i == axis else 0) for i in range(x.ndim)], constant_values=fill
        )
        return KVCache(pad(self.keys, 2, 0), pad(self.values, 2, 0), pad(self.position_ids, 1, 0), pad(self.segment_ids, 1, -1))

    def repeat(self, times: int) -> KVCache:
        """Every row `times` times, the copies adjacent: [B * times, ...]. Packed segments share a row without copies."""
        keys, values = (jnp.repeat(x, times, axis=1) for x in (self.keys, self.values))
        return KVCache(keys, values, *(jnp.repeat(x, times, axis=0) for x in (self.position_ids, self.segment_ids)))

    def update(
        self,
        keys: Float[Array, "l b t d"],
        values: Float[Array, "l b t d"],
        position_ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
    ) -> KVCache:
        """Fills each row's next slots with its real tokens. Padding takes no slot; tokens that find no slot are dropped."""
        real = segment_ids != -1
        nowhere = self.segment_ids.shape[1]
        slots = jnp.where(real, self.lengths[:, None] + jnp.cumsum(real, 1) - 1, nowhere)
        put = jax.vmap(lambda old, new, at: old.at[at].set(new.astype(old.dtype), mode="drop"))
        put_layers = jax.vmap(put, (0, 0, None))
        return KVCache(
            put_layers(self.keys, keys, slots),
            put_layers(self.values, values, slots),
            put(self.position_ids, position_ids, slots),
            put(self.segment_ids, segment_ids, slots),
        )

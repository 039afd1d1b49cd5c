"""The language model: a decoder-only transformer (Qwen3, Phi-3 or Llama), run on embeddings.

It computes what `transformers` `Qwen3Model`, `Phi3Model` and `LlamaModel` compute on right-padded input. It adds segments:
several conversations about one image stand in one row, and each is computed as if it stood alone with the image. A `KVCache`
keeps what has been read, and reading goes on from there: token by token, in chunks, or with many expressions about one image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.layers import Linear, RMSNorm, make_param, normal_init
from flowseg_jax.models.rope import rope_cos_sin
from flowseg_jax.models.stack import scan_layers, stack_layers
from flowseg_jax.ops.attention import AttentionMask, TokenInfo, attention, causal_mask
from flowseg_jax.ops.rope import norm_rope
from flowseg_jax.ops.vocabulary import ShardedEmbedding, embedding_lookup

KeyValuePair = tuple[Float[Array, "b _ d"], Float[Array, "b _ d"]]  # keys and values of a layer, heads side by side


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions and, if configured, RMS-normalised queries and keys. No biases."""

    def __init__(self, cfg: LanguageConfig, *, rngs: nnx.Rngs):
        w, e = cfg.hidden_size, cfg.head_dim
        self.q_proj = _linear(cfg, w, cfg.num_attention_heads * e, "embed", "heads", rngs=rngs)
        self.k_proj = _linear(cfg, w, cfg.num_key_value_heads * e, "embed", "heads", rngs=rngs)
        self.v_proj = _linear(cfg, w, cfg.num_key_value_heads * e, "embed", "heads", rngs=rngs)
        self.o_proj = _linear(cfg, cfg.num_attention_heads * e, w, "heads", "embed", rngs=rngs)
        self.q_norm = RMSNorm(e, rngs=rngs, eps=cfg.rms_norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(e, rngs=rngs, eps=cfg.rms_norm_eps) if cfg.qk_norm else None
        self.head_dim = e

    def __call__(
        self,
        x: Float[Array, "b t w"],
        cos: Float[Array, "b t r"],
        sin: Float[Array, "b t r"],
        mask: AttentionMask,
        past: KeyValuePair | None = None,
    ) -> tuple[Float[Array, "b t w"], KeyValuePair]:
        """Attends to `past` (if any), then the new tokens, as `mask` allows; returns the new tokens' keys and values too."""
        q, k, v = (self._split_heads(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is None:
            q, k = norm_rope(q, None, cos, sin), norm_rope(k, None, cos, sin)
        else:
            q, k = (norm_rope(x, norm.scale[...], cos, sin, eps=norm.eps) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        new = keys, values = k.reshape(*x.shape[:2], -1), v.reshape(*x.shape[:2], -1)
        if past is not None:
            keys, values = (jnp.concatenate(both, 1) for both in zip(past, new, strict=True))
        y = attention(q, self._split_heads(keys), self._split_heads(values), mask=mask)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), new

    def _split_heads(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h e"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class MLP(nnx.Module):
    """The SiLU-gated feed-forward part. No biases."""

    def __init__(self, cfg: LanguageConfig, *, rngs: nnx.Rngs):
        self.gate_proj = _linear(cfg, cfg.hidden_size, cfg.intermediate_size, "embed", "mlp", rngs=rngs)
        self.up_proj = _linear(cfg, cfg.hidden_size, cfg.intermediate_size, "embed", "mlp", rngs=rngs)
        self.down_proj = _linear(cfg, cfg.intermediate_size, cfg.hidden_size, "mlp", "embed", rngs=rngs)

    def __call__(self, x: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerBlock(nnx.Module):
    """One pre-norm layer: self-attention, then the feed-forward part (HF `Qwen3DecoderLayer`)."""

    def __init__(self, cfg: LanguageConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(cfg.hidden_size, rngs=rngs, eps=cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, rngs=rngs, eps=cfg.rms_norm_eps)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t w"],
        cos: Float[Array, "b t r"],
        sin: Float[Array, "b t r"],
        mask: AttentionMask,
        past: KeyValuePair | None = None,
    ) -> tuple[Float[Array, "b t w"], KeyValuePair]:
        """As `SelfAttention`: the layer's output, and the new tokens' keys and values."""
        y, new = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), new


def _linear(cfg: LanguageConfig, d_in: int, d_out: int, *axes: str, rngs: nnx.Rngs) -> Linear:
    return Linear(d_in, d_out, rngs=rngs, axes=axes, bias=False, init=normal_init(cfg.initializer_range))


def _sharded_embedding(table: nnx.Param, dtype: jnp.dtype | None) -> ShardedEmbedding:
    weight = table[...] if dtype is None else table[...].astype(dtype)
    if table.get_metadata().get("fsdp_axis") is None:
        return ShardedEmbedding.whole(weight)
    return ShardedEmbedding.from_fsdp_shard(weight)


class LanguageModel(nnx.Module):
    """The language model, from embeddings to normalised hidden states; logits are `hidden @ lm_head_weight().weight.T`."""

    def __init__(self, cfg: LanguageConfig, *, rngs: nnx.Rngs):
        shape, axes = (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed")
        self.embed_tokens = make_param(rngs, normal_init(cfg.embedding_initializer_range), shape, axes)
        self.layers = stack_layers(lambda r: TransformerBlock(cfg, rngs=r), cfg.num_hidden_layers, rngs)
        self.norm = RMSNorm(cfg.hidden_size, rngs=rngs, eps=cfg.rms_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else make_param(rngs, normal_init(0.02), shape, axes)
        self.cfg = cfg

    def embed(self, input_ids: Int[Array, "b t"], dtype: jnp.dtype | None = None) -> Float[Array, "b t w"]:
        """Embedding rows, in `dtype` or the table's. Placeholder ids (< 0) read row 0; the caller overwrites them."""
        return embedding_lookup(_sharded_embedding(self.embed_tokens, dtype), input_ids)

    def lm_head_weight(self, dtype: jnp.dtype | None = None) -> ShardedEmbedding:
        """The matrix of the language head, [V, W]; the embedding table itself when tied. In `dtype` or its own."""
        return _sharded_embedding(self.embed_tokens if self.lm_head is None else self.lm_head, dtype)

    def __call__(
        self,
        inputs_embeds: Float[Array, "b t w"],
        position_ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
        out: dict[str, Any] | None = None,
    ) -> Float[Array, "b t w"]:
        """Runs the layers.

        Args:
            inputs_embeds: [B, T, W]; their dtype is the dtype computed in.
            position_ids: int [B, T], rotary positions.
            segment_ids: int [B, T]; 0 = the prefix that every token attends to, 1.. = conversations that do not attend to each
                other, -1 = padding (never attended to; its own outputs have no meaning).
            out: if given, it gets "llm/hidden_states", a list as Hugging Face counts: the embeddings, every layer's output,
                the last one after the final norm.

        Returns:
            [B, T, W], hidden states after the final norm (HF's `hidden_states[-1]`).
        """
        mask = causal_mask(segment_ids, position_ids, self.cfg.sliding_window)
        hidden, _, states = self._run(inputs_embeds, position_ids, mask, None, keep_states=out is not None)
        if out is not None:
            out["llm/hidden_states"] = [inputs_embeds, *states[:-1], hidden]
        return hidden

    def prefill(
        self,
        inputs_embeds: Float[Array, "b t w"],
        position_ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
        capacity: int | None = None,
    ) -> tuple[Float[Array, "b t w"], KVCache]:
        """As the call; also returns the cache of these tokens, with `capacity` slots per row.

        None: a slot per token, without moving any; then padding must stand at the end of a row.

        Raises:
            ValueError: fewer slots than tokens.
        """
        b, t = segment_ids.shape
        if capacity is not None and capacity < t:
            raise ValueError(f"a cache of {capacity} slots cannot hold {t} tokens")
        mask = causal_mask(segment_ids, position_ids, self.cfg.sliding_window)
        hidden, new, _ = self._run(inputs_embeds, position_ids, mask, None, keep_keys=True)
        if capacity is None:
            return hidden, KVCache(*new, position_ids, segment_ids)
        cfg = self.cfg
        width = cfg.num_key_value_heads * cfg.head_dim
        cache = KVCache.empty(cfg.num_hidden_layers, b, capacity, width, inputs_embeds.dtype)
        return hidden, cache.update(*new, position_ids, segment_ids)

    def extend(
        self,
        cache: KVCache,
        inputs_embeds: Float[Array, "b t w"],
        position_ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
    ) -> tuple[Float[Array, "b t w"], KVCache]:
        """Reads more tokens: they attend to the cache and to each other, as if all had been read in one call.

        New tokens need free slots only to be remembered. A caller that reads once after a prefix (the expressions about an
        image, packed as segments 1..) passes a full cache and ignores the one returned.

        Args:
            cache: of earlier tokens.
            inputs_embeds: [B, T, W].
            position_ids: int [B, T], rotary positions; the caller counts on from the cached ones.
            segment_ids: int [B, T], as in the call; padding (-1) takes no slot.

        Returns:
            [B, T, W], hidden states of the new tokens after the final norm; the cache with the new tokens.
        """
        mask = causal_mask(segment_ids, position_ids, self.cfg.sliding_window)
        # Cached tokens come before all new ones.
        cached = TokenInfo(jnp.full_like(cache.segment_ids, -1), cache.segment_ids, cache.position_ids)
        keys = jax.tree.map(lambda *x: jnp.concatenate(x, 1), cached, mask.keys)
        mask = dataclasses.replace(mask, keys=keys, in_order=False)
        hidden, new, _ = self._run(inputs_embeds, position_ids, mask, (cache.keys, cache.values), keep_keys=True)
        return hidden, cache.update(*new, position_ids, segment_ids)

    def _run(
        self,
        x: Float[Array, "b t w"],
        position_ids: Int[Array, "b t"],
        mask: AttentionMask,
        past: Any,
        *,
        keep_keys: bool = False,
        keep_states: bool = False,
    ) -> tuple[Float[Array, "b t w"], Any, Float[Array, "l b t w"] | None]:
        """All layers over the new tokens; `past` holds the cached keys and values of all layers, or is None.

        Returns the normalised hidden states; the new keys and values of all layers if `keep_keys`; the output of every layer if
        `keep_states`.
        """
        cos, sin = rope_cos_sin(position_ids, self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)

        def body(layer: TransformerBlock, x: Array, past: KeyValuePair | None) -> tuple[Array, tuple[Any, Array | None]]:
            x, new = layer(x, cos, sin, mask, past)
            return x, (new if keep_keys else None, x if keep_states else None)

        x, (new, states) = scan_layers(self.layers, body, x, past, policy=self.cfg.remat)
        return self.norm(x), new, states

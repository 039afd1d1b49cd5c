"""Greedy decoding: one compiled loop over the language model's cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flowseg_jax.models.language import Cache, Language


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, and the hidden states that conditions and `<SEG>` are read from.

    Attributes:
        tokens: int32 [B, N], -1 behind the end.
        lengths: int32 [B], tokens generated, the one that ended the row included.
        hidden: [B, N, W], the model's output at each generated token (which the token's successor is chosen from); zeros behind
            the end.
        prompt_hidden: [B, T, W], the model's output at each prompt token; no meaning on padding.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, "b"]
    hidden: Float[Array, "b n w"]
    prompt_hidden: Float[Array, "b t w"]


def generate(
    model: Language,
    embeds: Float[Array, "b t w"],
    lengths: Int[Array, "b"],
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    cache: Cache | None = None,
) -> Generation:
    """Continues each prompt with its most likely tokens, as HF `generate(do_sample=False)` does.

    Meant to be called under `jax.jit`: all shapes are static, the loop ends on the device as soon as every row has ended.

    Args:
        model: the language model.
        embeds: [B, T, W], embedded prompts (`model.embed(tokens)`, images spliced in), right-padded; their dtype is the dtype
            computed in.
        lengths: int [B], real tokens of each prompt. A row of length 0 generates nothing.
        max_new_tokens: N.
        eos: ids that end a row; none: every row gets N tokens.
        cache: one conversation a row that the prompts continue, all of segment 0 (an image's prefix, `Cache.repeat`ed for
            several prompts); None: the prompts start at position 0.
    """
    b, t = embeds.shape[:2]
    index = jnp.arange(t, dtype=jnp.int32)
    start = jnp.zeros(b, jnp.int32) if cache is None else cache.lengths
    positions = start[:, None] + index
    segments = jnp.where(index < lengths[:, None], 0, -1)
    if cache is None:
        prompt_hidden, cache = model.prefill(embeds, positions, segments, t + max_new_tokens)
    else:
        prompt_hidden, cache = model.extend(cache.grow(t + max_new_tokens), embeds, positions, segments)
    last = jnp.take_along_axis(prompt_hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    matrix = model.unembedding(embeds.dtype).rows
    ends = jnp.asarray(tuple(eos), jnp.int32)

    def going(state: tuple) -> Array:
        step, alive = state[:2]
        return (step < max_new_tokens) & alive.any()

    def advance(state: tuple) -> tuple:
        step, alive, last, cache, out = state
        logits = jnp.einsum("bw,vw->bv", last[:, 0], matrix, preferred_element_type=jnp.float32)
        token = jnp.where(alive, logits.argmax(-1).astype(jnp.int32), -1)
        # A row that has ended goes on as padding: nothing it computes is remembered.
        place = (start + lengths + step)[:, None]
        one = jnp.where(alive, 0, -1)[:, None]
        last, cache = model.extend(cache, model.embed(token[:, None]).astype(embeds.dtype), place, one)
        out = Generation(
            out.tokens.at[:, step].set(token),
            out.lengths + alive,
            out.hidden.at[:, step].set(jnp.where(alive[:, None], last[:, 0], 0)),
            out.prompt_hidden,
        )
        return step + 1, alive & ~(token[:, None] == ends).any(-1), last, cache, out

    blank = Generation(
        jnp.full((b, max_new_tokens), -1, jnp.int32),
        jnp.zeros(b, jnp.int32),
        jnp.zeros((b, max_new_tokens, embeds.shape[2]), embeds.dtype),
        prompt_hidden,
    )
    return jax.lax.while_loop(going, advance, (jnp.int32(0), lengths > 0, last, cache, blank))[-1]

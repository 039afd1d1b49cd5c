"""Greedy decoding in one compiled loop over the KV cache, and the masks of answers that the model generates.

`FlowSeg.predict_cached` is given the model's answer, `<SEG>` included. Here the model generates its answers:
`generate_answers` continues questions about encoded images, `decode_generated_masks` reads the masks off the answers, and
`generate_and_segment` does both for evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowseg_jax.models.conditions import pool_spans
from flowseg_jax.models.flowseg import FlowSeg
from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.language import LanguageModel
from flowseg_jax.models.outputs import ImageCache, MaskCandidates
from flowseg_jax.ops.dot import matmul_f32
from flowseg_jax.types import PromptQueries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated tokens, and the hidden states from which conditions and `<SEG>` are pooled.

    Attributes:
        token_ids: int32 [B, N], -1 after the end.
        lengths: int32 [B], number of generated tokens, the one that ended the row included.
        hidden_states: [B, N, W], the model's output at each generated token (from which its successor is chosen); zeros after
            the end.
        prompt_hidden_states: [B, T, W], the model's output at each prompt token; without meaning on padding.
    """

    token_ids: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    hidden_states: Float[Array, "b n w"]
    prompt_hidden_states: Float[Array, "b t w"]


def generate(
    model: LanguageModel,
    inputs_embeds: Float[Array, "b t w"],
    lengths: Int[Array, " b"],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    kv_cache: KVCache | None = None,
) -> Generation:
    """Continues each prompt with its most likely tokens, as HF `generate(do_sample=False)` does.

    Meant to be called under `jax.jit`: all shapes are static, and the loop ends on the device as soon as every row has ended.

    Args:
        model: the language model.
        inputs_embeds: [B, T, W], embedded prompts (`model.embed(input_ids)`, visual tokens merged in), right-padded; their
            dtype is the dtype computed in.
        lengths: int [B], real tokens of each prompt. A row of length 0 generates nothing.
        max_new_tokens: N.
        eos_ids: ids that end a row; none: every row gets N tokens.
        kv_cache: one conversation per row that the prompts continue, all of segment 0 (an image's prefix,
            `KVCache.repeat`ed for several prompts); None: the prompts start at position 0.
    """
    b, t = inputs_embeds.shape[:2]
    dtype = inputs_embeds.dtype
    index = jnp.arange(t, dtype=jnp.int32)
    start = jnp.zeros(b, jnp.int32) if kv_cache is None else kv_cache.lengths
    position_ids = start[:, None] + index
    segment_ids = jnp.where(index < lengths[:, None], 0, -1)
    prompt = inputs_embeds, position_ids, segment_ids
    if kv_cache is None:
        prompt_hidden_states, kv_cache = model.prefill(*prompt, t + max_new_tokens)
    else:
        prompt_hidden_states, kv_cache = model.extend(kv_cache.with_capacity(t + max_new_tokens), *prompt)
    last = jnp.take_along_axis(prompt_hidden_states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    lm_head = model.lm_head_weight(dtype).weight
    ends = jnp.asarray(tuple(eos_ids), jnp.int32)

    def unfinished(state: tuple) -> Array:
        step, alive = state[:2]
        return (step < max_new_tokens) & alive.any()

    def advance(state: tuple) -> tuple:
        step, alive, last, kv_cache, out = state
        logits = matmul_f32(last[:, 0], lm_head, 1, 1)
        token = jnp.where(alive, logits.argmax(-1).astype(jnp.int32), -1)
        # A row that has ended goes on as padding: nothing that it computes is kept.
        position = (start + lengths + step)[:, None]
        segment = jnp.where(alive, 0, -1)[:, None]
        last, kv_cache = model.extend(kv_cache, model.embed(token[:, None]).astype(dtype), position, segment)
        out = Generation(
            out.token_ids.at[:, step].set(token),
            out.lengths + alive,
            out.hidden_states.at[:, step].set(jnp.where(alive[:, None], last[:, 0], 0)),
            out.prompt_hidden_states,
        )
        return step + 1, alive & ~(token[:, None] == ends).any(-1), last, kv_cache, out

    blank = Generation(
        jnp.full((b, max_new_tokens), -1, jnp.int32),
        jnp.zeros(b, jnp.int32),
        jnp.zeros((b, max_new_tokens, inputs_embeds.shape[2]), dtype),
        prompt_hidden_states,
    )
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), lengths > 0, last, kv_cache, blank))[-1]


@dataclasses.dataclass(frozen=True)
class SpecialTokenIds:
    """Ids of the special tokens `<p>`, `</p>` and `<SEG>`."""

    phrase_start: int
    phrase_end: int
    seg: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegPhrasePairs:
    """Which phrase each `<SEG>` of an answer stands for; J of them per row. Indices count the T question and N answer tokens.

    Attributes:
        exists: bool [R, J]; False where there is no such `<SEG>`, or no phrase at all: the other fields then mean nothing.
        seg: int32 [R, J], where the `<SEG>` is.
        start, end: int32 [R, J], where the phrase's `<p>` and `</p>` are.
    """

    exists: Bool[Array, "r j"]
    seg: Int[Array, "r j"]
    start: Int[Array, "r j"]
    end: Int[Array, "r j"]


def pair_seg_with_phrases(
    token_ids: Int[Array, "r l"], question_length: int, special_tokens: SpecialTokenIds, num_outputs: int
) -> SegPhrasePairs:
    """Finds the first J = `num_outputs` `<SEG>` of each answer, and their phrases.

    The phrases are the answer's own `<p>..</p>` spans if it has any, else the question's (X-SAM's rule). Where there are as
    many phrases as `<SEG>`, they belong together in their order (as in X-SAM's data). Otherwise a `<SEG>` takes the last phrase
    that ended before it, or the first one of all. A `<p>` that is never closed, or opened again before it is, begins no phrase.

    Args:
        token_ids: int [R, T + N], the question padded to T, then the answer; a negative id is no token.
        question_length: T.
    """

    def row(token_ids: Int[Array, " l"]) -> tuple[Array, ...]:
        length = token_ids.shape[0]
        index = jnp.arange(length, dtype=jnp.int32)
        latest = lambda where: jax.lax.cummax(jnp.where(where, index, -1))  # noqa: E731
        opened, closed = latest(token_ids == special_tokens.phrase_start), latest(token_ids == special_tokens.phrase_end)
        ends = (token_ids == special_tokens.phrase_end) & (opened > jnp.pad(closed, (1, 0), constant_values=-1)[:-1])
        own = ends & (index >= question_length)
        ends = jnp.where(own.any(), own, ends)
        is_seg = (token_ids == special_tokens.seg) & (index >= question_length)
        seg, nth = (jnp.nonzero(x, size=num_outputs, fill_value=0)[0].astype(jnp.int32) for x in (is_seg, ends))
        before = latest(ends)[seg]
        end = jnp.where(ends.sum() == is_seg.sum(), nth, jnp.where(before >= 0, before, ends.argmax()))
        return (jnp.arange(num_outputs) < is_seg.sum()) & ends.any(), seg, opened[end], end

    return SegPhrasePairs(*jax.vmap(row)(token_ids))


def generate_answers(
    model: FlowSeg, image_cache: ImageCache, queries: PromptQueries, *, max_new_tokens: int, eos_ids: Sequence[int]
) -> Generation:
    """The model's own answers to questions about encoded images; rows are B * K, image by image."""
    b, k, t = queries.input_ids.shape
    embeds = model.llm.embed(queries.input_ids.reshape(b * k, t), image_cache.kv_cache.keys.dtype)
    with jax.named_scope("generate"):
        return generate(
            model.llm,
            embeds,
            queries.lengths.reshape(b * k),
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            kv_cache=image_cache.kv_cache.repeat(k),
        )


def decode_generated_masks(
    model: FlowSeg,
    image_cache: ImageCache,
    queries: PromptQueries,
    answers: Generation,
    *,
    special_tokens: SpecialTokenIds,
    num_outputs: int,
) -> tuple[MaskCandidates, SegPhrasePairs]:
    """All candidates of the first J = `num_outputs` `<SEG>` of each answer.

    Args:
        image_cache: the images.
        queries: the questions.
        answers: the answers to them, from `generate_answers`.
        special_tokens: of the tokenizer.
        num_outputs: J.

    Returns:
        The candidates of [B, K * J] phrases, question by question; the scores of a phrase that does not exist are NaN, which
        `evaluation.postprocess` takes for a failure: an empty mask. And the pairs, of rows B * K.
    """
    b, k, t = queries.input_ids.shape
    question = jnp.where(jnp.arange(t) < queries.lengths[..., None], queries.input_ids, -1).reshape(b * k, t)
    pairs = pair_seg_with_phrases(jnp.concatenate([question, answers.token_ids], 1), t, special_tokens, num_outputs)
    projected = model.llm_projector(jnp.concatenate([answers.prompt_hidden_states, answers.hidden_states], 1))
    index = jnp.arange(projected.shape[1])

    def pool(start: Int[Array, " r"], end: Int[Array, " r"]) -> Float[Array, "r d"]:
        return pool_spans(projected, jnp.where((index >= start[:, None]) & (index <= end[:, None]), 0, -1), 1)[:, 0]

    pool_all = jax.vmap(pool, in_axes=1, out_axes=1)
    embeds = pool_all(pairs.start, pairs.end), pool_all(pairs.seg, pairs.seg)
    candidates = model.decode_masks(
        image_cache.mask_features,
        image_cache.levels,
        *(x.reshape(b, k * num_outputs, x.shape[-1]) for x in embeds),
    )
    exists = pairs.exists.reshape(b, k * num_outputs, 1)
    return dataclasses.replace(candidates, scores=jnp.where(exists, candidates.scores, jnp.nan)), pairs


def generate_and_segment(
    model: FlowSeg,
    image_cache: ImageCache,
    queries: PromptQueries,
    *,
    special_tokens: SpecialTokenIds,
    max_new_tokens: int,
    eos_ids: Sequence[int],
) -> tuple[MaskCandidates, Bool[Array, "b k"]]:
    """What `FlowSeg.predict_cached` returns, from answers that the model generates: the mask of the first `<SEG>` of each.

    Returns:
        The candidates of [B, K] phrases; and whether each answer has a `<SEG>`. Where it has none, the scores are NaN: a
        failure.
    """
    answers = generate_answers(model, image_cache, queries, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
    candidates, pairs = decode_generated_masks(
        model, image_cache, queries, answers, special_tokens=special_tokens, num_outputs=1
    )
    return candidates, pairs.exists.reshape(queries.lengths.shape)

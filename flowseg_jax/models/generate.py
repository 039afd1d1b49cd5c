"""Greedy decoding: one compiled loop over the language model's cache; and the masks of what the model wrote itself.

Segmentation usually hands the model its answer, `<SEG>` included (`FlowSeg.ask`). Here the model writes it: `write` continues
questions about images that have been seen, `segment` reads the masks off what was written, `answer` does both for evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowseg_jax.models.flowseg import FlowSeg, ImageCache, MaskCandidates, pool_spans
from flowseg_jax.models.language import KVCache, LanguageModel
from flowseg_jax.ops.dot import matmul_f32
from flowseg_jax.types import PromptQueries


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
    lengths: Int[Array, " b"]
    hidden: Float[Array, "b n w"]
    prompt_hidden: Float[Array, "b t w"]


def generate(
    model: LanguageModel,
    embeds: Float[Array, "b t w"],
    lengths: Int[Array, " b"],
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    cache: KVCache | None = None,
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
        prompt_hidden, cache = model.extend(cache.with_capacity(t + max_new_tokens), embeds, positions, segments)
    last = jnp.take_along_axis(prompt_hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    matrix = model.lm_head_weight(embeds.dtype).weight
    ends = jnp.asarray(tuple(eos), jnp.int32)

    def going(state: tuple) -> Array:
        step, alive = state[:2]
        return (step < max_new_tokens) & alive.any()

    def advance(state: tuple) -> tuple:
        step, alive, last, cache, out = state
        logits = matmul_f32(last[:, 0], matrix, 1, 1)
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


@dataclasses.dataclass(frozen=True)
class SpecialTokenIds:
    """Token ids that give an answer its meaning: `<p>`, `</p>` and `<SEG>`."""

    phrase_start: int
    phrase_end: int
    seg: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegPhrasePairs:
    """Which phrase each `<SEG>` of an answer stands for; J of them a row. Indices count the T question and N answer tokens.

    Attributes:
        exists: bool [R, J]; False where there is no such `<SEG>`, or no phrase at all: the other fields then mean nothing.
        seg: int32 [R, J], where the `<SEG>` is.
        start, end: int32 [R, J], where the phrase's `<p>` and `</p>` are.
    """

    exists: Bool[Array, "r j"]
    seg: Int[Array, "r j"]
    start: Int[Array, "r j"]
    end: Int[Array, "r j"]


def pair_seg_with_phrases(tokens: Int[Array, "r l"], question: int, marks: SpecialTokenIds, outputs: int) -> SegPhrasePairs:
    """Finds the first J = `outputs` `<SEG>` of each answer, and their phrases.

    The phrases are the answer's own `<p>..</p>` spans if it has any, else the question's (X-SAM's rule). Where there are as
    many phrases as `<SEG>`, they belong together in their order (as in X-SAM's data). Otherwise a `<SEG>` takes the last phrase
    that ended before it, or the first one of all. A `<p>` that is never closed, or opened again before it is, begins no phrase.

    Args:
        tokens: int [R, T + N], the question padded to T, then the answer; a negative id is no token.
        question: T.
    """

    def row(tokens: Int[Array, " l"]) -> tuple[Array, ...]:
        length = tokens.shape[0]
        index = jnp.arange(length, dtype=jnp.int32)
        latest = lambda where: jax.lax.cummax(jnp.where(where, index, -1))  # noqa: E731
        opened, closed = latest(tokens == marks.phrase_start), latest(tokens == marks.phrase_end)
        ends = (tokens == marks.phrase_end) & (opened > jnp.pad(closed, (1, 0), constant_values=-1)[:-1])
        own = ends & (index >= question)
        ends = jnp.where(own.any(), own, ends)
        is_seg = (tokens == marks.seg) & (index >= question)
        seg, nth = (jnp.nonzero(x, size=outputs, fill_value=0)[0].astype(jnp.int32) for x in (is_seg, ends))
        before = latest(ends)[seg]
        end = jnp.where(ends.sum() == is_seg.sum(), nth, jnp.where(before >= 0, before, ends.argmax()))
        return (jnp.arange(outputs) < is_seg.sum()) & ends.any(), seg, opened[end], end

    return SegPhrasePairs(*jax.vmap(row)(tokens))


def generate_answers(
    model: FlowSeg, seen: ImageCache, asked: PromptQueries, *, max_new_tokens: int, eos: Sequence[int]
) -> Generation:
    """The model's own answers to questions about images that have been seen; rows are B * K, image by image."""
    b, k, t = asked.input_ids.shape
    embeds = model.llm.embed(asked.input_ids.reshape(b * k, t), seen.kv_cache.keys.dtype)
    with jax.named_scope("generate"):
        return generate(
            model.llm,
            embeds,
            asked.lengths.reshape(b * k),
            max_new_tokens=max_new_tokens,
            eos=eos,
            cache=seen.kv_cache.repeat(k),
        )


def decode_generated_masks(
    model: FlowSeg, seen: ImageCache, asked: PromptQueries, written: Generation, *, marks: SpecialTokenIds, outputs: int
) -> tuple[MaskCandidates, SegPhrasePairs]:
    """All candidates of the first J = `outputs` `<SEG>` of each answer.

    Args:
        seen: the images. asked: the questions. written: the answers to them, from `write`.
        marks: of the tokenizer.
        outputs: J.

    Returns:
        Segmentation of [B, K * J] phrases, question by question; the scores of one that does not exist are NaN, which
        `evaluation.postprocess` takes for a failure: an empty mask. And the pairs, of rows B * K.
    """
    b, k, t = asked.input_ids.shape
    question = jnp.where(jnp.arange(t) < asked.lengths[..., None], asked.input_ids, -1).reshape(b * k, t)
    pairs = pair_seg_with_phrases(jnp.concatenate([question, written.tokens], 1), t, marks, outputs)
    projected = model.llm_projector(jnp.concatenate([written.prompt_hidden, written.hidden], 1))
    index = jnp.arange(projected.shape[1])

    def pool(start: Int[Array, " r"], end: Int[Array, " r"]) -> Float[Array, "r d"]:
        return pool_spans(projected, jnp.where((index >= start[:, None]) & (index <= end[:, None]), 0, -1), 1)[:, 0]

    pool_all = jax.vmap(pool, in_axes=1, out_axes=1)
    phrases, segs = pool_all(pairs.start, pairs.end), pool_all(pairs.seg, pairs.seg)
    found = model.decode_masks(
        seen.mask_features, seen.multi_scale_features, *(x.reshape(b, k * outputs, x.shape[-1]) for x in (phrases, segs))
    )
    exists = pairs.exists.reshape(b, k * outputs, 1)
    return dataclasses.replace(found, scores=jnp.where(exists, found.scores, jnp.nan)), pairs


def generate_and_segment(
    model: FlowSeg, seen: ImageCache, asked: PromptQueries, *, marks: SpecialTokenIds, max_new_tokens: int, eos: Sequence[int]
) -> tuple[MaskCandidates, Bool[Array, "b k"]]:
    """What `FlowSeg.ask` gives, from answers that the model writes itself: the mask of the first `<SEG>` of each.

    Returns:
        Segmentation of [B, K] phrases; and where the answer has a `<SEG>`. Where it has none, the scores are NaN: a failure.
    """
    written = generate_answers(model, seen, asked, max_new_tokens=max_new_tokens, eos=eos)
    found, pairs = decode_generated_masks(model, seen, asked, written, marks=marks, outputs=1)
    return found, pairs.exists.reshape(asked.lengths.shape)

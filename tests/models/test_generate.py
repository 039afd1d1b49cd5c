"""Reading on from a cache, and greedy decoding, against the run without a cache and against Hugging Face's models."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flowseg_jax.models.generate import SpecialTokenIds, generate, pair_seg_with_phrases
from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.language import LanguageModel
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.types import PromptQueries
from tests.helpers import hf_convert
from tests.models.test_language import LENGTHS, REFERENCES, ROPE, SIZES, config_of, model_of, padded_rows, params_of

NEW = 6  # tokens to generate


@pytest.fixture(scope="module", params=REFERENCES)
def pair(request):
    """Hugging Face's model with random weights, and ours with the same. The large scale keeps it from repeating one token."""
    make, config, extra = REFERENCES[request.param]
    reference = make(config(**SIZES | {"rope_parameters": dict(ROPE)} | extra))
    reference = hf_convert.randomise(reference, seed=len(request.param), scale=0.3)
    cfg = config_of(reference)
    return reference, model_of(cfg, params_of(hf_convert.weights(reference), cfg))


@pytest.fixture(scope="module")
def tiny():
    return LanguageModel(LanguageConfig.tiny(50), rngs=nnx.Rngs(0))


def read_in_chunks(model, embeds, positions, segments, sizes, capacity):
    """Hidden states of all tokens, chunk after chunk from one cache; equal chunks are compiled once."""

    @jax.jit
    def first(x, p, s):
        return model.prefill(x, p, s, capacity)

    extend = jax.jit(model.extend)
    parts, start, cache = [], 0, None
    for size in sizes:
        chunk = tuple(a[:, start : start + size] for a in (embeds, positions, segments))
        hidden, cache = first(*chunk) if cache is None else extend(cache, *chunk)
        parts.append(hidden)
        start += size
    return np.concatenate(parts, 1), cache


@pytest.mark.parametrize("sizes", [(1,) * 13, (4, 5, 4), (13,)], ids=["token by token", "chunks", "whole"])
def test_logits_from_a_cache_equal_the_run_without_and_hugging_face(pair, sizes):
    """Right-padded rows: in "chunks" the second row's padding begins inside of a chunk."""
    reference, model = pair
    tokens, real, positions, segments = padded_rows()
    embeds = np.asarray(model.embed(tokens))
    with torch.no_grad():
        expected = reference(inputs_embeds=torch.tensor(embeds), attention_mask=torch.tensor(real).long()).logits.numpy()
    cacheless = jax.jit(model.__call__)(embeds, positions, segments)
    hidden, cache = read_in_chunks(model, embeds, positions, segments, sizes, capacity=15)
    assert hf_convert.error(hidden[real], np.asarray(cacheless)[real]) < 1e-5
    logits = hidden @ np.asarray(model.lm_head_weight().weight).T
    assert hf_convert.error(logits[real], expected[real]) < 1e-5
    assert cache.lengths.tolist() == list(LENGTHS)
    assert (np.asarray(cache.position_ids)[1, :9] == np.arange(9)).all()


@pytest.mark.parametrize("pair", ["phi3 window"], indirect=True)
def test_padding_of_one_chunk_is_filled_by_the_next(pair):
    """Rows of lengths 2 and 5, read as padded chunks of 3 each, equal unpadded rows."""
    _, model = pair
    embeds = np.random.default_rng(5).normal(size=(2, 5, model.cfg.hidden_size)).astype(np.float32)
    expected = jax.jit(model.__call__)(embeds, np.broadcast_to(np.arange(5), (2, 5)), np.zeros((2, 5), int))
    junk = np.full((2, 3, model.cfg.hidden_size), 9.0, np.float32)
    first, second = junk.copy(), junk.copy()
    first[0, :1], second[0, :1] = embeds[0, :1], embeds[0, 1:2]
    first[1], second[1, :2] = embeds[1, :3], embeds[1, 3:]

    @jax.jit
    def run():
        one, cache = model.prefill(first, np.array([[0, 7, 7], [0, 1, 2]]), np.array([[0, -1, -1], [0, 0, 0]]), 5)
        return one, *model.extend(cache, second, np.array([[1, 7, 7], [3, 4, 7]]), np.array([[0, -1, -1], [0, 0, -1]]))

    one, two, cache = run()
    actual = np.concatenate([one[0, :1], two[0, :1], one[1], two[1, :2]])
    assert hf_convert.error(actual, np.concatenate([expected[0, :2], expected[1]])) < 1e-5
    assert cache.lengths.tolist() == [2, 5]


def test_expressions_after_a_shared_prefix_equal_the_packed_run(pair):
    """Both ways to share a prefix: packed segments on the prefix's own row, and one row an expression on repeated rows."""
    _, model = pair
    rng = np.random.default_rng(2)
    images, prefix, talks = 2, (6, 4), (4, 1, 3)
    longest, count = max(talks), len(talks)
    embeds = rng.normal(size=(images, max(prefix) + sum(talks), model.cfg.hidden_size)).astype(np.float32)
    index = np.broadcast_to(np.arange(max(prefix)), (images, max(prefix)))
    head = np.where(index < np.array(prefix)[:, None], 0, -1)
    ids = np.repeat(np.arange(count), talks)
    within = np.concatenate([np.arange(n) for n in talks])
    tail = np.array(prefix)[:, None] + within
    tail_ids = np.broadcast_to(ids + 1, tail.shape)
    packed = jax.jit(model.__call__)(embeds, np.concatenate([index, tail], 1), np.concatenate([head, tail_ids], 1))
    expected = np.asarray(packed)[:, max(prefix) :]

    # No room: it is only read.
    _, cache = jax.jit(lambda x: model.prefill(x, index, head, max(prefix)))(embeds[:, : max(prefix)])
    texts = embeds[:, max(prefix) :]
    extended, _ = jax.jit(model.extend)(cache, texts, tail, tail_ids)
    assert hf_convert.error(extended, expected) < 1e-5

    rows = rng.normal(size=(images, count, longest, model.cfg.hidden_size)).astype(np.float32)
    rows[:, ids, within] = texts
    flat = rows.reshape(images * count, longest, -1)
    positions = np.repeat(prefix, count)[:, None] + np.arange(longest)
    segments = np.tile(np.where(np.arange(longest) < np.array(talks)[:, None], 0, -1), (images, 1))
    batch, _ = jax.jit(model.extend)(cache.repeat(count), flat, positions, segments)
    actual = np.asarray(batch).reshape(images, count, longest, -1)[:, ids, within]
    assert hf_convert.error(actual, expected) < 1e-5


def test_slots_beyond_the_need_and_junk_in_empty_ones_change_nothing(tiny):
    rng = np.random.default_rng(3)
    embeds = rng.normal(size=(1, 7, tiny.cfg.hidden_size)).astype(np.float32)
    positions, segments = np.arange(7)[None], np.array([[0, 0, 0, 1, 1, 2, 2]])

    @functools.partial(jax.jit, static_argnums=0)
    def last(slots, junk):
        _, cache = tiny.prefill(embeds[:, :4], positions[:, :4], segments[:, :4], slots)
        empty = (cache.segment_ids == -1)[None, :, :, None]
        cache = dataclasses.replace(cache, keys=jnp.where(empty, junk, cache.keys), values=jnp.where(empty, junk, cache.values))
        return tiny.extend(cache, embeds[:, 4:], positions[:, 4:], segments[:, 4:])[0]

    assert hf_convert.error(last(19, 1e3), last(4, 0.0)) < 1e-6


def test_append_by_hand():
    cache = KVCache.empty(1, 2, 3, 2, jnp.dtype(jnp.bfloat16))
    assert cache.keys.dtype == jnp.bfloat16 and cache.lengths.tolist() == [0, 0]

    def append(cache, keys, values, positions, segments):
        keys, values = (jnp.broadcast_to(jnp.array(x)[None, :, :, None], (1, 2, 2, 2)) for x in (keys, values))
        return cache.update(keys, values, jnp.array(positions), jnp.array(segments))

    cache = append(cache, [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], [[8, 9], [8, 9]], [[0, -1], [-1, 4]])
    assert cache.keys[0, :, :, 0].tolist() == [[1, 0, 0], [4, 0, 0]]
    cache = append(cache, [[10.0, 20.0], [3.0, 4.0]], [[50.0, 60.0], [7.0, 8.0]], [[3, 4], [5, 6]], [[0, 2], [-1, -1]])
    assert cache.keys[0, :, :, 1].tolist() == [[1, 10, 20], [4, 0, 0]]
    assert cache.values[0, :, :, 1].tolist() == [[5, 50, 60], [8, 0, 0]]
    assert cache.position_ids.tolist() == [[8, 3, 4], [9, 0, 0]]
    assert cache.segment_ids.tolist() == [[0, 0, 2], [4, -1, -1]]
    full = append(cache, [[7.0, 7.0], [9.0, 9.0]], [[0.0, 0.0], [0.0, 0.0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]])
    assert full.keys[0, :, :, 0].tolist() == [[1, 10, 20], [4, 9, 9]], "a full row keeps what it has"
    grown = cache.with_capacity(2)
    assert grown.segment_ids.tolist() == [[0, 0, 2, -1, -1], [4, -1, -1, -1, -1]] and grown.keys.shape == (1, 2, 5, 2)
    assert cache.repeat(2).segment_ids.tolist() == [[0, 0, 2]] * 2 + [[4, -1, -1]] * 2


def test_a_cache_smaller_than_the_prompt_is_refused(tiny):
    with pytest.raises(ValueError, match="3 slots cannot hold 4 tokens"):
        tiny.prefill(jnp.zeros((1, 4, tiny.cfg.hidden_size)), jnp.zeros((1, 4), int), jnp.zeros((1, 4), int), 3)


# ------------------------------------------------------------------------------------------------------ greedy decoding


def greedy_of(reference, tokens, length, eos):
    """Hugging Face's continuation of one unpadded row (it wants padding on the left), and the hidden states it is read from."""
    row = torch.tensor(tokens[None, :length])
    with torch.no_grad():
        out = reference.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=eos,
            pad_token_id=0,
        )
        hidden = reference(input_ids=out, output_hidden_states=True).hidden_states[-1]
    return out[0, length:].numpy(), hidden[0].numpy()


def compiled(model, eos):
    return jax.jit(lambda x, n, cache=None: generate(model, x, n, max_new_tokens=NEW, eos_ids=eos, kv_cache=cache))


def test_greedy_tokens_equal_hugging_face(pair):
    reference, model = pair
    tokens, *_ = padded_rows()
    free, _ = greedy_of(reference, tokens[0], LENGTHS[0], None)
    assert len(set(free.tolist())) > 2, "the continuation must not be one token over and over"
    eos = [int(free[2])]  # the first row ends early, the other runs on
    out = compiled(model, eos)(model.embed(tokens), np.array(LENGTHS))
    lengths = []
    for i, length in enumerate(LENGTHS):
        expected, hidden = greedy_of(reference, tokens[i], length, eos)
        n = len(expected)
        lengths.append(n)
        assert out.token_ids[i].tolist() == expected.tolist() + [-1] * (NEW - n)
        assert hf_convert.error(out.hidden_states[i, :n], hidden[length:]) < 1e-5
        assert hf_convert.error(out.prompt_hidden_states[i, :length], hidden[:length]) < 1e-5
        assert not np.asarray(out.hidden_states)[i, n:].any()
    assert out.lengths.tolist() == lengths and min(lengths) <= 3 < max(lengths)


@pytest.mark.parametrize("pair", ["phi3 window"], indirect=True)
def test_more_padding_and_other_rows_change_nothing(pair):
    _, model = pair
    tokens, *_ = padded_rows()
    run = compiled(model, [3])
    expected = run(model.embed(tokens), np.array(LENGTHS))
    wide = np.concatenate([tokens, np.full((2, 4), 7)], 1)
    wide = np.concatenate([wide[::-1], np.full((1, 17), 5)])
    actual = run(model.embed(wide), np.array([*LENGTHS[::-1], 0]))
    assert (np.asarray(actual.token_ids)[[1, 0]] == np.asarray(expected.token_ids)).all()
    assert hf_convert.error(actual.hidden_states[np.array([1, 0])], expected.hidden_states) < 1e-5
    assert actual.token_ids[2].tolist() == [-1] * NEW and actual.lengths[2] == 0


@pytest.mark.parametrize("pair", ["phi3 window"], indirect=True)
def test_prompts_after_a_cached_prefix_generate_what_whole_prompts_do(pair):
    _, model = pair
    tokens, *_ = padded_rows()
    prefix = 5
    tokens[1, :prefix] = tokens[0, :prefix]
    run = compiled(model, [3])
    whole = run(model.embed(tokens), np.array(LENGTHS))
    start = (model.embed(tokens[:1, :prefix]), np.arange(prefix)[None], np.zeros((1, prefix), int))
    _, cache = jax.jit(lambda: model.prefill(*start, prefix))()
    after = run(model.embed(tokens[:, prefix:]), np.array(LENGTHS) - prefix, cache.repeat(2))
    assert (np.asarray(after.token_ids) == np.asarray(whole.token_ids)).all()
    assert hf_convert.error(after.hidden_states, whole.hidden_states) < 1e-5
    assert hf_convert.error(after.prompt_hidden_states[0], whole.prompt_hidden_states[0, prefix:]) < 1e-5


def test_one_program_serves_all_prompts_of_a_shape(tiny):
    run = compiled(tiny, list(range(50)))  # every token ends a row
    rng = np.random.default_rng(0)
    for lengths in ([4, 2], [1, 4], [0, 0]):
        embeds = rng.normal(size=(2, 4, tiny.cfg.hidden_size)).astype(np.float32)
        out = run(embeds, np.array(lengths))
        assert out.lengths.tolist() == [min(n, 1) for n in lengths]
    assert run._cache_size() == 1


def test_decoding_in_bfloat16(tiny):
    embeds = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, tiny.cfg.hidden_size)), jnp.bfloat16)
    out = compiled(tiny, [])(embeds, jnp.array([4]))
    assert out.hidden_states.dtype == out.prompt_hidden_states.dtype == jnp.bfloat16 and out.lengths.tolist() == [NEW]


# ------------------------------------------------------------------------------------------------- phrases and <SEG> in answers


@pytest.mark.parametrize(
    "question, answer, expected",
    [
        ("..<a>.", "S.", [(2, 4, 6)]),
        ("..<a>.", ".S.S", [(2, 4, 7), (2, 4, 9)]),  # several <SEG> of one phrase
        ("<a><b>", ".S.S", [(0, 2, 7), (3, 5, 9)]),  # as many phrases as <SEG>
        ("<a><b>", "..S.", [(3, 5, 8)]),  # fewer: the last phrase before it
        ("..<a>.", "<bc>S", [(6, 9, 10)]),  # the answer's own phrases win
        ("..<a>.", "S<b>S<c>S", [(7, 9, 6), (7, 9, 10), (11, 13, 14)]),  # before the first phrase: the first phrase
        ("..<a>.", "S<b>", [(7, 9, 6)]),  # one and one, whatever their order
        ("..<a>.", "<b><c>S<d>S", [(9, 11, 12), (13, 15, 16)]),
        ("..<a>.", ".<bS.", [(2, 4, 9)]),  # never closed: no phrase
        ("..<a>.", "<.<b>S", [(8, 10, 11)]),  # opened again: the inner one
        ("..<a>.", "b>S", [(2, 4, 8)]),  # closed, not opened
        ("..S...", "S", []),  # no phrase at all
        ("..<a>.", "....", []),
        ("..<a>.", "S" * 5, [(2, 4, 6 + i) for i in range(4)]),  # as many as there is room for
    ],
)
def test_which_phrase_each_seg_stands_for(question, answer, expected):
    """`<`, `>` and `S` are the special tokens; (start, end, seg) of each pair. A row of padding beside it changes nothing."""
    ids = {"<": 7, ">": 8, "S": 9}
    row = [ids.get(char, 1) for char in question + answer]
    tokens = np.full((2, 24), -1, np.int32)
    tokens[1, : len(row)] = row
    pairs = jax.jit(lambda tokens: pair_seg_with_phrases(tokens, len(question), SpecialTokenIds(7, 8, 9), 4))(tokens)
    assert not pairs.exists[0].any()
    found = [(int(pairs.start[1, j]), int(pairs.end[1, j]), int(pairs.seg[1, j])) for j in np.flatnonzero(pairs.exists[1])]
    assert found == expected


def test_questions_without_answers_are_padded():
    asked = PromptQueries.of([[[1, 2], [3]], []], (2, 3, 4))
    assert asked.lengths.tolist() == [[2, 1, 0], [0, 0, 0]]
    assert asked.input_ids[0].tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]]

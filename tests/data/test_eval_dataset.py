"""Evaluation data: every sample once, in alike batches, whatever the batch, the rows or the threads."""

from collections import Counter

import numpy as np
import pytest

from flowseg_jax.data import eval_dataset as module
from flowseg_jax.data import prepare
from flowseg_jax.data.eval_dataset import EvalDataset
from flowseg_jax.data.eval_plan import MIN_BUCKET_USES, BatchPlans, ConversationLengths, bucket_shape, merge_rare_buckets
from flowseg_jax.data.index import IndexEntry
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.records import Sample
from flowseg_jax.data.train_dataset import open_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.types import IMAGE_TOKEN_INDEX, PAD
from tests.helpers import minirefcoco as mini

VISUAL = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return prepare.prepare(mini.write(root / "layout"), root / "prepared", tokenizer_vocab=300, log=lambda _: None)


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return open_tokenizer(prepared, PromptTemplates())


@pytest.fixture
def evaluate(prepared, tokenizer):
    def make(split="train", batch=2, **options):
        return EvalDataset(prepared, split, tokenizer, sides=(32, 16), batch=batch, visual_tokens=VISUAL, **options)

    return make


def asked(data):
    """{(place, number of the expression): (sample, truth, tokens)} of all batches."""
    found = {}
    for batch in data:
        counts = Counter()
        for part in batch.rounds:
            for b, (place, samples, truths) in enumerate(zip(batch.places, part.samples, part.truth, strict=True)):
                for k, (sample, truth) in enumerate(zip(samples, truths, strict=True)):
                    tokens = part.questions.input_ids[b][part.questions.segment_ids[b] == k + 1]
                    assert (place, counts[place]) not in found
                    found[place, counts[place]] = sample, truth, tokens.tolist()
                    counts[place] += 1
    return found


def test_every_sample_once(evaluate, prepared, tokenizer):
    data = evaluate()
    found = asked(data)
    expected = {(i, k): s for i, e in enumerate(prepared.index("train")) for k, s in enumerate(e.samples)}
    assert {key: sample for key, (sample, *_) in found.items()} == expected and len(expected) == data.samples == 15
    assert len(data) == len(list(data)) == 2  # three images
    for sample, _, tokens in found.values():
        assert (
            tokenizer.encode(f"<p>{sample.sentence}</p>")
            == tuple(tokens[tokens.index(tokenizer.phrase_start) :])[: len(tokenizer.encode(f"<p>{sample.sentence}</p>"))]
        )


def test_conversations_stand_behind_the_prefix(evaluate):
    data = evaluate()
    assert data.prefix.dtype == np.int32 and (data.prefix[-VISUAL:] == IMAGE_TOKEN_INDEX).all()
    for batch in data:
        for part in batch.rounds:
            q = part.questions
            assert not (q.input_ids == IMAGE_TOKEN_INDEX).any()
            for b, samples in enumerate(part.samples):
                assert q.query_valid[b].tolist() == [True] * len(samples) + [False] * (q.query_valid.shape[1] - len(samples))
                for k in range(len(samples)):
                    here = q.segment_ids[b] == k + 1
                    assert q.position_ids[b][here].tolist() == list(range(len(data.prefix), len(data.prefix) + here.sum()))
                    assert (q.phrase_ids[b][q.seg_ids[b] != PAD] == PAD).all()
                    assert (q.seg_ids[b] == k).sum() == 1 and set(q.segment_ids[b][q.phrase_ids[b] == k]) == {k + 1}
            missing = slice(len(part.samples), None)
            assert not q.query_valid[missing].any() and (q.segment_ids[missing] == PAD).all()


@pytest.mark.parametrize("options", [{"batch": 3}, {"batch": 1}, {"threads": 4}])
def test_batch_and_threads_do_not_change_samples(evaluate, options):
    ours, theirs = asked(evaluate(**options)), asked(evaluate())
    assert ours.keys() == theirs.keys()
    for key, (sample, truth, tokens) in ours.items():
        assert (sample, tokens) == theirs[key][::2]
        np.testing.assert_array_equal(truth, theirs[key][1])


def test_processes_share_the_rows(evaluate):
    whole, first, second = (asked(evaluate(batch=3, **rows)) for rows in ({}, {"rows": [0, 2]}, {"rows": [1]}))
    assert first.keys() | second.keys() == whole.keys() and not first.keys() & second.keys() and first and second
    for a, b in zip(evaluate(batch=3, rows=[0, 2]), evaluate(batch=3, rows=[1]), strict=True):
        assert a.bucket == b.bucket and len(a.views.sam_images) == 2 and len(b.views.sam_images) == 1
        shapes = [[part.questions.input_ids.shape[1:] for part in one.rounds] for one in (a, b)]
        assert shapes[0] == shapes[1]


def test_images_can_be_chosen_and_left_out(evaluate):
    assert {place for place, _ in asked(evaluate(only={0, 2}))} == {0, 2}
    assert {place for place, _ in asked(evaluate(skip={0}))} == {1, 2}
    assert {place for place, _ in asked(evaluate(max_images=2))} == {0, 1}


def test_truth_and_images_have_the_original_size(evaluate):
    (batch,) = evaluate("testA")
    assert batch.rounds[0].truth[0].dtype == bool and batch.sizes == [(96, 96)] and batch.bucket == (128, 128)
    np.testing.assert_array_equal(batch.rounds[0].truth[0][0], mini.box_mask(96, 96, 10, 10, 50, 50))
    assert batch.images[0].shape == (96, 96, 3) and batch.images[0].dtype == np.uint8
    (grey,) = evaluate("val")
    assert grey.rounds[0].truth[0].shape == (3, 32, 32) and grey.images[0].shape == (32, 32, 3)


def test_the_wording_is_fixed(evaluate):
    ours, theirs = (asked(evaluate(prompts=PromptTemplates(randomize=vary))) for vary in (True, False))
    assert [tokens for *_, tokens in ours.values()] == [tokens for *_, tokens in theirs.values()]


def test_shuffled_text_control(evaluate, tokenizer):
    plain, control = asked(evaluate()), asked(evaluate(control_seed=0))
    own = {}
    for (place, _), (sample, *_) in plain.items():
        own.setdefault(place, set()).add(sample.sentence)
    for key, (sample, truth, tokens) in control.items():
        assert sample.sentence == plain[key][0].sentence
        np.testing.assert_array_equal(truth, plain[key][1])
        assert sample.prompt not in own[key[0]] and any(sample.prompt in texts for texts in own.values())
        said = tokenizer.encode(f"<p>{sample.prompt}</p>")
        assert tuple(tokens[tokens.index(said[0]) :][: len(said)]) == said
    with pytest.raises(UserError, match="needs at least two images"):
        evaluate("val", control_seed=0)


def test_an_unknown_split(evaluate):
    with pytest.raises(UserError, match="unknown split 'tset'"):
        evaluate("tset")


class TestPlan:
    def test_room(self):
        assert [bucket_shape(k, 50)[0] for k in (1, 2, 3, 4, 5, 8)] == [1, 2, 4, 4, 8, 8]
        lengths = [bucket_shape(1, n)[1] for n in range(1, 1200)]
        assert all(n <= room < max(2 * n, 17) for n, room in enumerate(lengths, 1))
        assert sorted(set(lengths))[:6] == [8, 12, 16, 24, 32, 48]

    def test_rare_shapes_join_the_smallest_larger_one(self):
        often, rare = MIN_BUCKET_USES, MIN_BUCKET_USES - 1
        uses = {(8, 256): often, (8, 384): 1, (4, 128): rare, (4, 512): 1, (2, 64): often, (1, 32): 1}
        expected = {shape: shape for shape in uses} | {(4, 128): (8, 256), (1, 32): (2, 64)}
        assert merge_rare_buckets(uses) == expected

    def test_batches_are_alike_and_whole(self):
        rng = np.random.default_rng(0)
        lengths = {i: rng.integers(5, 40, rng.integers(1, 20)).tolist() for i in range(403)}
        sizes = {i: tuple(rng.choice([400, 500], 2).tolist()) for i in lengths}
        values = np.concatenate([np.array(each) for each in lengths.values()])
        each = ConversationLengths(values, np.cumsum([len(one) for one in lengths.values()]))
        planned = BatchPlans(np.arange(403), np.array(list(sizes.values())), each, 8)
        assert sorted(i for one in planned for i in one.images) == list(range(403))
        for one in planned:
            for number, (phrases, text) in enumerate(one.rounds):
                parts = [lengths[i][8 * number : 8 * number + 8] for i in one.images]
                assert max(map(len, parts)) <= phrases and max(map(sum, parts)) <= text
            assert all(s <= b for i in one.images for s, b in zip(sizes[i], one.bucket, strict=True))
        used = sum(map(len, lengths.values()))
        room = sum(8 * phrases for one in planned for phrases, _ in one.rounds)
        assert used / room > 0.75  # most of what is computed is asked for
        assert [each[i] for i in lengths] == list(lengths.values()) and each.sums().tolist() == list(map(sum, lengths.values()))
        order = sorted(lengths, key=lambda i: ([-(-side // 128) for side in sizes[i]], -len(lengths[i]), -sum(lengths[i]), i))
        assert [i for one in planned for i in one.images] == order


def test_empty_rows_are_drawn_for_no_sample():
    mask = np.zeros((1, 4, 6), bool)
    assert module.ObjectMasks(mask, mask, mask, mask).stack(None, []).shape == (0, 4, 6)


def entry(*sentences: str, family: str = "short") -> IndexEntry:
    said = (Sample(1, "1.png", 1, 1, i, text, family, (0,), 1, text) for i, text in enumerate(sentences))
    return IndexEntry(1, "1.png", 4, 4, "", (0,), tuple(said))


def test_a_control_asks_in_the_wording_of_what_it_asks():
    first, silent, second = module._ShuffledText([entry("a", "b"), entry(), entry("c", family="long")], 0, "here")
    assert [(s.prompt, s.family, s.style) for s in first.samples] == [("c", "short", "long")] * 2
    assert [(s.prompt, s.family, s.style) for s in second.samples] == [("a", "long", "short")]
    assert silent.samples == ()
    for entries in ([entry("a"), entry()], [entry("a"), entry("a")]):
        with pytest.raises(UserError, match=r"here: .*(two images with expressions|same sentences)"):
            module._ShuffledText(entries, 0, "here")

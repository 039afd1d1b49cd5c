"""Training and evaluation data: reproducible order, what is asked, what is true."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from flowseg_jax.data import collate, images, masks, prepare
from flowseg_jax.data.mixture import build_mixture
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.train_dataset import TrainDataset, open_tokenizer
from flowseg_jax.data.train_examples import TrainOptions
from flowseg_jax.errors import UserError
from flowseg_jax.types import IGNORE_INDEX, IMAGE_TOKEN_INDEX, PAD, BatchShape
from tests.helpers import minirefcoco as mini

VISUAL = 6
SHAPE = BatchShape(batch=2, text_length=260, max_phrases=4, max_masks=3, sam_size=32, siglip_size=16, max_names=3)
FIXED, VARIED = PromptTemplates(randomize=False), PromptTemplates()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return prepare.prepare(mini.write(root / "layout"), root / "prepared", tokenizer_vocab=300, log=lambda _: None)


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return open_tokenizer(prepared, FIXED)


@pytest.fixture
def train(prepared, tokenizer):
    def make(seed=0, shape=SHAPE, prompts=VARIED, rows=None, **options):
        return TrainDataset(
            build_mixture([(prepared, 0.0)]),
            shape,
            prompts,
            seed,
            visual_tokens=VISUAL,
            tokenizer=tokenizer,
            options=TrainOptions(**options),
            rows=rows,
        )

    return make


def fields(batch):
    return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}


def assert_same(a, b):
    for key, value in fields(a).items():
        np.testing.assert_array_equal(value, getattr(b, key), err_msg=key)


def same(a, b):
    return all(np.array_equal(v, getattr(b, k)) for k, v in fields(a).items())


def phrases(batch, b, tokenizer):
    """The phrases of a row, decoded from its spans."""
    spans = [batch.input_ids[b][batch.phrase_ids[b] == k][1:-1] for k in range(batch.phrase_target.shape[1])]
    return [tokenizer.hf.decode(s).strip() for s in spans if len(s)]


def test_resume_from_any_step_gives_the_same_batches(train):
    whole = list(itertools.islice(train().iterate(), 9))  # 3 images, batch 2: six epochs
    for start in (1, 4, 7):
        for got, want in zip(train().iterate(start), whole[start:], strict=False):
            assert_same(got, want)
    assert_same(train().batch(8), whole[8])


@pytest.mark.parametrize(
    "options",
    [{"num_threads": 1, "prefetch": 1}, {"num_threads": 5, "prefetch": 16}, {"cache_bytes": 0}, {"cache_bytes": 9000}],
)
def test_threads_and_cache_do_not_change_the_stream(train, options):
    want = [train().batch(i) for i in range(12)]
    data = train(**options)
    for got, expected in zip(data.iterate(), want, strict=False):
        assert_same(got, expected)


def test_cache_stays_within_its_bytes(train):
    data = train(cache_bytes=12_000)
    for step in range(6):
        data.batch(step)
    assert 0 < data._cache._used <= 12_000 and len(data._cache._items) < 3


def test_what_a_model_was_trained_on_is_told(train, prepared):
    assert train().description == f"3 images of {prepared.directory.name}"


def test_seed_and_epoch_change_order_and_phrases(train, tokenizer):
    data = train(shape=dataclasses.replace(SHAPE, batch=3))
    epochs = [data.batch(i) for i in range(12)]
    assert all(sorted(b.example_id) == [1, 2, 5] for b in epochs)  # an epoch has every image once
    assert len({tuple(b.example_id) for b in epochs}) > 1
    of_five = {tuple(phrases(b, int(np.flatnonzero(b.example_id == 5)[0]), tokenizer)) for b in epochs}
    assert len(of_five) > 6 and all(len(p) == len(set(p)) == 4 for p in of_five)  # four of nine sentences, drawn anew
    assert len(set(itertools.chain(*of_five))) == 9
    assert not all(same(train(seed=1).batch(i), train().batch(i)) for i in range(4))


def test_wordings_vary_unless_fixed(train):
    drawn = {train().batch(i).input_ids[0].tobytes() for i in range(20)}
    one = train(prompts=FIXED, max_phrases=1)
    by_phrase = {}
    for i in range(30):
        batch = one.batch(i)
        span = batch.input_ids[0][batch.phrase_ids[0] == 0].tobytes()
        by_phrase.setdefault(span, set()).add(batch.input_ids[0].tobytes())
    assert len(drawn) > 15 and all(len(v) == 1 for v in by_phrase.values())


def test_phrases_point_at_their_masks(train, prepared, tokenizer):
    source = prepared.source("train")
    stored = {source[i].image_id: source[i] for i in range(len(source))}
    checked = 0
    for step in range(8):
        batch = train().batch(step)
        for b in range(2):
            example = stored[int(batch.example_id[b])]
            truth = {e.text.lower(): e.annotations for e in example.expressions}
            full = masks.decode([a.rle for a in example.annotations], example.height, example.width)
            for k, phrase in enumerate(phrases(batch, b, tokenizer)):
                want = images.pack_masks(full[list(truth[phrase])], 32)[0]
                np.testing.assert_array_equal(batch.packed_masks[b, batch.phrase_target[b, k]], want)
                checked += 1
            assert batch.mask_valid[b].sum() == len(example.annotations)
            classes = [PAD if a.crowd else a.category for a in example.annotations]
            assert batch.object_category[b, : len(classes)].tolist() == classes
            fitted, scaled = images.resize_and_pad(images.decode(example.image, name="x"), 32)
            np.testing.assert_array_equal(batch.sam_images[b], fitted)
            assert tuple(batch.resized_hw[b]) == scaled
    assert checked > 30


def test_generic_conversation_names_the_kinds_in_the_image(train, prepared, tokenizer):
    data = train(include_generic=True, prompts=FIXED)
    orders = set()
    for step in range(10):
        batch = data.batch(step)
        for b in range(2):
            classes, bears = batch.object_category[b], batch.object_name[b]
            names = {}
            assert batch.name_valid[b].sum() == len(set(bears) - {PAD})
            for k in range(SHAPE.max_names):
                span = batch.input_ids[b][batch.phrase_ids[b] == SHAPE.max_phrases + k]
                if len(span):
                    names[k] = tokenizer.hf.decode(span[1:-1]).strip()
            assert set(names.values()) == {prepared.categories[c] for c in classes if c != PAD}
            assert all(prepared.categories[c] == names[n] for c, n in zip(classes, bears, strict=True) if c != PAD)
            assert (bears[classes == PAD] == PAD).all()
            assert (batch.seg_ids[b] == SHAPE.max_phrases).sum() == 1
            orders.add(tuple(names.values()))
    assert ("cat", "dog") in orders and ("dog", "cat") in orders
    assert not (train().batch(0).seg_ids == SHAPE.max_phrases).any() and (train().batch(0).object_name == PAD).all()


def test_referred_objects_only(train, tokenizer):
    data = train(objects="referred", shape=dataclasses.replace(SHAPE, max_masks=1), max_phrases=1)
    everything = train()
    for step in range(6):
        batch, full = data.batch(step), everything.batch(step)
        assert batch.mask_valid.all() and (batch.phrase_target[:, 0] == 0).all()
        for b in range(2):
            assert any(np.array_equal(batch.packed_masks[b, 0], m) for m in full.packed_masks[b])


def test_curriculum_draws_by_family_until_its_step(train, tokenizer):
    stages = ((3, {"attribute": 1.0}), (6, {"relation": 2.0, "*": 0.0}), (9, {"ordinal": 0.0, "*": 1.0}))
    data, plain = train(curriculum=stages), train()
    attribute = {"cat near the café", "lower cat", "cat", "small dog"}
    relation = {"the dog on the left", "big dog"}
    for step in range(12):
        batch = data.batch(step)
        asked = {p for b in range(2) for p in phrases(batch, b, tokenizer)}
        if step < 3:
            assert asked <= attribute
        elif step < 6:
            assert asked <= relation
        elif step < 9:
            assert asked <= attribute | relation
        else:
            assert_same(batch, plain.batch(step))
    assert {p for s in range(3) for b in range(2) for p in phrases(data.batch(s), b, tokenizer)} == attribute


def test_weights_are_proportions(train, tokenizer):
    data = train(
        curriculum=((10_000, {"relation": 9.0, "attribute": 1.0}),), max_phrases=1, shape=dataclasses.replace(SHAPE, batch=1)
    )
    asked = [phrases(b, 0, tokenizer) for s in range(600) if (b := data.batch(s)).example_id[0] == 1]
    share = sum(a == ["cat near the café"] for a in asked) / len(asked)
    assert abs(share - 1 / 19) < 0.05  # two relation sentences of weight 9, one attribute sentence of weight 1


@pytest.mark.parametrize("rows", [(0, 1), (3,), (2, 0, 1), (3, 1, 2, 0)])
def test_a_process_builds_the_rows_it_is_asked_for_in_that_order(train, rows):
    shape = dataclasses.replace(SHAPE, batch=4)
    whole, part = train(shape=shape), train(shape=shape, rows=rows)
    assert part.shape == dataclasses.replace(shape, batch=len(rows))
    for step in range(4):
        want = fields(whole.batch(step))
        for key, value in fields(part.batch(step)).items():
            np.testing.assert_array_equal(value, want[key][list(rows)], err_msg=key)


@pytest.mark.parametrize("rows", [(), (0, 0), (1, 4), (-1, 0)])
def test_rows_that_the_global_batch_does_not_have_are_refused(train, rows):
    with pytest.raises(ValueError, match=r"rows must be distinct and among 0..3, the rows of the global batch; got \["):
        train(shape=dataclasses.replace(SHAPE, batch=4), rows=rows)


def test_everything_that_is_said_stands_behind_the_visual_slots(train, tokenizer):
    """What lets the losses leave out the first `visual_tokens` positions."""
    data = train(shape=dataclasses.replace(SHAPE, text_length=320), include_generic=True)
    for step in range(10):
        batch = data.batch(step)
        for b in range(2):
            (slots,) = np.nonzero(batch.input_ids[b] == IMAGE_TOKEN_INDEX)
            assert len(slots) == VISUAL and (np.diff(slots) == 1).all()
            said = (batch.labels[b] != IGNORE_INDEX) | (batch.phrase_ids[b] != PAD) | (batch.seg_ids[b] != PAD)
            assert np.flatnonzero(said)[0] > slots[-1] >= VISUAL - 1
    padding = collate.collate([], SHAPE, FIXED, tokenizer, VISUAL)
    assert not (padding.input_ids == IMAGE_TOKEN_INDEX).any() and (padding.labels == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ([IMAGE_TOKEN_INDEX, 5, IMAGE_TOKEN_INDEX], [6]),
        ([IMAGE_TOKEN_INDEX, 5], [6]),
        ([5, IMAGE_TOKEN_INDEX], [6, IMAGE_TOKEN_INDEX]),
    ],
)
def test_visual_slots_elsewhere_are_refused(prefix, said):
    none = [PAD] * len(said)
    with pytest.raises(ValueError, match="x: the visual slots must be one run at the end of the prefix"):
        collate.pack_conversations(prefix, [collate.TokenizedConversation(said, said, none, none)], 9, 0, "x")


def test_a_worker_is_sent_neither_images_nor_the_index(train):
    data = train(cache_bytes=20_000, num_workers=2)
    fresh = len(pickle.dumps(data))
    want = data.batch(3)
    sent = pickle.dumps(data)
    assert len(sent) == fresh < 40_000  # nearly all of it is the tokenizer
    received = pickle.loads(sent)
    assert_same(received.batch(3), want)
    assert received._cache._limit == 10_000  # all workers together keep what one process would


def test_too_small_shapes_are_refused_before_training(train):
    with pytest.raises(
        UserError, match=r"000000000005\.jpg: may need \d+ tokens, more than the text length 60; raise data.text_length"
    ):
        train(shape=dataclasses.replace(SHAPE, text_length=60))
    with pytest.raises(UserError, match="has 2 objects, but the batch has room for 1 masks; raise data.max_masks or set"):
        train(shape=dataclasses.replace(SHAPE, max_masks=1))
    with pytest.raises(
        UserError, match="has objects of 2 categories, but the batch has room for 1 names; raise data.max_names"
    ):
        train(shape=dataclasses.replace(SHAPE, max_names=1), include_generic=True)
    with pytest.raises(UserError, match="room for 2 masks, fewer than its 4 phrases"):
        train(shape=dataclasses.replace(SHAPE, max_masks=2), objects="referred")


def test_the_smallest_accepted_text_length_never_overflows(train):
    def fits(text):
        try:
            return train(shape=dataclasses.replace(SHAPE, text_length=text), include_generic=True)
        except UserError:
            return None

    smallest = next(t for t in range(20, 400) if fits(t))
    data, used = fits(smallest), 0
    for step in range(60):
        used = max(used, int((data.batch(step).segment_ids != PAD).sum(1).max()))
    assert used <= smallest
    with pytest.raises(UserError, match=rf"may need {smallest} tokens, more than the text length {smallest - 1}; "):
        train(shape=dataclasses.replace(SHAPE, text_length=smallest - 1), include_generic=True)


def test_option_errors(prepared, train):
    with pytest.raises(UserError, match=r"data\.objects: unknown value 'al' \(did you mean 'all'"):
        TrainOptions(objects="al")
    with pytest.raises(UserError, match="include_generic needs data.objects='all'"):
        TrainOptions(objects="referred", include_generic=True)
    with pytest.raises(UserError, match=r"curriculum: steps must rise, got \[5, 5\]"):
        TrainOptions(curriculum=((5, {}), (5, {})))
    with pytest.raises(UserError, match="weights must not be negative"):
        TrainOptions(curriculum=((5, {"attribute": -1.0}),))
    with pytest.raises(UserError, match=r"no data set has the family 'atribute' \(did you mean 'attribute'"):
        train(curriculum=((5, {"atribute": 1.0}),))
    with pytest.raises(UserError, match="data.num_workers must not be negative, got -2"):
        TrainOptions(num_workers=-2)
    with pytest.raises(UserError, match="seed must not be negative, got -1"):
        train(seed=-1)
    with pytest.raises(UserError, match=r"unknown split 'tset'"):
        build_mixture([(prepared, 0.0)], "tset")


def test_a_data_set_without_tokenizer_says_so(tmp_path):
    prepared = prepare.prepare(mini.write(tmp_path / "l"), tmp_path / "p", splits=["val"], log=lambda _: None)
    with pytest.raises(UserError, match="no tokenizer was trained for this data set; name the language model's"):
        open_tokenizer(prepared, FIXED)

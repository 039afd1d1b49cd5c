"""Token packing, spans, padding, and batches for prediction."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.data import collate, images, masks
from flowseg_jax.data.prompts import CHAT_TEMPLATES, Conversation, PromptTemplates, Turn, check_phrase, template_corpus
from flowseg_jax.data.records import Annotation
from flowseg_jax.data.token_budget import TokenBudget
from flowseg_jax.data.tokenizer import load_tokenizer, train_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.types import IGNORE_INDEX, IMAGE_TOKEN_INDEX, PAD, BatchShape

VISUAL = 10
SHAPE = BatchShape(batch=2, text_length=160, max_phrases=3, max_masks=4, sam_size=32, siglip_size=16)
PHRASES = ["The red star", "a dog left of the second small cat", "café"]
PROMPTS = PromptTemplates()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*template_corpus(), *PHRASES * 9], path, vocab=400)
    return load_tokenizer(path)


def picture(h=24, w=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))


def annotations(h=24, w=40, n=3):
    grids = [np.zeros((h, w), np.uint8) for _ in range(n)]
    for i, grid in enumerate(grids):
        grid[i * 3 : i * 3 + 9, 2 + i : 20] = 1
    return tuple(Annotation(i, i % 2, masks.encode(g)) for i, g in enumerate(grids))


def row(phrases=PHRASES, names=("cat", "dog"), seed=0, first=SHAPE.max_phrases):
    pixels = collate.prepare_pixels(picture(seed=seed), annotations(), SHAPE)
    conversations = [PROMPTS.referring(p, k) for k, p in enumerate(phrases)]
    bears = [PAD] * 3
    if names:
        conversations.append(PROMPTS.generic(names, first))
        bears = [0, 1, 0]
    return collate.TrainExample(f"image {seed}", pixels, conversations, [2, 0, 1][: len(phrases)], [0, 1, 0], bears, 7 + seed)


def fields(batch):
    return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}


def test_spans_outputs_and_labels(tokenizer):
    batch = collate.collate([row()], SHAPE, PROMPTS, tokenizer, VISUAL)
    tokens, phrase_ids, seg_ids = batch.input_ids[0], batch.phrase_ids[0], batch.seg_ids[0]
    for k, phrase in enumerate([*PHRASES, "cat", "dog"]):
        span = tokens[phrase_ids == k]
        assert tuple(span) == tokenizer.encode(f"<p>{phrase.lower()}</p>")
        at = np.flatnonzero(phrase_ids == k)
        assert (np.diff(at) == 1).all()
    assert set(phrase_ids) == {PAD, 0, 1, 2, 3, 4}
    for k in range(3):
        (at,) = np.flatnonzero(seg_ids == k)
        assert tokens[at] == tokenizer.seg
        assert batch.segment_ids[0, at] == k + 1 == batch.segment_ids[0, np.flatnonzero(phrase_ids == k)[0]]
    (at,) = np.flatnonzero(seg_ids == SHAPE.max_phrases)  # the generic output bears K
    assert tokens[at] == tokenizer.seg and batch.segment_ids[0, at] == 4
    assert (tokens == tokenizer.seg).sum() == 4
    answer = tokenizer.encode("<SEG>.<|im_end|>")
    learnt = batch.labels[0] != IGNORE_INDEX
    assert tuple(tokens[learnt]) == answer * 4  # answers and their suffix, nothing else
    np.testing.assert_array_equal(batch.labels[0][learnt], tokens[learnt])


def test_prefix_positions_and_padding(tokenizer):
    batch = collate.collate([row()], SHAPE, PROMPTS, tokenizer, VISUAL)
    head = tokenizer.encode("<|im_start|>user\n")
    length = len(head) + VISUAL
    assert tuple(batch.input_ids[0, :length]) == (*head, *[IMAGE_TOKEN_INDEX] * VISUAL)
    assert (batch.segment_ids[0, :length] == 0).all() and (batch.segment_ids[0] == 0).sum() == length
    np.testing.assert_array_equal(batch.position_ids[0, :length], np.arange(length))
    for number in range(1, 5):
        at = np.flatnonzero(batch.segment_ids[0] == number)
        np.testing.assert_array_equal(batch.position_ids[0, at], length + np.arange(len(at)))
    used = (batch.segment_ids[0] != PAD).sum()
    assert (batch.input_ids[0, used:] == tokenizer.pad).all() and (batch.segment_ids[0, used:] == PAD).all()
    assert used < SHAPE.text_length


def test_packed_conversations_are_what_each_is_alone(tokenizer):
    packed = collate.collate([row()], SHAPE, PROMPTS, tokenizer, VISUAL)
    for k, phrase in enumerate(PHRASES):
        alone = dataclasses.replace(row(names=()), conversations=[PROMPTS.referring(phrase, k)])
        single = collate.collate([alone], SHAPE, PROMPTS, tokenizer, VISUAL)
        for key in ("input_ids", "position_ids", "labels", "phrase_ids", "seg_ids"):
            mine = getattr(packed, key)[0][np.isin(packed.segment_ids[0], (0, k + 1))]
            np.testing.assert_array_equal(mine, getattr(single, key)[0][single.segment_ids[0] != PAD], err_msg=key)


def test_more_padding_changes_nothing_real(tokenizer):
    rows = [row(), row(PHRASES[:1], names=(), seed=1)]
    small = fields(collate.collate(rows, SHAPE, PROMPTS, tokenizer, VISUAL))
    wide = dataclasses.replace(SHAPE, batch=3, text_length=200, max_masks=6)
    large = fields(collate.collate(rows, wide, PROMPTS, tokenizer, VISUAL))
    fill = {"segment_ids": PAD, "phrase_ids": PAD, "seg_ids": PAD, "labels": IGNORE_INDEX, "input_ids": tokenizer.pad}
    fill |= {"phrase_target": PAD, "object_category": PAD, "object_name": PAD, "example_id": PAD, "resized_hw": 32}
    for key, value in small.items():
        inside = tuple(slice(0, n) for n in value.shape)
        np.testing.assert_array_equal(large[key][inside], value, err_msg=key)
        rest = np.ones(large[key].shape, bool)
        rest[inside] = False
        assert (large[key][rest] == fill.get(key, 0)).all(), key
    # More room for phrases moves only the numbers of the generic names, which count from K.
    more = fields(collate.collate([row(first=5)], dataclasses.replace(SHAPE, max_phrases=5), PROMPTS, tokenizer, VISUAL))
    for key in ("phrase_ids", "seg_ids"):
        np.testing.assert_array_equal(np.where(more[key] >= 5, more[key] - 2, more[key])[0], small[key][0])
    np.testing.assert_array_equal(more["input_ids"][0], small["input_ids"][0])


def test_pixels_and_targets(tokenizer):
    batch = collate.collate([row()], SHAPE, PROMPTS, tokenizer, VISUAL)
    fitted, scaled = images.resize_and_pad(picture(), 32)
    np.testing.assert_array_equal(batch.sam_images[0], fitted)
    assert tuple(batch.resized_hw[0]) == scaled == (19, 32)
    np.testing.assert_array_equal(batch.siglip_images[0], images.resize_to_square(picture(), 16))
    want = images.pack_masks(masks.decode([a.rle for a in annotations()], 24, 40), 32)
    np.testing.assert_array_equal(batch.packed_masks[0, :3], want)
    assert batch.mask_valid.tolist() == [[True] * 3 + [False], [False] * 4]
    assert batch.phrase_target.tolist() == [[2, 0, 1], [PAD] * 3]
    assert batch.object_category[0].tolist() == [0, 1, 0, PAD] and batch.object_name[0].tolist() == [0, 1, 0, PAD]
    assert batch.example_id.tolist() == [7, PAD]
    dtypes = {key: str(value.dtype) for key, value in fields(batch).items()}
    assert dtypes == {
        **dict.fromkeys(("sam_images", "siglip_images", "packed_masks"), "uint8"),
        **dict.fromkeys(("input_ids", "position_ids", "segment_ids", "labels", "phrase_ids", "seg_ids"), "int32"),
        **dict.fromkeys(("resized_hw", "phrase_target", "object_category", "object_name"), "int32"),
        **dict.fromkeys(("mask_valid", "name_valid"), "bool"),
        "example_id": "int64",
    }


def test_several_turns(tokenizer):
    """A conversation of two turns: separator and head between them, spans and outputs numbered across turns."""
    turns = (Turn("Segment <p>cat</p>.", "<SEG>."), Turn("And <p>dog</p>?", "Here: <SEG>."))
    encoded = collate.encode_conversation(Conversation(turns, (4, 2), (4, 2)), PROMPTS, tokenizer, "x")
    chat = CHAT_TEMPLATES["qwen3_instruct"]
    parts = [
        (turns[0].question + chat.assistant_prefix, False),
        ("<SEG>.<|im_end|>", True),
        ("\n", False),
        (chat.user_prefix + "And <p>dog</p>?" + chat.assistant_prefix, False),  # one chunk, as X-SAM tokenises it
        ("Here: <SEG>.<|im_end|>", True),
    ]
    want = [(t, t if loss else IGNORE_INDEX) for text, loss in parts for t in tokenizer.encode(text)]
    assert list(zip(encoded.input_ids, encoded.labels, strict=True)) == want
    assert [p for p in dict.fromkeys(encoded.phrase_ids) if p != PAD] == [4, 2]
    assert [s for s in encoded.seg_ids if s != PAD] == [4, 2]


def test_bos_stands_once_in_the_prefix(tokenizer):
    class WithBos:
        def __getattr__(self, name):
            return 99 if name == "bos" else getattr(tokenizer, name)

    assert collate.encode_prefix(PROMPTS, WithBos(), 2) == [
        99,
        *tokenizer.encode("<|im_start|>user\n"),
        IMAGE_TOKEN_INDEX,
        IMAGE_TOKEN_INDEX,
    ]


def test_overflow_is_an_error_that_names_the_example(tokenizer):
    with pytest.raises(
        UserError, match=r"image 0: needs \d+ tokens \(13 of them before the text\), more than the text length 60"
    ):
        collate.collate([row()], dataclasses.replace(SHAPE, text_length=60), PROMPTS, tokenizer, VISUAL)
    with pytest.raises(UserError, match="image 0: 3 phrases, 3 masks and 0 names, but the batch has room for 3, 2 and 0"):
        collate.collate([row()], dataclasses.replace(SHAPE, max_masks=2), PROMPTS, tokenizer, VISUAL)
    with pytest.raises(ValueError, match="2 rows do not fit a batch of 1"):
        collate.collate([row(), row()], dataclasses.replace(SHAPE, batch=1), PROMPTS, tokenizer, VISUAL)


def test_the_exact_length_fits(tokenizer):
    used = int((collate.collate([row()], SHAPE, PROMPTS, tokenizer, VISUAL).segment_ids[0] != PAD).sum())
    collate.collate([row()], dataclasses.replace(SHAPE, text_length=used), PROMPTS, tokenizer, VISUAL)
    with pytest.raises(UserError, match="image 0"):
        collate.collate([row()], dataclasses.replace(SHAPE, text_length=used - 1), PROMPTS, tokenizer, VISUAL)


@pytest.mark.parametrize(
    "prompts", [PromptTemplates(randomize=False), PromptTemplates(randomize=False, question=4, answer=3), PromptTemplates()]
)
def test_length_bound_is_exact_for_a_fixed_wording_and_never_too_small(tokenizer, prompts):
    bound = TokenBudget(prompts, tokenizer, VISUAL)
    rng = np.random.default_rng(0)
    for names in ((), ("cat",), ("café", "red star", "dog")):
        for _ in range(40):
            conversations = [prompts.referring(p, k, rng) for k, p in enumerate(PHRASES)]
            conversations += [prompts.generic(names, 3, rng)] if names else []
            encoded = [collate.encode_conversation(c, prompts, tokenizer, "x") for c in conversations]
            used = len(collate.encode_prefix(prompts, tokenizer, VISUAL)) + sum(len(e.input_ids) for e in encoded)
            limit = bound.upper_bound(bound.phrase_lengths(PHRASES), bound.phrase_lengths(names))
            assert used <= limit
            if not prompts.randomize:
                assert limit - used <= 4  # the generic template is rounded up


@pytest.mark.parametrize(
    ("question", "spans"),
    [("<p>a</p> and <p>b</p>", 2), ("a", 0), ("<p>a", 1), ("</p>a<p>", 1), ("<p>a</p></p>", 1)],
    ids=["too many", "none", "not closed", "closed before it is opened", "closed twice"],
)
def test_spans_that_do_not_belong_to_the_phrases_are_refused(tokenizer, question, spans):
    conversation = Conversation((Turn(question, "<SEG>."),), (0,), (0,))
    with pytest.raises(UserError, match=f"a.jpg: 1 phrases became {spans} spans; an expression contains <p> or </p>"):
        collate.encode_conversation(conversation, PROMPTS, tokenizer, "a.jpg")


@pytest.mark.parametrize("mark", ["<SEG>", "<p>", "</P>", "<image>", "<|im_end|>"])
def test_marks_inside_an_expression_are_refused(tokenizer, mark):
    with pytest.raises(UserError, match="a.jpg: the expression .* contains"):
        check_phrase(f"dog {mark} cat", tokenizer, "a.jpg")
    if mark in ("<p>", "<SEG>"):
        with pytest.raises(UserError, match=r"a.jpg: \d phrases became|a.jpg: \d outputs became"):
            turn = Turn(f"Segment <p>dog {mark} cat</p>.", "<SEG>.")
            collate.encode_conversation(Conversation((turn,), (0,), (0,)), PROMPTS, tokenizer, "a.jpg")


def test_questions_are_the_conversations_behind_the_prefix(tokenizer):
    """What is asked of an image that was seen is, token for token, what one row with prefix and conversations holds."""
    texts, prefix = [["one", "Two"], ["three"]], collate.encode_prefix(PROMPTS, tokenizer, VISUAL)
    said = [
        [collate.encode_conversation(c, PROMPTS, tokenizer, "x") for c in collate.make_conversations(PROMPTS, row)]
        for row in texts
    ]
    found = collate.collate_queries(said, (3, 4, 90), len(prefix), tokenizer.pad, ["a", "b"])
    assert found.query_valid.tolist() == [[True, True, False, False], [True, False, False, False], [False] * 4]
    for b, row in enumerate(said):
        whole = collate.pack_conversations(prefix, row, 90 + len(prefix), tokenizer.pad, "x")
        for key in ("input_ids", "position_ids", "segment_ids", "phrase_ids", "seg_ids"):
            np.testing.assert_array_equal(getattr(found, key)[b], whole[key][len(prefix) :])
    assert (found.input_ids[2] == tokenizer.pad).all() and (found.segment_ids[2] == PAD).all()
    with pytest.raises(UserError, match="b: needs .* tokens .*, more than the text length 9"):
        collate.collate_queries([[], *said[1:]], (2, 4, 9), len(prefix), tokenizer.pad, ["a", "b"])


@pytest.mark.parametrize("size", [(1, 1), (50, 8000)])
def test_views_take_any_size(size):
    pixels = collate.prepare_pixels(picture(*size), (), SHAPE)
    views = collate.collate_images([pixels], 2, (SHAPE.sam_size, SHAPE.siglip_size))
    assert views.sam_images[0].any() and (views.resized_hw[0] >= 1).all()
    assert not views.sam_images[1].any() and views.resized_hw[1].tolist() == [SHAPE.sam_size] * 2

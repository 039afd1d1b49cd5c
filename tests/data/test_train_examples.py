"""What each kind of data set asks of an image, and several kinds in one batch."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.data import images, masks, prepare
from flowseg_jax.data.eval_dataset import EvalDataset, ObjectMasks
from flowseg_jax.data.mixture import build_mixture
from flowseg_jax.data.prompts import EXPLAIN_QUESTIONS, REASONING_QUESTIONS, PromptTemplates
from flowseg_jax.data.records import make_samples
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.data.train_dataset import TrainDataset
from flowseg_jax.data.train_examples import TrainOptions
from flowseg_jax.errors import UserError
from flowseg_jax.types import IGNORE_INDEX, NO_TARGET, PAD, BatchShape
from tests.helpers import minicoco, minigrefcoco, minillava, minireasonseg, minirefcoco

VISUAL = 6
SHAPE = BatchShape(batch=2, text_length=400, max_phrases=3, max_masks=5, sam_size=32, siglip_size=16, max_names=4)
REFERRED = {"objects": "referred"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    layouts = {
        "refcoco": minirefcoco.write(root / "refcoco"),
        "grefcoco": minigrefcoco.write(root / "grefcoco"),
        "reasonseg": minireasonseg.write(root / "reasonseg"),
        "coco-panoptic": minicoco.write(root / "coco", "panoptic"),
        "llava": minillava.write(root / "llava"),
    }
    found = {}
    for layout, source in layouts.items():
        options = {"on_error": "record", "splits": ["train"] if layout in ("refcoco", "reasonseg") else None}
        found[layout] = prepare.prepare(source, root / f"{layout}-prepared", layout=layout, log=lambda _: None, **options)
    prepare.train_dataset_tokenizer(
        [text for prepared in found.values() for text in prepare.tokenizer_corpus(prepared)], root / "tok", 340
    )
    return found | {"tokenizer": load_tokenizer(root / "tok")}


@pytest.fixture
def train(sets):
    def make(*names, shape=SHAPE, seed=0, vary=True, **options):
        members = build_mixture([(sets[name], 0.0) for name in names])
        return TrainDataset(
            members,
            shape,
            PromptTemplates(randomize=vary),
            seed,
            visual_tokens=VISUAL,
            tokenizer=sets["tokenizer"],
            options=TrainOptions(**(REFERRED | options)),
        )

    return make


def text(batch, b, sets):
    """What is said in a row, without the image."""
    said = batch.input_ids[b][(batch.segment_ids[b] != PAD) & (batch.input_ids[b] >= 0)]
    return sets["tokenizer"].hf.decode(said)


def rows(data, steps):
    for step in range(steps):
        batch = data.batch(step)
        yield from ((batch, b) for b in range(len(batch.input_ids)))


def test_a_phrase_for_several_objects_has_their_union_and_one_for_none_has_nothing(train, sets):
    source = sets["grefcoco"].source("train")
    stored = {source[i].image_id: source[i] for i in range(len(source))}
    kinds = set()
    for batch, b in rows(train("grefcoco"), 20):
        example = stored[int(batch.example_id[b])]
        truth = {e.text.lower(): e.annotations for e in example.expressions}
        full = masks.decode([a.rle for a in example.annotations], example.height, example.width)
        for k, target in enumerate(batch.phrase_target[b]):
            if target == PAD:
                continue
            span = batch.input_ids[b][batch.phrase_ids[b] == k][1:-1]
            wanted = truth[sets["tokenizer"].hf.decode(span).strip()]
            kinds.add(min(len(wanted), 2))
            if not wanted:
                assert target == NO_TARGET
                continue
            union = full[list(wanted)].any(0).astype(np.uint8)
            np.testing.assert_array_equal(batch.packed_masks[b, target], images.pack_masks(union[None], SHAPE.sam_size)[0])
    assert kinds == {0, 1, 2}


def test_reasoning_asks_whole_questions_and_explains_some(train, sets):
    long = tuple(question.replace("{}", "").strip() for question in (*REASONING_QUESTIONS, *EXPLAIN_QUESTIONS))
    explained, answers = 0, {s.answer for e in sets["reasonseg"].index("train") for s in e.samples if s.answer}
    families = {s.sentence: s.family for e in sets["reasonseg"].index("train") for s in e.samples}
    assert answers and set(families.values()) == {"short", "long"}
    count = 0
    for batch, b in rows(train("reasonseg", explanation_prob=0.5), 30):
        said = text(batch, b, sets)
        explained += any(answer in said for answer in answers)
        if "long" in {families[p] for p in families if p in said}:
            assert any(part in said for part in long)
        count += 1
    assert 0.1 < explained / count < 0.95
    never = [text(batch, b, sets) for batch, b in rows(train("reasonseg", explanation_prob=0.0), 10)]
    assert not any(answer in said for said in never for answer in answers)


def test_evaluation_asks_reasoning_questions_with_one_wording(sets):
    options = {"sides": (32, 16), "batch": 2, "visual_tokens": VISUAL}
    data = EvalDataset(sets["reasonseg"], "train", sets["tokenizer"], **options)
    families = {s.sentence: s.family for e in sets["reasonseg"].index("train") for s in e.samples}
    for part in (part for batch in data for part in batch.rounds):
        for b, asked in enumerate(part.samples):
            said = text(part.questions, b, sets)
            long = sum(families[s.sentence] == "long" for s in asked)
            assert said.count(REASONING_QUESTIONS[0].replace("{}", "").strip()) == long
    with pytest.raises(UserError, match="chat data has no expressions to evaluate on"):
        EvalDataset(sets["llava"], "train", sets["tokenizer"], **options)


def test_generic_names_what_is_there_and_what_is_not(train, sets):
    prepared, absent = sets["coco-panoptic"], 0
    kinds = {e.image_id: {prepared.categories[c] for c in e.categories if c != PAD} for e in prepared.index("train")}
    for batch, b in rows(train("coco-panoptic", negatives=True), 20):
        there, count = kinds[int(batch.example_id[b])], int(batch.name_valid[b].sum())
        spans = [batch.input_ids[b][batch.phrase_ids[b] == SHAPE.max_phrases + k][1:-1] for k in range(count)]
        names = [sets["tokenizer"].hf.decode(span).strip() for span in spans]
        assert len(set(names)) == count <= SHAPE.max_names and set(names) <= set(prepared.categories)
        assert there & set(names) == there  # all fit here
        absent += len(set(names) - there)
        for m in np.flatnonzero(batch.mask_valid[b]):
            name = names[batch.object_name[b, m]]
            assert name in there and prepared.categories[batch.object_category[b, m]] == name
        assert (batch.phrase_target[b] == PAD).all()
    assert absent > 10
    assert all(b.name_valid[r].sum() == len(kinds[int(b.example_id[r])]) for b, r in rows(train("coco-panoptic"), 6))


def test_generic_names_as_many_kinds_as_fit(train, sets):
    """With room for one mask, a kind with one object is named and the others are not asked for."""
    full = max(len(e.categories) for e in sets["coco-panoptic"].index("train"))
    kinds = {e.image_id: e.categories for e in sets["coco-panoptic"].index("train")}
    for batch, b in rows(train("coco-panoptic", shape=dataclasses.replace(SHAPE, max_masks=1)), 10):
        assert batch.mask_valid[b].sum() <= 1 < full
        assert set(batch.object_name[b][batch.mask_valid[b]]) == set(range(int(batch.name_valid[b].sum())))
        whole = batch.mask_valid[b].sum() == sum(c != PAD for c in kinds[int(batch.example_id[b])])
        assert whole == (batch.object_category[b][batch.mask_valid[b]] != PAD).any()  # the linear head sees all objects or none
    with pytest.raises(UserError, match=r"to name '.*' takes \d+ tokens, data.text_length is 30"):
        train("coco-panoptic", shape=dataclasses.replace(SHAPE, text_length=30))
    with pytest.raises(UserError, match=r"has \d objects, the batch has room for 1: raise data.max_masks"):
        train("coco-panoptic", shape=dataclasses.replace(SHAPE, max_masks=1, max_names=0))


def coco_with(tmp_path, *images):
    """A panoptic training set: an image each, of so many objects of each kind; a negative number of crowds."""
    table, segments = minicoco.panoptic("train") | {"annotations": []}, {}
    for number, kinds in zip((1, 2, 3), images, strict=False):
        found = []
        for category, count in zip((1, 18), kinds, strict=True):
            for _ in range(abs(count)):
                x = 2 * len(found)
                found.append((100 * number + len(found) + 1, category, int(count < 0), (x, 0, x + 2, 9)))
        table["annotations"].append(
            {
                "image_id": number,
                "file_name": f"{number:012d}.png",
                "segments_info": [{"id": key, "category_id": c, "iscrowd": w} for key, c, w, _ in found],
            }
        )
        segments[number] = found
    root = minicoco.write(tmp_path / "coco", "panoptic", train=table)
    for number, found in segments.items():
        picture = Image.fromarray(minicoco.colours(number, found))
        (root / "annotations" / "panoptic_train2017" / f"{number:012d}.png").write_bytes(minicoco.png(picture))
    return prepare.prepare(root, tmp_path / "prepared", layout="coco-panoptic", splits=["train"], log=lambda _: None)


def test_a_set_of_which_nothing_fits_is_refused(train, sets, tmp_path, monkeypatch):
    prepared = coco_with(tmp_path, (4, 3), (5, 6), (-2, -1))
    monkeypatch.setitem(sets, "full", prepared)
    with pytest.raises(
        UserError, match=r"prepared: in every image each category has more objects than .* 2, .* data.max_masks to 3 or"
    ):
        train("full", "llava", shape=dataclasses.replace(SHAPE, max_masks=2))  # one of several is no better
    data = train("full", shape=dataclasses.replace(SHAPE, max_masks=3))
    said = (
        "2 of 3 images are without a target: they have nothing but crowds, or of each category more objects than "
        "data.max_masks, 3"
    )
    assert data.remarks == [f"{prepared.directory}: {said}"]
    seen = {int(b.example_id[i]): int(b.mask_valid[i].sum()) for b, i in rows(data, 6)}
    assert seen == {1: 3, 2: 0, 3: 0}  # the remark counts what the batches hold
    assert (
        train("full", "llava", shape=dataclasses.replace(SHAPE, max_masks=9))
        .remarks[0]
        .startswith(f"{prepared.directory}: 1 of 3")
    )
    assert train("coco-panoptic").remarks == []


def test_a_set_of_nothing_but_crowds_is_refused(train, sets, tmp_path, monkeypatch):
    monkeypatch.setitem(sets, "crowds", coco_with(tmp_path, (-2, -1), (0, -1)))
    for names in (4, 0):
        with pytest.raises(UserError, match="no image has an object that is neither a crowd nor to be ignored"):
            train("crowds", shape=dataclasses.replace(SHAPE, max_names=names))


def test_chats_need_room_behind_the_image(train):
    prefix = train("llava")._rows[0]._bound.prefix
    assert (train("llava", shape=dataclasses.replace(SHAPE, text_length=prefix + 1)).batch(0).segment_ids[0] != PAD).all()
    with pytest.raises(
        UserError, match=rf"the image takes {prefix} tokens, .* no room for a chat in data.text_length, {prefix}: raise"
    ):
        train("llava", shape=dataclasses.replace(SHAPE, text_length=prefix))


def test_marks_of_the_tokenizer_are_found_before_training(train, sets, monkeypatch):
    """A language model's tokenizer has special tokens of its own, which preparing does not know."""
    monkeypatch.setattr(sets["tokenizer"], "reserved", ("cat",))
    with pytest.raises(UserError, match=r"refcoco-prepared: .*\.jpg: the expression '.*cat.*' contains 'cat'"):
        train("refcoco")
    monkeypatch.setattr(sets["tokenizer"], "reserved", ("person",))
    with pytest.raises(
        UserError, match=r"coco-panoptic-prepared: category 'person': the expression 'person' contains 'person'"
    ):
        train("coco-panoptic")
    train("coco-panoptic", shape=dataclasses.replace(SHAPE, max_names=0))  # where no name is said, none is in the way


def test_chat_teaches_its_answers_and_is_cut_where_the_text_ends(train, sets):
    source = sets["llava"].source("train")
    answers = [turn.answer for i in range(len(source)) for turn in source[i].turns]
    for batch, b in rows(train("llava", shape=dataclasses.replace(SHAPE, text_length=600)), 6):
        labels = batch.labels[b][batch.labels[b] != IGNORE_INDEX]
        said = sets["tokenizer"].hf.decode(labels)
        assert any(answer in said for answer in answers) and "user" not in said
        assert not batch.mask_valid[b].any() and (batch.phrase_target[b] == PAD).all() and not batch.name_valid[b].any()
        assert (batch.seg_ids[b] == PAD).all() and (batch.phrase_ids[b] == PAD).all()
    used = [
        (batch.segment_ids[b] != PAD).sum()
        for batch, b in rows(train("llava", shape=dataclasses.replace(SHAPE, text_length=24)), 6)
    ]
    assert max(used) == 24


def test_a_curriculum_is_about_the_data_sets_that_have_its_families(train, sets):
    """The others ask as always; a family that no set has is an error."""
    data = train("refcoco", "reasonseg", curriculum=((10, {"attribute": 1.0}),))
    asked = dict.fromkeys(("referring", "reasoning"), 0)
    for batch, b in rows(data, 9):
        number = int((batch.phrase_target[b] != PAD).sum())
        reasoning = any(e.image_id == batch.example_id[b] for e in sets["reasonseg"].index("train"))
        asked["reasoning" if reasoning else "referring"] += number
        if not reasoning:
            assert all(word not in text(batch, b, sets) for word in ("number", "left"))  # of the other families
    assert min(asked.values()) > 0
    with pytest.raises(UserError, match="no data set has the family 'atribute'"):
        train("refcoco", "reasonseg", curriculum=((10, {"atribute": 1.0}),))


def test_a_crowd_is_not_named_as_absent(train, sets):
    """Its kind is there, though it is no target."""
    source = sets["coco-panoptic"].source("train")
    crowds = {source[i].image_id: {a.category for a in source[i].annotations if a.crowd} for i in range(len(source))}
    names = sets["coco-panoptic"].categories
    assert any(crowds.values())
    for batch, b in rows(train("coco-panoptic", negatives=True), 20):
        kinds = {names[c] for c in batch.object_category[b][batch.mask_valid[b]]}
        spans = [
            batch.input_ids[b][batch.phrase_ids[b] == SHAPE.max_phrases + k][1:-1] for k in range(batch.name_valid[b].sum())
        ]
        absent = {sets["tokenizer"].hf.decode(span).strip() for span in spans} - kinds
        assert not absent & {names[c] for c in crowds[int(batch.example_id[b])]}


def test_absent_names_are_none_up_to_as_many_as_there_is_room_for(train, sets):
    """As many as the names that are left and the room for them: both ends happen, and nothing is named twice."""
    rooms, counts = set(), set()
    for batch, b in rows(train("coco-panoptic", negatives=True), 40):
        spans = [
            tuple(batch.input_ids[b][batch.phrase_ids[b] == SHAPE.max_phrases + k]) for k in range(batch.name_valid[b].sum())
        ]
        present = len({int(c) for c in batch.object_name[b][batch.mask_valid[b]]} - {PAD})
        room = min(SHAPE.max_names, len(sets["coco-panoptic"].categories)) - present
        assert len(set(spans)) == len(spans) and present <= len(spans) <= present + room
        rooms.add(room)
        counts.add((len(spans) - present) / room if room else 0.0)
    assert max(rooms) > 1 and {0.0, 1.0} <= counts


def test_tasks_share_a_batch(train, sets):
    names = ("refcoco", "reasonseg", "coco-panoptic", "llava")
    data = train(*names, shape=dataclasses.replace(SHAPE, batch=8), negatives=True)
    assert data.epoch == sum(member.samples_per_epoch for member in data.members) and len(data.members) == 4
    seen = set()
    for batch, b in rows(data, 6):
        if (batch.phrase_target[b] != PAD).any():
            seen.add("phrases")
        elif batch.name_valid[b].any():
            seen.add("names")
        elif (batch.labels[b] != IGNORE_INDEX).any():
            seen.add("chat")
    assert seen == {"phrases", "names", "chat"}


def test_without_language_there_are_masks_and_classes_alone(sets):
    shape = dataclasses.replace(SHAPE, max_names=0, text_length=4)
    members = build_mixture([(sets["coco-panoptic"], 0.0)])
    data = TrainDataset(members, shape, PromptTemplates(), 0, visual_tokens=0, tokenizer=None)
    batch = data.batch(0)
    assert (batch.segment_ids == PAD).all() and (batch.labels == IGNORE_INDEX).all()
    assert ((batch.object_category != PAD) == batch.mask_valid).all() and batch.mask_valid.any(1).all()
    with pytest.raises(UserError, match=r"referring data needs a language model, and this model has none \(model.components\)"):
        TrainDataset(build_mixture([(sets["refcoco"], 0.0)]), shape, PromptTemplates(), 0, visual_tokens=0, tokenizer=None)


def test_jitter_scales_cuts_and_keeps_masks_on_their_objects(sets, train):
    plain = {int(b.example_id[r]): b for b, r in rows(train("coco-panoptic"), 6)}
    data = train("coco-panoptic", lsj_scale_range=(0.3, 3.0))
    sizes, fewer = set(), 0
    for batch, b in rows(data, 40):
        height, width = batch.resized_hw[b]
        sizes.add((int(height), int(width)))
        assert not batch.sam_images[b, height:].any() and not batch.sam_images[b, :, width:].any()
        here = images.unpack_masks(batch.packed_masks[b][batch.mask_valid[b]])
        assert here.any((1, 2)).all()  # what was cut off is no target
        assert not here[:, height:].any() and not here[:, :, width:].any()
        fewer += len(here) < sum(plain[int(batch.example_id[b])].mask_valid[0])
    assert len(sizes) > 20
    again = train("coco-panoptic", lsj_scale_range=(0.3, 3.0)).batch(7)
    np.testing.assert_array_equal(again.sam_images, data.batch(7).sam_images)


@pytest.mark.parametrize("square", [False, True])
def test_a_batch_holds_the_picture_padded_to_a_square_only_where_that_is_asked(train, square):
    """The whole way from `TrainOptions.square` to the vision encoder's input, on a picture that is not square."""
    data = train("llava", pad_to_square=square)
    picture = np.full((20, 30, 3), 90, np.uint8)  # as all of them are
    h, w = (11, 16) if square else (16, 16)
    for batch, b in rows(data, 4):
        vision = batch.siglip_images[b].astype(int)
        assert abs(vision[8] - picture[0, 0]).max() < 12
        assert (vision[0] == 127).all() == square and (vision[-1] == 127).all() == square
        assert abs((abs(vision - 127).max(-1) > 15).sum() - h * w) <= 16
    assert TrainOptions().pad_to_square is False


def test_evaluation_ignores_what_reasonseg_ignores_and_unites_what_grefcoco_names(sets):
    source = sets["reasonseg"].source("train")
    examples = [source[i] for i in range(len(source))]
    with_ignored = [e for e in examples if any(a.ignore for a in e.annotations)]
    for example in examples:
        objects = ObjectMasks.of(example)
        assert objects.ignored.any() == (example in with_ignored)
        assert not (objects.ignored & objects.whole[0]).any()  # painted one over the other
    source = sets["grefcoco"].source("train")
    for i in range(len(source)):
        objects = ObjectMasks.of(source[i])
        for sample in make_samples(source[i]):
            union, once = objects.union(sample), objects.sample_single_cover(sample)
            assert union.any() == bool(sample.annotations) and (once <= union).all() and not objects.ignored.any()


def test_evaluation_by_ref_asks_all_sentences_at_once_and_holds_them_against_filled_polygons(sets):
    def batches(name, **options):
        return EvalDataset(sets[name], "train", sets["tokenizer"], sides=(32, 16), batch=2, visual_tokens=VISUAL, **options)

    rounds = lambda data: [part for batch in data for part in batch.rounds]  # noqa: E731

    data = batches("refcoco", by_ref=True, filled_polygons=True)
    asked = {
        s.ref_id: (s, t, o)
        for part in rounds(data)
        for row in zip(part.samples, part.truth, part.single_cover, strict=True)
        for s, t, o in zip(*row, strict=True)
    }
    assert sorted(asked) == [1, 2, 3, 4, 7] and data.samples == 5
    sample, truth, once = asked[1]
    assert sample.prompt == "the dog on the left. the dog on the left. big dog."
    first, second = ((5, 5, 25, 25), (15, 15, 35, 30))
    box = lambda x0, y0, x1, y1: minirefcoco.box_mask(40, 60, x0, y0, x1 + 1, y1 + 1)  # noqa: E731
    np.testing.assert_array_equal(truth, box(*first) | box(*second))
    assert (once != truth).any()
    np.testing.assert_array_equal(asked[3][1], minirefcoco.box_mask(50, 30, 3, 20, 20, 45))  # no polygons: as it is
    said = [text(part.questions, b, sets) for part in rounds(data) for b in range(len(part.samples))]
    assert any("the dog on the left. the dog on the left. big dog." in each for each in said)
    plain = {
        s.ref_id: t for p in rounds(batches("refcoco", by_ref=True)) for t, s in zip(p.truth[0], p.samples[0], strict=True)
    }
    np.testing.assert_array_equal(plain[1], ObjectMasks.of(sets["refcoco"].source("train")[0]).whole[0])
    several = batches("grefcoco", by_ref=True, filled_polygons=True)
    assert {len(s.annotations) for part in rounds(several) for row in part.samples for s in row} == {0, 1, 3}
    with pytest.raises(UserError, match="reasoning questions have no refs .* such as xsam"):
        batches("reasonseg", by_ref=True)

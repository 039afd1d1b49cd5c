"""The ReasonSeg reader: its oddities and every error message."""

import pickle
from collections import Counter

import cv2
import numpy as np
import pytest

from flowseg_jax.data import images, masks
from flowseg_jax.data.formats.reading import hashed_id
from flowseg_jax.data.formats.reasonseg import IGNORE, TARGET, ReasonSeg, paint
from flowseg_jax.data.records import RecordErrors, examples
from flowseg_jax.errors import UserError
from tests.helpers import minireasonseg as mini

ROTATED_NOTE = "images with an EXIF rotation, read as they are stored"
TURNED_NOTE = "images turned as their EXIF says"


def read(layout, split, notes=None):
    return {e.file_name: e for e in examples(layout, split, notes)}


def painted(*shapes, height=12, width=12, notes=None):
    return paint(list(shapes), height, width, "x.json: shapes", Counter() if notes is None else notes)


def filled(*boxes, height=12, width=12):
    """Boxes (value, x0, y0, x1, y1) with all four borders, each over those before it."""
    mask = np.zeros((height, width), np.uint8)
    for value, x0, y0, x1, y1 in boxes:
        mask[y0 : y1 + 1, x0 : x1 + 1] = value
    return mask


def test_reads_the_layout(tmp_path):
    layout = ReasonSeg(mini.write(tmp_path))
    assert (layout.task, layout.categories, layout.splits) == ("reasoning", (), ("train", "val", "test"))
    assert [layout.size(s) for s in layout.splits] == [2, 2, 1]
    assert [str(p.relative_to(tmp_path)) for p in layout.annotation_files] == [
        "train/10_a.json",
        "train/9_b.json",
        "val/10_a.json",
        "val/dot.json",
        "test/turned.json",
        "explanatory/train.json",
    ]
    notes = Counter()
    train = read(layout, "train", notes)
    assert list(train) == ["10_a.jpg", "9_b.jpg"]  # sorted as text
    first = train["10_a.jpg"]
    assert (first.height, first.width, first.image) == (40, 60, mini.jpeg())
    assert [(a.id, a.category, a.crowd, a.ignore) for a in first.annotations] == [(0, -1, False, False)]
    np.testing.assert_array_equal(
        masks.decode([first.annotations[0].rle], 40, 60)[0], filled((1, 5, 5, 20, 20), height=40, width=60)
    )
    assert [(e.text, e.id, e.ref_id, e.annotations, e.family) for e in first.expressions] == [
        ("the animal that barks", 0, 0, (0,), "short")
    ]
    assert ROTATED_NOTE not in notes


def test_several_questions_in_cp1252(tmp_path):
    notes = Counter()
    example = read(ReasonSeg(mini.write(tmp_path)), "train", notes)["9_b.jpg"]
    assert b"What\x92s" in (tmp_path / "train" / "9_b.json").read_bytes()
    assert [(e.id, e.text, e.family, e.annotations) for e in example.expressions] == [
        (0, "What\u2019s the owner\u2019s cup?", "long", (0,)),
        (1, "Where is the cup?", "long", (0,)),
        (2, "Which thing holds tea?", "long", (0,)),
    ]
    assert notes["annotation files in cp1252 instead of UTF-8"] == 1


def test_a_text_that_is_no_list(tmp_path):
    layout = ReasonSeg(mini.write(tmp_path, {"train/10_a": mini.entry("the dog", False, mini.box("target", 1, 1, 5, 5))}))
    assert [e.text for e in read(layout, "train")["10_a.jpg"].expressions] == ["the dog"]


def test_target_ignore_and_flag(tmp_path):
    example = read(ReasonSeg(mini.write(tmp_path)), "val")["10_a.jpg"]
    assert [(a.id, a.category, a.ignore) for a in example.annotations] == [(0, -1, False), (1, -1, True)]
    target, ignore = masks.decode([a.rle for a in example.annotations], 40, 60)
    np.testing.assert_array_equal(target, filled((1, 10, 10, 19, 19), height=40, width=60))
    np.testing.assert_array_equal(ignore, filled((1, 5, 5, 30, 30), (0, 10, 10, 19, 19), height=40, width=60))


def test_image_without_a_target_is_left_out_and_counted(tmp_path):
    hidden = mini.box("target", 5, 5, 9, 9), mini.box("ignore", 5, 5, 9, 9)  # of equal areas the first is painted last
    covered = mini.entry(["x"], True, *reversed(hidden))
    layout = ReasonSeg(mini.write(tmp_path, {"val/covered": covered}))
    notes = Counter()
    assert layout.size("val") == 3
    assert list(read(layout, "val", notes)) == ["10_a.jpg"]
    assert notes["images without a target region: left out"] == 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_the_one_that_lisa_reads(tmp_path, orientation):
    """cv2.imread turns and mirrors a picture as its EXIF says; the outlines lie on what it shows."""
    mini.write(tmp_path)
    path = tmp_path / "test" / "turned.jpg"
    path.write_bytes(mini.jpeg(orientation))
    shown, notes = cv2.imread(str(path))[..., ::-1], Counter()
    example = read(ReasonSeg(tmp_path), "test", notes)["turned.jpg"]
    turned = orientation > 1
    assert (example.height, example.width) == shown.shape[:2] == ((60, 40) if orientation > 4 else (40, 60))
    assert notes == ({TURNED_NOTE: 1} if turned else {})
    assert (example.image == path.read_bytes()) is not turned  # one that need not be turned is not encoded again
    stored = np.asarray(images.decode(example.image, name="stored"), np.int32)
    assert np.abs(stored - shown).max() <= 4  # two JPEG decoders
    assert np.abs(stored[::-1] - shown).mean() > 20 and np.abs(stored[:, ::-1] - shown).mean() > 20
    code = example.annotations[0].rle
    np.testing.assert_array_equal(
        masks.decode([code], *shown.shape[:2])[0], filled((1, 0, 0, 29, 39), height=shown.shape[0], width=shown.shape[1])
    )


@pytest.mark.parametrize(
    ("given", "size", "note"),
    [
        ((60, 40), (60, 40), TURNED_NOTE),
        ((None, 40), (60, 40), TURNED_NOTE),
        ((40, 60), (40, 60), ROTATED_NOTE),  # the annotators saw it as it is stored
        ((40, None), (40, 60), ROTATED_NOTE),
    ],
)
def test_the_size_says_which_picture_was_annotated(tmp_path, given, size, note):
    entry = mini.entries()["test/turned"] | dict(zip(("imageHeight", "imageWidth"), given, strict=True))
    notes = Counter()
    example = read(ReasonSeg(mini.write(tmp_path, {"test/turned": entry})), "test", notes)["turned.jpg"]
    assert (example.height, example.width) == size and notes == {note: 1}


def test_a_size_that_is_neither_is_refused(tmp_path):
    entry = mini.entries()["test/turned"] | {"imageHeight": 61, "imageWidth": 40}
    with pytest.raises(
        UserError, match=r"61x40 differs from the image file's 60x40 as it is turned by its EXIF; put the image"
    ):
        read(ReasonSeg(mini.write(tmp_path, {"test/turned": entry})), "test")


def test_numbers_of_images_depend_on_nothing_but_their_names(tmp_path):
    layout = ReasonSeg(mini.write(tmp_path))
    numbers = [e.image_id for split in layout.splits for e in examples(layout, split)]
    assert len(set(numbers)) == 4 and all(0 <= n < 1 << 62 for n in numbers)
    assert numbers[0] == hashed_id("train/10_a") == 939823031890946126
    assert numbers[2] == hashed_id("val/10_a") != numbers[0]


# --- painting


def test_smaller_outlines_are_painted_over_larger_ones_whatever_their_order():
    large, small = ("target", 1, 1, 10, 10), ("ignore", 3, 3, 5, 5)
    want = filled((TARGET, 1, 1, 10, 10), (IGNORE, 3, 3, 5, 5))
    np.testing.assert_array_equal(painted(mini.box(*large), mini.box(*small)), want)
    np.testing.assert_array_equal(painted(mini.box(*small), mini.box(*large)), want)
    want = filled((IGNORE, 1, 1, 10, 10), (TARGET, 3, 3, 5, 5))
    np.testing.assert_array_equal(painted(mini.box("target", 3, 3, 5, 5), mini.box("ignore", 1, 1, 10, 10)), want)


def test_the_area_is_that_of_the_pixels_inside_the_image():
    outside = mini.box("target", -20, -20, 4, 4)  # 625 pixels, but 25 in the image
    inside = mini.box("ignore", 2, 2, 8, 8)  # 49
    np.testing.assert_array_equal(painted(outside, inside), filled((IGNORE, 2, 2, 8, 8), (TARGET, 0, 0, 4, 4)))


def test_of_equal_areas_the_first_is_painted_last():
    a, b = mini.box("target", 1, 1, 5, 5), mini.box("ignore", 3, 3, 7, 7)
    np.testing.assert_array_equal(painted(a, b), filled((IGNORE, 3, 3, 7, 7), (TARGET, 1, 1, 5, 5)))
    np.testing.assert_array_equal(painted(b, a), filled((TARGET, 1, 1, 5, 5), (IGNORE, 3, 3, 7, 7)))


def test_coordinates_are_cut_towards_zero():
    np.testing.assert_array_equal(painted(mini.box("t", 1.6, 2.5, 10.9, 6.99)), filled((TARGET, 1, 2, 10, 6)))
    np.testing.assert_array_equal(painted(mini.box("t", -5, 2, -0.9, 6)), filled((TARGET, 0, 2, 0, 6)))


def test_outline_belongs_to_the_shape():
    want = np.zeros((5, 5), np.uint8)
    want[[0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4], [2, 1, 2, 3, 0, 1, 2, 3, 4, 1, 2, 3, 2]] = TARGET
    np.testing.assert_array_equal(painted(mini.shape("t", (2, 0), (4, 2), (2, 4), (0, 2)), height=5, width=5), want)


def test_outlines_of_one_or_two_points_are_painted_and_counted():
    notes = Counter()
    dot, line, box = mini.shape("t", (1, 1)), mini.shape("ignore", (3, 2), (3, 5)), mini.box("t", 6, 6, 8, 8)
    want = filled((TARGET, 1, 1, 1, 1), (IGNORE, 3, 2, 3, 5), (TARGET, 6, 6, 8, 8))
    np.testing.assert_array_equal(painted(dot, line, box, notes=notes), want)
    assert notes == {"outlines of one or two points: painted as a dot or a line": 2}


@pytest.mark.parametrize(
    "label, value",
    [("target", 1), ("dog", 1), ("", 1), ("ignore", 255), ("IGNORED part", 255), ("flag", 0), ("Flag", 0), ("flags", 1)],
)
def test_labels(label, value):
    np.testing.assert_array_equal(painted(mini.box(label, 2, 2, 5, 5)), filled((value, 2, 2, 5, 5)))


# --- explanations


def answers(example):
    return [e.answer for e in example.expressions]


def test_an_explanation_answers_its_question_or_all_of_them(tmp_path):
    layout, notes = ReasonSeg(mini.write(tmp_path)), Counter()
    train = read(layout, "train", notes)
    assert answers(train["10_a.jpg"]) == ["Dogs bark."]
    assert answers(train["9_b.jpg"]) == ["One drinks from a cup."] * 3
    assert notes["images whose explanation answers none of their questions: given to all of them"] == 1
    assert answers(read(layout, "val")["10_a.jpg"]) == [""]  # the image of the same name in another split


def test_explanations_of_one_image(tmp_path):
    def explain(query, outputs):
        return {"image": "9_b.jpg", "query": query, "outputs": outputs}

    explained = [explain("where is the cup?", "old"), explain("Where is the cup? ", "There."), explain("And why?", "Because.")]
    notes = Counter()
    train = read(ReasonSeg(mini.write(tmp_path, explained=explained)), "train", notes)
    assert answers(train["9_b.jpg"]) == ["", "There.", ""] and answers(train["10_a.jpg"]) == [""]
    assert notes["images with two explanations of the same question: the last one counts"] == 1
    assert notes["explanations of a question that is not asked, beside one that is: not used"] == 1


def test_layout_without_explanations(tmp_path):
    root = mini.write(tmp_path)
    (root / "explanatory" / "train.json").unlink()
    layout = ReasonSeg(root)
    assert len(layout.annotation_files) == 5 and answers(read(layout, "train")["10_a.jpg"]) == [""]


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            {"image": "gone.jpg", "query": "q", "outputs": "o"},
            r"\[0\]\.image: 'gone\.jpg' is not in train; add the image or remove",
        ),
        ({"image": "9_b.jpg", "outputs": "o"}, r"\[0\]: field 'query' is missing"),
        ({"image": "9_b.jpg", "query": "q", "outputs": ["o"]}, r"\[0\]\.outputs: expected str"),
        ({"image": "9_b.jpg", "query": "q", "outputs": " "}, r"\[0\]\.outputs: ' ' is blank"),
        ("9_b.jpg", r"\[0\]: expected an object with fields"),
    ],
)
def test_damaged_explanations(tmp_path, entry, message):
    root = mini.write(tmp_path, explained=[entry, mini.explanations()[0]])
    with pytest.raises(UserError, match=r"explanatory/train\.json: " + message):
        ReasonSeg(root)
    kept = RecordErrors(keep=True)
    assert answers(read(ReasonSeg(root, problems=kept), "train")["10_a.jpg"]) == ["Dogs bark."]
    assert len(kept.found) == 1


def test_explanations_that_are_no_list(tmp_path):
    root = mini.write(tmp_path)
    (root / "explanatory" / "train.json").write_text("{}")
    with pytest.raises(UserError, match=r"explanatory/train\.json: expected a list of explanations, got dict"):
        ReasonSeg(root)


# --- folders and damaged records


def test_folders(tmp_path):
    root = mini.write(tmp_path / "ReasonSeg")
    assert ReasonSeg(tmp_path).size("train") == 2
    for path in (root / "train").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"train: holds no NAME\.jpg with its NAME\.json; fill or remove the folder"):
        ReasonSeg(root)
    (root / "train").rmdir()
    layout = ReasonSeg(root)  # the explanations, of train, go with it
    assert layout.splits == ("val", "test") and len(layout.annotation_files) == 3
    with pytest.raises(UserError, match=r"unknown split 'tset' \(did you mean 'test'\?\); it has val, test"):
        layout.size("tset")
    with pytest.raises(UserError, match=r"none of the folders train, val, test is here; pass the folder that holds them"):
        ReasonSeg(root / "val")
    with pytest.raises(UserError, match="no such folder"):
        ReasonSeg(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "gone, message",
    [
        ("dot.json", r"val/dot\.json: missing, yet there is dot\.jpg; every image needs its questions"),
        ("dot.jpg", r"val/dot\.jpg: missing, yet there is dot\.json; every file of questions needs its image"),
    ],
)
def test_half_a_pair(tmp_path, gone, message):
    root = mini.write(tmp_path)
    (root / "val" / gone).unlink()
    with pytest.raises(UserError, match=message) as caught:
        ReasonSeg(root)
    kept = RecordErrors(keep=True)
    layout = ReasonSeg(root, problems=kept)
    assert kept.found == [str(caught.value)] and layout.size("val") == 1


def test_file_name_that_is_no_text(tmp_path):
    root = mini.write(tmp_path)
    (root / "val" / "caf\udce9.jpg").write_bytes(mini.jpeg())
    with pytest.raises(UserError, match=r"val: the file name 'caf\\udce9' is not UTF-8; rename it"):
        ReasonSeg(root)


def target(**fields):
    return mini.entry(["x"], True, mini.box("target", 1, 1, 9, 9)) | fields


def outline(*points):
    return target(shapes=[mini.box("flag", 0, 0, 1, 1), {"label": "target", "points": list(points)}])


READING = {
    "not an object": ([], r"10_a\.json: expected an object with fields"),
    "no text": ({"is_sentence": True, "shapes": []}, r"10_a\.json: field 'text' is missing"),
    "text of wrong type": (target(text=5), r"10_a\.json\.text: expected list/str, got 5"),
    "empty list": (target(text=[]), r"10_a\.json: text: no question about the image"),
    "empty text": (target(text=["x", " "]), r"10_a\.json: text\[1\]: ' ' is blank"),
    "number as text": (target(text=[3]), r"10_a\.json: text\[0\]: expected a question, got 3"),
    "is_sentence as number": (target(is_sentence=1), r"10_a\.json\.is_sentence: expected bool, got 1"),
    "is_sentence missing": ({"text": ["x"], "shapes": []}, r"field 'is_sentence' is missing"),
    "shapes missing": ({"text": ["x"], "is_sentence": True}, r"field 'shapes' is missing"),
    "shapes of wrong type": (target(shapes={}), r"10_a\.json\.shapes: expected list"),
    "shape of wrong type": (target(shapes=["x"]), r"10_a\.json: shapes\[0\]: expected an object with fields"),
    "no label": (target(shapes=[{"points": []}]), r"shapes\[0\]: field 'label' is missing"),
    "no points": (target(shapes=[{"label": "a"}]), r"shapes\[0\]: field 'points' is missing"),
    "empty points": (outline(), r"shapes\[1\]\.points: an outline without points"),
    "flat points": (outline(1, 2, 3, 4), r"shapes\[1\]\.points\[0\]: expected \[x, y\], got 1"),
    "three coordinates": (outline([1, 2], [1, 2, 3]), r"shapes\[1\]\.points\[1\]: expected \[x, y\], got \[1, 2, 3\]"),
    "text as coordinate": (outline([1, "2"]), r"points\[0\]: expected \[x, y\]"),
    "bool as coordinate": (outline([1, True]), r"points\[0\]: expected \[x, y\]"),
    "NaN": (outline([1, 2], [float("nan"), 2]), r"points\[1\]: \[nan, 2\] is not a position in a 60x40 image"),
    "infinite": (outline([1, float("-inf")]), r"points\[0\]: \[1, -inf\] is not a position"),
    "images away": (outline([181, 2]), r"points\[0\]: \[181, 2\] is not a position"),
    "images above": (outline([1, -121]), r"points\[0\]: \[1, -121\] is not a position"),
    "huge": (outline([1, 10**400]), r"points\[0\]: \[1, <a number of 1329 bits>\] is not a position"),
    "other height": (
        target(imageHeight=60, imageWidth=60),
        r"10_a\.json: imageHeight x imageWidth 60x60 differs from the image file's 40x60 as it is stored",
    ),
    "other width": (target(imageWidth=61), r"imageHeight x imageWidth Nonex61 differs from"),
    "height of wrong type": (target(imageHeight="40"), r"10_a\.json\.imageHeight: expected int, got '40'"),
}


@pytest.mark.parametrize("case", READING)
def test_errors_at_reading(tmp_path, case):
    entry, message = READING[case]
    layout = ReasonSeg(mini.write(tmp_path, {"val/10_a": entry}))
    with pytest.raises(UserError, match=message) as caught:
        layout.example("val", 0, Counter())
    assert "\n" not in str(caught.value) and "val/10_a.json" in str(caught.value)


@pytest.mark.parametrize("size", [{"imageHeight": 40, "imageWidth": 60}, {"imageHeight": None, "imageWidth": None}])
def test_the_annotators_size_may_be_given(tmp_path, size):
    layout = ReasonSeg(mini.write(tmp_path, {"val/10_a": target(**size, shapes=[mini.box("t", 180, 160, 0, 0)])}))
    assert layout.example("val", 0, Counter()).height == 40  # and a point may lie up to two images outside


def test_damaged_files(tmp_path):
    layout = ReasonSeg(mini.write(tmp_path))
    path = tmp_path / "val" / "10_a.json"
    path.with_suffix(".jpg").write_bytes(mini.jpeg()[:400])
    with pytest.raises(UserError, match=r"val/10_a\.jpg: truncated or damaged image"):
        layout.example("val", 0, Counter())
    for content in (b'{"text": [', b'{"text": ["\x81"]}'):  # 0x81 is no cp1252 either
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"val/10_a\.json: not valid JSON"):
            layout.example("val", 0, Counter())


def test_another_process_can_read(tmp_path):
    layout = ReasonSeg(mini.write(tmp_path))
    assert pickle.loads(pickle.dumps(layout)).example("val", 0, Counter()) == layout.example("val", 0, Counter())

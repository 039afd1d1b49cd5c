"""The reader of your own data: its schema both ways, its oddities and every error message."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.data import masks
from flowseg_jax.data.formats import open_layout
from flowseg_jax.data.formats.jsonl import Jsonl, parse, validator
from flowseg_jax.data.formats.llava import hashed_id
from flowseg_jax.data.records import RecordErrors, examples, make_samples
from flowseg_jax.errors import UserError
from tests.helpers.minicoco import png
from tests.helpers.minirefcoco import box, box_mask, compressed, jpeg, uncompressed

PICTURE = Image.fromarray(np.full((40, 60, 3), 90, np.uint8))
BOX = box_mask(40, 60, 5, 5, 25, 25)
OTHER = box_mask(40, 60, 30, 10, 50, 30)
GOOD = {"image": "a.jpg", "expressions": ["the cup"], "mask": box(5, 5, 25, 25)}


def write(root, lines, name="mine.jsonl"):
    """The file, and the images a, b and c."""
    for image in "abc":
        (root / f"{image}.jpg").write_bytes(jpeg(PICTURE))
    text = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
    (root / name).write_bytes(text)
    return root


def only(root, **changes):
    """The example of a file of one line."""
    return Jsonl(write(root, [GOOD | changes])).example("train", 0, Counter())


def decoded(example):
    return masks.decode([a.rle for a in example.annotations], example.height, example.width)


def test_reads_the_layout(tmp_path):
    lines = [
        {"image": "b.jpg", "expressions": [" a dog ", "the dog"], "mask": [box(5, 5, 25, 25)], "category": "dog", "id": 70},
        {"image": "a.jpg", "expressions": ["nothing"], "mask": None, "split": "val"},
        {"image": "./b.jpg", "expressions": ["the cup"], "mask": box(30, 10, 50, 30), "id": "cup-1"},
        {"image": "b.jpg", "expressions": ["no bird"], "mask": None, "category": "bird"},
        {"image": "b.jpg", "expressions": ["no fish"], "mask": None},
    ]
    layout = open_layout("jsonl", write(tmp_path, lines))
    assert (layout.task, layout.splits, layout.size("train"), layout.size("val")) == ("referring", ("train", "val"), 1, 1)
    assert layout.categories == ("dog", "object")  # of objects only
    assert layout.annotation_files == (tmp_path / "mine.jsonl",)
    example = layout.example("train", 0, Counter())
    assert (example.file_name, example.height, example.width, example.image_id) == ("b.jpg", 40, 60, hashed_id("b.jpg"))
    assert example.image == jpeg(PICTURE)
    assert [(a.id, a.category) for a in example.annotations] == [(70, 0), (hashed_id("cup-1"), 1)]
    np.testing.assert_array_equal(decoded(example), [BOX, OTHER])
    assert [(e.text, e.ref_id, e.annotations) for e in example.expressions] == [
        ("a dog", 70, (0,)),
        ("the dog", 70, (0,)),
        ("the cup", hashed_id("cup-1"), (1,)),
        ("no bird", 4, ()),  # without an id: the number of the line
        ("no fish", 5, ()),
    ]
    # What evaluation tells samples apart by, also where they refer to nothing.
    assert len({(s.ann_id, s.sentence_id) for s in make_samples(example)}) == 5
    assert [e.annotations for e in layout.example("val", 0, Counter()).expressions] == [()]


MASKS = {
    "flat polygon": (box(5, 5, 25, 25), BOX),
    "polygons": ([box(5, 5, 25, 25), box(30, 10, 50, 30)], BOX | OTHER),
    "run lengths": (uncompressed(BOX), BOX),
    "compressed": (compressed(BOX), BOX),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(tmp_path, case):
    mask, want = MASKS[case]
    np.testing.assert_array_equal(decoded(only(tmp_path, mask=mask)), [want])


def palette():
    picture = Image.fromarray(BOX).convert("P")  # the object has index 1
    picture.putpalette([200, 200, 200, 0, 0, 0])  # the colours say the reverse
    return picture


PNGS = {
    "grey": Image.fromarray(BOX * 255),
    "grey, 1": Image.fromarray(BOX),
    "bits": Image.fromarray(BOX.astype(bool)),
    "16 bits": Image.fromarray(BOX.astype(np.uint16)),
    "palette": palette(),
    "colour": Image.fromarray(np.stack([BOX * 0, BOX * 0, BOX], -1)),
    "opaque": Image.fromarray(np.stack([BOX, BOX, BOX, BOX * 0 + 255], -1)),
    "grey and opaque": Image.fromarray(np.stack([BOX, BOX * 0 + 255], -1), "LA"),
}


@pytest.mark.parametrize("case", PNGS)
def test_png_masks_are_the_stored_pixels_that_are_not_zero(tmp_path, case):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "1.PNG").write_bytes(png(PNGS[case]))
    np.testing.assert_array_equal(decoded(only(tmp_path, mask="masks/1.PNG")), [BOX])


def drawn(**values):
    """A grey of several values: the object's inside, its edge, and what lies around it."""
    grey = np.full((40, 60), values.get("around", 0), np.uint8)
    grey[5:25, 5:25] = values.get("edge", 0)
    grey[6:24, 6:24] = values.get("inside", 255)
    return grey


INSIDE = box_mask(40, 60, 6, 6, 24, 24)
SOFT = "PNG masks of several values: 128 and more is the object"
NUMBERS = "PNG masks of several numbers: all that are not 0 are the object"
ALPHA = "PNG masks whose alpha channel differs from pixel to pixel: it is not read"
LOW, HIGH = "pixels of 1 to 127 in them, which are not the object", "pixels of 128 to 254 in them, which are the object"
NOT_PLAIN = {  # picture -> object and notes
    "bright edge": (Image.fromarray(drawn(edge=128)), BOX, {SOFT: 1, HIGH: 76}),
    "dark edge": (Image.fromarray(drawn(edge=127)), INSIDE, {SOFT: 1, LOW: 76}),
    "noise around": (Image.fromarray(drawn(edge=254, around=3)), BOX, {SOFT: 1, LOW: 2000, HIGH: 76}),
    "never white": (Image.fromarray(drawn(inside=200, edge=1)), INSIDE, {SOFT: 1, LOW: 76, HIGH: 324}),
    "soft colours": (Image.fromarray(np.stack([drawn(edge=9), drawn(edge=1)] * 2, -1)[..., :3]), INSIDE, {SOFT: 1, LOW: 76}),
    "numbers": (Image.fromarray(drawn(inside=1, edge=127)), BOX, {NUMBERS: 1}),
    "palette": (Image.fromarray(drawn(inside=200, edge=1), "P"), BOX, {NUMBERS: 1}),
    "16 bits": (Image.fromarray(drawn(inside=200, edge=1).astype(np.uint16) * 257), BOX, {NUMBERS: 1}),
    "one number": (
        Image.fromarray(BOX * 38),
        BOX,
        {"PNG masks of one value that is neither 1 nor the largest: it is the object": 1},
    ),
    "alpha": (Image.fromarray(np.stack([BOX, OTHER], -1), "LA"), BOX, {ALPHA: 1}),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_png_masks_that_are_not_plain(tmp_path, case):
    picture, want, notes = NOT_PLAIN[case]
    if picture.mode == "P":
        picture.putpalette([0, 0, 0] * 256)
    (tmp_path / "mask.png").write_bytes(png(picture))
    found = Counter()
    example = Jsonl(write(tmp_path, [GOOD | {"mask": "mask.png"}])).example("train", 0, found)
    np.testing.assert_array_equal(decoded(example), [want])
    assert +found == notes


def test_plain_png_masks_have_no_notes(tmp_path):
    for case, picture in PNGS.items():
        (tmp_path / "mask.png").write_bytes(png(picture))
        found = Counter()
        Jsonl(write(tmp_path, [GOOD | {"mask": "mask.png"}])).example("train", 0, found)
        assert not +found, case


def test_an_object_in_the_alpha_channel_alone_is_no_mask(tmp_path):
    (tmp_path / "mask.png").write_bytes(png(Image.fromarray(np.stack([BOX * 0, BOX * 255], -1), "LA")))
    with pytest.raises(UserError, match="mask: empty, yet expressions refer to it"):
        only(tmp_path, mask="mask.png")


READING = {
    "no pixel": (box(9.1, 9.1, 9.2, 9.2), r"mine\.jsonl:1: mask: empty, yet expressions refer to it; null says"),
    "odd polygon": ([1, 2, 3, 4, 5, 6, 7], r"mine\.jsonl:1: mask\[0\]: a polygon needs at least 3 points .* got 7 numbers"),
    "far away": ([1, 2, 3, 4, 1e9, 6], r"mask\[0\]: polygon coordinate 1000000000\.0 is not a position in a 60x40 image"),
    "NaN": ([1, 2, 3, 4, float("nan"), 6], r"mask\[0\]: polygon coordinate nan is not a position"),
    "size": ({"size": [60, 40], "counts": [2400]}, r":1: mask: run-length size \[60, 40\] differs from .* \[40, 60\]"),
    "counts": ({"size": [40, 60], "counts": [7]}, r":1: mask: run lengths add up to 7, not to height x width = 2400"),
    "PNG missing": ("no.png", r"mine\.jsonl:1: mask: image 'no\.png' is missing \(looked in"),
    "PNG outside": ("../no.png", r"mine\.jsonl:1: mask: '\.\./no\.png' leads out"),
    "PNG of other size": ("tests.helpers.small.png", r":1: mask: .*small\.png is 39x60 \(height x width\), its image 40x60"),
    "PNG empty": ("empty.png", r"mine\.jsonl:1: mask: empty, yet expressions refer to it"),
    "JPEG": ("jpeg.png", r"jpeg\.png: expected a PNG mask, got JPEG"),
    "PNG damaged": ("cut.png", r"cut\.png: truncated or damaged image"),
}


@pytest.mark.parametrize("case", READING)
def test_errors_of_masks(tmp_path, case):
    mask, message = READING[case]
    whole = png(Image.fromarray(BOX))
    (tmp_path / "tests.helpers.small.png").write_bytes(png(Image.fromarray(BOX[:-1])))
    (tmp_path / "empty.png").write_bytes(png(Image.fromarray(BOX * 0)))
    (tmp_path / "jpeg.png").write_bytes(jpeg(Image.fromarray(BOX * 255)))
    (tmp_path / "cut.png").write_bytes(whole[:50])
    with pytest.raises(UserError, match=message) as caught:
        only(tmp_path, mask=mask)
    assert "\n" not in str(caught.value)


RLE = {"size": [2, 2], "counts": [4]}
ALLOWED = {
    "flat polygon": {},
    "polygons": {"mask": [[1, 2, 3, 4, 5, 6], [1.5, 2, 3, 4, 5, 6]]},
    "run lengths": {"mask": RLE},
    "compressed": {"mask": {"size": [2, 2], "counts": "04"}},
    "PNG": {"mask": "a/b.png"},
    "nothing": {"mask": None},
    "all fields": {"split": "testA", "category": "cup", "id": 5},
    "text id": {"id": "cup 5"},
    "texts": {"expressions": ["a", "ä 猫"]},
}
MISSING = object()
REFUSED = {
    "no image": ({"image": MISSING}, "'image' is a required property"),
    "no expressions": ({"expressions": MISSING}, "'expressions' is a required property"),
    "no mask": ({"mask": MISSING}, "'mask' is a required property"),
    "misspelt": ({"spilt": "val"}, "Additional properties are not allowed ('spilt' was unexpected)"),
    "image number": ({"image": 5}, "image: 5 is not of type 'string'"),
    "image empty": ({"image": ""}, "image: expected text that is not blank, got ''"),
    "expressions empty": ({"expressions": []}, "expressions: [] should be non-empty"),
    "expressions text": ({"expressions": "cup"}, "expressions: 'cup' is not of type 'array'"),
    "expression blank": ({"expressions": ["a", " "]}, "expressions[1]: expected text that is not blank, got ' '"),
    "expression number": ({"expressions": [1]}, "expressions[0]: 1 is not of type 'string'"),
    "mask number": ({"mask": 3}, "mask: 3 is not of type 'array', 'object', 'string', 'null'"),
    "mask empty": ({"mask": []}, "mask: [] should be non-empty"),
    "polygon empty": ({"mask": [[]]}, "mask[0]: [] is too short"),
    "two points": ({"mask": [1, 2, 3, 4]}, "mask: [1, 2, 3, 4] is too short"),
    "two points of two": ({"mask": [[1, 2, 3, 4, 5, 6], [1, 2]]}, "mask[1]: [1, 2] is too short"),
    "points": ({"mask": [[[1, 2], [3, 4], [5, 6]]]}, "mask[0]: [[1, 2], [3, 4], [5, 6]] is too short"),
    "mixed": ({"mask": [1, 2, 3, 4, 5, [6]]}, "mask[5]: [6] is not of type 'number'"),
    "mixed lists": ({"mask": [[1, 2, 3, 4, 5, 6], 7]}, "mask[1]: 7 is not of type 'array'"),
    "code in a list": ({"mask": [1, 2, 3, 4, 5, {"counts": 4}]}, "mask[5]: {'counts': 4} is not of type 'number'"),
    "JPEG": ({"mask": "a.jpg"}, "mask: expected the path of a .png file, got 'a.jpg'"),
    "no counts": ({"mask": {"size": [2, 2]}}, "mask: 'counts' is a required property"),
    "no size": ({"mask": {"counts": [4]}}, "mask: 'size' is a required property"),
    "more in the code": ({"mask": RLE | {"x": 1}}, "mask: Additional properties are not allowed ('x' was unexpected)"),
    "size of one": ({"mask": {"size": [2], "counts": [4]}}, "mask.size: [2] is too short"),
    "size of three": ({"mask": {"size": [2, 2, 3], "counts": [4]}}, "mask.size: [2, 2, 3] is too long"),
    "size zero": ({"mask": {"size": [0, 2], "counts": [4]}}, "mask.size[0]: 0 is less than the minimum of 1"),
    "counts negative": ({"mask": {"size": [2, 2], "counts": [-4]}}, "mask.counts[0]: -4 is less than the minimum of 0"),
    "counts number": ({"mask": {"size": [2, 2], "counts": 4}}, "mask.counts: 4 is not of type 'string', 'array'"),
    "split": ({"split": "my val"}, "split: expected a name of letters, digits and _, got 'my val'"),
    "split null": ({"split": None}, "split: None is not of type 'string'"),
    "category": ({"category": ""}, "category: expected text that is not blank, got ''"),
    "id negative": ({"id": -1}, "id: -1 is less than the minimum of 0"),
    "id large": ({"id": 1 << 62}, "id: 4611686018427387904 is greater than the maximum of 4611686018427387903"),
    "id real": ({"id": 1.5}, "id: 1.5 is not of type 'integer', 'string'"),
    "id empty": ({"id": ""}, "id: expected text that is not blank, got ''"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALLOWED)
def test_the_schema_allows(case):
    line = GOOD | ALLOWED[case]
    assert parse(json.dumps(line).encode(), "f:1") == line


@pytest.mark.parametrize("case", REFUSED)
def test_the_schema_refuses(tmp_path, case):
    changes, message = REFUSED[case]
    line = {key: value for key, value in (GOOD | changes).items() if value is not MISSING}
    assert not validator().is_valid(line)
    write(tmp_path, [GOOD, line])
    with pytest.raises(UserError) as caught:
        Jsonl(tmp_path)
    assert str(caught.value) == f"{tmp_path}/mine.jsonl:2: {message}"


def test_a_line_that_is_no_object_and_a_long_value():
    with pytest.raises(UserError, match=r"^f:1: \[1\] is not of type 'object'$"):
        parse(b"[1]", "f:1")
    with pytest.raises(UserError, match=r"^f:1: expressions: {'a': .* \.\.\. .* is not of type 'array'$") as caught:
        parse(json.dumps(GOOD | {"expressions": {"a": list(range(1000))}}).encode(), "f:1")
    assert len(str(caught.value)) < 200


TEXT = json.dumps(GOOD).encode()
BROKEN = {
    "cut": (
        TEXT + b"\n\n" + TEXT[:-1],
        r"mine\.jsonl:3: not valid JSON \(Expecting ',' delimiter at column \d+\); a line",
    ),
    "array over lines": (b"[\n" + TEXT + b"\n]", r"mine\.jsonl:1: not valid JSON \(Expecting value at column 2\)"),
    "latin-1": (
        TEXT + b"\n" + TEXT.replace(b"cup", b"caf\xe9"),
        r"mine\.jsonl:2: not UTF-8 \(invalid continuation",
    ),
    "UTF-16": (TEXT.decode().encode("utf-16"), r"mine\.jsonl:1: not UTF-8"),
    "deep": (b"[" * 100_000, r"mine\.jsonl:1: not valid JSON \("),
    "huge number": (b"9" * 5000, r"mine\.jsonl:1: not valid JSON \("),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_lines_are_raised_or_kept(tmp_path, case):
    content, message = BROKEN[case]
    write(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        Jsonl(tmp_path)
    assert "\n" not in str(caught.value)
    problems = RecordErrors(keep=True)
    write(tmp_path, content + b"\n" + json.dumps(GOOD | {"image": "b.jpg"}).encode())
    assert "b.jpg" in [e.file_name for e in examples(Jsonl(tmp_path, problems=problems), "train")]
    assert problems.found[0] == str(caught.value)


def test_marks_of_byte_order_blank_lines_and_other_line_ends(tmp_path):
    odd = json.dumps(GOOD | {"expressions": ["a\u2028b\x85c"]}, ensure_ascii=False).encode()
    layout = Jsonl(write(tmp_path, b"\xef\xbb\xbf\r\n" + TEXT + b"\r\n  \n\n\xef\xbb\xbf" + odd))
    assert [e.text for e in layout.example("train", 0, Counter()).expressions] == ["the cup", "a\u2028b\x85c"]
    assert [e.ref_id for e in layout.example("train", 0, Counter()).expressions] == [2, 5]


@pytest.mark.parametrize("image", ["a.jpg", "./a.jpg", ".//a.jpg"])
def test_an_image_in_two_splits_is_an_error(tmp_path, image):
    write(tmp_path, [GOOD, GOOD | {"image": image, "split": "val"}, GOOD | {"image": "b.jpg", "split": "val"}])
    with pytest.raises(UserError, match=r"jsonl:2: split: 'a\.jpg' is in 'val' here and in 'train' in line 1; an image"):
        Jsonl(tmp_path)
    problems = RecordErrors(keep=True)
    layout = Jsonl(tmp_path, problems=problems)
    assert len(problems.found) == 1
    assert {s: [e.file_name for e in examples(layout, s)] for s in layout.splits} == {"train": ["a.jpg"], "val": ["b.jpg"]}


def test_an_id_occurs_once(tmp_path):
    with pytest.raises(UserError, match=r"jsonl:2: id: 'x' is the id of line 1 too; give each line its own"):
        Jsonl(write(tmp_path, [GOOD | {"id": "x"}, GOOD | {"id": "x"}]))
    with pytest.raises(UserError, match=r"jsonl:2: id: 2 \(the line's number\) is the id of line 1 too"):
        Jsonl(write(tmp_path, [GOOD | {"id": 2}, GOOD]))


def test_rotated_photos_are_counted_and_read_as_stored(tmp_path):
    write(tmp_path, [GOOD])
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURE.save(tmp_path / "a.jpg", exif=exif)
    notes = Counter()
    example = Jsonl(tmp_path).example("train", 0, notes)
    assert (example.height, example.width) == (40, 60)
    assert notes == {"images with an EXIF rotation, read as they are stored": 1}


def test_which_file(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.jsonl here; pass the \.jsonl file itself"):
        Jsonl(tmp_path)
    with pytest.raises(UserError, match=r"mine\.jsonl: no such file or folder"):
        Jsonl(tmp_path / "mine.jsonl")
    write(tmp_path, [GOOD])
    write(tmp_path, [GOOD | {"split": "val"}], "other.jsonl")
    with pytest.raises(UserError, match=r"mine\.jsonl, other\.jsonl here; pass the"):
        Jsonl(tmp_path)
    assert Jsonl(tmp_path / "other.jsonl").splits == ("val",)
    for content in (b"", b"\n \n"):
        with pytest.raises(UserError, match=r"mine\.jsonl: holds no usable line"):
            Jsonl(write(tmp_path, content) / "mine.jsonl")


def test_named_image_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    write(tmp_path / "photos", [], "unused.jsonl")
    (tmp_path / "mine.jsonl").write_text(json.dumps(GOOD | {"mask": "m.png"}))
    (tmp_path / "m.png").write_bytes(png(Image.fromarray(BOX)))
    with pytest.raises(UserError, match=r"mine\.jsonl:1: image: image 'a\.jpg' is missing \(looked in"):
        Jsonl(tmp_path).example("train", 0, Counter())
    example = Jsonl(tmp_path, images=tmp_path / "photos").example("train", 0, Counter())
    np.testing.assert_array_equal(decoded(example), [BOX])


def test_unknown_split_and_pickling(tmp_path):
    layout = pickle.loads(pickle.dumps(Jsonl(write(tmp_path, [GOOD]))))
    assert len(list(examples(layout, "train"))) == 1
    for method in (layout.size, lambda split: layout.example(split, 0, Counter())):
        with pytest.raises(UserError, match=r"unknown split 'trian' \(did you mean 'train'\?\)"):
            method("trian")

"""The COCO panoptic and detection readers: their oddities and every error message."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.data import masks
from flowseg_jax.data.formats import open_layout
from flowseg_jax.data.formats.coco_instances import CocoInstances
from flowseg_jax.data.formats.coco_panoptic import CocoPanoptic
from flowseg_jax.data.records import RecordErrors, examples
from flowseg_jax.errors import UserError
from tests.helpers import minicoco as mini
from tests.helpers.minirefcoco import box, box_mask, entry

READERS = {"panoptic": CocoPanoptic, "instances": CocoInstances}
BOTH = pytest.mark.parametrize("kind", READERS)


def read(layout, split, notes=None):
    return {e.image_id: e for e in examples(layout, split, notes)}


def decoded(example):
    return masks.decode([a.rle for a in example.annotations], example.height, example.width)


def test_panoptic(tmp_path):
    layout = open_layout("coco_panoptic", mini.write(tmp_path, "panoptic"))
    assert (layout.task, layout.splits, layout.size("train"), layout.size("val")) == ("generic", ("train", "val"), 3, 1)
    assert layout.categories == ("person", "dog", "tree-merged")  # in the order of their ids
    assert layout.things == (True, True, False)
    assert [p.name for p in layout.annotation_files] == ["panoptic_train2017.json", "panoptic_val2017.json"]
    notes = Counter()
    train = read(layout, "train", notes)
    assert list(train) == [1, 2] and notes == {"images without a panoptic annotation: left out": 1}
    first = train[1]
    assert (first.file_name, first.height, first.width) == ("000000000001.jpg", 40, 60)
    assert first.image == mini.jpeg(mini.PICTURE[1])
    assert [(a.id, a.category, a.crowd) for a in first.annotations] == [(mini.LARGE, 1, False), (300, 2, False), (255, 0, True)]
    want = [box_mask(40, 60, *b) for *_, b in mini.SEGMENTS[1]]
    np.testing.assert_array_equal(decoded(first), want)
    assert read(layout, "val")[4].annotations[0].id == 65_536


def test_instances(tmp_path):
    layout = open_layout("coco-instances", mini.write(tmp_path, "instances"))
    assert (layout.task, layout.splits, layout.categories) == ("generic", ("train", "val"), ("person", "dog"))
    notes = Counter()
    train = read(layout, "train", notes)
    assert list(train) == [1, 2]
    assert notes == {"objects with an empty mask: left out": 1, "images without an object: left out": 1}
    assert [(a.id, a.category, a.crowd) for a in train[1].annotations] == [(11, 1, False), (12, 0, True)]
    union = box_mask(40, 60, 5, 5, 25, 25) | box_mask(40, 60, 15, 15, 35, 30)
    np.testing.assert_array_equal(decoded(train[1]), [union, box_mask(40, 60, 40, 0, 60, 20)])
    np.testing.assert_array_equal(decoded(train[2]), [box_mask(50, 30, 3, 20, 20, 45)])


def test_images_whose_objects_are_all_empty_are_left_out(tmp_path):
    table = mini.instances("train")
    entry(table["annotations"], 21)["segmentation"] = [box(9.1, 9.1, 9.2, 9.2)]
    notes = Counter()
    assert list(read(CocoInstances(mini.write(tmp_path, "instances", train=table)), "train", notes)) == [1]
    assert notes["images without an object: left out"] == 2


def test_images_of_2014_and_the_year(tmp_path):
    name = "COCO_train2014_{:012d}.jpg"
    mini.write(tmp_path, "instances", year=2014, train=mini.instances("train", name))
    layout = CocoInstances(tmp_path)
    assert layout.source == "coco instances 2014" and read(layout, "train")[2].file_name == name.format(2)
    mini.write(tmp_path, "instances")
    assert CocoInstances(tmp_path).source == "coco instances 2017"  # both hold the same images: never mixed
    assert CocoInstances(tmp_path, year=2014).annotation_files[1].name == "instances_val2014.json"
    with pytest.raises(UserError, match=r"no instances annotations of the year 2015 \(did you mean"):
        CocoInstances(tmp_path, year=2015)


@pytest.mark.parametrize("place", ["{}", "images/{}", "../{}", "../coco/{}", "images", "../images/{}"])
def test_images_are_found_in_the_usual_places(tmp_path, place):
    assert list(read(CocoPanoptic(mini.write(tmp_path / "a", "panoptic", images=place)), "val")) == [4]


@pytest.mark.parametrize("place", ["annotations/{}", "{}"])
def test_png_folders_lie_in_annotations_or_beside(tmp_path, place):
    assert list(read(CocoPanoptic(mini.write(tmp_path, "panoptic", pngs=place)), "train")) == [1, 2]


@BOTH
def test_roots(tmp_path, kind):
    mini.write(tmp_path / "coco", kind)
    for root in (tmp_path, tmp_path / "coco", tmp_path / "coco" / "annotations"):
        assert list(read(READERS[kind](root), "train")) == [1, 2]


@BOTH
def test_named_image_folder(tmp_path, kind):
    mini.write(tmp_path / "a", kind, images="../elsewhere/{}")
    with pytest.raises(UserError, match=r"image 1\.file_name: image '000000000001\.jpg' is missing \(looked in"):
        read(READERS[kind](tmp_path / "a"), "train")
    for folder in ("elsewhere", "elsewhere/train2017"):
        assert list(read(READERS[kind](tmp_path / "a", images=tmp_path / folder), "train")) == [1, 2]


@BOTH
def test_one_split_is_enough(tmp_path, kind):
    mini.write(tmp_path, kind)
    (tmp_path / "annotations" / f"{kind}_train2017.json").unlink()
    layout = READERS[kind](tmp_path)
    assert layout.splits == ("val",)
    for method in (layout.size, lambda split: layout.example(split, 0, Counter())):
        with pytest.raises(UserError, match=rf"unknown coco {kind} 2017 split 'vall' \(did you mean 'val'\?\)"):
            method("vall")


@BOTH
def test_missing_files_and_pickling(tmp_path, kind):
    with pytest.raises(UserError, match=rf"no annotations/{kind}_\{{train,val\}}2017\.json here; pass the folder"):
        READERS[kind](tmp_path)
    layout = pickle.loads(pickle.dumps(READERS[kind](mini.write(tmp_path, kind))))
    assert list(read(layout, "train")) == [1, 2]


@BOTH
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("person", r"category 18\.name: 'person' is the name of category 1 too, .*rename one of them"),
        (" person\u00a0", r"category 18\.name: ' person\\xa0' is the name of category 1 too"),
        ("", r"category 18\.name: '' is blank; write what it says"),
        (" \u200b\t", r"category 18\.name: .* is blank"),
        (18, r"category 18\.name: expected str, got 18"),
    ],
)
def test_equal_and_blank_names_are_refused(tmp_path, kind, name, message):
    """A model is asked by name: of two categories of one name it could answer neither."""
    tables = {split: (mini.panoptic if kind == "panoptic" else mini.instances)(split) for split in mini.SPLITS}
    for table in tables.values():
        entry(table["categories"], 18)["name"] = name
    mini.write(tmp_path, kind, **tables)
    with pytest.raises(UserError, match=rf"{kind}_train2017\.json: {message}"):
        open_layout(f"coco-{kind}", tmp_path)
    with pytest.raises(UserError, match=message):  # what is wrong with the names is wrong with every record
        open_layout(f"coco-{kind}", tmp_path, RecordErrors(keep=True))


@BOTH
def test_categories_must_be_those_of_the_other_split(tmp_path, kind):
    table = getattr(mini, kind)("val")
    table["categories"][0]["name"] = "cat"
    with pytest.raises(UserError, match=rf"{kind}_val2017\.json: categories: differ from those of .*{kind}_train2017\.json"):
        READERS[kind](mini.write(tmp_path, kind, val=table))


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda c: c.pop("isthing"), "field 'isthing' is missing"), (lambda c: c.update(isthing=2), "expected 0 or 1, got 2")],
)
def test_panoptic_categories_say_what_they_are(tmp_path, change, message):
    table = mini.panoptic("train")
    change(entry(table["categories"], 18))
    with pytest.raises(UserError, match=rf"panoptic_train2017.json: category 18.*{message}"):
        CocoPanoptic(mini.write(tmp_path, "panoptic", train=table))


def segment(table, **changes):
    table["annotations"][0]["segments_info"][0].update(changes)


PANOPTIC = {
    "unknown image": (lambda t: t["annotations"][0].update(image_id=9), r"annotations\[0\]\.image_id: there is no image 9"),
    "unknown category": (lambda t: segment(t, category_id=5), r"segments_info\[0\]\.category_id: there is no category 5"),
    "void id": (lambda t: segment(t, id=0), r"segments_info\[0\]\.id: 0 is no colour of a PNG \(1 to 16777215; 0 is void\)"),
    "large id": (lambda t: segment(t, id=1 << 24), r"segments_info\[0\]\.id: 16777216 is no colour"),
    "id twice": (lambda t: segment(t, id=300), r"segments_info\[1\]\.id: 300 occurs twice"),
    "crowd": (lambda t: segment(t, iscrowd=2), r"segments_info\[0\]\.iscrowd: expected 0 or 1, got 2"),
    "segment of wrong type": (lambda t: t["annotations"][0].update(segments_info=[5]), r"\[0\]: expected an object .*got 5"),
    "no segments": (lambda t: t["annotations"][0].pop("segments_info"), r"image 1: field 'segments_info' is missing"),
    "no PNG name": (lambda t: t["annotations"][0].pop("file_name"), r"annotation of image 1: field 'file_name' is missing"),
    "image twice": (lambda t: t["annotations"][1].update(image_id=1), r"\[1\]\.image_id: 1 has an annotation already"),
}
INSTANCES = {
    "unknown image": (lambda t: t["annotations"][0].update(image_id=9), r"annotation 11\.image_id: there is no image 9"),
    "unknown category": (lambda t: t["annotations"][0].update(category_id=5), r"11\.category_id: there is no category 5"),
    "no outline": (lambda t: t["annotations"][0].pop("segmentation"), r"annotation 11: field 'segmentation' is missing"),
    "crowd": (lambda t: t["annotations"][0].update(iscrowd="no"), r"11\.iscrowd: expected int/bool, got 'no'"),
    "id twice": (lambda t: t["annotations"][1].update(id=11), r"annotations\[1\]\.id: 11 occurs twice"),
}
OPENING = [(k, c, *v) for k, cases in (("panoptic", PANOPTIC), ("instances", INSTANCES)) for c, v in cases.items()]


@pytest.mark.parametrize(("kind", "case", "change", "message"), OPENING, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_at_opening_are_raised_or_kept(tmp_path, kind, case, change, message):
    table = getattr(mini, kind)("train")
    change(table)
    mini.write(tmp_path, kind, train=table)
    with pytest.raises(UserError, match=message) as caught:
        READERS[kind](tmp_path)
    assert "\n" not in str(caught.value) and f"{kind}_train2017.json" in str(caught.value)
    problems = RecordErrors(keep=True)
    layout = READERS[kind](tmp_path, problems=problems)
    assert problems.found[0] == str(caught.value)
    assert list(read(layout, "val")) == [4]


@BOTH
def test_an_image_with_a_damaged_object_is_left_out_whole(tmp_path, kind):
    table = getattr(mini, kind)("train")
    target = table["annotations"][0]
    (target["segments_info"][0] if kind == "panoptic" else target)["category_id"] = 5
    layout = READERS[kind](mini.write(tmp_path, kind, train=table), problems=RecordErrors(keep=True))
    assert layout.size("train") == 2 and list(read(layout, "train")) == [2]  # its other objects would pass for all of them


@BOTH
@pytest.mark.parametrize(
    ("field", "message"), [("images", "holds no usable image"), ("categories", "categories: holds no category")]
)
def test_tables_without_content(tmp_path, kind, field, message):
    path = mini.write(tmp_path, kind) / "annotations" / f"{kind}_train2017.json"
    path.write_text(json.dumps(getattr(mini, kind)("train") | {"annotations": [], field: []}))
    with pytest.raises(UserError, match=rf"{kind}_train2017\.json: {message}"):
        READERS[kind](tmp_path)


def picture(mode, **options):
    return mini.png(Image.fromarray(mini.colours(1)).convert(mode, **options))


def without(key):
    return mini.png(Image.fromarray(mini.colours(1, [s for s in mini.SEGMENTS[1] if s[0] != key])))


READING = {
    "segment without pixel": (without(300), r"image 1\.segments_info: segment 300 without a pixel in .*000000000001\.png$"),
    "pixels without segment": (
        mini.png(Image.fromarray(mini.colours(1, [*mini.SEGMENTS[1], (9, 0, 0, (0, 0, 1, 1)), (8, 0, 0, (1, 0, 2, 1))]))),
        r"000000000001\.png: pixels of segments 8, 9, missing in .*train2017\.json: annotation of image 1\.segments_info",
    ),
    "other size": (mini.png(Image.fromarray(mini.colours(1)[:-1])), r"1\.png is 39x60 \(height x width\), its image 40x60"),
    "palette": (picture("P"), r"1\.png: expected an RGB PNG whose colours are segment ids, got PNG P"),
    "grey": (picture("L"), r"expected an RGB PNG whose colours are segment ids, got PNG L"),
    "JPEG": (mini.jpeg(Image.fromarray(mini.colours(1))), r"expected an RGB PNG .*, got JPEG RGB"),
    "damaged": (picture("RGB")[:80], r"000000000001\.png: truncated or damaged image"),
    "missing": (None, r"annotation of image 1\.file_name: image '000000000001\.png' is missing \(looked in"),
}


@pytest.mark.parametrize("case", READING)
def test_errors_of_the_png(tmp_path, case):
    content, message = READING[case]
    path = mini.write(tmp_path, "panoptic") / "annotations" / "panoptic_train2017" / "000000000001.png"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    layout = CocoPanoptic(tmp_path)  # does not read PNGs
    with pytest.raises(UserError, match=message) as caught:
        layout.example("train", 0, Counter())
    assert "\n" not in str(caught.value)


def test_a_png_of_void_only_is_left_out(tmp_path):
    table = mini.panoptic("train")
    table["annotations"][1]["segments_info"] = []
    layout = CocoPanoptic(mini.write(tmp_path, "panoptic", train=table))
    with pytest.raises(UserError, match=r"pixels of segment 7, missing in"):
        layout.example("train", 1, Counter())
    path = tmp_path / "annotations" / "panoptic_train2017" / "000000000002.png"
    path.write_bytes(mini.png(Image.fromarray(mini.colours(2, []))))
    notes = Counter()
    assert layout.example("train", 1, notes) is None and notes == {"images without a segment: left out": 1}


@BOTH
def test_wrong_image_size(tmp_path, kind):
    table = getattr(mini, kind)("train")
    table["images"][0]["width"] = 61
    layout = READERS[kind](mini.write(tmp_path, kind, train=table))
    with pytest.raises(UserError, match=r"image 1: height x width 40x61 differs from the image file's 40x60"):
        layout.example("train", 0, Counter())


def test_damaged_outline(tmp_path):
    table = mini.instances("train")
    table["annotations"][0]["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]
    layout = CocoInstances(mini.write(tmp_path, "instances", train=table))
    with pytest.raises(UserError, match=r"annotation 11\.segmentation\[0\]: polygon coordinate nan is not a position"):
        layout.example("train", 0, Counter())

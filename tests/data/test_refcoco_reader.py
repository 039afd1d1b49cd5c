"""The RefCOCO reader: its oddities and every error message."""

import os
import pickle
from collections import Counter

import numpy as np
import pytest

from flowseg_jax.data import masks
from flowseg_jax.data.formats.refcoco import RefCoco
from flowseg_jax.data.records import examples, make_ref_samples, make_samples
from flowseg_jax.errors import UserError
from tests.helpers import minirefcoco as mini


def read(layout, split):
    return {e.image_id: e for e in examples(layout, split)}


def test_reads_the_layout(tmp_path):
    layout = RefCoco(mini.write(tmp_path / "refcoco"))
    assert layout.splits == ("train", "val", "testA")
    assert layout.categories == ("cat", "dog", "café chair")  # in the order of their ids 3, 7, 90
    assert layout.size("train") == 3 and layout.size("val") == 1
    train = read(layout, "train")
    assert list(train) == [1, 2, 5]
    first = train[1]
    assert (first.height, first.width, first.file_name) == (40, 60, "COCO_train2014_000000000001.jpg")
    assert [(a.id, a.category) for a in first.annotations] == [(11, 1), (12, 0)]
    assert [(e.text, e.id, e.ref_id, e.annotations, e.family) for e in first.expressions][::3] == [
        ("the dog on the left", 10, 1, (0,), "relation"),
        ("cat near the café", 20, 2, (1,), "attribute"),
    ]
    assert [a.category for a in read(layout, "testA")[4].annotations] == [2]
    assert first.image == mini.jpeg(mini.image(1))  # the stored bytes, not a re-encoding


def test_masks_are_unions_of_all_kinds_of_segmentations(tmp_path):
    layout = RefCoco(mini.write(tmp_path))
    train = read(layout, "train")
    expected = {
        (1, 0): mini.box_mask(40, 60, 5, 5, 25, 25) | mini.box_mask(40, 60, 15, 15, 35, 30),
        (1, 1): mini.box_mask(40, 60, 40, 10, 55, 35),
        (2, 0): mini.box_mask(50, 30, 3, 20, 20, 45),
        (2, 1): mini.box_mask(50, 30, 0, 0, 8, 8) | mini.box_mask(50, 30, 4, 4, 20, 12),
    }
    for (image, index), want in expected.items():
        example = train[image]
        got = masks.decode([a.rle for a in example.annotations], example.height, example.width)[index]
        np.testing.assert_array_equal(got, want, err_msg=f"image {image} object {index}")
    grey = read(layout, "val")[3]
    np.testing.assert_array_equal(masks.decode([grey.annotations[0].rle], 32, 32)[0], mini.box_mask(32, 32, 4, 4, 20, 28))


def test_the_sum_of_overlapping_parts_is_kept_beside_their_union(tmp_path):
    """LISA adds polygons up and counts where the sum is 1. Kept for objects that are asked for, where it makes a difference."""
    train = read(RefCoco(mini.write(tmp_path)), "train")
    first, second = mini.box_mask(40, 60, 5, 5, 25, 25), mini.box_mask(40, 60, 15, 15, 35, 30)
    overlapping, alone = train[1].annotations
    np.testing.assert_array_equal(masks.decode([overlapping.rle_single_cover], 40, 60)[0], first ^ second)
    assert alone.rle_single_cover == "" and train[2].annotations[1].rle_single_cover != ""  # two run-length codes that overlap


def test_polygons_filled_on_whole_points_are_kept_beside_their_union(tmp_path):
    """PSALM cuts the points to whole numbers and fills up to and including the edge. Kept for objects that are asked for."""

    def broken(instances, refs):
        mini.entry(instances["annotations"], 12)["segmentation"] = [mini.box(40.9, 10.2, 55.7, 35.9), mini.box(-3.5, 0, 2, 2)]

    instances, refs = mini.damaged(broken)
    train = read(RefCoco(mini.write(tmp_path, instances=instances, refs=refs)), "train")
    whole, edged = train[1].annotations
    first, second = mini.box_mask(40, 60, 5, 5, 26, 26), mini.box_mask(40, 60, 15, 15, 36, 31)  # one column and row more
    np.testing.assert_array_equal(masks.decode([whole.rle_filled_polygons], 40, 60)[0], first | second)
    want = mini.box_mask(40, 60, 40, 10, 56, 36) | mini.box_mask(40, 60, 0, 0, 3, 3)
    np.testing.assert_array_equal(masks.decode([edged.rle_filled_polygons], 40, 60)[0], want)
    assert [a.rle_filled_polygons for a in train[2].annotations] == ["", ""]  # run-length codes have no points
    assert train[5].annotations[1].rle_filled_polygons == ""  # a crowd region that nothing refers to
    with pytest.raises(UserError, match="a polygon needs at least 3 points"):
        masks.fill_polygons([[1, 2, 3, 4]], 40, 60, "here")


def test_a_mask_that_filling_does_not_change_is_not_kept_twice():
    assert masks.fill_polygons([mini.box(0, 0, 60, 40)], 40, 60, "here") == ""


def test_crowds_are_kept_and_unreferenced_empty_masks_are_counted(tmp_path):
    notes = Counter()
    example = next(e for e in examples(RefCoco(mini.write(tmp_path)), "train", notes) if e.image_id == 5)
    assert [(a.id, a.crowd) for a in example.annotations] == [(51, False), (52, True)]
    assert notes == {"objects with an empty mask that no expression refers to: left out": 1}


def test_samples_are_unique_lower_cased_sorted_sentences(tmp_path):
    asked = make_samples(read(RefCoco(mini.write(tmp_path)), "train")[1])
    assert [(s.ann_id, s.sentence, s.count, s.sentence_id) for s in asked] == [
        (11, "big dog", 1, 12),
        (11, "the dog on the left", 2, 10),
        (12, "cat near the café", 1, 20),
    ]


def test_a_ref_is_one_sample_with_all_its_sentences_in_the_order_of_the_source(tmp_path):
    example = read(RefCoco(mini.write(tmp_path)), "train")[1]
    asked = make_ref_samples(example)
    assert [(s.ann_id, s.ref_id, s.sentence_id, s.annotations, s.count, s.family) for s in asked] == [
        (11, 1, 10, (0,), 3, "relation"),
        (12, 2, 20, (1,), 1, "attribute"),
    ]
    assert [s.sentence for s in asked] == ["the dog on the left. the dog on the left. big dog.", "cat near the café."]
    assert all(s.prompt == s.sentence and s.answer == "" for s in asked)


@pytest.mark.parametrize("place", ["images", "images/train2014", "../images", "../images/mscoco/images/train2014"])
def test_images_are_found_in_the_usual_places(tmp_path, place):
    layout = RefCoco(mini.write(tmp_path / "refcoco", image_dir=place))
    assert len(list(examples(layout, "testA"))) == 1


def test_refs_file_is_chosen_by_split_by(tmp_path):
    mini.write(tmp_path, split_by="google")
    assert RefCoco(tmp_path).annotation_files[1].name == "refs(google).p"
    mini.write(tmp_path, split_by="umd")
    assert RefCoco(tmp_path).annotation_files[1].name == "refs(umd).p"
    assert RefCoco(tmp_path, split_by="google").annotation_files[1].name == "refs(google).p"
    with pytest.raises(UserError, match=r"no refs\(ump\)\.p \(did you mean 'umd'\?\)"):
        RefCoco(tmp_path, split_by="ump")


def test_hostile_pickle_runs_nothing(tmp_path):
    root = mini.write(tmp_path)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (root / "refs(unc).p").write_bytes(pickle.dumps([Hostile()]))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: not a readable refs pickle \(it wants to import posix\.mkdir"):
        RefCoco(root)
    assert not (tmp_path / "owned").exists()


def set_field(table, key, field, value):
    def change(instances, refs):
        target = refs if table == "refs" else instances[table]
        if value is KeyError:
            del mini.entry(target, key)[field]
        else:
            mini.entry(target, key)[field] = value

    return change


def outline(value):
    return set_field("annotations", 11, "segmentation", value)


CUT = mini.compressed(mini.box_mask(40, 60, 3, 3, 20, 30))["counts"][:-3]
OPENING = {
    "expression without an object": (set_field("refs", 2, "ann_id", 999), r"ref 2\.ann_id: expression without an object.*999"),
    "object of another image": (set_field("refs", 2, "ann_id", 21), r"ref 2\.ann_id: annotation 21 lies in image 2, not 1"),
    "ref without image": (set_field("refs", 2, "image_id", 77), r"ref 2\.image_id: instances\.json has no image 77"),
    "several objects": (set_field("refs", 2, "ann_id", [11, 12]), r"ref 2\.ann_id: a list of objects; this is gRefCOCO"),
    "no sentences": (set_field("refs", 2, "sentences", []), r"ref 2\.sentences: an object without an expression"),
    "empty sentence": (
        set_field("refs", 2, "sentences", [{"sent": "  ", "sent_id": 5}]),
        r"ref 2\.sentences\[0\]\.sent: '  ' is blank",
    ),
    "sentence of wrong type": (
        set_field("refs", 2, "sentences", [{"sent": 5, "sent_id": 5}]),
        r"sentences\[0\]\.sent: expected str, got 5",
    ),
    "field missing": (set_field("refs", 2, "split", KeyError), r"ref 2: field 'split' is missing"),
    "annotation of no image": (set_field("annotations", 11, "image_id", 78), r"annotation 11\.image_id: there is no image 78"),
    "annotation of no category": (
        set_field("annotations", 11, "category_id", 5),
        r"annotation 11\.category_id: there is no category 5",
    ),
    "no segmentation": (
        outline(KeyError),
        r"annotation 11: field 'segmentation' is missing",
    ),
    "two categories of one name": (
        set_field("categories", 90, "name", "dog"),
        r"category 90\.name: 'dog' is the name of category 7 too, .*; rename one of them",
    ),
    "category without a name": (set_field("categories", 90, "name", " "), r"category 90\.name: ' ' is blank"),
    "id twice": (set_field("annotations", 11, "id", 12), r"annotations\[1\]\.id: 12 occurs twice"),
}

READING = {
    "image missing": (
        set_field("images", 1, "file_name", "gone.jpg"),
        r"image 1\.file_name: image 'gone\.jpg' is missing \(looked in",
    ),
    "image outside": (set_field("images", 1, "file_name", "../../x.jpg"), r"image 1\.file_name: '../../x\.jpg' leads out"),
    "wrong size": (set_field("images", 1, "width", 61), r"image 1: height x width 40x61 differs from the image file's 40x60"),
    "two points": (outline([[1, 2, 3, 4]]), r"annotation 11\.segmentation\[0\]: a polygon needs at least 3"),
    "odd polygon": (outline([[1, 2, 3, 4, 5, 6, 7]]), r"segmentation\[0\]: .* got 7 numbers"),
    "NaN": (outline([[1, 2, float("nan"), 4, 5, 6]]), r"polygon coordinate nan is not a position"),
    "huge": (outline([[1, 2, 1e9, 4, 5, 6]]), r"polygon coordinate 1000000000\.0 is not a position"),
    "text in polygon": (outline([["a"] * 6]), r"segmentation\[0\]: a polygon must be a flat list of numbers"),
    "empty list": (outline([]), r"annotation 11\.segmentation: expected polygons or a run-length code"),
    "empty referred mask": (
        outline([mini.box(9.1, 9.1, 9.2, 9.2)]),
        r"annotation 11\.segmentation: empty mask, yet an expression refers to it",
    ),
    "RLE of another size": (
        outline({"size": [4, 4], "counts": [16]}),
        r"run-length size \[4, 4\] differs from the image's \[height, width\] \[40, 60\]",
    ),
    "RLE too long": (
        outline({"size": [40, 60], "counts": [2400, 7]}),
        r"run lengths add up to 2407, not to height x width = 2400",
    ),
    "RLE damaged": (
        outline({"size": [40, 60], "counts": "o\x05"}),
        r"damaged compressed run-length counts",
    ),
    "RLE cut": (
        outline({"size": [40, 60], "counts": CUT}),
        r"annotation 11\.segmentation: (run lengths add up|damaged)",
    ),
}


@pytest.mark.parametrize("case", OPENING)
def test_errors_at_opening(tmp_path, case):
    change, message = OPENING[case]
    instances, refs = mini.damaged(change)
    with pytest.raises(UserError, match=message) as caught:
        RefCoco(mini.write(tmp_path, instances=instances, refs=refs))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", READING)
def test_errors_at_reading(tmp_path, case):
    change, message = READING[case]
    instances, refs = mini.damaged(change)
    layout = RefCoco(mini.write(tmp_path, instances=instances, refs=refs))
    with pytest.raises(UserError, match=message) as caught:
        list(examples(layout, "train"))
    assert "\n" not in str(caught.value)


def test_truncated_image(tmp_path):
    root = mini.write(tmp_path)
    path = root / "images" / "COCO_train2014_000000000001.jpg"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=r"000000000001\.jpg: truncated or damaged image"):
        list(examples(RefCoco(root), "train"))


def test_unknown_split_lists_the_known_ones(tmp_path):
    layout = RefCoco(mini.write(tmp_path))
    with pytest.raises(UserError, match=r"unknown split 'vall' \(did you mean 'val'\?\); it has train, val, testA"):
        list(examples(layout, "vall"))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        RefCoco(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no refs\(<split_by>\)\.p here"):
        RefCoco(tmp_path)
    root = mini.write(tmp_path / "a")
    (root / "instances.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"instances\.json: not valid JSON"):
        RefCoco(root)
    (root / "instances.json").unlink()
    with pytest.raises(UserError, match=r"instances\.json: missing"):
        RefCoco(root)
    root = mini.write(tmp_path / "b")
    (root / "refs(unc).p").write_bytes((root / "refs(unc).p").read_bytes()[:100])
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: not a readable refs pickle"):
        RefCoco(root)

"""Validation: every defect is found and listed, counts are compared with the published ones, leaks and duplicates are seen."""

from __future__ import annotations

import json

import pytest

from flowseg_jax.cli.data import main
from flowseg_jax.data import published, validate
from flowseg_jax.data.leakage import coco_number
from flowseg_jax.data.records import Example, RecordErrors
from flowseg_jax.errors import UserError
from tests.helpers import minirefcoco as mini


@pytest.fixture(autouse=True)
def mini_is_the_published_set(monkeypatch):
    numbers = {"train": (3, 5, 16), "val": (1, 1, 3), "testA": (1, 1, 1)}
    counts = {
        (name, "unc", split): {
            "images": published.PublishedCount(i),
            "refs": published.PublishedCount(r),
            "sentences": published.PublishedCount(s, memory=True),
        }
        for name in ("refcoco", "refcoco+")
        for split, (i, r, s) in numbers.items()
    }
    monkeypatch.setattr(validate, "COUNTS", counts)
    return counts


class Fake:
    """A layout of given examples that may know its images' files."""

    task, categories, source, annotation_files = "referring", (), "fake", ()

    def __init__(self, **splits):
        self._splits = splits

    @property
    def splits(self):
        return tuple(self._splits)

    def size(self, split):
        return len(self._splits[split])

    def example(self, split, index, notes):
        name, content = self._splits[split][index]
        return Example(1, name, 4, 4, content)


def fake(name="jsonl", **splits):
    layout = Fake(**splits)
    return validate.Opened(name, layout, RecordErrors(keep=True), layout.splits)


def check(root, **options):
    return validate.validate([validate.open_set("refcoco", root, **options)])


def add_ref(refs, ref_id, split, like):
    new = dict(mini.entry(refs, like), ref_id=ref_id, split=split)
    refs.append(new)


def test_coco_numbers():
    for name in ("COCO_train2014_000000581857.jpg", "000000581857.jpg", "COCO_train2014_000000581857_12.jpg"):
        assert coco_number(name, "refcoco") == coco_number(f"coco/train2017/{name}", "llava") == 581857
    for layout in ("jsonl", "reasonseg"):  # there a bare number is anybody's
        assert coco_number("COCO_val2014_000000000042.jpg", layout) == 42
        assert coco_number("000000000042.jpg", layout) is coco_number("train2017/000000000042.jpg", layout) is None
    assert coco_number("cam1/000000000042.jpg", "coco-instances") is None
    for name in ("581857.jpg", "0000005818571.jpg", "x000000581857.jpg", "\u0660" * 12 + ".jpg"):  # the last: Arabic digits
        assert coco_number(name, "coco-instances") is None


def test_a_clean_set(tmp_path):
    report = check(mini.write(tmp_path))
    assert report.ok and not report.leaks
    (one,) = report.sets
    assert one.label == "refcoco unc" and one.problems == [] and one.warnings == []
    assert {split: s.counts for split, s in one.splits.items()} == {
        "train": {"images": 3, "refs": 5, "sentences": 16, "samples": 15},  # two sentences differ in case only
        "val": {"images": 1, "refs": 1, "sentences": 3, "samples": 3},
        "testA": {"images": 1, "refs": 1, "sentences": 1, "samples": 1},
    }
    assert list(one.notes.values()) == [1]
    text = validate.render(report)
    assert "train: 3 images (as published), 5 refs (as published), 16 sentences (as published, from memory), 15 samples" in text
    assert "1 objects with an empty mask" in text and text.endswith("\nclean")


def test_counts_that_differ(tmp_path, mini_is_the_published_set):
    root = mini.write(tmp_path)
    mini_is_the_published_set["refcoco", "unc", "val"]["sentences"] = published.PublishedCount(10_834, memory=True)
    report = check(root)
    assert report.ok  # a figure from memory is no proof
    assert "3 sentences (differs: 10,834 published, from memory)" in validate.render(report)
    mini_is_the_published_set["refcoco", "unc", "val"]["refs"] = published.PublishedCount(3_811)
    report = check(root)
    assert not report.ok
    assert "1 refs (differs: 3,811 published)," in validate.render(report)


def test_other_data_in_the_layout_is_not_compared(tmp_path, mini_is_the_published_set):
    mini_is_the_published_set["refcoco", "unc", "val"]["refs"] = published.PublishedCount(3_811)

    def rename(instances, refs):
        for image in instances["images"]:
            image["file_name"] = f"{image['id']}.jpg"

    instances, refs = mini.damaged(rename)
    root = mini.write(tmp_path, instances=instances, refs=refs)
    for path in (root / "images").iterdir():
        path.rename(path.with_name(f"{int(path.stem[-12:])}.jpg"))
    report = check(root)
    assert report.ok and "counts not compared" in report.sets[0].warnings[0]
    assert "published)" not in validate.render(report) and validate.render(report).endswith("clean, with 1 warnings")


def test_all_problems_are_listed(tmp_path):
    def change(instances, refs):
        mini.entry(refs, 2)["ann_id"] = 999  # found at opening
        mini.entry(instances["annotations"], 21)["segmentation"] = [mini.box(9.1, 9.1, 9.2, 9.2)]
        instances["annotations"].append(dict(mini.entry(instances["annotations"], 31)))

    instances, refs = mini.damaged(change)
    root = mini.write(tmp_path, instances=instances, refs=refs)
    (root / "images" / "COCO_train2014_000000000003.jpg").write_bytes(b"\xff\xd8\xff broken")
    (root / "images" / "COCO_train2014_000000000004.jpg").unlink()
    report = check(root)
    assert not report.ok
    problems = "\n".join(report.sets[0].problems)
    for words in (
        "ref 2.ann_id: expression without an object",
        ".id: 31 occurs twice",
        "annotation 21.segmentation: empty mask",
        "000000000003.jpg",
        "image 4.file_name: image 'COCO_train2014_000000000004.jpg' is missing",
    ):
        assert words in problems
    assert len(report.sets[0].problems) == 5
    assert report.sets[0].splits["train"].counts["refs"] == 2  # the rest was read
    assert "problems: 5" in validate.render(report)


def test_long_lists_are_cut_in_print_only(tmp_path):
    report = check(mini.write(tmp_path))
    report.sets[0].problems = [f"problem {i}" for i in range(25)]
    text = validate.render(report)
    assert "problems: 25" in text and "problem 19" in text and "problem 20" not in text and "and 5 more" in text
    assert len(report.to_json()["sets"][0]["problems"]) == 25


def test_degenerate_masks_are_counted(tmp_path):
    def change(instances, refs):
        mini.entry(instances["annotations"], 31)["segmentation"] = mini.compressed(mini.box_mask(32, 32, 0, 0, 32, 32))
        mini.entry(instances["annotations"], 41)["segmentation"] = mini.compressed(mini.box_mask(96, 96, 5, 5, 6, 40))

    instances, refs = mini.damaged(change)
    notes = check(mini.write(tmp_path, instances=instances, refs=refs)).sets[0].notes
    assert notes["objects whose mask covers the whole image"] == 1
    assert notes["objects whose mask is one pixel wide or high"] == 1


def test_leak_inside_a_set(tmp_path):
    instances, refs = mini.damaged(lambda instances, refs: add_ref(refs, 99, "testA", like=1))
    report = check(mini.write(tmp_path, instances=instances, refs=refs))
    (leak,) = report.leaks
    assert (leak.training, leak.evaluation) == ("refcoco unc train", "refcoco unc testA")
    assert leak.images == ["COCO_train2014_000000000001.jpg"] and leak.remark == ""
    assert not report.ok
    assert "leakage: images of refcoco unc train that are also in refcoco unc testA: 1" in validate.render(report)


def test_evaluation_splits_may_share_images(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "COUNTS", {})
    instances, refs = mini.damaged(lambda instances, refs: add_ref(refs, 99, "testA", like=5))
    assert check(mini.write(tmp_path, instances=instances, refs=refs)).ok


def test_leak_by_design_of_the_google_partition(tmp_path):
    instances, refs = mini.damaged(lambda instances, refs: add_ref(refs, 99, "val", like=1))
    report = check(mini.write(tmp_path, instances=instances, refs=refs, split_by="google"))
    assert not report.ok and "by design" in report.leaks[0].remark
    assert "(the google partition shares images between its splits by design)" in validate.render(report)


def test_leaks_between_sets_in_both_directions(tmp_path):
    def swap(instances, refs):
        for ref in refs:
            ref["split"] = {"train": "val", "val": "train"}.get(ref["split"], ref["split"])

    one = validate.open_set("refcoco", mini.write(tmp_path / "a"))
    instances, refs = mini.damaged(swap)
    other = validate.open_set("refcoco+", mini.write(tmp_path / "b", instances=instances, refs=refs))
    leaks = validate.validate([one, other]).leaks
    assert [(leak.training, leak.evaluation, len(leak.images)) for leak in leaks] == [
        ("refcoco unc train", "refcoco+ unc val", 3),
        ("refcoco+ unc train", "refcoco unc val", 1),
    ]


def test_a_coco_image_is_one_picture_under_every_name_and_encoding():
    one = fake("refcoco", train=[("COCO_train2014_000000000007.jpg", b"a")])
    other = fake("coco-panoptic", val=[("000000000007.jpg", b"b"), ("000000000008.jpg", b"a")])
    (leak,) = validate.validate([one, other]).leaks
    assert leak.images == ["COCO_train2014_000000000007.jpg"]


def test_names_of_twelve_digits_are_coco_s_in_its_own_layouts_alone():
    mine = fake(
        train=[("cam1/000000000007.jpg", b"a")], val=[("cam2/000000000007.jpg", b"b"), ("cam2/000000000008.jpg", b"a7")]
    )
    assert validate.validate([mine]).ok
    coco = fake("coco-panoptic", train=[("000000000007.jpg", b"a7"), ("000000000009.jpg", b"a9")])
    (leak,) = validate.validate([mine, coco]).leaks  # the content says that number 8 of one is number 7 of the other
    assert (leak.training, leak.evaluation, leak.images) == ("coco-panoptic train", "jsonl val", ["000000000007.jpg"])
    coco = fake("coco-panoptic", val=[("000000000001.jpg", b"a")])
    (leak,) = validate.validate([mine, coco]).leaks
    assert (leak.training, leak.evaluation, leak.images) == ("jsonl train", "coco-panoptic val", ["cam1/000000000007.jpg"])


def test_two_numbers_are_two_pictures_of_coco():
    """Its pictures are told by their numbers, so that the published splits are clean whatever files occur twice in them."""
    assert validate.validate([fake("refcoco", train=[("000000000007.jpg", b"a")], val=[("000000000008.jpg", b"a")])]).ok


def test_other_images_are_the_same_if_their_content_is():
    assert validate.validate([fake(train=[("train/0.jpg", b"a")], val=[("val/0.jpg", b"b")])]).ok
    (leak,) = validate.validate([fake(train=[("train/0.jpg", b"a")], val=[("val/9.jpg", b"a")])]).leaks
    assert leak.images == ["train/0.jpg"]


def test_duplicates_inside_a_split_are_shown_and_allowed():
    one = fake(train=[("0.jpg", b"a"), ("1.jpg", b"b"), ("2.jpg", b"a"), ("0.jpg", b"a")], val=[("9.jpg", b"c")])
    report = validate.validate([one])
    assert report.ok
    assert report.sets[0].splits["train"].duplicates == ["2.jpg is the same picture as 0.jpg", "0.jpg"]
    assert "duplicate images in train: 2" in validate.render(report)


def test_quick_looks_for_files_without_reading_them(tmp_path):
    root = mini.write(tmp_path)
    (root / "images" / "COCO_train2014_000000000003.jpg").write_bytes(b"not read")
    report = validate.validate([validate.open_set("refcoco", root)], quick=True)
    assert report.ok and report.sets[0].splits["train"].counts == {"images": 3}
    (root / "images" / "COCO_train2014_000000000003.jpg").unlink()
    report = validate.validate([validate.open_set("refcoco", root)], quick=True)
    assert not report.ok and "'COCO_train2014_000000000003.jpg' is missing" in report.sets[0].problems[0]


def test_quick_finds_leaks(tmp_path):
    instances, refs = mini.damaged(lambda instances, refs: add_ref(refs, 99, "val", like=1))
    root = mini.write(tmp_path, instances=instances, refs=refs)
    assert len(validate.validate([validate.open_set("refcoco", root)], quick=True).leaks) == 1


def test_progress_is_reported():
    lines = []
    progress = validate._Progress(lines.append, every=0)
    progress("refcoco val", 1200, 1500)
    assert lines == ["refcoco val: 1,200 of 1,500"]
    assert validate._Progress(lines.append)._every <= 5


def test_command(tmp_path, capsys):
    root = mini.write(tmp_path / "set")
    out = tmp_path / "report.json"
    assert main(["validate", "refcoco", str(root), "--json", str(out), "--splits", "val", "testA"]) == 0
    report = json.loads(out.read_text())
    assert report["ok"] and list(report["sets"][0]["splits"]) == ["val", "testA"]
    assert report["sets"][0]["splits"]["val"]["checks"]["refs"] == {"count": 1, "published": 1, "memory": False}
    assert "clean" in capsys.readouterr().out
    (root / "images" / "COCO_train2014_000000000004.jpg").unlink()
    assert main(["validate", "refcoco", str(root), "--with", f"refcoco+={root}"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("'COCO_train2014_000000000004.jpg' is missing") == 2 and "refcoco+ unc" in shown.out
    assert "opening as refcoco+" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["refcoco", "nowhere"], "no such folder"),
        (["refcocoo", "."], "unknown layout 'refcocoo'"),
        (["refcoco", "SET", "--splits", "vall"], "unknown split 'vall'"),
        (["refcoco", "SET", "--split-by", "umd"], r"no refs\(umd\)\.p"),
        (["refcoco", "SET", "--with", "refcoco+"], "--with takes LAYOUT=DIR, got 'refcoco\\+'"),
        (["refcoco", "SET", "--with", "=x"], "--with takes LAYOUT=DIR, got 'x'"),
        (["refcoco", "SET", "--json", "nowhere/report.json"], "cannot write nowhere/report.json"),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    mini.write(tmp_path / "SET")
    with pytest.raises(UserError, match=message) as caught:
        main(["validate", *words])
    assert "\n" not in str(caught.value)


def test_published_counts_add_up():
    """The published totals of refs, and the sums over the evaluation splits that other projects report."""

    def total(name, partition, key):
        return sum(f[key].value for (n, p, _), f in published.COUNTS.items() if (n, p) == (name, partition))

    assert (total("refcoco", "unc", "images"), total("refcoco", "unc", "refs")) == (19_994, 50_000)
    assert (total("refcoco+", "unc", "images"), total("refcoco+", "unc", "refs")) == (19_992, 49_856)
    assert total("refcoco+", "unc", "sentences") == 141_564
    assert total("reasonseg", "", "images") == 1_218
    evaluation = {
        key: f for key, f in published.COUNTS.items() if key[2] != "train" and "sentences" in f and key[1] != "google"
    }
    assert sum(f["images"].value for f in evaluation.values()) == 9_900
    assert sum(f["sentences"].value for f in evaluation.values()) == 57_457

"""The gRefCOCO reader: its oddities and every error message."""

import json
from collections import Counter

import pytest

from flowseg_jax.data.formats.grefcoco import GRefCoco
from flowseg_jax.data.records import RecordErrors, examples, make_samples
from flowseg_jax.errors import UserError
from tests.helpers import minigrefcoco as mini
from tests.helpers import minirefcoco

CROWD_NOTE = "crowd regions among the objects of a ref: not part of its target"
TWICE_NOTE = "objects that a ref names twice: taken once"


def read(layout, split, notes=None):
    return {e.image_id: e for e in examples(layout, split, notes)}


def targets(example):
    """Ids of the objects of each expression, by (ref id, sentence id)."""
    return {(e.ref_id, e.id): [example.annotations[a].id for a in e.annotations] for e in example.expressions}


def test_several_objects_one_and_none_are_all_kept(tmp_path):
    layout = GRefCoco(mini.write(tmp_path / "grefcoco"))
    assert (layout.task, layout.splits) == ("referring", ("train", "val", "testA"))
    assert layout.categories == ("cat", "dog", "café chair")
    assert [layout.size(s) for s in layout.splits] == [2, 1, 1]
    assert [p.name for p in layout.annotation_files] == ["instances.json", "grefs(unc).json"]
    example = read(layout, "train")[1]
    assert [a.id for a in example.annotations] == [11, 12, 13]
    assert targets(example) == {(1, 10): [11, 12, 13], (2, 20): [12], (2, 21): [12], (3, 30): []}
    assert [e.text for e in example.expressions] == ["all of them", "the cat", "the Cat", "the zebra"]
    assert [(s.ann_id, s.sentence, s.annotations, s.count) for s in make_samples(example)] == [
        (-1, "the zebra", (), 1),
        (11, "all of them", (0, 1, 2), 1),
        (12, "the cat", (1,), 2),
    ]


def test_an_image_may_have_nothing_but_expressions_without_a_target(tmp_path):
    example = read(GRefCoco(mini.write(tmp_path)), "val")[3]
    assert targets(example) == {(5, 50): []} and [a.id for a in example.annotations] == [31]


def test_an_id_that_is_no_list(tmp_path):
    assert targets(read(GRefCoco(mini.write(tmp_path)), "testA")[4]) == {(6, 60): [41, 42], (7, 70): [41]}


def test_crowds_are_no_targets_and_are_counted(tmp_path):
    layout, notes = GRefCoco(mini.write(tmp_path)), Counter()
    example = read(layout, "train", notes)[5]
    assert targets(example) == {(4, 40): [51]}
    assert [(a.id, a.crowd) for a in example.annotations] == [(51, False), (52, True)]
    assert notes[CROWD_NOTE] == 1 and TWICE_NOTE not in notes
    quiet = Counter()
    read(layout, "testA", quiet)
    assert not quiet


def test_an_object_named_twice_is_taken_once(tmp_path):
    instances, refs = mini.damaged(set_field(2, "ann_id", [12, 12]))
    notes = Counter()
    example = read(GRefCoco(mini.write(tmp_path, instances=instances, refs=refs)), "train", notes)[1]
    assert targets(example)[2, 20] == [12] and notes[TWICE_NOTE] == 1


@pytest.mark.parametrize(
    "change", [{"ann_id": [-1], "no_target": KeyError}, {"ann_id": -1, "no_target": True}, {"ann_id": [], "no_target": True}]
)
def test_ways_to_say_no_target(tmp_path, change):
    instances, refs = mini.damaged(lambda *tables: [set_field(3, *c)(*tables) for c in change.items()])
    example = read(GRefCoco(mini.write(tmp_path, instances=instances, refs=refs)), "train")[1]
    assert targets(example)[3, 30] == []


def test_which_refs_file_is_read(tmp_path):
    root = mini.write(tmp_path, name="refs(unc).p")
    for name in ("refs(unc).p", "grefs(unc).p", "grefs(unc).json"):  # each is preferred to those before it
        mini.write(tmp_path / "other", name=name)
        (tmp_path / "other" / name).rename(root / name)
        layout = GRefCoco(root)
        assert layout.annotation_files[1].name == name and layout.source == f"grefcoco layout {name}"
        assert targets(read(layout, "testA")[4]) == {(6, 60): [41, 42], (7, 70): [41]}


def test_refs_file_of_another_author(tmp_path):
    root = mini.write(tmp_path, name="grefs(mine).json")
    assert GRefCoco(root, split_by="mine").size("train") == 2
    with pytest.raises(
        UserError, match=r"none of grefs\(unc\)\.json, grefs\(unc\)\.p, refs\(unc\)\.p is here; pass the folder that holds"
    ):
        GRefCoco(root)


def test_the_folder_above_will_do(tmp_path):
    mini.write(tmp_path / "grefcoco")
    assert GRefCoco(tmp_path).size("val") == 1


def set_field(ref_id, field, value):
    def change(_, refs):
        ref = minirefcoco.entry(refs, ref_id)
        if value is KeyError:
            del ref[field]
        else:
            ref[field] = value

    return change


OPENING = {
    "unknown object": (set_field(1, "ann_id", [11, 999]), r"ref 1\.ann_id: expression without an object: .* no annotation 999"),
    "object of another image": (set_field(1, "ann_id", [11, 21]), r"ref 1\.ann_id: annotation 21 lies in image 2, not 1"),
    "no target beside an object": (set_field(1, "ann_id", [11, -1]), r"ref 1\.ann_id: .* no annotation -1"),
    "text as id": (set_field(1, "ann_id", ["11"]), r"ref 1\.ann_id: expected a list of whole numbers, got \['11'\]"),
    "bool as id": (set_field(1, "ann_id", [True]), r"ref 1\.ann_id: expected a list of whole numbers"),
    "text as ids": (set_field(1, "ann_id", "11"), r"ref 1\.ann_id: expected list/int, got '11'"),
    "no ids": (set_field(1, "ann_id", KeyError), r"ref 1: field 'ann_id' is missing"),
    "empty list": (
        lambda _, refs: (refs[0].update(ann_id=[]), refs[0].pop("no_target")),
        r"ref 1\.ann_id: an empty list; a ref without a target has \[-1\] or no_target true",
    ),
    "no_target with objects": (set_field(1, "no_target", True), r"ref 1: ann_id \[13, 11, 12\] contradicts no_target True"),
    "target without objects": (set_field(3, "no_target", False), r"ref 3: ann_id \[-1\] contradicts no_target False"),
    "no_target as text": (set_field(3, "no_target", "yes"), r"ref 3\.no_target: expected bool, got 'yes'"),
    "only crowds": (set_field(4, "ann_id", [52]), r"ref 4\.ann_id: nothing but crowd regions \[52\]; name an object or \[-1\]"),
    "unknown image": (set_field(3, "image_id", 77), r"ref 3\.image_id: instances\.json has no image 77"),
    "no sentences": (set_field(3, "sentences", []), r"ref 3\.sentences: an object without an expression"),
    "no ref id": (set_field(3, "ref_id", KeyError), r"grefs\(unc\)\.json: refs\[2\]: field 'ref_id' is missing"),
    "ref id twice": (set_field(3, "ref_id", 2), r"ref 2\.ref_id: 2 occurs twice"),
}


@pytest.mark.parametrize("case", OPENING)
def test_errors_at_opening(tmp_path, case):
    change, message = OPENING[case]
    instances, refs = mini.damaged(change)
    root = mini.write(tmp_path, instances=instances, refs=refs)
    with pytest.raises(UserError, match=message) as caught:
        GRefCoco(root)
    assert "\n" not in str(caught.value) and "grefs(unc).json" in str(caught.value)
    kept = RecordErrors(keep=True)
    layout = GRefCoco(root, problems=kept)
    assert kept.found == [str(caught.value)]
    assert sum(len(targets(e)) for s in layout.splits for e in examples(layout, s)) == 7  # all the other sentences


def test_missing_and_damaged_files(tmp_path):
    root = mini.write(tmp_path)
    path = root / "grefs(unc).json"
    for content, message in (
        (b'[{"ref_id": 1', "not valid JSON"),
        (b"\xff[]", "not valid JSON"),
        (b'{"refs": []}', "expected a list of refs, got dict"),
        (b"[]", "holds no refs"),
        (json.dumps(["x"]).encode(), r"refs\[0\]: expected an object with fields, got 'x'"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"grefs\(unc\)\.json: {message}"):
            GRefCoco(root)
    (root / "instances.json").unlink()
    with pytest.raises(UserError, match=r"instances\.json: missing; a gRefCOCO layout needs instances\.json and grefs"):
        GRefCoco(root)
    with pytest.raises(UserError, match="no such folder"):
        GRefCoco(tmp_path / "nowhere")

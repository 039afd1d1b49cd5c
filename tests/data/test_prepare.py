"""Preparation: what is stored comes back, atomically, without TensorFlow."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest

from flowseg_jax.cli.data import main
from flowseg_jax.data import checksums, prepare
from flowseg_jax.data.dataset import FORMAT, PreparedDataset
from flowseg_jax.data.formats.refcoco import RefCoco
from flowseg_jax.data.records import examples, make_ref_samples, make_samples
from flowseg_jax.data.upgrade import upgrade
from flowseg_jax.errors import UserError
from tests.helpers import minirefcoco as mini

LISTING = [
    "SHA256SUMS",
    "data/dataset_info.json",
    "data/features.json",
    "data/flowseg-train.array_record-00000-of-00001",
    "index/train.jsonl",
    "index/train.npy",
    "metadata.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
]


def quiet(_):
    pass


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    return mini.write(tmp_path_factory.mktemp("layout") / "refcoco")


@pytest.fixture(scope="module")
def prepared(layout, tmp_path_factory):
    lines = []
    out = tmp_path_factory.mktemp("prepared") / "mini"
    result = prepare.prepare(layout, out, tokenizer_vocab=300, log=lines.append)
    assert "train: 3 images" in lines and any("note: 1 objects with an empty mask" in line for line in lines)
    return result


def test_round_trip(layout, prepared):
    reader = RefCoco(layout)
    assert tuple(prepared.splits) == reader.splits and prepared.categories == reader.categories
    for split in reader.splits:
        source = prepared.source(split)
        assert [source[i] for i in range(len(source))] == list(examples(reader, split))


def test_index_agrees_with_the_records(prepared):
    for split in prepared.splits:
        source, index = prepared.source(split), prepared.index(split)
        assert len(source) == len(index)
        for i, entry in enumerate(index):
            assert (source[i].image_id, source[i].file_name) == (entry.image_id, entry.file_name)
            assert entry.samples and entry.samples == make_samples(source[i])
            assert entry.refs == make_ref_samples(source[i]) == entry.by_ref.samples
    assert [e.categories for e in prepared.index("train")] == [(1, 0), (0, 1), (0, -1)]  # the crowd has none
    assert prepared.families("train") == ("attribute", "ordinal", "relation")
    assert prepared.splits["train"] == {"images": 3, "refs": 5, "sentences": 16, "samples": 15}
    described = json.loads(next(prepared.directory.rglob("dataset_info.json")).read_text())
    sizes = {split["name"]: int(split["numBytes"]) for split in described["splits"]}
    files = {name: prepared.directory.rglob(f"flowseg-{name}.array_record*") for name in sizes}
    assert sizes == {name: sum(file.stat().st_size for file in found) for name, found in files.items()}


def test_metadata_and_digest(layout, prepared, tmp_path):
    assert prepared.tokenizer_directory.is_dir()
    again = prepare.prepare(layout, tmp_path / "a", log=quiet)
    assert again.digest == prepared.digest and again.tokenizer_directory is None
    instances, refs = mini.damaged(lambda i, r: r[0]["sentences"][0].update(sent="another dog"))
    other = prepare.prepare(mini.write(tmp_path / "l", instances=instances, refs=refs), tmp_path / "b", log=quiet)
    assert other.digest != prepared.digest


def test_only_some_splits(layout, tmp_path):
    assert list(prepare.prepare(layout, tmp_path / "x", splits=["val"], log=quiet).splits) == ["val"]
    with pytest.raises(UserError, match=r"unknown split 'vall' \(did you mean 'val'\?\); it has train, val, testA"):
        prepare.prepare(layout, tmp_path / "y", splits=["vall"], log=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def break_image(root):
    path = root / "images" / "COCO_train2014_000000000005.jpg"
    path.write_bytes(path.read_bytes()[:300])


def remove_image(root):
    (root / "images" / "COCO_train2014_000000000001.jpg").unlink()


@pytest.mark.parametrize(("damage", "message"), [(break_image, "truncated or damaged"), (remove_image, "is missing")])
def test_nothing_is_left_behind(tmp_path, damage, message):
    root = mini.write(tmp_path / "layout")
    damage(root)
    with pytest.raises(UserError, match=message):
        prepare.prepare(root, tmp_path / "out" / "mini", log=quiet)
    assert list((tmp_path / "out").iterdir()) == []


def lose_image(root):
    """Image 4 is moved away; a function puts it back."""
    path = root / "images" / "COCO_train2014_000000000004.jpg"
    path.rename(root / "kept.jpg")
    return lambda: (root / "kept.jpg").rename(path)


def test_continues_behind_finished_shards(tmp_path, monkeypatch):
    root, lines, read = mini.write(tmp_path / "layout"), [], []
    put_back = lose_image(root)
    with pytest.raises(UserError, match="image 'COCO_train2014_000000000004.jpg' is missing"):
        prepare.prepare(root, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out.partial" / "shards").glob("*.json"))) == 2
    put_back()
    example = RefCoco.example
    monkeypatch.setattr(RefCoco, "example", lambda self, split, *rest: read.append(split) or example(self, split, *rest))
    prepared = prepare.prepare(root, tmp_path / "out", log=lines.append)
    assert read == ["testA"] and "continuing: 2 of 3 shards are written already" in lines
    assert prepared.digest == prepare.prepare(root, tmp_path / "again", log=quiet).digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "layout", "out"]


def test_other_annotations_begin_anew(tmp_path):
    root = mini.write(tmp_path / "layout")
    put_back = lose_image(root)
    with pytest.raises(UserError, match="is missing"):
        prepare.prepare(root, tmp_path / "out", log=quiet)
    put_back()
    instances, refs = mini.damaged(lambda i, r: r[0]["sentences"][0].update(sent="another dog"))
    mini.write(root, instances=instances, refs=refs)
    assert any(s.sentence == "another dog" for e in prepare.prepare(root, tmp_path / "out").index("train") for s in e.samples)


def test_damaged_records_are_listed_where_that_is_wanted(tmp_path):
    def damage(instances, refs):
        refs[1]["ann_id"] = 999
        mini.entry(instances["annotations"], 51)["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]

    instances, refs = mini.damaged(damage)
    root, lines = mini.write(tmp_path / "layout", instances=instances, refs=refs), []
    (root / "images" / "COCO_train2014_000000000004.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="has no annotation 999"):
        prepare.prepare(root, tmp_path / "out", log=quiet)
    with pytest.raises(UserError, match="split 'testA': nothing is left of its examples"):
        prepare.prepare(root, tmp_path / "out", on_error="record", log=quiet)
    prepared = prepare.prepare(root, tmp_path / "out", splits=["train", "val"], on_error="record", log=lines.append)
    assert prepared.metadata["problems"] == 2 and [e.image_id for e in prepared.index("train")] == [1, 2]
    listed = (tmp_path / "out" / "problems.txt").read_text().splitlines()
    assert len(listed) == 2 and "annotation 999" in listed[0] and "polygon coordinate nan" in listed[1]
    said = f"{tmp_path / 'out' / 'problems.txt'} lists the records that are left out; 2 damaged: {listed[0]}; {listed[1]}"
    assert said in lines
    with pytest.raises(UserError, match="on_error is 'ignore': choose stop or record"):
        prepare.prepare(root, tmp_path / "x", on_error="ignore", log=quiet)


def test_processes_write_what_one_writes(layout, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("flowseg_jax.data.shards.EXAMPLES", 1)
    several = prepare.prepare(layout, tmp_path / "out", processes=2, log=quiet)
    assert several.splits == prepared.splits and several.metadata["notes"] == prepared.metadata["notes"]
    for split in prepared.splits:
        assert list(several.index(split)) == list(prepared.index(split))
        ours, theirs = several.source(split), prepared.source(split)
        assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]
    assert len(list((tmp_path / "out" / "data").glob("*-train.array_record-*"))) == 3


def test_what_fails_in_a_process_is_its_own_error(tmp_path, monkeypatch):
    monkeypatch.setattr("flowseg_jax.data.shards.EXAMPLES", 1)
    root = mini.write(tmp_path / "layout")
    break_image(root)
    with pytest.raises(UserError, match=r"COCO_train2014_000000000005\.jpg: truncated or damaged image"):
        prepare.prepare(root, tmp_path / "out", processes=2, log=quiet)


def test_a_mark_in_a_sentence_is_an_error(tmp_path):
    instances, refs = mini.damaged(lambda i, r: r[0]["sentences"][0].update(sent="dog <seg> cat"))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: ref 1\.sentences\[0\]\.sent: contains the special token '<SEG>'"):
        prepare.prepare(mini.write(tmp_path / "l", instances=instances, refs=refs), tmp_path / "out", log=quiet)


def test_existing_directories_and_unknown_layouts(layout, prepared, tmp_path):
    with pytest.raises(UserError, match="exists already; remove it to prepare again"):
        prepare.prepare(layout, prepared.directory, log=quiet)
    (tmp_path / "empty").mkdir()
    prepare.prepare(layout, tmp_path / "empty", splits=["val"], log=quiet)
    with pytest.raises(UserError, match=r"unknown layout 'refcoc' \(did you mean 'refcoco'"):
        prepare.prepare(layout, tmp_path / "z", layout="refcoc", log=quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare.prepare(layout, tmp_path / "file" / "x", log=quiet)


def test_opening_what_is_not_prepared(prepared, tmp_path):
    with pytest.raises(UserError, match=r"not a prepared data set \(no metadata\.json\); make one with"):
        PreparedDataset.open(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({**prepared.metadata, "format": 0}))
    with pytest.raises(UserError, match=f"prepared in format 0, this version reads {FORMAT}; remove it and prepare it again"):
        PreparedDataset.open(tmp_path)
    with pytest.raises(UserError, match="unknown split 'trian'"):
        prepared.index("trian")


def test_command_line(layout, tmp_path, capsys):
    assert main(["prepare", "--source", str(layout), "--out", str(tmp_path / "out"), "--splits", "val"]) == 0
    said = capsys.readouterr().out
    assert "val: 1 images" in said and "Download" not in said
    command = [
        sys.executable,
        "-m",
        "flowseg_jax",
        "data",
        "prepare",
        "--source",
        str(tmp_path / "gone"),
        "--out",
        str(tmp_path / "b"),
    ]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr == f"error: {tmp_path / 'gone'}: no such folder\n"


def test_no_tensorflow_no_torch():
    code = (
        "import sys, flowseg_jax.data.prepare, flowseg_jax.data.train_dataset, flowseg_jax.data.tokenizer\n"
        "bad = {'tensorflow', 'torch'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_images_elsewhere_named_by_a_path(layout, tmp_path):
    """Also where it is interrupted: what images were named is part of the request that the same command continues."""
    moved = tmp_path / "moved"
    shutil.copytree(layout, moved)
    (folder,) = {path.parent for path in moved.rglob("*.jpg")}
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(UserError):
        prepare.prepare(moved, tmp_path / "out", log=quiet)
    result = prepare.prepare(moved, tmp_path / "out", images=tmp_path / "elsewhere", log=quiet)
    usual = prepare.prepare(layout, tmp_path / "usual", log=quiet)
    assert result.digest == usual.digest and [result.source("train")[i].image for i in range(3)] == [
        usual.source("train")[i].image for i in range(3)
    ]


def test_a_finished_directory_holds_these_files_and_no_others(layout, tmp_path):
    out = tmp_path / "out"
    prepare.prepare(layout, out, splits=["train"], tokenizer_vocab=300, log=quiet)
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == LISTING
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_as_many_processes_as_cores_and_memory_allow(tmp_path, monkeypatch):
    (tmp_path / "annotations").write_bytes(bytes(3 << 20))
    layout = SimpleNamespace(annotation_files=[tmp_path / "annotations", str(tmp_path / "annotations")])
    each, page = 10 * (6 << 20) + (1 << 29), 4096
    free = {"SC_PAGE_SIZE": page}
    monkeypatch.setattr(os, "sysconf", free.__getitem__)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for pages, wanted in ((3 * each // page, 3), (3 * each // page - 1, 2), (90 * each // page, 8), (1, 1), (0, 1)):
        free["SC_AVPHYS_PAGES"] = pages
        assert prepare._default_processes(layout) == wanted
    free["SC_AVPHYS_PAGES"] = 90 * each // page
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert prepare._default_processes(layout) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delattr(os, "sysconf")
    assert prepare._default_processes(layout) == 1


def test_a_worker_leaves_ctrl_c_to_its_parent_and_opens_the_layout(layout, monkeypatch):
    signals, opened = [], []
    monkeypatch.setattr(prepare.workers, "init_worker", lambda *numbers: signals.extend(numbers))
    monkeypatch.setattr(prepare, "open_layout", lambda *given, **options: opened.append((given, options)) or opened)
    monkeypatch.setattr(prepare, "_layout", None)
    for keep in (False, True):
        prepare._open_in_worker("refcoco", layout, {"split_by": "unc"}, keep)
        (name, source, problems), options = opened[-1]
        assert (name, source, problems.keep, options) == ("refcoco", layout, keep, {"split_by": "unc"})
        assert prepare._layout is opened
    assert signals == [signal.SIGINT] * 2


def test_a_set_of_the_format_before_is_upgraded(prepared, tmp_path):
    old, new = shutil.copytree(prepared.directory, tmp_path / "old"), tmp_path / "new"
    metadata = json.loads((old / "metadata.json").read_text())
    earlier = {key: value for key, value in metadata.items() if key not in ("families", "index")} | {"format": 6}
    (old / "metadata.json").write_text(json.dumps(earlier))
    for rows in (old / "index").glob("*.npy"):
        rows.unlink()
    names = [path.relative_to(old).as_posix() for path in old.rglob("*") if path.is_file() and path.name != checksums.FILE]
    checksums.write(old, names, {})
    with pytest.raises(
        UserError, match=rf"format 6, this version reads 7; write it anew with `flowseg data upgrade {old} NEW`"
    ):
        PreparedDataset.open(old)
    assert main(["upgrade", str(old), str(new)]) == 0
    assert json.loads((new / "metadata.json").read_text()) == metadata
    for path in (prepared.directory / "index").iterdir():
        assert (new / "index" / path.name).read_bytes() == path.read_bytes()
    assert [*PreparedDataset.open(new).source("train")] == [*prepared.source("train")]
    with pytest.raises(UserError, match="new: exists already"):
        upgrade(old, new)
    with pytest.raises(UserError, match="prepared in format 7; only sets of format 6 are upgraded"):
        upgrade(new, tmp_path / "newer")
    (old / "index" / "val.jsonl").write_text("x")
    with pytest.raises(UserError, match=r"val\.jsonl: has changed since it was prepared"):
        upgrade(old, tmp_path / "newer")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("old", "new")]


def test_a_process_that_dies_and_one_that_was_quicker(tmp_path, monkeypatch):
    class Pool(contextlib.AbstractContextManager):
        def __init__(self, *_, **__):
            pass

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match="a process died while it prepared, perhaps for want of memory: try fewer"):
        prepare._write_in_processes(["a shard"], None, False, 2, None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metadata.json").write_text("")
    with pytest.raises(UserError, match="out: another process has prepared it meanwhile"):
        with prepare._resumable_directory(tmp_path / "out", {}, quiet):
            pass
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metadata.json").write_text(json.dumps({"format": FORMAT - 1}))
    with pytest.raises(UserError, match="out: exists already; name another folder"):
        upgrade(tmp_path / "old", tmp_path / "out")
    (tmp_path / "old" / "metadata.json").write_text(json.dumps({"format": FORMAT - 2}))
    with pytest.raises(UserError, match=f"prepared in format {FORMAT - 2}; only sets of format {FORMAT - 1} are"):
        upgrade(tmp_path / "old", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "out"]

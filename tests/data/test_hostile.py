"""Annotation files and prepared sets of somebody who means harm: one line, nothing outside OUT, nothing run."""

import contextlib
import json
import pickle
import shutil
import sys
from collections import Counter

import pytest

from flowseg_jax.data import checksums, masks, prepare
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.formats import jsonl, open_layout, reading
from flowseg_jax.errors import UserError
from tests.helpers import minicoco, minigrefcoco, minillava, minireasonseg
from tests.helpers import minirefcoco as mini


def quiet(_):
    pass


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    return prepare.prepare(mini.write(root / "layout"), root / "set", tokenizer_vocab=300, log=quiet)


@pytest.fixture
def prepared(original, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(original.directory, tmp_path / "set")


def seal(root):
    """Writes the checksums anew, as whoever changed a file could."""
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.name != checksums.FILE]
    checksums.write(root, names, {})


def change(path, function):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(function(value) or value))


def everything(root):
    opened = PreparedDataset.open(root)
    return {split: ([*opened.source(split)], [*opened.index(split)]) for split in opened.splits}


def refused(root, message):
    with pytest.raises(UserError, match=message) as caught:
        everything(root)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


# --- what is named is not imported


def test_a_class_that_a_set_names_is_not_imported(original, prepared, tmp_path, monkeypatch):
    folder = tmp_path / "cwd" / "data"
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    monkeypatch.chdir(folder.parent)
    monkeypatch.syspath_prepend(str(folder.parent))
    change(prepared / "data" / "features.json", lambda features: features.update(pythonClassName="data.planted.Feature"))
    seal(prepared)
    assert everything(prepared) == everything(original.directory)
    assert not (folder / "ran").exists() and "data.planted" not in sys.modules
    # It would be by TFDS alone: the trap works.
    import tensorflow_datasets as tfds

    with contextlib.suppress(Exception):
        tfds.builder_from_directory(prepared / "data")
    assert (folder / "ran").exists()


def test_tfds_reads_a_set_by_itself(original):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(original.directory / "data").as_data_source(split="train")
    assert [r["image_id"] for r in source] == [e.image_id for e in original.index("train")]


def test_code_of_a_tokenizer_is_not_run(prepared, tmp_path, monkeypatch):
    from flowseg_jax.data.tokenizer import load_tokenizer

    (prepared / "tokenizer" / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    named = {"auto_map": {"AutoTokenizer": ["planted.T", "planted.T"]}, "tokenizer_class": "T"}
    change(prepared / "tokenizer" / "tokenizer_config.json", lambda c: c.update(named))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whether to run it
    with contextlib.suppress(UserError):
        load_tokenizer(prepared / "tokenizer")
    assert not (tmp_path / "ran").exists()


# --- names that become paths

SPLITS = ("", "/tmp/x", "../../x", "a/b", "..", "a\0b", "x" * 5000, "a\nb", "\ud800")


@pytest.mark.parametrize("split", SPLITS, ids=range(len(SPLITS)))
@pytest.mark.parametrize("layout", ["refcoco", "grefcoco", "jsonl"])
def test_a_split_cannot_name_another_place(layout, split, tmp_path):
    root = tmp_path / "in" / "deep" / "layout"
    if layout == "refcoco":
        mini.write(root, refs=[])
        refs = mini.tables()[1]
        refs[0]["split"] = split
        (root / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    elif layout == "grefcoco":
        minigrefcoco.write(root)
        change(root / "grefs(unc).json", lambda refs: refs[0].update(split=split))
    else:
        mini.write(root)
        line = {"image": "images/COCO_train2014_000000000001.jpg", "expressions": ["a"], "mask": [mini.box(5, 5, 25, 25)]}
        (root / "own.jsonl").write_text(json.dumps(line | {"split": split}) + "\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="split") as caught:
        prepare.prepare(root, tmp_path / "in" / "deep" / "out", layout=layout, log=quiet)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.jpg", "a\0.jpg", "", "x" * 5000], ids=range(5))
def test_an_image_cannot_be_another_file(name, tmp_path):
    minillava.write(
        tmp_path / "llava", table=[{"id": "1", "image": name, "conversations": minillava.samples()[0]["conversations"]}]
    )
    (tmp_path / "secret.jpg").write_bytes(mini.jpeg(mini.image(1)))
    minicoco.write(tmp_path / "panoptic", "panoptic")
    table = tmp_path / "panoptic" / "annotations" / "panoptic_val2017.json"
    change(table, lambda t: t["annotations"][0].update(file_name=name))
    instances = minicoco.write(tmp_path / "instances", "instances") / "annotations" / "instances_val2017.json"
    change(instances, lambda t: t["images"][0].update(file_name=name))
    line = {"expressions": ["a"], "mask": [mini.box(5, 5, 25, 25)]}
    mini.write(tmp_path / "own")
    (tmp_path / "own" / "a.jsonl").write_text(json.dumps({"image": name or " .", **line}) + "\n")
    (tmp_path / "own" / "b.jsonl").write_text(
        json.dumps({**line, "image": "images/COCO_train2014_000000000001.jpg", "mask": f"{name}.png"}) + "\n"
    )
    sets = (
        ("llava", "llava", "train"),
        ("coco-panoptic", "panoptic", "val"),
        ("coco-instances", "instances", "val"),
        ("jsonl", "own/a.jsonl", "train"),
        ("jsonl", "own/b.jsonl", "train"),
    )
    for layout, place, split in sets:
        opened = open_layout(layout, tmp_path / place)
        with pytest.raises(UserError, match=r"leads out of the folder|is no file name|is missing") as caught:
            for index in range(opened.size(split)):
                opened.example(split, index, Counter())
        assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


# --- values that blow up

DEEP = "[" * 900 + "]" * 900
DEEPER = "[" * 100_000 + "]" * 100_000
HUGE = "9" * 5000
LONG = "9" * 4000


@pytest.mark.parametrize(
    "value",
    [DEEP, DEEPER, HUGE, LONG, '"' + "x" * 10**6 + '"', "[" + "[1]," * 10**5 + "[1]]", '{"a":' + DEEP + "}"],
    ids=range(7),
)
@pytest.mark.parametrize("key", ["ref_id", "image_id", "ann_id", "split", "sentences", "no_target"])
def test_refs_that_blow_up(key, value, tmp_path):
    root = minigrefcoco.write(tmp_path)
    path = root / "grefs(unc).json"
    refs = json.loads(path.read_text())
    refs[0][key] = "@"
    path.write_text(json.dumps(refs).replace('"@"', value))
    with pytest.raises(UserError) as caught:
        open_layout("grefcoco", root)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "value", [DEEP, DEEPER, HUGE, LONG, "[" + "1," * 10**5 + "1]", f"[[{LONG}, 1, 2, 3, 4, 5]]"], ids=range(6)
)
@pytest.mark.parametrize("layout", ["coco-instances", "refcoco", "jsonl"])
def test_masks_that_blow_up(layout, value, tmp_path):
    root = minicoco.write(tmp_path, "instances") if layout == "coco-instances" else mini.write(tmp_path)
    if layout == "jsonl":
        line = {"image": "images/COCO_train2014_000000000001.jpg", "expressions": ["a"], "mask": "@"}
        path = root / "own.jsonl"
        path.write_text(json.dumps(line).replace('"@"', value) + "\n")
        root = path
    else:
        path = root / ("annotations/instances_val2017.json" if layout == "coco-instances" else "instances.json")
        table = json.loads(path.read_text())
        table["annotations"][0]["segmentation"] = "@"
        path.write_text(json.dumps(table).replace('"@"', value))
    with pytest.raises(UserError) as caught:
        opened = open_layout(layout, root)
        for split in opened.splits:
            for index in range(opened.size(split)):
                opened.example(split, index, Counter())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


COUNTS = {
    "one number without an end": ("o" * 10**6, "ends inside a number"),
    "one number of megabytes": ("o" * 10**6 + "0", "too many digits"),
    "megabytes of zeros": ("0" * 10**6, "add up to 0,"),
    "a run that wraps around": ("PPPPPPP1", "a number of too many digits|a run longer|add up"),
    "letters of another alphabet": ("é" * 100, "a character that is none of a code"),
    "a negative run": ("5" + "O", "add up"),
    "empty": ("", "a character that is none of a code"),
}


@pytest.mark.parametrize("case", COUNTS)
def test_run_lengths_that_blow_up(case):
    counts, message = COUNTS[case]
    with pytest.raises(UserError, match=message) as caught:
        masks.rasterise({"size": [40, 60], "counts": counts}, 40, 60, "f.json: mask")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("size", [5, "40", None, [40], [40, 60, 1], {"a": 1}, [[40], 60], ["4" * 10**6, 60]], ids=range(8))
def test_run_length_sizes_of_another_kind(size):
    with pytest.raises(UserError, match="run-length size .* differs") as caught:
        masks.rasterise({"size": size, "counts": [2400]}, 40, 60, "f.json: mask")
    assert len(str(caught.value)) < 250


def test_an_outline_that_goes_to_and_fro():
    zigzag = [0.0, 0.0, 1200.0, 800.0] * 5000  # pycocotools would take gigabytes for its corners
    with pytest.raises(UserError, match="its outlines run along 12000000 pixels, more than 4000000"):
        masks.rasterise([zigzag], 400, 600, "f.json: mask")


def test_a_line_of_megabytes():
    with pytest.raises(UserError, match=r"^f:1: a line of 20000000 bytes; the most is 16777216$"):
        jsonl.parse(b"[" * 20_000_000, "f:1")


def test_objects_without_number(tmp_path, monkeypatch):
    assert reading.MOST_DRAWN < 1000 * 89_000_000  # a thousand of them in the largest picture
    monkeypatch.setattr(reading, "MOST_DRAWN", 4 * 40 * 60)
    path = sorted((minireasonseg.write(tmp_path / "r") / "val").glob("*.json"))[0]
    shape = {"label": "target", "points": [[1, 1], [9, 1], [9, 9]]}
    change(path, lambda entry: entry.update(shapes=[shape] * 4))
    assert open_layout("reasonseg", tmp_path / "r").example("val", 0, Counter())
    change(path, lambda entry: entry.update(shapes=[shape] * 5))
    with pytest.raises(UserError, match=r"shapes: 5 objects in an image of 40x60 \(height x width\) are too many to draw"):
        open_layout("reasonseg", tmp_path / "r").example("val", 0, Counter())
    monkeypatch.setattr(reading, "MOST_DRAWN", 10)
    panoptic = open_layout("coco-panoptic", minicoco.write(tmp_path / "p", "panoptic"))
    with pytest.raises(UserError, match="segments_info: .* are too many to draw"):
        panoptic.example("val", 0, Counter())

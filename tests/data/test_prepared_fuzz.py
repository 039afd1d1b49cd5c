"""Damaged prepared sets: bits turned over in every file. Each is a clear error or changes nothing.

Thousands of them: `python -m pytest tests/data/test_prepared_fuzz.py -m slow`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flowseg_jax.data import checksums, masks, prepare, serialization
from flowseg_jax.data.dataset import METADATA, PreparedDataset
from flowseg_jax.data.formats.refcoco import RefCoco
from flowseg_jax.data.index import line_checksum
from flowseg_jax.data.records import Annotation, Example, Expression
from flowseg_jax.errors import UserError
from tests.helpers import minigrefcoco, minillava
from tests.helpers import minirefcoco as mini

LONGEST = 60  # seconds that a case may take before it counts as a hang


def quiet(_):
    pass


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    chats = [sample for sample in minillava.samples() if isinstance(sample.get("image"), str)][:4]
    layouts = {
        "refcoco": mini.write(root / "refcoco"),
        "grefcoco": minigrefcoco.write(root / "grefcoco"),
        "llava": minillava.write(root / "llava", table=chats),
    }
    sets = {name: root / f"{name}-set" for name in layouts}
    for name, layout in layouts.items():
        prepare.prepare(layout, sets[name], layout=name, tokenizer_vocab=300 if name == "refcoco" else None, log=quiet)
    return sets


@pytest.fixture
def prepared(originals, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(originals["refcoco"], tmp_path / "set")


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def seal(root: Path) -> None:
    """Writes the checksums anew, as whoever changed a file could."""
    checksums.write(root, [path.relative_to(root).as_posix() for path in files(root) if path.name != checksums.FILE], {})


def point_to_lines(root: Path, split: str = "train", change: Callable[[np.ndarray], None] | None = None) -> None:
    """Rows and metadata that fit changed lines again, `change` applied to the rows, and new checksums."""
    lines = (root / "index" / f"{split}.jsonl").read_bytes()
    rows, each = np.load(root / "index" / f"{split}.npy"), lines.splitlines(keepends=True)[:-1]
    each.append(lines[sum(map(len, each)) :])
    if len(each) == len(rows):  # not where a bit turned a letter into a line end
        rows["bytes"] = [len(line) for line in each]
        rows["line"] = np.cumsum(rows["bytes"]) - rows["bytes"]
        rows["checksum"] = [line_checksum(line) for line in each]
    if change:
        change(rows)
    np.save(root / "index" / f"{split}.npy", rows)
    metadata = json.loads((root / METADATA).read_text())
    metadata["index"][split] = hashlib.sha256(lines).hexdigest()
    (root / METADATA).write_text(json.dumps(metadata))
    seal(root)


def everything(root: Path) -> list:
    """All that a prepared set gives, read as a new process would."""
    checksums._checked.clear()
    opened = PreparedDataset.open(root)
    about = (opened.task, opened.categories, opened.things, opened.splits, opened.digest, opened.tokenizer_directory is None)
    parts = [about]
    for split in opened.splits:
        examples = [*opened.source(split)]
        for example in examples:
            masks.decode([a.rle for a in example.annotations], example.height, example.width)
        parts += [split, examples, list(opened.index(split))]
    return parts


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def verdict(root: Path, before: list) -> str:
    """What became of a changed set."""

    def hang(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(LONGEST)
    try:
        return "no effect" if everything(root) == before else "silent changes"
    except UserError as error:
        text = str(error)
        return "clear errors" if str(root) in text and "\n" not in text and len(text) < 1000 else "traces"
    except TimeoutError:
        return "hangs"
    except Exception:
        return "traces"
    finally:
        signal.alarm(0)


def fuzz(root: Path, work: Path, cases: int, seed: str, sealed: bool = False) -> dict[str, Counter]:
    """File -> what became of so many turned bits of it. `sealed`: its checksum follows."""
    shutil.copytree(root, work)
    before, found = everything(work), {}
    for path in files(work):
        name, data = path.relative_to(work).as_posix(), path.read_bytes()
        if sealed and (name == checksums.FILE or not data):
            continue
        sums, outcomes = (work / checksums.FILE).read_bytes(), found.setdefault(name, Counter())
        follow = {path: path.read_bytes() for path in (work / METADATA, work / "index" / f"{path.stem}.npy") if path.is_file()}
        for case in range(cases):
            path.write_bytes(flip(data, random.Random(f"{seed} {name} {case}")))
            if sealed and path.suffix == ".jsonl":
                point_to_lines(work, path.stem)
            elif sealed:
                seal(work)
            outcome = verdict(work, before)
            outcomes["another set" if sealed and outcome == "silent changes" else outcome] += 1
        for other, content in follow.items():
            other.write_bytes(content)
        path.write_bytes(data)
        (work / checksums.FILE).write_bytes(sums)
    return found


def total(found: dict[str, Counter]) -> Counter:
    return sum(found.values(), Counter())


def test_every_turned_bit_is_refused(originals, tmp_path):
    found = fuzz(originals["refcoco"], tmp_path / "set", 8, "0")
    assert {name: dict(outcomes) for name, outcomes in found.items()} == {name: {"clear errors": 8} for name in found}
    places = {"metadata.json", "SHA256SUMS", "index/train.jsonl", "data/features.json", "data/dataset_info.json"}
    assert places | {"tokenizer/tokenizer.json", "data/flowseg-train.array_record-00000-of-00001"} <= found.keys()


def test_turned_bits_whose_checksum_follows(originals, tmp_path):
    """Whoever changes a set with its checksums makes another set: it may differ, and leaves no trace and never hangs."""
    for name in ("refcoco", "llava"):
        outcomes = total(fuzz(originals[name], tmp_path / name, 8, "0", sealed=True))
        assert outcomes["clear errors"] > 10 and not outcomes["traces"] and not outcomes["hangs"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands(originals, tmp_path, capsys):
    plain, sealed = Counter(), Counter()
    for name, root in originals.items():
        plain += total(fuzz(root, tmp_path / name, 80, "1"))
        sealed += total(fuzz(root, tmp_path / f"{name}-sealed", 60, "1", sealed=True))
    with capsys.disabled():
        for what, outcomes in (("checksums as written", plain), ("checksums that follow", sealed)):
            print(f"\n{what}: {outcomes.total()} inputs, " + ", ".join(f"{n} {kind}" for kind, n in outcomes.most_common()))
    assert plain["clear errors"] == plain.total()
    assert not sealed["traces"] and not sealed["hangs"]


# --- what the checksums cover, and when they are looked at


def test_sha256sum_reads_the_list(prepared):
    for line in (prepared / checksums.FILE).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((prepared / name).read_bytes()).hexdigest() == digest
    names = {line.split("  ")[1] for line in (prepared / checksums.FILE).read_text().splitlines()}
    assert names == {path.relative_to(prepared).as_posix() for path in files(prepared)} - {checksums.FILE}


def test_a_shard_is_checked_before_its_first_record_and_once(prepared, monkeypatch):
    checksums._checked.clear()
    read, of_file = [], checksums.of_file
    monkeypatch.setattr(checksums, "of_file", lambda path: read.append(path.name) or of_file(path))
    opened = PreparedDataset.open(prepared)
    assert (
        "metadata.json" in read and "train.npy" in read and not any("array_record" in name or "jsonl" in name for name in read)
    )
    read.clear()
    for source in (opened.source("train"), opened.source("train"), PreparedDataset.open(prepared).source("train")):
        assert [source[i].image_id for i in (2, 0, 1, 0)] == [5, 1, 2, 1]
    assert read == ["flowseg-train.array_record-00000-of-00001"]


def test_files_that_are_gone_or_not_listed(prepared):
    shard, index = prepared / "data" / "flowseg-val.array_record-00000-of-00001", prepared / "index" / "val.jsonl"
    for path in (shard, index, prepared / "tokenizer" / "tokenizer.json"):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name}: (missing|cannot be read .*); remove it and prepare it again"):
            PreparedDataset.open(prepared)
        path.write_bytes(data)
    (prepared / ".DS_Store").touch()
    (prepared / "tokenizer" / ".DS_Store").touch()
    (prepared / "notes.txt").write_text("mine")
    PreparedDataset.open(prepared)
    (prepared / "tokenizer" / "added_tokens.json").write_text("{}")
    with pytest.raises(UserError, match=r"SHA256SUMS: has no checksum of 'tokenizer/added_tokens\.json'"):
        PreparedDataset.open(prepared)
    (prepared / "tokenizer" / "added_tokens.json").unlink()
    lines = (prepared / checksums.FILE).read_text().splitlines(keepends=True)
    for kind in (METADATA, "index/val", "data/flowseg-val"):
        (prepared / checksums.FILE).write_text("".join(line for line in lines if kind not in line))
        with pytest.raises(UserError, match=f"has no checksum of '{kind}"):
            PreparedDataset.open(prepared)
    (prepared / checksums.FILE).write_text("".join(lines) + f"{'0' * 64}  ../x\n")
    with pytest.raises(UserError, match=r"SHA256SUMS:\d+: '\.\./x' leads out of the folder"):
        PreparedDataset.open(prepared)
    (prepared / checksums.FILE).unlink()
    with pytest.raises(UserError, match=r"SHA256SUMS: the checksums cannot be read .*; remove it and prepare it again"):
        PreparedDataset.open(prepared)


WRONG = {
    "task": ["walking", 5],
    "categories": [5, [5], None],
    "things": [[True], [1, 0, 1], "x"],
    "tokenizer": ["../../tokenizer", "/etc", 5],
    "splits": [{}, {"../x": {}}, {"val": 5}, 7],
    "index": [{}, {"train": 5}, {"train": "x"}, None],
    "families": [{}, {"train": [5]}, {"train": "x"}, None],
    "shards": [{}, {"train": [-1]}, {"train": [10**400]}, {"train": "x"}],
    "digest": [None],
    "request": [None, {}, {"layout": "../x"}],
    "format": [4, 10**4000, "x" * 10**6, None],
}


@pytest.mark.parametrize("key", WRONG)
def test_metadata_of_another_kind(key, prepared):
    path = prepared / METADATA
    metadata = json.loads(path.read_text())
    for value in WRONG[key]:
        path.write_text(json.dumps(metadata | {key: value}))
        seal(prepared)
        with pytest.raises(UserError, match=r"prepared in format|metadata\.json") as caught:
            everything(prepared)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


LINES = {
    "no object": lambda line: 5,
    "an id that is no number": lambda line: line | {"image_id": "1"},
    "a huge id": lambda line: line | {"image_id": 10**300},
    "a category that is not there": lambda line: line | {"categories": [3, 0]},
    "three sizes": lambda line: line | {"size": [1, 2, 3]},
    "an object that is not there": lambda line: line | {"samples": [[*line["samples"][0][:5], [7], *line["samples"][0][6:]]]},
    "a sentence that is a list": lambda line: line | {"samples": [[*line["samples"][0][:3], ["x"], *line["samples"][0][4:]]]},
    "a short sample": lambda line: line | {"refs": [[1, 2]]},
    "no refs": lambda line: {key: value for key, value in line.items() if key != "refs"},
}


@pytest.mark.parametrize("case", LINES)
def test_index_lines_of_another_kind(case, prepared):
    path = prepared / "index" / "train.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(LINES[case](json.loads(first))), *rest]) + "\n")
    seal(prepared)
    with pytest.raises(UserError, match=r"train\.jsonl: has changed since it was prepared"):
        list(PreparedDataset.open(prepared).index("train"))
    point_to_lines(prepared)  # whoever changes a line can change its row as well
    with pytest.raises(UserError, match=r"train\.jsonl:1: damaged \((?!its checksum).*\); remove it and prepare it again"):
        list(PreparedDataset.open(prepared).index("train"))


ROWS = {
    "another length of a line": (lambda rows: rows["bytes"].put(0, 5), "do not follow each other"),
    "a line before the file": (lambda rows: rows["line"].put(0, -1), "do not follow each other"),
    "a huge line": (lambda rows: rows["bytes"].put(2, 2**32 - 1), "bytes, but the lines of 3 images have"),
    "more samples": (lambda rows: rows["samples"].put(2, 2**32 - 1), "samples, but metadata.json has"),
    "samples of another image": (lambda rows: rows["samples"].put(0, 2**32 - 1), "do not follow each other"),
    "fewer objects": (lambda rows: rows["objects"].put(0, 0), "its row tells of other objects"),
}


@pytest.mark.parametrize("case", ROWS)
def test_index_rows_of_another_kind(case, prepared):
    change, message = ROWS[case]
    point_to_lines(prepared)
    everything(prepared)
    point_to_lines(prepared, change=change)
    with pytest.raises(UserError, match=rf"index/train\.(npy|jsonl).*{message}.*; remove it and prepare it again"):
        everything(prepared)


def test_an_index_that_is_another_array(prepared):
    path = prepared / "index" / "train.npy"
    rows = np.load(path)
    for other in (rows[:2], rows["line"], np.stack([rows, rows]), np.array([{}, 1, 2], object)):
        np.save(path, other)
        seal(prepared)
        with pytest.raises(UserError, match=r"train\.npy: not an array of 3 rows"):
            everything(prepared)


def test_lines_without_images(prepared):
    path = prepared / "index" / "train.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    point_to_lines(prepared)
    with pytest.raises(UserError, match=r"train\.jsonl: \d+ bytes, but the lines of 3 images have \d+"):
        PreparedDataset.open(prepared).index("train")


GOOD = Example(
    1, "a.jpg", 5, 5, b"x", (Annotation(1, 0, masks.encode(np.eye(5, dtype=np.uint8))),), (Expression("a", 1, 1, (0,)),)
)
RECORDS = {
    "a mask that does not fill the image": ({"rle": "000"}, "run lengths add up to 0, not to height x width = 25"),
    "a mask that is longer": ({"rle_single_cover": "i3"}, "a run longer than the 25 pixels"),
    "a mask of no letters": ({"rle_filled_polygons": "\x01"}, "a character that is none of a code"),
    "no mask": ({"rle": ""}, "an object without a mask"),
    "a category that is not there": ({"category": 2}, "there is no category 2"),
    "a category below none": ({"category": -2}, "there is no category -2"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_of_another_kind(case):
    """pycocotools gives uninitialised memory for the first of them."""
    assert serialization.deserialize(serialization.serialize(GOOD), 2, "f: record 0") == GOOD
    changed, message = RECORDS[case]
    bad = dataclasses.replace(GOOD, annotations=(dataclasses.replace(GOOD.annotations[0], **changed),))
    with pytest.raises(UserError, match=f"^f: record 0: a damaged record .{message}"):
        serialization.deserialize(serialization.serialize(bad), 2, "f: record 0")


@pytest.mark.parametrize(
    "changed", [{"height": 0}, {"width": -1}, {"height": 2**31 - 1}, {"expressions": (Expression("a", 1, 1, (1,)),)}]
)
def test_records_without_a_place(changed):
    with pytest.raises(UserError, match=r"^f: record 0: a damaged record \("):
        serialization.deserialize(serialization.serialize(dataclasses.replace(GOOD, **changed)), 2, "f: record 0")


@pytest.mark.parametrize("data", [b"", b"\xff" * 50, b"\n\x05abc"], ids=range(3))
def test_records_that_are_none(data):
    with pytest.raises(UserError, match=r"^f: record 0: a damaged record \("):
        serialization.deserialize(data, 2, "f: record 0")


# --- an interrupted preparation goes on after whole shards alone


@pytest.mark.parametrize("kind", ["array_record", "jsonl", "json"])
def test_a_damaged_shard_is_written_again(kind, tmp_path, monkeypatch):
    root = mini.write(tmp_path / "layout")
    lost = root / "images" / "COCO_train2014_000000000004.jpg"
    lost.rename(tmp_path / "lost.jpg")
    with contextlib.suppress(UserError):
        prepare.prepare(root, tmp_path / "out", log=quiet)
    (tmp_path / "lost.jpg").rename(lost)
    path = tmp_path / ".out.partial" / "shards" / f"train-00000.{kind}"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if kind == "json" else data[:60] + bytes([data[60] ^ 1]) + data[61:])
    read, example = [], RefCoco.example
    monkeypatch.setattr(RefCoco, "example", lambda self, split, *rest: read.append(split) or example(self, split, *rest))
    prepared = prepare.prepare(root, tmp_path / "out", log=quiet)
    assert set(read) == {"train", "testA"}  # not val, whose shard is whole
    assert everything(prepared.directory) == everything(prepare.prepare(root, tmp_path / "again", log=quiet).directory)

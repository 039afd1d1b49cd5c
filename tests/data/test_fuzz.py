"""Damaged data sets: annotation files and images changed at random. Each is a clear error, is counted, or changes nothing.

Thousands of them: `python -m pytest tests/data/test_fuzz.py -m slow`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import pickle
import random
import shutil
import signal
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowseg_jax.data.formats import open_layout
from flowseg_jax.data.records import RecordErrors, examples
from flowseg_jax.errors import UserError
from tests.helpers import minicoco, minigrefcoco, minillava, minireasonseg, minirefcoco

LAYOUTS = ("refcoco", "grefcoco", "reasonseg", "coco-panoptic", "coco-instances", "llava", "jsonl")
WRONG: tuple[Any, ...] = (
    None,
    True,
    -7,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "x" * 300,
    [],
    {},
    [[]],
    [None],
    "x" * 100_000,
    [0] * 100_000,
    json.loads("[" * 300 + "]" * 300),
    json.loads('{"a":' * 300 + "[]" + "}" * 300),
)
LONGEST = 60  # seconds that a case may take before it counts as a hang
KINDS = {"listed": "clear errors", "refused as a whole": "clear errors", "without effect": "no effect", "noted": "no effect"}


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raises a TimeoutError in what takes longer than `LONGEST`."""

    def hang(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)


def own_data(root: Path) -> Path:
    root.mkdir()
    (root / "a.jpg").write_bytes(minirefcoco.jpeg(minirefcoco.image(1)))
    (root / "b.jpg").write_bytes(minirefcoco.jpeg(minirefcoco.image(2)))
    mask = minirefcoco.box_mask(50, 30, 3, 3, 20, 20)
    Image.fromarray(mask * 255).save(root / "b.png")
    lines = [
        {"image": "a.jpg", "expressions": ["one", "two"], "mask": [minirefcoco.box(5, 5, 25, 25)], "category": "dog"},
        {"image": "a.jpg", "expressions": ["nothing"], "mask": None, "id": "n"},
        {"image": "b.jpg", "expressions": ["three"], "mask": "b.png", "split": "val"},
        {"image": "b.jpg", "expressions": ["four"], "mask": minirefcoco.uncompressed(mask), "split": "val", "id": 9},
    ]
    (root / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    minillava.write(root / "llava", table=[s for s in minillava.samples() if isinstance(s.get("image"), str)][:4])
    return {
        "refcoco": minirefcoco.write(root / "refcoco"),
        "grefcoco": minigrefcoco.write(root / "grefcoco"),
        "reasonseg": minireasonseg.write(root / "reasonseg"),
        "coco-panoptic": minicoco.write(root / "panoptic", "panoptic"),
        "coco-instances": minicoco.write(root / "instances", "instances"),
        "llava": root / "llava",
        "jsonl": own_data(root / "own"),
    }


def read(layout: str, root: Path, problems: RecordErrors | None = None) -> tuple[list, Counter]:
    """All examples of a data set, without the images' bytes, and what was noted."""
    opened, notes, found = open_layout(layout, root, problems), Counter(), []
    for split in opened.splits:
        for example in examples(opened, split, notes):
            found.append(dataclasses.replace(example, image=b""))
    return found, notes


# --- mutations


def places(tree: Any, at: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at] * bool(at) + [path for key, value in items for path in places(value, (*at, key))]


def change_tree(tree: Any, rng: random.Random) -> tuple[Any, str, Any]:
    """(changed copy, kind of change, key) of a JSON tree."""
    tree = copy.deepcopy(tree)
    path = rng.choice(places(tree) or [()])
    if not path:
        return rng.choice(WRONG), "type", None
    *above, key = path
    node = tree
    for step in above:
        node = node[step]
    kind = rng.choice(("type", "type", "type", "delete", "double"))
    if kind == "delete":
        del node[key]
    elif kind == "double" and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        kind, old = "type", node[key]
        coordinate = isinstance(old, (int, float)) and isinstance(node, list)  # for which any other number will do
        other = [v for v in WRONG if type(v) is not type(old) and not (coordinate and v in (-7, 1.5))]
        node[key] = rng.choice(other)
    return tree, kind, key


def change_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """(changed file, "bytes"), or with one byte replaced, perhaps inside a sentence, and "flipped"."""
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))], "bytes"
    if kind == 1:
        return b"", "bytes"
    if kind == 2:
        return bytes(rng.randrange(256) for _ in range(200)), "bytes"
    at = rng.randrange(len(data))
    return data[:at] + b"\0\0\0\0" + data[at + 1 :], "flipped"


def bomb() -> bytes:
    """A PNG of a few kilobytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


def change_image(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """(changed file, "image"), or another picture and "swapped"."""
    kind = rng.randrange(4)
    if kind == 1:
        buffer = io.BytesIO()
        Image.new("RGB", (7, 5)).save(buffer, "PNG")
        return buffer.getvalue(), "swapped"
    return (bomb(), b"", b"", data[: rng.randrange(len(data) // 2)])[kind], "image"


def mutate(root: Path, rng: random.Random) -> tuple[str, Any, Path]:
    """Changes one file of a data set in place; (kind of change, key, file)."""
    path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file()))
    data = path.read_bytes()
    if path.suffix in (".jpg", ".png", ".gif"):
        changed, kind = change_image(data, rng)
        path.write_bytes(changed)
        return kind, None, path
    if rng.random() < 0.2:
        changed, kind = change_bytes(data, rng)
        path.write_bytes(changed)
        return kind, None, path
    if path.suffix == ".p":
        tree, kind, key = change_tree(pickle.loads(data, encoding="latin1"), rng)
        path.write_bytes(pickle.dumps(tree, 2))
    elif path.suffix == ".jsonl":
        lines = data.splitlines()
        number = rng.randrange(len(lines))
        tree, kind, key = change_tree(json.loads(lines[number]), rng)
        lines[number] = json.dumps(tree).encode()
        path.write_bytes(b"\n".join(lines))
    else:
        try:
            tree = json.loads(data)
        except UnicodeDecodeError:
            tree = json.loads(data.decode("cp1252"))
        tree, kind, key = change_tree(tree, rng)
        path.write_text(json.dumps(tree))
    return kind, key, path


def verdict(layout: str, root: Path, before: tuple[list, Counter], kind: str, key: Any) -> str:
    """What became of a changed data set; fails unless that was noticed."""
    try:
        after = read(layout, root)
    except UserError as error:
        text = str(error)
        assert text.strip() and "\n" not in text and len(text) < 1000, text
        assert str(root) in text or "grefs(unc)" in text, f"names no file: {text}"
        with_list = RecordErrors(keep=True)
        try:
            read_on(layout, root, with_list)
        except UserError:
            return "refused as a whole"
        assert with_list.found, text
        return "listed"
    if after[0] == before[0]:
        return "without effect"
    if after[1] != before[1]:
        return "noted"
    # What is left are values that are as good as those before, and things that a data set need not have.
    without_sizes = layout in ("llava", "reasonseg", "jsonl")
    fine = kind in ("delete", "double", "flipped") or (kind == "swapped" and without_sizes)
    fine = fine or key in ("family", "no_target", "iscrowd") or (layout == "llava" and key == "id")
    assert fine, (kind, key, layout)
    return "another data set"


def read_on(layout: str, root: Path, problems: RecordErrors) -> None:
    """Reads what can be read of a damaged data set."""
    opened = open_layout(layout, root, problems)
    for split in opened.splits:
        for index in range(opened.size(split)):
            with problems.record():
                opened.example(split, index, Counter())


def fuzz(originals, tmp_path, count: int, seed: int) -> Counter:
    before = {layout: read(layout, root) for layout, root in originals.items()}
    found = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        layout = LAYOUTS[number % len(LAYOUTS)]
        root = tmp_path / layout
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(originals[layout], root)
        kind, key, path = mutate(root, rng)
        try:
            with in_time():
                found[verdict(layout, root, before[layout], kind, key)] += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {layout}, {kind} of {key!r} in {path.name}") from error
    return found


def test_a_sample(originals, tmp_path):
    found = fuzz(originals, tmp_path, 210, seed=0)
    assert found["listed"] > 100 and found["refused as a whole"] > 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_thousand(originals, tmp_path, capsys):
    found = fuzz(originals, tmp_path, 2000, seed=1)
    with capsys.disabled():
        print("\n" + table(found))
    assert sum(found.values()) == 2000


def table(found: Counter) -> str:
    """Counts in the words of docs/reliability.md; a trace, a hang and a silent change end the test before."""
    kinds = Counter()
    for what, count in found.items():
        kinds[KINDS.get(what, what)] += count
    return f"{found.total()} inputs, " + ", ".join(f"{count} {what}" for what, count in kinds.most_common())


# --- refs pickles whose bytes change


def fuzz_pickles(root: Path, count: int, seed: int) -> Counter:
    """Refs pickles of every protocol with one bit turned or a run of bytes lost, doubled or replaced."""
    before, found = read("refcoco", root), Counter()
    path = root / "refs(unc).p"
    refs = pickle.loads(path.read_bytes(), encoding="latin1")
    originals = [minirefcoco.py2_pickle(refs), *(pickle.dumps(refs, protocol) for protocol in range(6))]
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        data = originals[number % len(originals)]
        at = rng.randrange(len(data))
        end = at + rng.choice((1, 1, 4, 30))
        part = rng.choice((b"", 2 * data[at:end], rng.randbytes(end - at), bytes([data[at] ^ 1 << rng.randrange(8)])))
        path.write_bytes(data[:at] + part + data[at + 1 if len(part) == 1 else end :])
        try:
            with in_time():
                after = read("refcoco", root)
        except UserError as error:
            assert str(root) in str(error) and "\n" not in str(error) and len(str(error)) < 1000, str(error)
            found["clear errors"] += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}") from error
        else:
            found["no effect" if after[0] == before[0] else "another data set"] += 1
    return found


def test_a_sample_of_pickles(originals, tmp_path):
    found = fuzz_pickles(shutil.copytree(originals["refcoco"], tmp_path / "set"), 200, seed=0)
    assert found["clear errors"] > 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_thousand_pickles(originals, tmp_path, capsys):
    found = fuzz_pickles(shutil.copytree(originals["refcoco"], tmp_path / "set"), 3000, seed=1)
    with capsys.disabled():
        print("\n" + table(found))
    assert sum(found.values()) == 3000

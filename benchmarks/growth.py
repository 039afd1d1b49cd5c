"""What a process pays for a data set of 10^4 to 10^7 images before its first step: seconds, and memory of its own.

    python -m benchmarks.growth                    # into benchmarks/growth.json
    python -m benchmarks.growth --largest=5        # up to 10^5 images
    python docs/figures/make_scale.py              # benchmarks/growth.json into docs/scale.md and its figures

The data sets are synthetic: images with six sentences each, and chats. Their rows, shards and checksums are as many as a real
set of that size has. Lines of the index are written for the first 10^5 images, and the rest of the file is a hole, because
nothing that is measured reads lines further on. Each size is opened by a process of its own. Seconds are CPU seconds.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:growth")

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import ratio
from benchmarks.command_line import growth_parser
from benchmarks.table import ROOT
from flowseg_jax.data import checksums, masks, shards, token_lengths
from flowseg_jax.data.array_file import write_header
from flowseg_jax.data.dataset import FORMAT, METADATA, PreparedDataset, shard_files
from flowseg_jax.data.eval_dataset import EvalDataset
from flowseg_jax.data.held_out import HeldOutKeys
from flowseg_jax.data.index import ROW, index_file, index_line, index_row, parse_line, rows_file
from flowseg_jax.data.mixture import SampleOrder, build_mixture
from flowseg_jax.data.prompts import PromptTemplates, template_corpus
from flowseg_jax.data.records import Annotation, Example, Expression
from flowseg_jax.data.serialization import serialize
from flowseg_jax.data.tokenizer import load_tokenizer, train_tokenizer
from flowseg_jax.data.train_dataset import TrainDataset
from flowseg_jax.system.console import log
from flowseg_jax.types import BatchShape

RESULTS = Path(__file__).with_name("growth.json")
KINDS = {"referring": "images with six sentences", "chat": "chats"}
BLOCK = 10_000  # images whose index is made one by one; larger sets repeat it
WRITTEN = 100_000  # images whose lines are written
HELD_OUT = 5_000  # images of the set that an evaluation set has too, each with two keys
POSITIONS = 10_000  # of the order that are drawn
RECORDS = 3_000  # that are read at random
MIB = 1 << 20
SHAPE = BatchShape(16, 512, 8, 16, 64, 32)


def example(number: int, kind: str) -> Example:
    """An image with three objects and six sentences about them, or without any."""
    name = f"COCO_train2014_{number:012d}.jpg"
    if kind == "chat":
        return Example(number, name, 480, 640, str(number).encode())
    mask = masks.encode(np.ones((480, 640), np.uint8))
    objects = tuple(Annotation(number * 3 + k, k, mask) for k in range(3))
    texts = ("the {} thing on the left of picture {}", "{} one next to the wall of picture {}")
    said = [(text.format(("red", "blue", "small")[k], number), k) for k in range(3) for text in texts]
    sentences = tuple(Expression(text, number * 6 + i, number * 3 + k, (k,), "attribute") for i, (text, k) in enumerate(said))
    return Example(number, name, 480, 640, str(number).encode(), objects, sentences)


def write_set(root: Path, kind: str, images: int) -> None:
    """A prepared set of so many images whose shards are one file under many names."""
    for folder in ("data", "index"):
        (root / folder).mkdir(parents=True)
    categories, layout, block = ("a", "b", "c"), "refcoco", min(BLOCK, images)
    rows, lines = np.zeros(block, ROW), io.BytesIO()
    samples = 0
    for number in range(block):
        line = json.dumps(index_line(example(number, kind))).encode() + b"\n"
        entry = parse_line(line, len(categories), layout)
        rows[number] = index_row(entry, line, lines.tell(), samples)
        samples += len(entry.samples)
        lines.write(line)
    keys = np.random.default_rng(0)
    with (root / index_file("train")).open("wb") as text, (root / rows_file("train")).open("wb") as table:
        write_header(table, ROW, images)
        for at in range(0, images, block):
            table.write(rows.tobytes())
            if at < WRITTEN:
                text.write(lines.getvalue())
            rows["line"] += len(lines.getvalue())
            rows["sample"] += samples
            rows["keys"] = keys.integers(0, 1 << 64, rows["keys"].shape, np.uint64, endpoint=False)
        text.truncate(len(lines.getvalue()) * (images // block))
    lengths = [min(shards.EXAMPLES, images - at) for at in range(0, images, shards.EXAMPLES)]
    names = shard_files("train", len(lengths))
    stored = _stored_image(root / "stored", kind)
    for name in names:
        os.link(stored, root / name)
    counts = {"images": images, "refs": 0, "sentences": 0, "samples": samples * images // block}
    metadata = {"format": FORMAT, "task": kind, "categories": categories, "things": None, "splits": {"train": counts}}
    metadata |= {"shards": {"train": lengths}, "families": {"train": ["attribute"]}, "index": {"train": "0" * 64}}
    metadata |= {"digest": f"{kind} {images}", "request": {"layout": layout}, "tokenizer": None}
    (root / METADATA).write_text(json.dumps(metadata))
    known = dict.fromkeys(names, checksums.of_file(stored)) | {index_file("train"): "0" * 64}
    checksums.write(root, [*names, METADATA, index_file("train"), rows_file("train")], known)


def _stored_image(path: Path, kind: str) -> Path:
    """A file of as many records as a shard has."""
    from array_record.python.array_record_module import ArrayRecordWriter

    picture = io.BytesIO()
    Image.new("RGB", (640, 480)).save(picture, "JPEG")
    one = serialize(Example(**{**vars(example(0, kind)), "image": picture.getvalue()}))
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(shards.EXAMPLES):
        writer.write(one)
    writer.close()
    return path


def write_lengths(prepared: PreparedDataset, block: token_lengths.TokenLengths, folder: Path) -> None:
    """Token lengths of a large set that repeats a block whose lengths are counted."""
    folder.mkdir(parents=True)
    images = prepared.splits["train"]["images"]
    for name, array in (("samples.npy", block.samples), ("names.npy", block.names)):
        values = array[:]
        with (folder / name).open("wb") as file:
            write_header(file, array.dtype, len(values) * images // BLOCK)
            for _ in range(images // BLOCK):
                file.write(values.tobytes())
    checksums.write(folder, ["samples.npy", "names.npy"], {})


def own_memory() -> int:
    """Bytes of this process that no file backs, so that no other process shares them."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def measure(root: Path, kind: str, images: int) -> dict[str, Any]:
    """Seconds and bytes of each thing that a process does with a set before and at its first step."""
    tokenizer, found = load_tokenizer(root / "tokenizer"), {"kind": kind, "images": images}

    @contextlib.contextmanager
    def measured(name: str) -> Iterator[None]:
        memory, began = own_memory(), time.process_time()
        yield
        found[name] = {"seconds": time.process_time() - began, "bytes": own_memory() - memory}

    directory = root / f"{kind}-{images}"
    PreparedDataset.open(root / f"{kind}-{BLOCK}").index("train")[0]  # what is loaded once, whatever the size
    with measured("open"):
        prepared = PreparedDataset.open(directory)
        index = prepared.index("train")
    with measured("mixture"):
        small = PreparedDataset.open(root / f"chat-{BLOCK}")
        members = build_mixture([(prepared, 0.0), (small, 0.0)])
    with measured("held-out list"):  # of all images up to WRITTEN
        held = HeldOutKeys(key for entry in islice(index, WRITTEN) for key in entry.identity.holds_out)
    held = HeldOutKeys(key for entry in islice(index, HELD_OUT) for key in entry.identity.holds_out)
    with measured("held-out look-up"):
        build_mixture([(prepared, 0.0)], held_out=held)
    if kind == "referring":
        folder = token_lengths.lengths_folder(prepared, "train", tokenizer)
        if images > BLOCK:
            base = PreparedDataset.open(root / f"{kind}-{BLOCK}")
            write_lengths(prepared, token_lengths.TokenLengths(base, "train", tokenizer), folder)
        else:
            with measured("token lengths, counted"):
                token_lengths.TokenLengths(prepared, "train", tokenizer)
    with measured("training data, checked"):
        data = TrainDataset(members, SHAPE, PromptTemplates(), 0, visual_tokens=16, tokenizer=tokenizer)
    with measured("digest"):
        assert data.digest
    draw = random.Random(0)
    with measured("shuffle, first position"):
        order = SampleOrder(members, 0)
        order(0)
    with measured("shuffle, 10,000 positions"):
        for _ in range(POSITIONS):
            order(draw.randrange(order.epoch))
    with measured("resume at a random position"):
        SampleOrder(members, 0)(draw.randrange(100 * order.epoch))
    source = prepared.source("train")
    with measured("3,000 random records"):
        for _ in range(RECORDS):
            assert source[draw.randrange(images)]
    found["open files"] = len(os.listdir("/proc/self/fd"))
    if kind == "referring":
        with measured("evaluation planning"):
            planned = EvalDataset(prepared, "train", tokenizer, sides=(64, 32), batch=16, visual_tokens=16).planned
            assert planned[len(planned) // 2].images
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = growth_parser().parse_args(argv)
    if arguments.serve:
        root, kind, images = arguments.serve
        print(json.dumps(measure(Path(root), kind, int(images))))
        return 0
    results = []
    with tempfile.TemporaryDirectory(prefix="growth-", dir=arguments.dir) as directory:
        root = Path(directory)
        train_tokenizer(
            [*template_corpus(), "the red blue small thing on the left next to the wall of picture"], root / "tokenizer"
        )
        for images in [10**exponent for exponent in range(4, arguments.largest + 1)]:
            for kind in ("chat", "referring"):
                write_set(root / f"{kind}-{images}", kind, images)
                command = [sys.executable, "-m", "benchmarks.growth", "--serve", str(root), kind, str(images)]
                done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                for name, cost in results[-1].items():
                    if isinstance(cost, dict):
                        each = cost["bytes"] / images
                        cells = f"{cost['seconds']:8.2f} s {cost['bytes'] / MIB:9.1f} MiB {each:8.1f} B"
                        log(f"{kind} {images:>10,}  {name:28} {cells}")
                log(f"{kind} {images:>10,}  {'open files':28} {results[-1]['open files']:8}")
                ratio.write_json(arguments.json, {"results": results, "environment": ratio.environment()})
    return 0

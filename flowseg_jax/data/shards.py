"""Runs of examples on disk, each complete or absent: what a preparation writes in several processes, and continues after.

A shard is an ArrayRecord file, its index lines and rows, and a report that is written last and whose presence says that all is
there. `finish` puts the shards of all splits together as one TFDS data set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowseg_jax.data import checksums
from flowseg_jax.data.array_file import write_header
from flowseg_jax.data.dataset import shard_files
from flowseg_jax.data.index import ROW, index_file, index_line, index_row, parse_line, rows_file
from flowseg_jax.data.records import DatasetReader, Example, RecordErrors, read
from flowseg_jax.data.serialization import features, serialize, to_record
from flowseg_jax.system import paths

EXAMPLES = 256  # of a shard
NAME = "flowseg"
_KINDS = ("array_record", "jsonl", "npy")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Examples `start` to `stop` of a split of a layout, as `directory/SPLIT-NUMBER.*`."""

    directory: Path
    layout: str
    split: str
    number: int
    start: int
    stop: int

    def file(self, kind: str) -> Path:
        """Its file of a kind: "array_record", "jsonl" and "npy" (index) or "json" (report)."""
        paths.check_name(self.split, "split")
        return paths.inside(self.directory, f"{self.split}-{self.number:05d}.{kind}", "split")

    def report(self) -> dict[str, Any] | None:
        """What was written, or None if it is not complete."""
        try:
            return json.loads(self.file("json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def is_whole(self) -> bool:
        """Whether it is complete and its files are as they were written."""
        report = self.report()
        try:
            return report is not None and all(checksums.of_file(self.file(kind)) == report["sha256"][kind] for kind in _KINDS)
        except (OSError, KeyError, TypeError):
            return False

    def write(self, layout: DatasetReader, keep: bool) -> dict[str, Any]:
        """Reads the examples and writes the shard; returns its report.

        Raises:
            UserError: a damaged record, unless these are to be kept and listed.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        self.directory.mkdir(exist_ok=True)
        notes, problems, digest = Counter(), RecordErrors(keep), hashlib.sha256()
        counts = dict.fromkeys(("images", "refs", "sentences", "samples"), 0)
        rows, families = [], set()
        writer = ArrayRecordWriter(str(self.file("array_record")), "group_size:1")
        with self.file("jsonl").open("wb") as index:
            for number in range(self.start, self.stop):
                example = read(layout, self.split, number, notes, problems)
                if example is None:
                    continue
                line = json.dumps(index_line(example)).encode() + b"\n"
                entry = parse_line(line, len(layout.categories), self.layout)
                rows.append(index_row(entry, line, index.tell(), counts["samples"]))
                index.write(line)
                writer.write(serialize(example))
                digest.update(content(example))
                counts["images"] += 1
                counts["refs"] += len({e.ref_id for e in example.expressions})
                counts["sentences"] += len(example.expressions)
                counts["samples"] += len(entry.samples)
                families.update(sample.family for sample in entry.samples)
        writer.close()
        np.save(self.file("npy"), np.array(rows, ROW))
        report = {"counts": counts, "families": sorted(families), "notes": notes, "problems": problems.found}
        report["digest"] = digest.hexdigest()
        report["sha256"] = {kind: checksums.of_file(self.file(kind)) for kind in _KINDS}
        temporary = self.file("json.partial")
        temporary.write_text(json.dumps(report), encoding="utf-8")
        os.replace(temporary, self.file("json"))
        return report


def content(example: Example) -> bytes:
    """Everything that is stored of an example, the image as its digest: two examples that differ in anything differ here."""
    stored = to_record(example) | {"image": hashlib.sha256(example.image).hexdigest()}
    return json.dumps(stored, sort_keys=True).encode()


def divide(directory: Path, layout: str, split: str, size: int) -> list[Shard]:
    """The shards of a split of so many examples."""
    starts = enumerate(range(0, size, EXAMPLES))
    return [Shard(directory, layout, split, n, at, min(at + EXAMPLES, size)) for n, at in starts]


def finish(shards: Sequence[Shard], root: Path) -> dict[str, str]:
    """Makes `root/data` (a TFDS data set) and `root/index` of complete shards, of which each split has an example.

    May be done again after an interruption. Returns the checksums of shards and index lines by their names in `root`.
    """
    import tensorflow_datasets as tfds

    data, index = root / "data", root / "index"
    for folder in (data, index):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    template = tfds.core.ShardedFileTemplate(data_dir=data, dataset_name=NAME, filetype_suffix="array_record")
    infos, sums = [], {}
    for split in dict.fromkeys(shard.split for shard in shards):
        filled = [(s, s.report()["counts"]["images"]) for s in shards if s.split == split]
        filled = [(shard, count) for shard, count in filled if count]
        with (root / index_file(split)).open("wb") as lines, (root / rows_file(split)).open("wb") as rows:
            write_header(rows, ROW, sum(count for _, count in filled))
            samples = 0
            for shard, _ in filled:
                part = np.load(shard.file("npy"))
                part["line"] += lines.tell()
                part["sample"] += samples
                samples += shard.report()["counts"]["samples"]
                rows.write(part.tobytes())
                lines.write(shard.file("jsonl").read_bytes())
        sums[index_file(split)] = checksums.of_file(root / index_file(split))
        total = 0
        for name, (shard, _) in zip(shard_files(split, len(filled)), filled, strict=True):
            link(shard.file("array_record"), root / name)
            sums[name] = shard.report()["sha256"]["array_record"]
            total += (root / name).stat().st_size
        infos.append(tfds.core.SplitInfo(split, [count for _, count in filled], total, template.replace(split=split)))
    tfds.folder_dataset.write_metadata(
        data_dir=data,
        features=features(),
        split_infos=infos,
        filename_template=template,
        check_data=False,
        description="Images, their objects, and what is said about them.",
        disable_shuffling=True,  # stored order = reader's order = the index's order; training shuffles anyway
    )
    return sums


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy of it."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)

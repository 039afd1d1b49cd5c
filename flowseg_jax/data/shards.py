"""Runs of examples on disk, each complete or absent: what a preparation writes in several processes, and continues behind.

A shard is an ArrayRecord file, its index lines, and a report that is written last and whose presence says that all is there.
`finish` puts the shards of all splits together as one TFDS data set.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowseg_jax.data.prepared import index_entry
from flowseg_jax.data.records import Example, Layout, Problems, read, to_record

EXAMPLES = 256  # of a shard
NAME = "flowseg"


@functools.cache
def features() -> Any:
    """The TFDS features of a record. No sequence is nested: TFDS can write ragged features only with TensorFlow."""
    import tensorflow_datasets as tfds

    text, sequence = tfds.features.Text(), tfds.features.Sequence
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image_id": np.int64,
            "height": np.int32,
            "width": np.int32,
            "file_name": text,
            "ann_id": sequence(np.int64),
            "ann_category": sequence(np.int32),
            "ann_rle": sequence(text),
            "ann_iscrowd": sequence(np.bool_),
            "ann_ignore": sequence(np.bool_),
            "ann_once": sequence(text),
            "ann_filled": sequence(text),
            "sentence_text": sequence(text),
            "sentence_id": sequence(np.int64),
            "sentence_ref": sequence(np.int64),
            "sentence_anns": sequence(np.int32),
            "sentence_ann": sequence(np.int32),
            "sentence_family": sequence(text),
            "sentence_answer": sequence(text),
            "turn_question": sequence(text),
            "turn_answer": sequence(text),
        }
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """Examples `start` to `stop` of a split, as `directory/SPLIT-NUMBER.*`."""

    directory: Path
    split: str
    number: int
    start: int
    stop: int

    def file(self, kind: str) -> Path:
        """Its file of a kind: "array_record", "jsonl" (index) or "json" (report)."""
        return self.directory / f"{self.split}-{self.number:05d}.{kind}"

    def report(self) -> dict[str, Any] | None:
        """What was written, or None if it is not complete."""
        try:
            return json.loads(self.file("json").read_text())
        except FileNotFoundError:
            return None

    def write(self, layout: Layout, keep: bool) -> dict[str, Any]:
        """Reads the examples and writes the shard; returns its report.

        Raises:
            UserError: a damaged record, unless these are to be kept and listed.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        self.directory.mkdir(exist_ok=True)
        notes, problems, digest = Counter(), Problems(keep), hashlib.sha256()
        counts = dict.fromkeys(("images", "refs", "sentences", "samples"), 0)
        writer = ArrayRecordWriter(str(self.file("array_record")), "group_size:1")
        with self.file("jsonl").open("w") as index:
            for number in range(self.start, self.stop):
                example = read(layout, self.split, number, notes, problems)
                if example is None:
                    continue
                line = index_entry(example)
                index.write(json.dumps(line) + "\n")
                writer.write(features().serialize_example(features().encode_example(to_record(example))))
                digest.update(content(example))
                counts["images"] += 1
                counts["refs"] += len({e.ref_id for e in example.expressions})
                counts["sentences"] += len(example.expressions)
                counts["samples"] += len(line["samples"])
        writer.close()
        report = {"counts": counts, "notes": notes, "problems": problems.found, "digest": digest.hexdigest()}
        temporary = self.file("json.partial")
        temporary.write_text(json.dumps(report))
        os.replace(temporary, self.file("json"))
        return report


def content(example: Example) -> bytes:
    """Everything that is stored of an example, the image as its digest: two examples that differ in anything differ here."""
    stored = to_record(example) | {"image": hashlib.sha256(example.image).hexdigest()}
    return json.dumps(stored, sort_keys=True).encode()


def divide(directory: Path, split: str, size: int) -> list[Shard]:
    """The shards of a split of so many examples."""
    return [Shard(directory, split, n, at, min(at + EXAMPLES, size)) for n, at in enumerate(range(0, size, EXAMPLES))]


def finish(shards: Sequence[Shard], root: Path) -> None:
    """Makes `root/data` (a TFDS data set) and `root/index` of complete shards, of which each split has an example.

    May be done again after an interruption.
    """
    import tensorflow_datasets as tfds

    data, index = root / "data", root / "index"
    for folder in (data, index):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    template = tfds.core.ShardedFileTemplate(data_dir=data, dataset_name=NAME, filetype_suffix="array_record")
    infos = []
    for split in dict.fromkeys(shard.split for shard in shards):
        filled = [(s, s.report()["counts"]["images"]) for s in shards if s.split == split]
        filled = [(shard, count) for shard, count in filled if count]
        with (index / f"{split}.jsonl").open("w") as lines:
            for shard, _ in filled:
                lines.write(shard.file("jsonl").read_text())
        names = template.replace(split=split)
        total = 0
        for number, (shard, _) in enumerate(filled):
            path = Path(names.sharded_filepath(shard_index=number, num_shards=len(filled)))
            _link(shard.file("array_record"), path)
            total += path.stat().st_size
        infos.append(tfds.core.SplitInfo(split, [count for _, count in filled], total, names))
    tfds.folder_dataset.write_metadata(
        data_dir=data,
        features=features(),
        split_infos=infos,
        filename_template=template,
        check_data=False,
        description="Images, their objects, and what is said about them.",
        disable_shuffling=True,  # stored order = reader's order = the index's order; training shuffles anyway
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)

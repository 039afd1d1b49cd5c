"""How many images, refs and sentences the published data sets hold, to tell a complete copy from a broken one."""

from __future__ import annotations

import dataclasses
import re

from flowseg_jax.data.records import DatasetReader


@dataclasses.dataclass(frozen=True)
class PublishedCount:
    """A published count; `memory`: it was not looked up at the source, so a difference is a warning only."""

    value: int
    memory: bool = False


@dataclasses.dataclass(frozen=True)
class CountCheck:
    """A count and the published one."""

    count: int
    published: int
    memory: bool

    @property
    def same(self) -> bool:
        return self.count == self.published

    def __str__(self) -> str:
        words = "as published" if self.same else f"differs: {self.published:,} published"
        return words + ", from memory" * self.memory


def _memory(value: int) -> PublishedCount:
    return PublishedCount(value, memory=True)


def _row(
    images: int | PublishedCount, refs: int | PublishedCount | None = None, sentences: int | None = None
) -> dict[str, PublishedCount]:
    """Images and refs are looked up unless marked; the numbers of sentences are all from memory."""
    given = {"images": images, "refs": refs, "sentences": None if sentences is None else _memory(sentences)}
    return {key: PublishedCount(v) if isinstance(v, int) else v for key, v in given.items() if v is not None}


# (layout, split_by, split) -> counts. Sources: the data sets' pages on the Hugging Face hub (jxu124/refcoco,
# lmms-lab/RefCOCOplus and RefCOCOg), refcoco-benchmark, the evaluation log of GSVA, the README of LISA.
COUNTS: dict[tuple[str, str, str], dict[str, PublishedCount]] = {
    ("refcoco", "unc", "train"): _row(_memory(16_994), 42_404, 120_624),
    ("refcoco", "unc", "val"): _row(1_500, 3_811, 10_834),
    ("refcoco", "unc", "testA"): _row(750, 1_975, 5_657),
    ("refcoco", "unc", "testB"): _row(750, 1_810, 5_095),
    ("refcoco+", "unc", "train"): _row(_memory(16_992), _memory(42_278), 120_191),
    ("refcoco+", "unc", "val"): _row(1_500, _memory(3_805), 10_758),
    ("refcoco+", "unc", "testA"): _row(750, 1_975, 5_726),
    ("refcoco+", "unc", "testB"): _row(750, 1_798, 4_889),
    ("refcocog", "umd", "train"): _row(_memory(21_899), _memory(42_226), 80_512),
    ("refcocog", "umd", "val"): _row(1_300, 2_573, 4_896),
    ("refcocog", "umd", "test"): _row(2_600, 5_023, 9_602),
    ("refcocog", "google", "val"): _row(4_650, 5_000, 9_536),
    ("grefcoco", "unc", "val"): _row(1_500),
    ("grefcoco", "unc", "testA"): _row(750),
    ("grefcoco", "unc", "testB"): _row(750),
    ("reasonseg", "", "train"): _row(239),
    ("reasonseg", "", "val"): _row(200),
    ("reasonseg", "", "test"): _row(779),
    ("coco-panoptic", "", "train"): _row(_memory(118_287)),
    ("coco-panoptic", "", "val"): _row(_memory(5_000)),
}


def split_by(layout: DatasetReader) -> str:
    """Which partition an opened RefCOCO layout has, after the name of its refs file; empty for other layouts."""
    for path in layout.annotation_files:
        if found := re.search(r"refs\(([^)]+)\)\.\w+$", str(path)):
            return found.group(1)
    return ""

"""Reads whole data sets before anything is trained on them: what is broken, incomplete, doubled, or leaks into evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as coco

from flowseg_jax.data import formats
from flowseg_jax.data.leakage import ImageIdentity, coco_number, is_train_split
from flowseg_jax.data.published import COUNTS, CountCheck, split_by
from flowseg_jax.data.records import DatasetReader, Example, RecordErrors, make_samples, read

SHOWN = 20  # entries of a list that are printed; the JSON has all of them


@dataclasses.dataclass(frozen=True)
class Opened:
    """A data set to validate: the layout's name, what was opened, its problems so far, and the splits to read."""

    name: str
    layout: DatasetReader
    problems: RecordErrors
    splits: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.name} {split_by(self.layout)}".strip()


@dataclasses.dataclass
class SplitReport:
    """What one split holds.

    Attributes:
        counts: images, and unless only the files were looked at: refs, sentences, samples (unique lower-cased sentences).
        checks: those of the counts that are published.
        duplicates: images that occur more than once.
    """

    counts: dict[str, int]
    checks: dict[str, CountCheck] = dataclasses.field(default_factory=dict)
    duplicates: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class SetReport:
    """What one data set holds: its splits, problems (each makes the set unfit), warnings, and notes with their counts."""

    label: str
    source: str
    splits: dict[str, SplitReport] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Leak:
    """Images of a training split that also lie in an evaluation split."""

    training: str
    evaluation: str
    images: list[str]
    remark: str = ""


@dataclasses.dataclass
class ValidationReport:
    """The outcome of `validate`."""

    quick: bool
    sets: list[SetReport]
    leaks: list[Leak]

    @property
    def ok(self) -> bool:
        """Whether there is no problem, no leak and no difference to a published count that was looked up."""
        checks = [check for s in self.sets for split in s.splits.values() for check in split.checks.values()]
        return not (self.leaks or any(s.problems for s in self.sets) or any(not c.same and not c.memory for c in checks))

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain containers."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


class _Progress:
    """Says where it is, at most every `every` seconds."""

    def __init__(self, log: Callable[[str], None], every: float = 4.0):
        self._log, self._every, self._last = log, every, time.monotonic()

    def __call__(self, label: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._log(f"{label}: {done:,} of {total:,}")


_Identities = list[tuple[ImageIdentity, str]]  # with the file's name


def open_set(name: str, root: str | Path, *, splits: Sequence[str] | None = None, **options: Any) -> Opened:
    """Opens a data set so that damaged records are kept and listed.

    Args:
        name, root, options: see `formats.open_layout`.
        splits: only these; None: all.

    Raises:
        UserError: the annotation files cannot be used at all, or there is no such split.
    """
    problems = RecordErrors(keep=True)
    layout = formats.open_layout(name, root, problems, **options)
    wanted = layout.splits if splits is None else tuple(dict.fromkeys(splits))
    for split in wanted:
        layout.size(split)
    return Opened(formats.layout_name(name), layout, problems, wanted)


def validate(opened: Sequence[Opened], quick: bool = False, log: Callable[[str], None] = lambda line: None) -> ValidationReport:
    """Goes through all examples of the sets.

    Args:
        opened: the sets, from `open_set`. Leakage is looked for in each and between them.
        quick: only look whether the image files exist.
        log: receives progress at least every 5 s.
    """
    progress = _Progress(log)
    sets, pictures = [], []
    for one in opened:
        report = SetReport(one.label, one.layout.source)
        notes: Counter[str] = Counter()
        found = {split: _read(one, split, report, notes, quick, progress) for split in one.splits}
        report.problems, report.notes = list(one.problems.found), dict(notes)
        _compare(one, report, found)
        sets.append(report)
        pictures.append(found)
    return ValidationReport(quick, sets, _leaks(opened, pictures))


def _identity(name: str, layout: str, content: bytes) -> ImageIdentity:
    """What an image is. One that was not read and is not COCO's is known by its path alone."""
    digest = hashlib.blake2b(content, digest_size=16).hexdigest() if content else f"{layout}:{name}"
    return ImageIdentity(coco_number(name, layout), digest)


def _read(one: Opened, split: str, report: SetReport, notes: Counter[str], quick: bool, progress: _Progress) -> _Identities:
    """Goes through one split: adds its counts and duplicates to the report; returns its images."""
    size = one.layout.size(split)
    result = report.splits[split] = SplitReport({"images": size})
    if not quick:
        result.counts |= {"refs": 0, "sentences": 0, "samples": 0}
    found: _Identities = []
    first: dict[str, str] = {}  # of each picture
    for index in range(size):
        progress(f"{one.label} {split}", index, size)
        with one.problems.record():
            if quick:
                file = one.layout.image_file(split, index)
                if file is None:
                    continue
                name, content = file[0], b""
            else:
                example = read(one.layout, split, index, notes, one.problems)
                if example is None:
                    continue
                _count(example, result.counts, notes)
                name, content = example.file_name, example.image
            picture = _identity(name, one.name, content)
            if picture.identity in first:
                before = first[picture.identity]
                result.duplicates.append(name if name == before else f"{name} is the same picture as {before}")
            first.setdefault(picture.identity, name)
            found.append((picture, name))
    return found


def _count(example: Example, counts: dict[str, int], notes: Counter[str]) -> None:
    counts["refs"] += len({e.ref_id for e in example.expressions})
    counts["sentences"] += len(example.expressions)
    counts["samples"] += len(make_samples(example))
    for annotation in example.annotations:
        code = {"size": [example.height, example.width], "counts": annotation.rle.encode()}
        if int(coco.area(code)) == example.height * example.width:
            notes["objects whose mask covers the whole image"] += 1
        elif min(coco.toBbox(code)[2:]) <= 1:
            notes["objects whose mask is one pixel wide or high"] += 1


def _compare(one: Opened, report: SetReport, found: dict[str, _Identities]) -> None:
    """Sets the counts against the published ones."""
    partition = split_by(one.layout)
    published = {s: COUNTS.get((one.name, partition, s), {}) for s in one.splits}
    numbers = [picture.number for pictures in found.values() for picture, _ in pictures]
    if any(published.values()) and one.name != "reasonseg" and numbers and not any(n is not None for n in numbers):
        # the layout is used for other data too, which is complete at any size
        report.warnings.append("not the published data set (none of its images is named as COCO's): counts not compared")
        return
    for split, figures in published.items():
        counts = report.splits[split].counts
        report.splits[split].checks = {k: CountCheck(counts[k], f.value, f.memory) for k, f in figures.items() if k in counts}


def _leaks(opened: Sequence[Opened], pictures: Sequence[dict[str, _Identities]]) -> list[Leak]:
    """Images that lie in a training split of one set and in an evaluation split of any set."""
    splits = [(one, split, found[split]) for one, found in zip(opened, pictures, strict=True) for split in found]
    shown = [
        (one, split, [(p.held_out_by, name) for p, name in images]) for one, split, images in splits if is_train_split(split)
    ]
    evaluated = [
        (one, split, {key for p, _ in images for key in p.holds_out})
        for one, split, images in splits
        if not is_train_split(split)
    ]
    leaks = []
    for (one, train, trained), (other, split, keys) in itertools.product(shown, evaluated):
        if names := sorted({name for held_out_by, name in trained if not keys.isdisjoint(held_out_by)}):
            google = one is other and split_by(one.layout) == "google"
            remark = "the google partition shares images between its splits by design" if google else ""
            leaks.append(Leak(f"{one.label} {train}", f"{other.label} {split}", names, remark))
    return leaks


def _list(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    more = [f"    and {len(entries) - SHOWN:,} more"] if len(entries) > SHOWN else []
    return [f"  {title}: {len(entries):,}", *(f"    {entry}" for entry in entries[:SHOWN]), *more]


def render(report: ValidationReport) -> str:
    """The report as text."""
    lines = []
    for one in report.sets:
        lines.append(f"{one.label} ({one.source})")
        for name, split in one.splits.items():
            cells = [f"{n:,} {k}" + (f" ({split.checks[k]})" if k in split.checks else "") for k, n in split.counts.items()]
            lines.append(f"  {name}: {', '.join(cells)}")
        lines += _list("problems", one.problems)
        lines += _list("warnings", one.warnings)
        for name, split in one.splits.items():
            lines += _list(f"duplicate images in {name}", split.duplicates)
        lines += _list("notes", [f"{n:,} {words}" for words, n in one.notes.items()])
    for leak in report.leaks:
        remark = leak.remark and f" ({leak.remark})"
        lines += _list(f"leakage: images of {leak.training} that are also in {leak.evaluation}{remark}", leak.images)
    warned = sum(len(one.warnings) for one in report.sets)
    clean = f"clean, with {warned} warnings" if warned else "clean"
    lines.append(clean if report.ok else "not clean: problems, leakage or counts unlike the published ones, see above")
    return "\n".join(lines)

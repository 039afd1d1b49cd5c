"""What every on-disk format is read into: one `Example` per image, with its objects and their expressions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from flowseg_jax.errors import UserError
from flowseg_jax.types import PAD

TASKS = ("referring", "reasoning", "generic", "chat")


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One object of an image.

    Attributes:
        id: annotation id of the source.
        category: 0-based index into the layout's category names, PAD (-1) where the layout has no categories.
        rle: counts of the COCO compressed run-length code of its mask (the union of its parts) at the image's original size.
        crowd: whether the source calls it a crowd region.
        ignore: whether its pixels count for nothing at evaluation.
        rle_single_cover: counts of the code of the pixels that exactly one of its parts covers; empty where no two parts
            overlap. That is the mask of evaluations that add the parts up (protocol "lisa").
        rle_filled_polygons: counts of the code of its polygons filled on whole points (`masks.fill_polygons`); empty where that
            is the same mask or there are no polygons. That is the mask of protocol "psalm".
    """

    id: int
    category: int
    rle: str
    crowd: bool = False
    ignore: bool = False
    rle_single_cover: str = ""
    rle_filled_polygons: str = ""


@dataclasses.dataclass(frozen=True)
class Expression:
    """One sentence about an image.

    Attributes:
        text: the sentence.
        id, ref_id: of the source.
        annotations: the objects that it refers to, as indices into `Example.annotations`; empty if it refers to nothing.
        family: kind of expression, empty when the source does not say; "short" or "long" for reasoning questions.
        answer: what the model may say with the mask (an explanation), or empty.
    """

    text: str
    id: int
    ref_id: int
    annotations: tuple[int, ...]
    family: str = ""
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of one split: its encoded bytes, all of its objects, and the expressions or the chat of the split."""

    image_id: int
    file_name: str
    height: int
    width: int
    image: bytes
    annotations: tuple[Annotation, ...] = ()
    expressions: tuple[Expression, ...] = ()
    turns: tuple[Turn, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One thing to ask about an image: objects and a unique lower-cased sentence that refers to them.

    Attributes:
        image_id, file_name: the image.
        ann_id: id of the first object, PAD (-1) if the sentence refers to nothing.
        ref_id, sentence_id: where the sentence came from (the first of its duplicates).
        sentence: lower-cased, stripped.
        family: kind of expression, empty when the source does not say.
        annotations: indices into the example's annotations; empty if the sentence refers to nothing.
        count: how many sentences of the source were merged into this one (for protocols that count duplicates).
        prompt: the phrase in the prompt. It differs from `sentence` only in the shuffled-text control.
        answer: what the model may say with the mask, or empty.
        style: the family whose prompt template is used: that of `prompt`.
    """

    image_id: int
    file_name: str
    ann_id: int
    ref_id: int
    sentence_id: int
    sentence: str
    family: str
    annotations: tuple[int, ...]
    count: int
    prompt: str
    answer: str = ""
    style: str = ""

    def __post_init__(self):
        object.__setattr__(self, "style", self.style or self.family)


def make_samples(example: Example) -> tuple[Sample, ...]:
    """The example's samples: unique lower-cased sentences of each target, sorted (the protocol of X-SAM)."""
    merged: dict[tuple[tuple[int, ...], str], list[Expression]] = {}
    for expression in example.expressions:
        merged.setdefault((expression.annotations, expression.text.strip().lower()), []).append(expression)
    result = []
    for (targets, sentence), same in sorted(merged.items()):
        first = same[0]
        result.append(
            Sample(
                example.image_id,
                example.file_name,
                example.annotations[targets[0]].id if targets else PAD,
                first.ref_id,
                first.id,
                sentence,
                first.family,
                targets,
                len(same),
                sentence,
                first.answer,
            )
        )
    return tuple(result)


def make_ref_samples(example: Example) -> tuple[Sample, ...]:
    """One sample a ref, in the source's order, that asks for all of its sentences at once (the protocol of PSALM).

    The sentences stand in the source's order, duplicates included, each with a full stop after it: "left dog. big dog.". Id
    and family are the first one's; `count` is their number; the answer is the mask alone.
    """
    refs: dict[tuple[int, tuple[int, ...]], list[Expression]] = {}
    for expression in example.expressions:
        refs.setdefault((expression.ref_id, expression.annotations), []).append(expression)
    result = []
    for (ref_id, targets), expressions in refs.items():
        joined = " ".join(f"{e.text.strip().lower()}." for e in expressions)
        ann_id = example.annotations[targets[0]].id if targets else PAD
        ids = example.image_id, example.file_name, ann_id, ref_id, expressions[0].id
        result.append(Sample(*ids, joined, expressions[0].family, targets, len(expressions), joined))
    return tuple(result)


class RecordErrors:
    """What is wrong with single records: raised at once, or kept, listed and counted while the rest goes on.

    Attributes:
        keep: go on.
        found: one line a record, naming file and field.
    """

    def __init__(self, keep: bool = False):
        self.keep = keep
        self.found: list[str] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Around the reading of one record."""
        try:
            yield
        except UserError as error:
            if not self.keep:
                raise
            text = " ".join(str(error).split("\n")).encode("utf-8", "backslashreplace")  # it may quote half a character
            self.found.append(text.decode())

    def nothing_left(self, message: str) -> UserError:
        """The error that no record is left, with the first reasons."""
        return UserError(message + damaged(self.found))


def damaged(problems: Sequence[str], shown: int = 3, length: int = 240) -> str:
    """The end of a line that tells how many problems there are and the first of them, cut to `length` characters each.

    Empty if there are none.
    """
    some = [p if len(p) <= length else f"{p[: length - 3]}..." for p in problems[:shown]]
    more = [f"and {len(problems) - shown:,} more"] if len(problems) > shown else []
    return f"; {len(problems):,} damaged: {'; '.join(some + more)}" if some else ""


class DatasetReader(Protocol):
    """An opened on-disk data set: what a reader of `formats/` offers.

    It is opened with `(root, *, problems=RecordErrors(), **options)`, checks its annotation files then, record by record inside
    `problems.record()`, and reads images and rasterises masks only in `example`, which is safe in several processes at once.

    Attributes:
        task: one of `TASKS`.
        categories: names, empty without categories.
        source: what was opened, in words.
        annotation_files: what was read to open it (a change makes another data set).
    """

    task: str
    categories: tuple[str, ...]
    source: str

    @property
    def annotation_files(self) -> tuple[Any, ...]: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def size(self, split: str) -> int:
        """Number of examples of the split, those that will be left out included. UserError for an unknown split."""
        ...

    def image_file(self, split: str, index: int) -> tuple[str, Path] | None:
        """An example's image, which is not read: its `file_name` and its file; None without one. UserError if it is missing."""
        ...

    def example(self, split: str, index: int, notes: Counter[str]) -> Example | None:
        """Example `index` of the split; None if it is left out by rule. `notes` counts, in words, what was special.

        Raises:
            UserError: the record is damaged, naming file and field.
        """
        ...


def read(layout: DatasetReader, split: str, index: int, notes: Counter[str], problems: RecordErrors) -> Example | None:
    """Example `index` of the split; None if it is left out, by rule or because it is damaged.

    `notes` counts what was special, as `DatasetReader.example` does, but nothing of a damaged example.
    """
    mine: Counter[str] = Counter()
    with problems.record():
        example = layout.example(split, index, mine)
        notes.update(+mine)
        return example
    return None


def examples(layout: DatasetReader, split: str, notes: Counter[str] | None = None) -> Iterator[Example]:
    """All examples of a split in order, without those that are left out. UserError at the first damaged one."""
    notes = Counter() if notes is None else notes
    for index in range(layout.size(split)):
        example = read(layout, split, index, notes, RecordErrors())
        if example is not None:
            yield example

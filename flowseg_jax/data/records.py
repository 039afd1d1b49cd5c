"""What every on-disk format is read into: one `Example` an image, with its objects and the expressions that refer to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One object of an image.

    Attributes:
        id: annotation id of the source.
        category: 0-based index into the layout's category names.
        rle: counts of the COCO compressed run-length code of its mask (the union of its parts) at the image's original size.
        crowd: whether the source calls it a crowd region.
    """

    id: int
    category: int
    rle: str
    crowd: bool = False


@dataclasses.dataclass(frozen=True)
class Expression:
    """One sentence that refers to one object; `annotation` is an index into `Example.annotations`."""

    text: str
    id: int
    ref_id: int
    annotation: int
    family: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of one split: its encoded bytes, all of its objects, and the expressions that belong to the split."""

    image_id: int
    file_name: str
    height: int
    width: int
    image: bytes
    annotations: tuple[Annotation, ...]
    expressions: tuple[Expression, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One thing to ask about an image: an object and a unique lower-cased sentence that refers to it.

    Attributes:
        image_id, file_name: the image.
        ann_id, ref_id, sentence_id: where the sentence came from (the first of its duplicates).
        sentence: lower-cased, stripped.
        family: kind of expression, empty when the source does not say.
        annotation: index into the example's annotations.
        count: how many sentences of the source were merged into this one (for protocols that count duplicates).
        prompt: the phrase that is asked. It differs from `sentence` only in the shuffled-text control.
    """

    image_id: int
    file_name: str
    ann_id: int
    ref_id: int
    sentence_id: int
    sentence: str
    family: str
    annotation: int
    count: int
    prompt: str


def samples(example: Example) -> tuple[Sample, ...]:
    """The example's samples: unique lower-cased sentences of each annotation, sorted (the protocol of X-SAM)."""
    merged: dict[tuple[int, str], list[Expression]] = {}
    for expression in example.expressions:
        merged.setdefault((expression.annotation, expression.text.strip().lower()), []).append(expression)
    result = []
    for (annotation, sentence), same in sorted(merged.items()):
        first = same[0]
        result.append(
            Sample(
                example.image_id,
                example.file_name,
                example.annotations[annotation].id,
                first.ref_id,
                first.id,
                sentence,
                first.family,
                annotation,
                len(same),
                sentence,
            )
        )
    return tuple(result)


class Layout(Protocol):
    """An opened on-disk data set: what a reader of `formats/` offers."""

    categories: tuple[str, ...]
    source: str

    @property
    def splits(self) -> tuple[str, ...]: ...

    def size(self, split: str) -> int:
        """Number of images of the split."""
        ...

    def examples(self, split: str) -> Iterator[Example]: ...

    def notes(self) -> Mapping[str, int]:
        """What was left out so far, counted by reason."""
        ...


def to_record(example: Example) -> dict[str, Any]:
    """Flattens an example into the stored features: scalars and rank-1 sequences only."""
    return {
        "image": example.image,
        "image_id": example.image_id,
        "height": example.height,
        "width": example.width,
        "file_name": example.file_name,
        "ann_id": [a.id for a in example.annotations],
        "ann_category": [a.category for a in example.annotations],
        "ann_rle": [a.rle for a in example.annotations],
        "ann_iscrowd": [a.crowd for a in example.annotations],
        "sentence_text": [e.text for e in example.expressions],
        "sentence_id": [e.id for e in example.expressions],
        "sentence_ref": [e.ref_id for e in example.expressions],
        "sentence_ann": [e.annotation for e in example.expressions],
        "sentence_family": [e.family for e in example.expressions],
    }


def from_record(record: Mapping[str, Any]) -> Example:
    """The inverse of `to_record` on what a data source yields (text as bytes, sequences as arrays)."""
    annotations = tuple(
        Annotation(int(i), int(c), r.decode(), bool(w))
        for i, c, r, w in zip(record["ann_id"], record["ann_category"], record["ann_rle"], record["ann_iscrowd"], strict=True)
    )
    expressions = tuple(
        Expression(t.decode(), int(i), int(r), int(a), f.decode())
        for t, i, r, a, f in zip(
            record["sentence_text"],
            record["sentence_id"],
            record["sentence_ref"],
            record["sentence_ann"],
            record["sentence_family"],
            strict=True,
        )
    )
    return Example(
        int(record["image_id"]),
        record["file_name"].decode(),
        int(record["height"]),
        int(record["width"]),
        record["image"],
        annotations,
        expressions,
    )

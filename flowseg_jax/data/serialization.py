"""An `Example` as the bytes of a stored record, and back.

The features of a record are known here. TFDS writes them beside the data too (`features.json`), for whoever opens a prepared
set with TFDS alone; nothing here reads that file, because TFDS imports the classes that it names.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flowseg_jax.data import images, masks
from flowseg_jax.data.records import Annotation, Example, Expression, Turn
from flowseg_jax.errors import UserError, brief
from flowseg_jax.types import PAD

AGAIN = "remove it and prepare it again"


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
            "ann_rle_single_cover": sequence(text),
            "ann_rle_filled_polygons": sequence(text),
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
        "ann_ignore": [a.ignore for a in example.annotations],
        "ann_rle_single_cover": [a.rle_single_cover for a in example.annotations],
        "ann_rle_filled_polygons": [a.rle_filled_polygons for a in example.annotations],
        "sentence_text": [e.text for e in example.expressions],
        "sentence_id": [e.id for e in example.expressions],
        "sentence_ref": [e.ref_id for e in example.expressions],
        "sentence_anns": [len(e.annotations) for e in example.expressions],
        "sentence_ann": [a for e in example.expressions for a in e.annotations],  # of all sentences, one after the other
        "sentence_family": [e.family for e in example.expressions],
        "sentence_answer": [e.answer for e in example.expressions],
        "turn_question": [t.question for t in example.turns],
        "turn_answer": [t.answer for t in example.turns],
    }


def from_record(record: Mapping[str, Any]) -> Example:
    """The inverse of `to_record` on what TFDS decodes (text as bytes, sequences as arrays)."""

    def columns(*names: str) -> Iterator[tuple[Any, ...]]:
        return zip(*(record[name] for name in names), strict=True)

    annotations = tuple(
        Annotation(int(i), int(c), r.decode(), bool(w), bool(n), o.decode(), f.decode())
        for i, c, r, w, n, o, f in columns(
            "ann_id", "ann_category", "ann_rle", "ann_iscrowd", "ann_ignore", "ann_rle_single_cover", "ann_rle_filled_polygons"
        )
    )
    targets = iter(record["sentence_ann"])
    expressions = tuple(
        Expression(t.decode(), int(i), int(r), tuple(map(int, itertools.islice(targets, n))), f.decode(), a.decode())
        for t, i, r, n, f, a in columns(
            "sentence_text", "sentence_id", "sentence_ref", "sentence_anns", "sentence_family", "sentence_answer"
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
        tuple(Turn(q.decode(), a.decode()) for q, a in columns("turn_question", "turn_answer")),
    )


def serialize(example: Example) -> bytes:
    """The stored record of an example."""
    return features().serialize_example(features().encode_example(to_record(example)))


def deserialize(data: bytes, categories: int, where: str) -> Example:
    """The example of a stored record, after checking all that memory or an index depends on.

    Args:
        data: what `serialize` returned.
        categories: number of categories of the data set.
        where: file and record, for the message.

    Raises:
        UserError: the record is damaged.
    """
    import tensorflow_datasets as tfds

    try:
        example = from_record(features().deserialize_example_np(data, decoders={"image": tfds.decode.SkipDecoding()}))
        _check(example, categories)
    except Exception as error:  # damaged bytes make the parser raise nearly anything
        raise UserError(f"{where}: a damaged record ({brief(error)}); {AGAIN}") from None
    return example


def _check(example: Example, categories: int) -> None:
    """Raises a ValueError for codes that pycocotools would read out of bounds, and for places that do not exist."""
    height, width = example.height, example.width
    if not (0 < height and 0 < width and height * width <= images.MAX_PIXELS):
        raise ValueError(f"an image of {height} x {width} pixels")
    for a in example.annotations:
        if not PAD <= a.category < categories:
            raise ValueError(f"there is no category {a.category}")
        for counts in filter(None, (a.rle, a.rle_single_cover, a.rle_filled_polygons)):
            masks.run_lengths(counts, height, width)
        if not a.rle:
            raise ValueError("an object without a mask")
    for e in example.expressions:
        if any(not 0 <= place < len(example.annotations) for place in e.annotations):
            raise ValueError(f"sentence {e.id} refers to an object that is not there")

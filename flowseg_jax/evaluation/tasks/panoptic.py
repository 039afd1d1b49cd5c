"""Panoptic quality, from integer counts of matched segments, on the host.

Panoptic quality (Kirillov et al. 2019; the rules are those of its reference code, panopticapi). Pixels without a true segment
are void. A predicted and a true segment match if they are of one category and their IoU is above 1/2, which no segment can have
with two others; void pixels of the prediction do not count in the union. Of each category, over all images:

    PQ = sum of matched IoU / (TP + FP / 2 + FN / 2) = SQ x RQ,    SQ = mean matched IoU,    RQ = TP / (TP + FP / 2 + FN / 2)

Crowd regions match nothing and are not missed. A prediction without a match is no false positive if more than half of it lies
on void and on crowd regions of its category. A table is the mean over the categories that are in the truth or in a prediction.

Categories are numbers, places in the data set's list of names. So are the keys of `by_category` (as text, which JSON asks for),
each of whose rows says the name: two categories of one name stay two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from flowseg_jax.data import masks
from flowseg_jax.data.records import Example

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of an image, of the truth or predicted.

    Attributes:
        ids: int32 [H, W], the number of each pixel's segment, from 1; 0 for none (void).
        category: of segments 1, 2, ...
        crowd: whether each is a crowd region.
    """

    ids: Int[np.ndarray, "y x"]
    category: tuple[int, ...]
    crowd: tuple[bool, ...]

    @classmethod
    def of(cls, example: Example) -> Segments:
        """The true ones. Ignored objects are void."""
        ids = np.zeros((example.height, example.width), np.int32)
        counted = [a for a in example.annotations if not a.ignore]
        for number, annotation in enumerate(counted, 1):
            ids[masks.decode([annotation.rle], *ids.shape)[0] > 0] = number
        return cls(ids, tuple(a.category for a in counted), tuple(a.crowd for a in counted))


def count_segments(found: Segments, truth: Segments) -> dict[str, list]:
    """What panoptic quality is made from.

    Returns:
        matched: [category, intersection, union] of each match; missed, extra: the category of each false negative and of each
        false positive.
    """
    t, f = len(truth.category), len(found.category)
    joint = truth.ids.astype(np.int64) * (f + 1) + found.ids
    both = np.bincount(joint.ravel(), minlength=(t + 1) * (f + 1)).reshape(t + 1, f + 1)
    true_area, found_area = both.sum(1), both.sum(0)
    matched, true_left, found_left = [], dict.fromkeys(range(1, t + 1)), dict.fromkeys(range(1, f + 1))
    for i, j in np.argwhere(both[1:, 1:]).tolist():
        category = truth.category[i]
        if truth.crowd[i] or category != found.category[j]:
            continue
        intersection = int(both[i + 1, j + 1])
        union = int(true_area[i + 1] + found_area[j + 1] - intersection - both[0, j + 1])
        if 2 * intersection > union:
            matched.append([category, intersection, union])
            del true_left[i + 1], found_left[j + 1]
    missed = [truth.category[i - 1] for i in true_left if not truth.crowd[i - 1]]
    extra = []
    for j in found_left:
        category = found.category[j - 1]
        crowds = [i for i in range(1, t + 1) if truth.crowd[i - 1] and truth.category[i - 1] == category]
        if 2 * int(both[[0, *crowds], j].sum()) <= found_area[j]:
            extra.append(category)
    return {"matched": matched, "missed": missed, "extra": extra}


def exact_mean(values: Iterable[float]) -> float | None:
    """The mean, exact, so the order does not matter; None of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else None


def panoptic_table(records: Iterable[Record], categories: Sequence[str], things: Sequence[bool]) -> dict[str, Any]:
    """PQ, SQ and RQ in percent: of all categories, of things, of stuff and of each category.

    Args:
        records: with `matched`, `missed` and `extra` of `count_segments`.
        categories: their names.
        things: which of them are things.

    Returns:
        {"all", "things", "stuff": {"pq", "sq", "rq", "categories" (how many are averaged)}, "by_category": {number: {"name",
        "pq", "sq", "rq", "tp", "fp", "fn"}}}; None where there is nothing to average.
    """
    ious: list[list[float]] = [[] for _ in categories]
    missed, extra = [0] * len(categories), [0] * len(categories)
    for record in records:
        for category, intersection, union in record["matched"]:
            ious[category].append(intersection / union)
        for counts, key in ((missed, "missed"), (extra, "extra")):
            for category in record[key]:
                counts[category] += 1
    rows: dict[int, dict[str, Any]] = {}
    for c, matched in enumerate(ious):
        tp, fp, fn = len(matched), extra[c], missed[c]
        if weight := tp + fp / 2 + fn / 2:
            quality = {"pq": math.fsum(matched) / weight, "sq": math.fsum(matched) / max(tp, 1), "rq": tp / weight}
            rows[c] = {key: 100 * value for key, value in quality.items()} | {"tp": tp, "fp": fp, "fn": fn}

    def mean(kept: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {key: exact_mean(row[key] for row in kept) for key in ("pq", "sq", "rq")} | {"categories": len(kept)}

    table: dict[str, Any] = {"all": mean([*rows.values()])}
    for name, wanted in (("things", True), ("stuff", False)):
        table[name] = mean([row for c, row in rows.items() if things[c] is wanted])
    return table | {"by_category": {str(c): {"name": categories[c]} | row for c, row in rows.items()}}

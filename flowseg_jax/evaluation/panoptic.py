"""What a generic evaluation counts: panoptic quality, mIoU and mask AP, in integers, on the host.

Each image leaves one record: its matched segments with their intersections and unions, its missed and its superfluous segments,
its confusion of categories, and its objects, true and predicted, as run-length codes. The tables of all protocols are functions
of the records alone. Mask AP ranks all predictions of a split and is left to pycocotools.

Categories are numbers, places in the data set's list of names. So are the keys of `by_category` (as text, which JSON asks for),
each of whose rows says the name: two categories of one name stay two.

Panoptic quality (Kirillov et al. 2019; the rules are those of its reference code, panopticapi). Pixels without a true segment
are void. A predicted and a true segment match if they are of one category and their IoU is above 1/2, which no segment can have
with two others; void pixels of the prediction do not count in the union. Of each category, over all images:

    PQ = sum of matched IoU / (TP + FP / 2 + FN / 2) = SQ x RQ,    SQ = mean matched IoU,    RQ = TP / (TP + FP / 2 + FN / 2)

Crowd regions match nothing and are not missed. A prediction without a match is no false positive if more than half of it lies
on void and on crowd regions of its category. A table is the mean over the categories that are in the truth or in a prediction.

mIoU is the mean, over the categories that occur in the truth, of IoU = diagonal / (row + column - diagonal) of the confusion
matrix of all pixels that are not void. Pixels of a crowd region have its category.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from flowseg_jax.data import masks
from flowseg_jax.data.records import Example

Record = Mapping[str, Any]
OBJECTS = ("objects", "masks", "found")  # of a record: what mask AP is made from
STATISTICS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}  # places in COCOeval.stats


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


def count_pixels(found: Int[np.ndarray, "y x"], truth: Segments) -> dict[str, list]:
    """The confusion of categories.

    Args:
        found: predicted category of every pixel, -1 for none.
        truth: the true segments.

    Returns:
        confusion: [true category, predicted category, pixels] of each pair that occurs; void pixels are left out.
    """
    category = np.array([-1, *truth.category])[truth.ids]
    pairs, pixels = np.unique(np.stack([category, found])[:, truth.ids > 0], axis=1, return_counts=True)
    return {"confusion": [[int(t), int(f), int(n)] for (t, f), n in zip(pairs.T, pixels, strict=True)]}


def check(record: Record, categories: int) -> None:
    """Raises a ValueError unless the record's counts are counts, of categories below `categories` (predicted pixels: or -1)."""
    numbers = [(c, i, u - i) for c, i, u in record.get("matched", ())]
    numbers += [(c,) for key in ("missed", "extra") for c in record.get(key, ())]
    numbers += [(true, found + 1, pixels) for true, found, pixels in record.get("confusion", ())]
    numbers += [(category,) for category, *_ in record.get("objects", ())]
    numbers += [(category, place, len(record["masks"]) - 1 - place) for category, _, place in record.get("found", ())]
    if any(type(n) is not int or n < 0 for row in numbers for n in row) or any(row[0] >= categories for row in numbers):
        raise ValueError("a negative count or no such category")


def _mean(values: Iterable[float]) -> float | None:
    """Exact, so the order does not matter; None of nothing."""
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
        return {key: _mean(row[key] for row in kept) for key in ("pq", "sq", "rq")} | {"categories": len(kept)}

    table: dict[str, Any] = {"all": mean([*rows.values()])}
    for name, wanted in (("things", True), ("stuff", False)):
        table[name] = mean([row for c, row in rows.items() if things[c] is wanted])
    return table | {"by_category": {str(c): {"name": categories[c]} | row for c, row in rows.items()}}


def semantic_table(records: Iterable[Record], categories: Sequence[str]) -> dict[str, Any]:
    """mIoU, in percent, and "by_category": {number: {"name", "iou"}} of each category that occurs in the truth.

    Args:
        records: with `confusion` of `count_pixels`.
        categories: their names.
    """
    matrix = np.zeros((len(categories), len(categories) + 1), np.int64)  # the last column: predicted to be nothing
    for record in records:
        for true, found, pixels in record["confusion"]:
            matrix[true, found] += pixels
    right, rows, columns = matrix.diagonal(), matrix.sum(1), matrix.sum(0)[:-1]
    iou = {
        c: 100 * int(right[c]) / int(rows[c] + columns[c] - right[c]) for c in range(len(categories)) if rows[c]
    }  # true division of integers: correctly rounded
    by_category = {str(c): {"name": categories[c], "iou": value} for c, value in iou.items()}
    return {"miou": _mean(iou.values()), "categories": len(iou), "by_category": by_category}


def count_objects(
    example: Example, found: Iterable[tuple[int, float, int]], mask_of: Callable[[int], Bool[np.ndarray, "y x"]]
) -> dict[str, list]:
    """What mask AP is made from.

    Args:
        example: the image, with its true objects.
        found: (category, score, candidate) of each prediction.
        mask_of: candidate -> its mask.

    Returns:
        objects: [category, code, whether it counts for nothing] of each true object; masks: the codes of the candidates that
        are not empty, several predictions share one; found: [category, score, place in `masks`] of each prediction with such a
        mask. Codes are COCO's compressed run lengths.
    """
    objects = [[a.category, a.rle, bool(a.crowd or a.ignore)] for a in example.annotations]
    places: dict[int, int | None] = {}  # candidate -> place in `codes`, None for an empty mask
    codes, kept = [], []
    for category, score, candidate in found:
        if candidate not in places:
            mask = mask_of(candidate)
            places[candidate] = len(codes) if mask.any() else None
            codes += [masks.encode(mask)] if mask.any() else []
        if (place := places[candidate]) is not None:
            kept.append([category, score, place])
    return {"objects": objects, "masks": codes, "found": kept}


def instance_table(
    records: Iterable[Record], categories: Sequence[str], things: Sequence[bool] | None = None
) -> dict[str, Any]:
    """AP over IoU 0.5:0.95, at 0.5, at 0.75, of small, medium and large objects, and "by_category": {number: {"name", "ap"}}.

    In percent. At most 100 predictions an image count. None where there is no true object.

    Args:
        records: with `height`, `width` and the lists of `count_objects`.
        categories: their names.
        things: which of them count; None for all.
    """
    counted = [c for c in range(len(categories)) if things is None or things[c]]
    if not counted:
        return dict.fromkeys(STATISTICS) | {"by_category": {}}
    shown: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []

    def entry(code: dict[str, Any], number: int, category: int) -> dict[str, Any]:
        area = int(coco_mask.area(code))
        return {"image_id": len(shown), "id": number, "category_id": category, "segmentation": code, "area": area}

    for record in records:
        size = [record["height"], record["width"]]
        code = lambda text, size=size: {"size": size, "counts": text.encode()}  # noqa: E731
        shown.append({"id": len(shown) + 1, "height": size[0], "width": size[1]})
        for category, text, ignored in record["objects"]:  # numbers from 1: COCOeval takes 0 for "no match"
            truth.append(entry(code(text), len(truth) + 1, category) | {"iscrowd": int(ignored)})
        codes = [*map(code, record["masks"])]
        for category, score, place in record["found"]:
            found.append(entry(codes[place], len(found) + 1, category) | {"iscrowd": 0, "score": score})

    def indexed(annotations: list[dict[str, Any]]) -> COCO:
        index = COCO()
        named = [{"id": c, "name": name} for c, name in enumerate(categories)]
        index.dataset = {"images": shown, "annotations": annotations, "categories": named}
        index.createIndex()
        return index

    with contextlib.redirect_stdout(io.StringIO()):  # they print
        evaluation = COCOeval(indexed(truth), indexed(found), "segm")
        evaluation.params.catIds = counted
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    known = lambda value: None if value < 0 else 100 * float(value)  # noqa: E731 (-1: no true object)
    table = {name: known(evaluation.stats[at]) for name, at in STATISTICS.items()}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # of objects of all sizes
    each = {c: precision[:, :, k] for k, c in enumerate(counted)}
    return table | {
        "by_category": {str(c): {"name": categories[c], "ap": known(p.mean())} for c, p in each.items() if (p >= 0).all()}
    }


def tables(records: Sequence[Record], categories: Sequence[str], things: Sequence[bool] | None) -> dict[str, dict[str, Any]]:
    """{protocol: its table} of every protocol whose counts the records hold: "panoptic", "semantic", "instance"."""
    n, found = {"n": len(records)}, {}
    if things is not None:
        found["panoptic"] = n | panoptic_table(records, categories, things)
        found["semantic"] = n | semantic_table(records, categories)
    if all("found" in record for record in records):
        found["instance"] = n | instance_table(records, categories, things)
    return found


def in_words(found: Mapping[str, Any]) -> list[str]:
    """A line for each protocol of `tables`."""
    number = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
    figures = lambda table, names: ", ".join(f"{name.upper()} {number(table[name])}" for name in names)  # noqa: E731
    lines = []
    if table := found.get("panoptic"):
        parts = ", ".join(f"PQ of {part} {number(table[part]['pq'])}" for part in ("things", "stuff"))
        lines.append(f"panoptic, n {table['n']}, {figures(table['all'], ('pq', 'sq', 'rq'))}, {parts}")
    if table := found.get("semantic"):
        lines.append(f"semantic, n {table['n']}, mIoU {number(table['miou'])}")
    if table := found.get("instance"):
        lines.append(f"instance, n {table['n']}, {figures(table, ('ap', 'ap50', 'ap75'))}")
    return lines

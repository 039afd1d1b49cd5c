"""Mask AP: the objects of every image, true and predicted, as run-length codes; all predictions of a split are ranked together.

That is left to pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from flowseg_jax.data import masks
from flowseg_jax.data.records import Example

Record = Mapping[str, Any]
OBJECTS = ("objects", "masks", "found")  # of a record: what mask AP is made from
STATISTICS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}  # places in COCOeval.stats


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

"""Records of an evaluation, as they stand in a `<split>.jsonl`, made by hand."""

from __future__ import annotations

import json

SIZE = 100  # union of every mask with its truth, so that an IoU is a number of pixels


def record(image=1, sentence=0, *, iou, oracle=None, rank=0, score=0.5, family="", **changes):
    """A sample whose selected mask has `iou` percent and whose best candidate `oracle` percent (None: the same)."""
    oracle = iou if oracle is None else oracle
    text = f"text {image}.{sentence}"
    fields = {
        "image_id": image,
        "file_name": f"{image}.jpg",
        "ann_id": 10 * image,
        "sentence_id": sentence,
        "text": text,
        "text_form": "lower",
        "sentence": text,
        "family": family,
        "count": 1,
        "area": SIZE,
        "truth_area": iou,
        "no_target_threshold": 0.0,
        "failed": False,
        "failure": "",
        "score": score,
        "best_rank": rank,
        "intersection": iou,
        "union": SIZE,
        "single_cover_intersection": iou,
        "single_cover_union": SIZE,
    }
    for raster in ("", "single_cover_"):
        fields |= {f"oracle_{raster}intersection": oracle, f"oracle_{raster}union": SIZE}
    return fields | changes


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path

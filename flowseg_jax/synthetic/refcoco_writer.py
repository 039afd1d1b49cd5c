"""Writes scenes in the RefCOCO layout: `instances.json`, `refs(unc).p` and `images/`.

With expressions that refer to nothing it is the layout of gRefCOCO: `grefs(unc).json` in place of the pickle.

`scenes.jsonl` beside them holds the scene graph for checks of the benchmark itself; no reader of the layout knows it.
"""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowseg_jax.synthetic import polygons
from flowseg_jax.synthetic.expressions import NO_TARGET_FAMILY, NOTHING, GeneratedExpression
from flowseg_jax.synthetic.scene import COLOURS, SHAPES, SIZES, TEXTURES, Scene
from flowseg_jax.synthetic.statistics import Statistics

RLE_SHARE = 0.12  # of the objects; masks with a hole come on top
# A category is everything that can be seen of an object by itself, so that the generic pass teaches every attribute.
CATEGORIES = [
    {"id": i, "name": " ".join(kind), "supercategory": kind[-1]}
    for i, kind in enumerate(itertools.product(SIZES, TEXTURES, COLOURS, SHAPES), 1)
]
_CATEGORY_ID = {category["name"]: category["id"] for category in CATEGORIES}


@dataclass(frozen=True)
class ImageRecord:
    """One image without the ids that depend on the images before it. `refs` are expressions grouped by target."""

    image_id: int
    split: str
    file_name: str
    size: int
    annotations: list[dict[str, Any]]
    objects: list[dict[str, Any]]
    refs: list[list[GeneratedExpression]]


def record(index: int, split: str, scene: Scene, refs: list[list[GeneratedExpression]], rng: random.Random) -> ImageRecord:
    """Collects what the files say about scene `index`."""
    annotations, objects = [], []
    for item, mask, centre, area in zip(scene.items, scene.masks, scene.centres, scene.areas, strict=True):
        parts = polygons.polygons(mask) if rng.random() >= RLE_SHARE else None
        annotations.append(
            {
                "segmentation": parts or polygons.run_lengths(mask),
                "area": float(area),
                "iscrowd": 0,
                "bbox": polygons.bounding_box(mask),
                "category_id": _CATEGORY_ID[f"{item.size} {item.texture} {item.colour} {item.shape}"],
            }
        )
        graph = {"shape": item.shape, "colour": item.colour, "texture": item.texture, "size": item.size}
        objects.append(graph | {"centre": [round(float(v), 3) for v in centre], "area": int(area)})
    image_id = index + 1
    return ImageRecord(image_id, split, f"shapes_{image_id:012d}.jpg", scene.size, annotations, objects, refs)


def write(root: Path, records: list[ImageRecord], seed: int, mix: Mapping[str, float]) -> Statistics:
    """Writes the annotation files of `records` to `root` and counts what they hold; `seed` and `mix` are noted in them."""
    statistics = Statistics()
    images, annotations, refs = [], [], []
    sentence_id = 0
    with open(root / "scenes.jsonl", "w", encoding="utf-8") as sidecar:
        for r in records:
            images.append(_image(r))
            first = len(annotations) + 1
            annotations += [{"id": first + i, "image_id": r.image_id} | a for i, a in enumerate(r.annotations)]
            for expressions in r.refs:
                target = expressions[0].target
                sentences = [_sentence(e, sentence_id + i) for i, e in enumerate(expressions)]
                sentence_id += len(sentences)
                refs.append(_ref(r, first, len(refs) + 1, target, sentences))
            graph = [{"ann_id": first + i} | o for i, o in enumerate(r.objects)]
            row = {"image_id": r.image_id, "split": r.split, "image_size": r.size, "objects": graph}
            sidecar.write(json.dumps(row, separators=(",", ":")) + "\n")
            statistics.add(r.split, len(r.objects), r.refs)
    info = {"description": "shapes", "version": "1.0", "seed": seed, "mix": dict(mix)}
    licence = {"id": 1, "name": "CC0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}
    instances = {"info": info, "licenses": [licence], "images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "instances.json").write_text(json.dumps(instances, separators=(",", ":")), encoding="utf-8")
    if NO_TARGET_FAMILY in mix:
        refs = [ref | {"ann_id": [ref["ann_id"]], "no_target": ref["ann_id"] == NOTHING} for ref in refs]
        (root / "grefs(unc).json").write_text(json.dumps(refs, separators=(",", ":")), encoding="utf-8")
        return statistics
    # A pickle also records which equal strings are one object, and that depends on which process made them: make all anew.
    refs = json.loads(json.dumps(refs))
    with open(root / "refs(unc).p", "wb") as file:
        pickle.dump(refs, file, protocol=2)
    return statistics


def _ref(r: ImageRecord, first: int, ref_id: int, target: int, sentences: list[dict[str, Any]]) -> dict[str, Any]:
    """A ref to object `target` of the image, whose first object has the id `first`."""
    ann_id, category = (NOTHING, NOTHING) if target == NOTHING else (first + target, r.annotations[target]["category_id"])
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": category,
        "image_id": r.image_id,
        # RefCOCO's own file names carry the annotation here; readers take the name from instances.json.
        "file_name": f"{r.file_name.removesuffix('.jpg')}_{ann_id}.jpg",
        "split": r.split,
        "sent_ids": [s["sent_id"] for s in sentences],
        "sentences": sentences,
    }


def _image(r: ImageRecord) -> dict[str, Any]:
    return {
        "id": r.image_id,
        "file_name": r.file_name,
        "height": r.size,
        "width": r.size,
        "license": 1,
        "coco_url": "",
        "flickr_url": "",
        "date_captured": "",
    }


def _sentence(expression: GeneratedExpression, sentence_id: int) -> dict[str, Any]:
    text = expression.text
    return {
        "tokens": text.split(),
        "raw": text[0].upper() + text[1:] + ".",
        "sent_id": sentence_id,
        "sent": text,
        "family": expression.family,
    }

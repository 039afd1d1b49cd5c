"""A miniature RefCOCO layout with the oddities of the real one, for tests.

Five images: 1 (train; two objects, one of two overlapping polygons), 2 (train; uncompressed RLE and a list of RLEs), 3 (val;
grey JPEG, compressed RLE), 4 (testA), 5 (train; a crowd region, an unreferenced empty polygon, nine sentences on one object).
"""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco


def py2_pickle(value) -> bytes:
    """Pickles plain containers as Python 2 did: byte strings, here latin-1."""

    def emit(v):
        if isinstance(v, bool) or v is None:
            raise TypeError(v)
        if isinstance(v, int):
            return b"I%d\n" % v
        if isinstance(v, str):
            return b"S" + repr(v.encode("latin1")).lstrip("b").encode() + b"\n"
        if isinstance(v, list):
            return b"(" + b"".join(map(emit, v)) + b"l"
        return b"(" + b"".join(emit(k) + emit(x) for k, x in v.items()) + b"d"

    return emit(value) + b"."


def box(x0, y0, x1, y1):
    """A rectangle's polygon."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def box_mask(h, w, x0, y0, x1, y1):
    mask = np.zeros((h, w), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def uncompressed(mask):
    """COCO's uncompressed run-length code: runs of 0 and 1 down the columns, starting with 0."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def compressed(mask):
    code = coco.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


SIZES = {1: (40, 60), 2: (50, 30), 3: (32, 32), 4: (96, 96), 5: (48, 64)}  # (height, width)


def image(number: int) -> Image.Image:
    """A reproducible picture."""
    h, w = SIZES[number]
    y, x = np.mgrid[:h, :w]
    pixels = np.stack([x * 4 % 256, y * 5 % 256, (x + y) * number % 256], -1).astype(np.uint8)
    picture = Image.fromarray(pixels)
    return picture.convert("L") if number == 3 else picture


def tables():
    """(instances, refs) of the layout, to be damaged at will."""
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": h, "width": w} for i, (h, w) in SIZES.items()]
    rle_list = [compressed(box_mask(50, 30, 0, 0, 8, 8)), compressed(box_mask(50, 30, 4, 4, 20, 12))]
    segmentations = {
        11: (1, 7, [box(5, 5, 25, 25), box(15, 15, 35, 30)]),
        12: (1, 3, [box(40, 10, 55, 35)]),
        21: (2, 3, uncompressed(box_mask(50, 30, 3, 20, 20, 45))),
        22: (2, 7, rle_list),
        31: (3, 7, compressed(box_mask(32, 32, 4, 4, 20, 28))),
        41: (4, 90, [box(10, 10, 50, 50)]),
        51: (5, 3, [box(2, 2, 30, 40)]),
        52: (5, 7, {"size": [48, 64], "counts": uncompressed(box_mask(48, 64, 40, 0, 64, 48))["counts"]}),
        53: (5, 90, [box(10.1, 10.1, 10.2, 10.2)]),
    }
    annotations = [
        {"id": key, "image_id": i, "category_id": c, "segmentation": s, "iscrowd": int(key == 52)}
        for key, (i, c, s) in segmentations.items()
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 90, "name": "café chair"}, {"id": 3, "name": "cat"}]

    def ref(ref_id, ann_id, split, sents, family=None):
        image_id = segmentations[ann_id][0]
        sentences = [
            {"sent": s, "raw": s.upper() + "!", "sent_id": ref_id * 10 + i, "tokens": s.split()} for i, s in enumerate(sents)
        ]
        if family:
            for s in sentences:
                s["family"] = family
        return {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "image_id": image_id,
            "category_id": segmentations[ann_id][1],
            "split": split,
            "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
            "sentences": sentences,
            "sent_ids": [s["sent_id"] for s in sentences],
        }

    refs = [
        ref(1, 11, "train", ["the dog on the left", "The Dog on the left", "big dog"], "relation"),
        ref(2, 12, "train", ["cat near the café"], "attribute"),
        ref(3, 21, "train", ["lower cat", "cat"], "attribute"),
        ref(4, 22, "train", ["small dog"], "attribute"),
        ref(5, 31, "val", ["the grey dog", "a dog", "dog in the middle"]),
        ref(6, 41, "testA", ["chair"]),
        ref(7, 51, "train", [f"cat number {i}" for i in range(9)], "ordinal"),
    ]
    return {"images": images, "annotations": annotations, "categories": categories}, refs


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write(root: Path, *, instances=None, refs=None, image_dir="images", split_by="unc") -> Path:
    """Writes the layout to `root`; `instances` and `refs` replace the tables."""
    default_instances, default_refs = tables()
    root.mkdir(parents=True, exist_ok=True)
    (root / "instances.json").write_text(json.dumps(instances or default_instances), encoding="utf-8")
    (root / f"refs({split_by}).p").write_bytes(py2_pickle(default_refs if refs is None else refs))
    folder = root / image_dir
    folder.mkdir(parents=True, exist_ok=True)
    for number in SIZES:
        (folder / f"COCO_train2014_{number:012d}.jpg").write_bytes(jpeg(image(number)))
    return root


def entry(table, key):
    """The entry of a list of dicts with this id (or ref_id)."""
    return next(e for e in table if e.get("id", e.get("ref_id")) == key)


def damaged(change) -> tuple[dict, list]:
    """The tables after `change(instances, refs)`."""
    instances, refs = copy.deepcopy(tables())
    change(instances, refs)
    return instances, refs

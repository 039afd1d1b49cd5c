"""Miniature COCO panoptic and detection layouts with the oddities of the real ones, for tests.

Images 1 (train; things, stuff, a crowd region), 2 (train; one object), 3 (train; without an annotation), 4 (val).
"""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.minirefcoco import box, box_mask, compressed, jpeg, uncompressed

SIZES = {1: (40, 60), 2: (50, 30), 3: (32, 32), 4: (24, 48)}  # (height, width)
SPLITS = {"train": (1, 2, 3), "val": (4,)}
CATEGORIES = [
    {"id": 184, "name": "tree-merged", "isthing": 0, "color": [107, 142, 35]},
    {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60]},
    {"id": 18, "name": "dog", "isthing": 1, "color": [0, 60, 100]},
]
LARGE = 3_226_956  # needs all three bytes: R 76, G 61, B 49
# image -> [(segment id, category id, iscrowd, box)]; the pixels of no box are void.
SEGMENTS = {
    1: [(LARGE, 18, 0, (5, 5, 25, 25)), (300, 184, 0, (0, 30, 60, 40)), (255, 1, 1, (40, 0, 60, 20))],
    2: [(7, 1, 0, (3, 20, 20, 45))],
    4: [(65_536, 184, 0, (0, 0, 48, 10))],
}
PICTURE = {k: Image.fromarray(np.full((h, w, 3), 40 * k, np.uint8)) for k, (h, w) in SIZES.items()}


def colours(number: int, segments: Any = None) -> np.ndarray:
    """The pixels of an image's PNG."""
    ids = np.zeros(SIZES[number], np.uint32)
    for key, _, _, (x0, y0, x1, y1) in SEGMENTS[number] if segments is None else segments:
        ids[y0:y1, x0:x1] = key
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _images(split: str, name: str) -> list[dict[str, Any]]:
    return [
        {
            "id": k,
            "file_name": name.format(k),
            "height": SIZES[k][0],
            "width": SIZES[k][1],
            "license": 3,
            "coco_url": "http://x",
        }
        for k in SPLITS[split]
    ]


def panoptic(split: str) -> dict[str, Any]:
    """The panoptic JSON of a split, to be damaged at will."""
    annotations = [
        {
            "image_id": k,
            "file_name": f"{k:012d}.png",
            "segments_info": [
                {"id": key, "category_id": c, "iscrowd": w, "area": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                for key, c, w, (x0, y0, x1, y1) in SEGMENTS[k]
            ],
        }
        for k in SPLITS[split]
        if k in SEGMENTS
    ]
    return copy.deepcopy({"images": _images(split, "{:012d}.jpg"), "annotations": annotations, "categories": CATEGORIES})


def instances(split: str, name: str = "{:012d}.jpg") -> dict[str, Any]:
    """The detection JSON of a split, to be damaged at will."""
    crowd = uncompressed(box_mask(40, 60, 40, 0, 60, 20))
    found = {
        11: (1, 18, [box(5, 5, 25, 25), box(15, 15, 35, 30)]),
        12: (1, 1, crowd),
        13: (1, 1, [box(10.1, 10.1, 10.2, 10.2)]),  # covers no pixel
        21: (2, 1, compressed(box_mask(50, 30, 3, 20, 20, 45))),
        41: (4, 18, [box(0, 0, 48, 10)]),
    }
    annotations = [
        {"id": key, "image_id": k, "category_id": c, "segmentation": s, "iscrowd": int(s is crowd), "area": 1.0}
        for key, (k, c, s) in found.items()
        if k in SPLITS[split]
    ]
    return copy.deepcopy({"images": _images(split, name), "annotations": annotations, "categories": CATEGORIES[1:]})


def write(
    root: Path, kind: str, *, images: str = "{}", pngs: str = "annotations/{}", year: int = 2017, **tables: dict[str, Any]
) -> Path:
    """Writes the layout to `root`; `train` and `val` replace the tables, `images` and `pngs` say where the folders are."""
    make = panoptic if kind == "panoptic" else instances
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, numbers in SPLITS.items():
        table = tables[split] if split in tables else make(split)
        (root / "annotations" / f"{kind}_{split}{year}.json").write_text(json.dumps(table))
        folder = root / images.format(f"{split}{year}")
        folder.mkdir(parents=True, exist_ok=True)
        for k in numbers:
            (folder / table["images"][0]["file_name"].replace(f"{numbers[0]:012d}", f"{k:012d}")).write_bytes(jpeg(PICTURE[k]))
        if kind == "panoptic":
            folder = root / pngs.format(f"panoptic_{split}{year}")
            folder.mkdir(parents=True, exist_ok=True)
            for k in SEGMENTS.keys() & {*numbers}:
                (folder / f"{k:012d}.png").write_bytes(png(Image.fromarray(colours(k))))
    return root

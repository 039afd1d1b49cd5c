"""Data sets on disk whose objects are drawn differently by every raster, for tests: RefCOCO, gRefCOCO and ReasonSeg layouts,
and a COCO panoptic one.

Images of 1 to 700 pixels; objects of several overlapping outlines on broken coordinates, of run-length codes with holes, crowd
regions; sentences that refer to several objects or to nothing, that are repeated, in other case, too; regions to be ignored.
Brightness shows where the objects are. In an image that is BROKEN (blue) the model below finds no numbers.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

SIZES = [
    (1, 1),
    (1, 700),
    (700, 1),
    (2, 3),
    (9, 14),
    (31, 17),
    (48, 64),
    (64, 64),
    (129, 40),
    (100, 300),
    (320, 250),
    (700, 500),
]
BROKEN = (5, 8)  # numbers of images
FAMILIES = ("", "attribute", "relation")
WORDS = "red blue dog cat left right of the big small one behind second".split()


def outline(rng, h, w):
    """A closed outline around a random centre, on broken coordinates that may leave the image."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
    radius = rng.uniform(0.15, 0.5) * max(min(h, w), 4) + 1
    points = rng.uniform(0, 1, 2) * (w, h) + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    return points.round(2).clip(-max(h, w), 2 * max(h, w)).ravel().tolist()


def blob(rng, h, w):
    """A mask with holes."""
    y, x = np.mgrid[:h, :w]
    cy, cx = rng.uniform(0.2, 0.8, 2) * (h, w)
    away = np.hypot(y - cy, x - cx) / max(h, w)
    holes = (away > 0.1) & (away < 0.2) | ((y + x) % 7 == 6)
    return ((away < 0.4) & ~holes | (h * w == 1)).astype(np.uint8)


def runs(mask):
    """COCO's uncompressed code: runs of 0 and 1 down the columns, beginning with 0."""
    flat = np.concatenate([[0], mask.flatten(order="F")])
    edges = np.flatnonzero(np.diff(np.concatenate([flat, [1 - flat[-1]]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def compressed(mask):
    return {"size": list(mask.shape), "counts": coco.encode(np.asfortranarray(mask))["counts"].decode()}


def segmentation(rng, h, w, kind):
    """Outlines, or (kinds 3 to 5) run-length codes; never without a pixel."""
    while True:
        if kind < 3:
            found = [outline(rng, h, w) for _ in range(kind + 1)]
            drawn = coco.decode(coco.frPyObjects(found, h, w)).any()
        else:
            masks = [blob(rng, h, w) for _ in range(2)]
            found = [compressed(masks[0]), runs(masks[0]), [compressed(mask) for mask in masks]][kind - 3]
            drawn = all(mask.any() for mask in masks)
        if drawn:
            return found


def picture(rng, h, w, number, objects):
    """Objects of different brightness before a dark ground."""
    gray = np.full((h, w), 0.05)
    for one in objects:
        shown = coco.decode(coco.frPyObjects(one, h, w)) if isinstance(one, list) and isinstance(one[0], list) else None
        gray[blob(rng, h, w).astype(bool) if shown is None else shown.any(-1)] = rng.uniform(0.2, 0.95)
    rgb = np.repeat(gray[..., None], 3, -1)
    if number in BROKEN:
        rgb *= (0.1, 0.1, 1.0)
        rgb[..., 2] += 0.3
    return Image.fromarray(np.uint8(255 * rgb.clip(0, 1)))


def sentences(rng, number, first):
    """Of one ref: no two refs of an image say the same; some sentences are said again, in other case."""
    said = [f"{' '.join(rng.choice(WORDS, rng.integers(1, 6)))} {number}" for _ in range(rng.integers(1, 4))]
    said += [f" {said[0].upper()} "] * int(rng.integers(0, 3))
    family = str(rng.choice(FAMILIES))
    return [{"sent": text, "sent_id": first + i, "family": family} for i, text in enumerate(said)]


def refs(root: Path, general: bool, seed: int = 0) -> Path:
    """A RefCOCO layout with a split val; `general`: a gRefCOCO layout. The first object of an image is no crowd region."""
    rng = np.random.default_rng(seed)
    images, annotations, said = [], [], []
    (root / "images").mkdir(parents=True)
    for number, (h, w) in enumerate(SIZES):
        kinds = [int(rng.choice([1, 2, 2, 3])), *rng.choice([0, 1, 2, 2, 2, 3, 4, 5], rng.integers(1, 3)).tolist()]
        objects = [segmentation(rng, h, w, kind) for kind in kinds]
        name = f"{number:03d}.png"
        picture(rng, h, w, number, objects).save(root / "images" / name)
        images.append({"id": 100 + number, "file_name": name, "height": h, "width": w})
        mine = [1000 + 10 * number + i for i in range(len(objects))]
        crowds = {key for key, kind in zip(mine, kinds, strict=True) if kind == 4}
        for key, one in zip(mine, objects, strict=True):
            entry = {"id": key, "image_id": 100 + number, "category_id": 1 + key % 2, "segmentation": one}
            annotations.append(entry | {"iscrowd": int(key in crowds)})
        targets = [[key] for key in mine]
        if general:  # beside others, a crowd region is named but is no target
            targets = [[key] for key in mine if key not in crowds] + [mine[::-1], mine[:2], [-1], [-1]]
        for n, target in enumerate(targets):
            ref_id = 10 * number + n
            ref = {"ref_id": ref_id, "ann_id": target if general else target[0], "image_id": 100 + number, "split": "val"}
            said.append(ref | {"sentences": sentences(rng, ref_id, 100 * ref_id), "no_target": target == [-1]})
    categories = [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}]
    table = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(table))
    if general:
        (root / "grefs(unc).json").write_text(json.dumps(said))
    else:
        (root / "refs(unc).p").write_bytes(pickle.dumps(said, protocol=2))
    return root


def reasoning(root: Path, seed: int = 0) -> Path:
    """A ReasonSeg layout with a split val: targets and ignored regions over each other, one image turned by its EXIF."""
    rng = np.random.default_rng(seed)
    (root / "val").mkdir(parents=True)
    for number, (h, w) in enumerate(SIZES):
        turned = number in (4, 9)
        seen = (w, h) if turned else (h, w)
        shapes = []
        for label in ("target", "ignore", "target")[: int(rng.integers(1, 4))]:
            points = np.array(outline(rng, *seen)).reshape(-1, 2)
            shapes.append({"label": label, "points": points.tolist()})
        exif = Image.Exif()
        if turned:
            exif[0x0112] = 6
        objects = [[np.array(shape["points"]).ravel().tolist()] for shape in shapes]
        picture(rng, h, w, number, objects).save(root / "val" / f"i{number:03d}.jpg", quality=95, exif=exif)
        texts = [s["sent"] for s in sentences(rng, number, 0)]
        entry = {"text": texts, "is_sentence": bool(number % 2), "shapes": shapes}
        (root / "val" / f"i{number:03d}.json").write_text(json.dumps(entry))
    return root


COLOURS = [(230, 30, 30), (30, 230, 30), (30, 30, 230), (230, 230, 30)]
KINDS = [{"id": 7, "name": "dog", "isthing": 1}, {"id": 3, "name": "cat", "isthing": 1}]
KINDS += [{"id": 150, "name": "sky", "isthing": 0}, {"id": 90, "name": "road", "isthing": 0}]


def panoptic(root: Path, seed: int = 0) -> Path:
    """A COCO panoptic layout: segments with holes over each other, crowd regions, void. A pixel's colour is near its kind's."""
    rng = np.random.default_rng(seed)
    (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
    (root / "val2017").mkdir()
    images, annotations = [], []
    for number, (h, w) in enumerate(SIZES):
        ids, shown = np.zeros((h, w), np.uint32), np.full((h, w, 3), 120.0)
        segments = []
        for _ in range(int(rng.integers(1, 7))):
            kind, key = int(rng.integers(4)), int(rng.integers(1, 1 << 24))
            mask = blob(rng, h, w).astype(bool)
            ids[mask] = key
            shown[mask] = COLOURS[kind if rng.random() < 0.8 else (kind + 1) % 4]  # what is shown is not always what it is
            crowd = int(KINDS[kind]["isthing"] and rng.random() < 0.2)
            segments.append({"id": key, "category_id": KINDS[kind]["id"], "iscrowd": crowd})
        segments = [one for one in segments if (ids == one["id"]).any()]
        name = f"{number:012d}"
        colour = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colour).save(root / "annotations" / "panoptic_val2017" / f"{name}.png")
        Image.fromarray(shown.astype(np.uint8)).save(root / "val2017" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.png", "height": h, "width": w})
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    table = {"images": images, "annotations": annotations, "categories": KINDS}
    (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(table))
    return root

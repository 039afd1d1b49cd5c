"""Random data sets in every layout, written without the package, and what each image of them holds, for a judge of batches.

Pictures are noise, so that each is told by its pixels. Masks are drawn by pycocotools and OpenCV from what the files say.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

CATEGORIES = {3: "cat", 7: "dog", 18: "café chair", 90: "tree", 184: "sky"}  # id -> name
COLOURS, THINGS = ("red", "green", "blue", "grey"), ("cup", "lamp", "bird", "box")


@dataclasses.dataclass
class Truth:
    """What an image of a data set holds.

    Attributes:
        layout: whose it is.
        image_id: None where the layout has no numbers.
        rgb: uint8 [h, w, 3].
        objects: (mask [h, w], category id or None, whether it is a crowd) in the order of the file.
        phrases: text -> the objects that it may mean, each a tuple of indices; () for nothing.
        long: whether its phrases are whole questions. answers: text -> explanation.
        turns: (question, answer) of a chat.
    """

    layout: str
    image_id: int | None
    rgb: np.ndarray
    objects: list[tuple[np.ndarray, int | None, bool]]
    phrases: dict[str, list[tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    long: bool = False
    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def say(self, text: str, objects: tuple[int, ...]) -> None:
        self.phrases.setdefault(" ".join(text.lower().split()), []).append(tuple(sorted(objects)))


def picture(rng: np.random.Generator, path: Path) -> np.ndarray:
    """Writes a picture of noise; its pixels as PIL reads them back."""
    h, w = rng.integers(18, 90, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(path, quality=95) if path.suffix == ".jpg" else (
        Image.fromarray(rng.integers(0, 256, (h, w), np.uint8)).save(path)
    )
    return np.asarray(Image.open(path).convert("RGB"))


def polygon(rng: np.random.Generator, h: int, w: int) -> list[float]:
    centre = rng.uniform(0.2, 0.8, 2) * (w, h)
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
    points = centre + rng.uniform(3, 0.5 * min(h, w), (len(angles), 1)) * np.stack([np.cos(angles), np.sin(angles)], -1)
    return np.clip(points, 0, (w, h)).round(1).ravel().tolist()


def outline(rng: np.random.Generator, h: int, w: int) -> tuple[Any, np.ndarray]:
    """(segmentation as COCO writes it, mask): polygons, or a run-length code of either kind."""
    while True:
        parts = [polygon(rng, h, w) for _ in range(rng.integers(1, 3))]
        code = coco.merge(coco.frPyObjects(parts, int(h), int(w)))
        mask = coco.decode(code).astype(bool)
        if mask.sum() >= 4:
            break
    kind = rng.integers(3)
    if kind == 0:
        return parts, mask
    if kind == 1:
        return {"size": [int(h), int(w)], "counts": code["counts"].decode()}, mask
    flat = mask.ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    runs = np.diff(edges).tolist()
    return {"size": [int(h), int(w)], "counts": [0, *runs] if flat[0] else runs}, mask


def phrase(rng: np.random.Generator, number: int) -> str:
    return f"The {rng.choice(COLOURS)} {rng.choice(THINGS)}  number {number}"


def referring(root: Path, rng: np.random.Generator, count: int, several: bool) -> list[Truth]:
    """RefCOCO, or with `several` gRefCOCO."""
    truths, images, annotations, refs = [], [], [], []
    for i in range(1, count + 1):
        name = f"COCO_train2014_{i:012d}.jpg"
        rgb = picture(rng, root / "images" / name)
        h, w = rgb.shape[:2]
        images.append({"id": i, "file_name": name, "height": h, "width": w})
        truth = Truth("grefcoco" if several else "refcoco", i, rgb, [])
        for k in range(rng.integers(1, 4)):
            segmentation, mask = outline(rng, h, w)
            category = int(rng.choice([*CATEGORIES]))
            annotations.append(
                {
                    "id": 100 * i + k,
                    "image_id": i,
                    "category_id": category,
                    "segmentation": segmentation,
                    "iscrowd": 0,
                    "area": 1,
                }
            )
            truth.objects.append((mask, category, False))
        for r in range(rng.integers(1, 4)):
            size = int(rng.integers(0, len(truth.objects) + 1)) if several else 1
            meant = tuple(sorted(rng.permutation(len(truth.objects))[:size].tolist()))
            said = [phrase(rng, 10 * r + s) for s in range(rng.integers(1, 4))]
            said += [said[0].upper()] * int(rng.integers(2))
            for text in said:
                truth.say(text, meant)
            ids = [100 * i + k for k in meant] or [-1]
            refs.append(
                {
                    "ref_id": 10 * i + r,
                    "ann_id": ids if several else ids[0],
                    "image_id": i,
                    "category_id": [1] * len(ids) if several else 1,
                    "split": "train",
                    "file_name": name,
                    "no_target": not meant,
                    "sentences": [{"sent": s, "raw": s, "sent_id": 100 * i + 10 * r + n} for n, s in enumerate(said)],
                    "sent_ids": [100 * i + 10 * r + n for n in range(len(said))],
                }
            )
        truths.append(truth)
    tables = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    table = {"images": images, "annotations": annotations, "categories": tables}
    (root / "instances.json").write_text(json.dumps(table, default=int))
    if several:
        (root / "grefs(unc).json").write_text(json.dumps(refs, default=int))
    else:
        (root / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return truths


def coco_set(root: Path, rng: np.random.Generator, count: int, panoptic: bool) -> list[Truth]:
    truths, images, annotations = [], [], []
    kind = "panoptic" if panoptic else "instances"
    pngs = root / "annotations" / "panoptic_train2017"
    pngs.mkdir(parents=True, exist_ok=True)
    for i in range(1, count + 1):
        name = f"{i + 500:012d}.jpg"
        rgb = picture(rng, root / "train2017" / name)
        h, w = rgb.shape[:2]
        images.append({"id": i + 500, "file_name": name, "height": h, "width": w})
        truth = Truth(f"coco-{kind}", i + 500, rgb, [])
        ids, rows = np.zeros((h, w), np.uint32), []
        for k in range(rng.integers(1, 5)):
            segmentation, mask = outline(rng, h, w)
            category, crowd = int(rng.choice([*CATEGORIES])), bool(rng.random() < 0.2)
            key = int(rng.integers(1, 1 << 24))
            if panoptic:
                ids[mask] = key
                rows.append({"id": key, "category_id": category, "iscrowd": int(crowd), "area": 1, "bbox": [0, 0, 1, 1]})
            else:
                annotations.append(
                    {"id": 1000 * i + k, "image_id": i + 500, "category_id": category, "segmentation": segmentation}
                    | {"iscrowd": int(crowd), "area": 1}
                )
                truth.objects.append((mask, category, crowd))
        if panoptic:
            rows = [row for row in rows if (ids == row["id"]).any()]
            truth.objects = [(ids == row["id"], row["category_id"], bool(row["iscrowd"])) for row in rows]
            Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(pngs / f"{i}.png")
            annotations.append({"image_id": i + 500, "file_name": f"{i}.png", "segments_info": rows})
        truths.append(truth)
    tables = [{"id": key, "name": name, "isthing": int(key < 100)} for key, name in CATEGORIES.items()]
    table = {"images": images, "annotations": annotations, "categories": tables}
    (root / "annotations" / f"{kind}_train2017.json").write_text(json.dumps(table, default=int))
    return truths


def reasonseg(root: Path, rng: np.random.Generator, count: int) -> list[Truth]:
    truths, explained = [], []
    for i in range(count):
        rgb = picture(rng, root / "train" / f"{i}_x.jpg")
        h, w = rgb.shape[:2]
        shapes, drawn = [], []
        for label in ("target", "target", "ignore")[: rng.integers(1, 4)]:
            points = np.array(polygon(rng, h, w)).reshape(-1, 2)
            shapes.append({"label": label, "points": points.tolist()})
            alone = np.zeros((h, w), np.uint8)
            whole = points.astype(np.int32)
            cv2.polylines(alone, [whole], True, 1, 1)
            cv2.fillPoly(alone, [whole], 1)
            drawn.append((int(alone.sum()), label, alone.astype(bool)))
        mask = np.zeros((h, w), np.uint8)
        for _, label, alone in sorted(drawn, key=lambda d: -d[0]):
            mask[alone] = 255 if label == "ignore" else 1
        if len({area for area, *_ in drawn}) < len(drawn) or not (mask == 1).any():
            shapes, mask = [{"label": "target", "points": [[1, 1], [9, 1], [9, 9]]}], np.zeros((h, w), np.uint8)
            cv2.polylines(mask, [np.array([[1, 1], [9, 1], [9, 9]], np.int32)], True, 1, 1)
            cv2.fillPoly(mask, [np.array([[1, 1], [9, 1], [9, 9]], np.int32)], 1)
        truth = Truth("reasonseg", None, rgb, [(mask == 1, None, False)], long=bool(rng.random() < 0.5))
        texts = [f"What is {phrase(rng, n)}?" if truth.long else phrase(rng, n) for n in range(rng.integers(1, 4))]
        for text in texts:
            truth.say(text, (0,))
            if rng.random() < 0.5:
                answer = f"It is number {i} {{of}} {len(text)}."
                truth.answers[" ".join(text.lower().split())] = answer
                explained.append({"image": f"{i}_x.jpg", "query": text, "outputs": answer})
        entry = {"text": texts, "is_sentence": truth.long, "shapes": shapes}
        (root / "train" / f"{i}_x.json").write_text(json.dumps(entry))
        truths.append(truth)
    (root / "explanatory").mkdir()
    (root / "explanatory" / "train.json").write_text(json.dumps(explained))
    return truths


def llava(root: Path, rng: np.random.Generator, count: int) -> list[Truth]:
    truths, table = [], []
    for i in range(count):
        name = f"{i:05d}.{('jpg', 'png')[i % 2]}"
        truth = Truth("llava", None, picture(rng, root / "images" / name), [])
        said = []
        for t in range(rng.integers(1, 4)):
            truth.turns.append((f"What of {phrase(rng, t)} in {i}?", f"A {rng.choice(THINGS)}, {rng.choice(COLOURS)}."))
            said += [{"from": "human", "value": truth.turns[-1][0]}, {"from": "gpt", "value": truth.turns[-1][1]}]
        said[0]["value"] = f"<image>\n{said[0]['value']}" if i % 2 else f"{said[0]['value']}\n<image>"
        table.append({"id": str(i), "image": name, "conversations": said})
        truths.append(truth)
    (root / "chat.json").write_text(json.dumps(table))
    return truths


def jsonl(root: Path, rng: np.random.Generator, count: int) -> list[Truth]:
    truths, lines = [], []
    for i in range(count):
        truth = Truth("jsonl", None, picture(rng, root / "pictures" / f"{i}.png"), [])
        h, w = truth.rgb.shape[:2]
        for k in range(rng.integers(1, 4)):
            said = [phrase(rng, 10 * k + n) for n in range(rng.integers(1, 3))]
            if rng.random() < 0.2:
                lines.append({"image": f"pictures/{i}.png", "expressions": said, "mask": None})
                meant: tuple[int, ...] = ()
            else:
                segmentation, mask = outline(rng, h, w)
                if rng.random() < 0.4:
                    Image.fromarray(mask.astype(np.uint8) * 255).save(root / f"m{i}_{k}.png")
                    segmentation = f"m{i}_{k}.png"
                category = str(rng.choice(THINGS))
                lines.append({"image": f"pictures/{i}.png", "expressions": said, "mask": segmentation, "category": category})
                meant = (len(truth.objects),)
                truth.objects.append((mask, None, False))
            for text in said:
                truth.say(text, meant)
        truths.append(truth)
    (root / "own.jsonl").write_text("".join(json.dumps(line, default=int) + "\n" for line in lines))
    return truths


def write(root: Path, seed: int, count: int) -> dict[str, list[Truth]]:
    """Writes a data set of `count` images in each layout to `root`/LAYOUT; what is in them."""
    made = {
        "refcoco": lambda folder, rng: referring(folder, rng, count, False),
        "grefcoco": lambda folder, rng: referring(folder, rng, count, True),
        "coco-panoptic": lambda folder, rng: coco_set(folder, rng, count, True),
        "coco-instances": lambda folder, rng: coco_set(folder, rng, count, False),
        "reasonseg": lambda folder, rng: reasonseg(folder, rng, count),
        "llava": lambda folder, rng: llava(folder, rng, count),
        "jsonl": lambda folder, rng: jsonl(folder, rng, count),
    }
    found = {}
    for number, (layout, make) in enumerate(made.items()):
        (root / layout).mkdir(parents=True)
        found[layout] = make(root / layout, np.random.default_rng([seed, number]))
    return found

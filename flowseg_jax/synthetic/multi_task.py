"""Miniature data sets beside the `shapes` benchmark: the same kind of scenes in the layouts of the other data sets.

    flowseg data make-multitask --out data/multi_task --seed 0

    OUT/reasonseg/  ReasonSeg: {train,val,test}/NAME.jpg and NAME.json, explanatory/train.json
    OUT/coco/       COCO panoptic: annotations/panoptic_{train,val}2017.json and their PNG folders, {train,val}2017/
    OUT/llava/      LLaVA conversations: chat.json, images/
    OUT/scenes.jsonl  the scene graphs for checks of the questions; no reader knows it

As in the benchmark's own training split, no combination of its testB occurs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from flowseg_jax.errors import UserError
from flowseg_jax.synthetic import chat as talk
from flowseg_jax.synthetic import polygons
from flowseg_jax.synthetic.generator import check_palette, say, whole_directory
from flowseg_jax.synthetic.reasoning_questions import REASONING_QUESTIONS, ReasoningQuestion
from flowseg_jax.synthetic.render import render
from flowseg_jax.synthetic.scene import (
    PALETTES,
    REFERENCE_SIZE,
    Scene,
    SceneObject,
    compose,
    draw_attributes,
    is_held_out,
    place,
)

DEFAULTS = {"reasonseg": 60, "panoptic": 120, "chat": 120}
LEAST = {"reasonseg": 5, "panoptic": 2, "chat": 1}  # so that every split has an image
OBJECTS = (4, 8)
QUALITY = 92  # of the JPEG files
ATTEMPTS = 5000
IGNORE_SHARE, FLAG_SHARE, EXPLAINED_SHARE = 0.4, 0.15, 0.75
IGNORE_RADIUS = 7.0
BACKGROUND = 100  # as in COCO, ids have gaps and things come before stuff


class _SceneWriter:
    """Draws scenes, saves their pictures and writes down what is on them."""

    def __init__(self, root: Path, seed: int, sidecar: TextIO, objects: tuple[int, int], palette: str):
        self.root, self.objects, self.palette = root, objects, palette
        self._seed, self._sidecar = seed, sidecar

    def rng(self, name: str) -> random.Random:
        return random.Random(f"shapes companions {self._seed} {name}")

    def scene(self, rng: random.Random, objects: tuple[int, int], palette: str) -> Scene:
        """Any scene without a combination of testB."""
        while True:
            triples = draw_attributes(rng, rng.randint(*objects), lambda *t: not is_held_out(*t), palette)
            items = triples and place(rng, triples, REFERENCE_SIZE)
            if items and (scene := compose(items, REFERENCE_SIZE)):
                return scene

    def save(self, scene: Scene, rng: random.Random, name: str) -> None:
        """Saves the picture as `name`, relative to the root, and its scene graph."""
        render(scene, rng).save(self.root / name, quality=QUALITY)
        objects = [
            {"shape": item.shape, "colour": item.colour, "texture": item.texture, "size": item.size}
            | {"centre": [round(float(v), 3) for v in centre], "area": int(area), "bbox": polygons.bounding_box(mask)}
            for item, centre, area, mask in zip(scene.items, scene.centres, scene.areas, scene.masks, strict=True)
        ]
        self._sidecar.write(_dump({"image": name, "image_size": scene.size, "objects": objects}) + "\n")


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def write_datasets(
    directory: Path,
    *,
    seed: int = 0,
    reasonseg: int = DEFAULTS["reasonseg"],
    panoptic: int = DEFAULTS["panoptic"],
    chat: int = DEFAULTS["chat"],
    objects: tuple[int, int] = OBJECTS,
    palette: str = "all",
    report: Callable[[str], None] = say,
) -> dict[str, int]:
    """Writes the three data sets to the new directory `directory`; the arguments alone decide what is in them.

    Args:
        directory: to create; an existing non-empty one is an error.
        seed: any integer.
        reasonseg: images of the ReasonSeg layout: 60 % train, 20 % val, 20 % test.
        panoptic: images of the COCO panoptic layout: 80 % train, 20 % val.
        chat: images of the LLaVA layout.
        objects: fewest and most objects of a scene. The questions of ReasonSeg ask for `OBJECTS` and for all looks.
        palette: what objects look like (`scene.PALETTES`). Of "all" the panoptic categories are shapes, of "few" colours and
            shapes: "red circle".
        report: receives progress lines.

    Returns:
        Number of images by folder.

    Raises:
        UserError: too few images for every split to have one, an unknown palette, or a directory that exists or cannot be
            written.
    """
    directory = Path(directory)
    check_palette(palette)
    for name, number in (("reasonseg", reasonseg), ("panoptic", panoptic), ("chat", chat)):
        if number < LEAST[name]:
            raise UserError(f"multi-task data needs at least {LEAST[name]} images for {name}, got {number}")
    counts: dict[str, int] = {}
    with (
        whole_directory(directory, "the multi-task data sets") as partial,
        open(partial / "scenes.jsonl", "w", encoding="utf-8") as sidecar,
    ):
        writer = _SceneWriter(partial, seed, sidecar, objects, palette)
        for make, number in ((_reasonseg, reasonseg), (_panoptic, panoptic), (_llava, chat)):
            made = make(writer, number)
            report(f"multi-task data: {', '.join(f'{n} images in {folder}' for folder, n in made.items())}")
            counts |= made
    report(f"wrote {directory}")
    return counts


def outline_points(mask: np.ndarray) -> list[list[list[float]]] | None:
    """The outlines of a bool mask [h, w] through the centres of its outermost pixels, as [[x, y], ...] a part.

    This is what OpenCV's fillPoly, which also fills the pixels under the outline, turns back into the mask exactly. None for a
    mask with a hole or with a part too small for an outline of three points.
    """
    parts = []
    for flat in polygons.polygons(mask) or [[]]:
        corners = list(zip(flat[::2], flat[1::2], strict=True))
        points: list[list[float]] = []
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            # The mask lies to the right of the direction of travel; a run ends one pixel before the next corner.
            start = [x0 - (x1 < x0 or y1 > y0), y0 - (y1 < y0 or x1 < x0)]
            end = [x1 - (x1 > x0 or y1 > y0), y1 - (y1 > y0 or x1 < x0)]
            points += [
                p for i, p in enumerate((start, end)) if p != (points[-1] if points else None) and (i == 0 or p != start)
            ]
        if points and points[0] == points[-1]:
            points.pop()
        if len(points) < 3:
            return None
        parts.append(points)
    return parts


def _question(writer: _SceneWriter, rng: random.Random) -> tuple[Scene, ReasoningQuestion, list[list[list[float]]]]:
    """A scene, a question about it, and the outlines of the answer."""
    # The kind is drawn before the scene and kept, so that rejection cannot bend the mix.
    kind = rng.choice(tuple(REASONING_QUESTIONS))
    for _ in range(ATTEMPTS):
        scene = writer.scene(rng, OBJECTS, "all")
        if question := REASONING_QUESTIONS[kind](scene, rng):
            outlines = [outline_points(scene.masks[i]) for i in question.targets]
            if all(outlines):
                return scene, question, [part for parts in outlines for part in parts]
    raise AssertionError(f"no scene for a question of the kind {kind!r} in {ATTEMPTS} attempts")


def _ignored(scene: Scene, targets: tuple[int, ...], rng: random.Random) -> list[list[float]] | None:
    """An octagon clear of the targets, sometimes over a part of another object; None if the place that was drawn is not."""
    reach = IGNORE_RADIUS * scene.size / REFERENCE_SIZE
    x, y = (rng.uniform(reach, scene.size - 1 - reach) for _ in range(2))
    ys, xs = np.nonzero(scene.masks[list(targets)].any(axis=0))
    if np.hypot(xs - x, ys - y).min() < reach + 2:
        return None
    angles = np.arange(8) * np.pi / 4
    return np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], axis=1).round(2).tolist()


def _reasonseg(writer: _SceneWriter, number: int) -> dict[str, int]:
    held = {"val": round(0.2 * number), "test": round(0.2 * number)}
    counts = {"train": number - sum(held.values())} | held
    explanations = []
    for split, images in counts.items():
        folder = writer.root / "reasonseg" / split
        folder.mkdir(parents=True)
        for i in range(images):
            name = f"shapes_{split}_{i:06d}"
            rng = writer.rng(name)
            scene, question, parts = _question(writer, rng)
            is_sentence = rng.random() < 0.5
            texts = list(question.long if is_sentence else question.short)
            rng.shuffle(texts)
            shapes = [{"label": "target", "points": points} for points in parts]
            if rng.random() < IGNORE_SHARE and (points := _ignored(scene, question.targets, rng)):
                shapes.append({"label": "ignore", "points": points})
            if rng.random() < FLAG_SHARE:  # what a flag surrounds has no meaning
                x, y, w, h = polygons.bounding_box(scene.masks[rng.randrange(len(scene.items))])
                shapes.append({"label": "flag", "points": [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]})
            rng.shuffle(shapes)
            (folder / f"{name}.json").write_text(
                _dump({"text": texts, "is_sentence": is_sentence, "shapes": shapes}), encoding="utf-8"
            )
            writer.save(scene, rng, f"reasonseg/{split}/{name}.jpg")
            if split == "train" and rng.random() < EXPLAINED_SHARE:
                explanations.append({"image": f"{name}.jpg", "query": texts[0], "outputs": question.explanation})
    (writer.root / "reasonseg" / "explanatory").mkdir()
    (writer.root / "reasonseg" / "explanatory" / "train.json").write_text(_dump(explanations), encoding="utf-8")
    return {f"reasonseg/{split}": images for split, images in counts.items()}


def _panoptic(writer: _SceneWriter, number: int) -> dict[str, int]:
    things = _things(writer.palette)
    categories = [{"supercategory": "shape", "isthing": 1, "id": i, "name": name} for name, i in things.items()]
    categories.append({"supercategory": "background", "isthing": 0, "id": BACKGROUND, "name": "background"})
    for category, colour in zip(categories, writer.rng("palette").sample(range(1 << 24), len(categories)), strict=True):
        category["color"] = _rgb(colour)
    val = max(1, round(0.2 * number))
    coco, counts = writer.root / "coco", {}
    for split, image_ids in (("train2017", range(1, number - val + 1)), ("val2017", range(number - val + 1, number + 1))):
        (coco / split).mkdir(parents=True)
        maps = coco / "annotations" / f"panoptic_{split}"
        maps.mkdir(parents=True)
        table: dict[str, Any] = {"info": {"description": "shapes, panoptic"}, "licenses": [], "images": [], "annotations": []}
        for image_id in image_ids:
            name = f"{image_id:012d}"
            rng = writer.rng(f"panoptic {name}")
            scene = writer.scene(rng, writer.objects, writer.palette)
            writer.save(scene, rng, f"coco/{split}/{name}.jpg")
            ids, segments = _segments(scene, rng, [things[_name(item, writer.palette)] for item in scene.items])
            Image.fromarray(ids).save(maps / f"{name}.png")
            size = {"height": scene.size, "width": scene.size}
            source = {"license": 1, "coco_url": "", "flickr_url": "", "date_captured": ""}
            table["images"].append({"id": image_id, "file_name": f"{name}.jpg"} | size | source)
            table["annotations"].append({"segments_info": segments, "file_name": f"{name}.png", "image_id": image_id})
        (coco / "annotations" / f"panoptic_{split}.json").write_text(
            _dump(table | {"categories": categories}), encoding="utf-8"
        )
        counts[f"coco/{split}"] = len(image_ids)
    return counts


def _rgb(number: int) -> list[int]:
    return [number % 256, number // 256 % 256, number // 65536]


def _name(item: SceneObject, palette: str) -> str:
    return item.shape if palette == "all" else f"{item.colour} {item.shape}"


def _things(palette: str) -> dict[str, int]:
    """Category name -> id."""
    looks = PALETTES[palette]
    names = looks.shapes if palette == "all" else [f"{colour} {shape}" for colour in looks.colours for shape in looks.shapes]
    return {name: i + 1 + i // 3 for i, name in enumerate(names)}


def _segments(scene: Scene, rng: random.Random, things: list[int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The PNG's pixels, which code segment ids as R + 256 G + 65536 B, and the list of the segments."""
    masks = [*scene.masks, ~scene.masks.any(axis=0)]
    categories = [*things, BACKGROUND]
    pixels = np.zeros((scene.size, scene.size, 3), np.uint8)
    segments = []
    for number, category, mask in zip(rng.sample(range(1, 1 << 24), len(masks)), categories, masks, strict=True):
        pixels[mask] = _rgb(number)
        box = [int(v) for v in polygons.bounding_box(mask)]
        segments.append({"id": number, "category_id": category, "iscrowd": 0, "bbox": box, "area": int(mask.sum())})
    return pixels, segments


def _llava(writer: _SceneWriter, number: int) -> dict[str, int]:
    (writer.root / "llava" / "images").mkdir(parents=True)
    entries = []
    for i in range(number):
        name = f"shapes_chat_{i:06d}"
        rng = writer.rng(name)
        scene = writer.scene(rng, writer.objects, writer.palette)
        writer.save(scene, rng, f"llava/images/{name}.jpg")
        turns = []
        for question, answer in talk.conversation(scene, rng):
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        entries.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
    (writer.root / "llava" / "chat.json").write_text(_dump(entries), encoding="utf-8")
    return {"llava": number}

"""A miniature ReasonSeg layout with the oddities of the real one, for tests.

train: "10_a" (a phrase; explained by its query), "9_b" (three sentences, cp1252; explained by no question's words).
val: "10_a" again (target over ignore and a flag), "dot" (no shapes). test: "turned" (JPEG with an EXIF rotation).
All images are 40 high and 60 wide.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 60


def jpeg(orientation: int | None = None) -> bytes:
    """A picture, with an EXIF orientation if one is given."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    pixels = np.stack([x * 4, y * 6, x + y], -1).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def shape(label: str, *points) -> dict:
    """An outline as labelme writes it."""
    return {
        "label": label,
        "labels": [label],
        "shape_type": "polygon",
        "image_name": "x.jpg",
        "points": list(map(list, points)),
    }


def box(label: str, x0, y0, x1, y1) -> dict:
    """A rectangle's outline; the pixels of all four borders belong to it."""
    return shape(label, (x0, y0), (x1, y0), (x1, y1), (x0, y1))


def entry(text, is_sentence, *shapes) -> dict:
    """The content of a NAME.json."""
    return {"text": text, "is_sentence": is_sentence, "shapes": list(shapes)}


def entries() -> dict[str, dict]:
    """The JSON files by "split/NAME", to be damaged at will."""
    return {
        "train/10_a": entry(["  the animal that barks"], False, box("target", 5, 5, 20, 20)),
        "train/9_b": entry(
            ["What\u2019s the owner\u2019s cup?", "Where is the cup?", "Which thing holds tea?"],
            True,
            box("target", 30, 10, 50, 30),
        ),
        "val/10_a": entry(
            ["the lid"],
            False,
            box("target", 10, 10, 19, 19),
            box("Ignore area", 5, 5, 30, 30),
            box("flag", 0, 0, 59, 39),
        ),
        "val/dot": entry(["What is not there?"], True),
        "test/turned": entry(["the left half"], False, box("target", 0, 0, 29, 39)),
    }


def explanations() -> list[dict]:
    """explanatory/train.json."""
    return [
        {"image": "10_a.jpg", "query": "The animal that barks ", "outputs": "Dogs bark."},
        {"image": "9_b.jpg", "query": "What can one drink from?", "outputs": "One drinks from a cup."},
    ]


def write(root: Path, changes: dict[str, dict] | None = None, explained: list | None = None) -> Path:
    """Writes the layout to `root`; `changes` replace or add JSON files, `explained` replaces the explanations."""
    for key, value in (entries() | (changes or {})).items():
        path = root / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json.dumps(value, ensure_ascii=False).encode("cp1252" if key == "train/9_b" else "utf-8"))
        path.with_suffix(".jpg").write_bytes(jpeg(6 if key == "test/turned" else None))
    (root / "explanatory").mkdir()
    (root / "explanatory" / "train.json").write_text(json.dumps(explanations() if explained is None else explained))
    return root

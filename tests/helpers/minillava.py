"""A miniature file of LLaVA chats with the oddities of the real ones, and its images, for tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.minicoco import png
from tests.helpers.minirefcoco import jpeg


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    """Turns that alternate, from `first` on."""
    sides = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": sides[i % 2], "value": value} for i, value in enumerate(values)]


PICTURE = Image.fromarray(np.full((20, 30, 3), 90, np.uint8))
ANIMATED = "ocr_vqa/images/0006.jpg"  # lies there as .gif
SAMPLES = [
    {"id": "004539375", "image": "00453/004539375.jpg", "conversations": turns("Describe it briefly.\n<image>", "a red cup ")},
    {"id": "text", "model": "", "conversations": turns("Who are you?", "A model.")},
    {
        "id": 7,
        "image": "coco/train2017/7.jpg",
        "conversations": turns("<image>\nWhat is it?", "A dog.", "Its colour?", "Brown."),
    },
    {"id": 8, "image": "gqa/images/8.jpg", "conversations": turns("Hello.", "<image>\nWhere?", "Here.", first="gpt")},
    {"id": 9, "image": "vg/VG_100K/9.jpg", "conversations": turns("<image>\nWho?", "A man.", "And then?")},
    {"id": 10, "image": ANIMATED, "conversations": turns("Title?\n<image>", "Cats")},
    {"id": 11, "image": "textvqa/train_images/11.jpg", "conversations": turns("No <image> answer")},
]


def samples() -> list[dict[str, Any]]:
    """The samples, to be damaged at will."""
    return copy.deepcopy(SAMPLES)


def write(root: Path, *, table: Any = None, name: str = "llava_v1_5_mix665k.json", images: str = "images") -> Path:
    """Writes the layout to `root`; `table` replaces the samples, `images` says where the folder is."""
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(SAMPLES if table is None else table))
    for sample in SAMPLES:
        if "image" in sample:
            path = root / images / sample["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if sample["image"] == ANIMATED:
                PICTURE.save(path.with_suffix(".gif"))
            else:
                path.write_bytes(png(PICTURE) if sample["id"] == 9 else jpeg(PICTURE))
    return root

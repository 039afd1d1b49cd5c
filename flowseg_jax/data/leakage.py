"""Which picture an image is, whatever data set holds it, so that one shown in training is not met again at evaluation.

RefCOCO's evaluation images are part of COCO train2014, whose copies in other data sets bear other names.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

# COCO_train2014_000000581857, 000000581857, and COCO_train2014_000000581857_12 as refs name an object's image
_COCO = re.compile(r"(?:COCO_[a-z]+20\d\d_)?(\d{12})(?:_\d+)?")


def image_key(file_name: str, source: str = "") -> str:
    """The identity of an image: "coco:581857" under any of COCO's names, else "<source>:<path without suffix>".

    Args:
        file_name: path or name of the image.
        source: name of the layout; names that are not COCO's mean something within one layout only.
    """
    path = PurePosixPath(file_name)
    coco = _COCO.fullmatch(path.stem)
    return f"coco:{int(coco.group(1))}" if coco else f"{source}:{path.with_suffix('') if path.name else path}"


def is_training(split: str) -> bool:
    """Whether a split of this name is trained on; every other one is held out for evaluation."""
    return split.startswith("train")

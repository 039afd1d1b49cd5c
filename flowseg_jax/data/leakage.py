"""The identity of an image across data sets, so that no training image comes up again in evaluation.

RefCOCO's evaluation images are part of COCO train2014, and copies in other data sets have other names and perhaps other bytes.
So COCO's images are identified by their number. All others are identified by the content of their files, because names mean
nothing: two cameras may both have written a 000000000001.jpg.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import PurePosixPath

COCO_LAYOUTS = ("refcoco", "refcoco+", "refcocog", "grefcoco", "coco-panoptic", "coco-instances", "llava")
# COCO_train2014_000000581857, also with the suffix that refs give an object's image
_COCO_NAME = re.compile(r"COCO_[a-z]+20\d\d_(\d{12})(?:_\d+)?", re.ASCII)
_NUMBER = re.compile(r"(\d{12})(?:_\d+)?", re.ASCII)
_COCO_FOLDER = re.compile(r"(?:train|val|test|unlabeled)20\d\d", re.ASCII)


def coco_number(file_name: str, layout: str) -> int | None:
    """COCO's number of an image; None for one that is not known to be COCO's.

    A name that begins like COCO_train2014_ is COCO's anywhere. A name of twelve digits is in COCO's own layouts, and there only
    without a folder or in one of COCO's, such as coco/train2017.

    Args:
        file_name: path or name of the image.
        layout: name of the layout that it comes from.
    """
    path = PurePosixPath(file_name)
    match = _COCO_NAME.fullmatch(path.stem)
    if not match and layout in COCO_LAYOUTS and (len(path.parts) == 1 or _COCO_FOLDER.fullmatch(path.parent.name)):
        match = _NUMBER.fullmatch(path.stem)
    return int(match[1]) if match else None


def name_key(file_name: str) -> str:
    """The key of an image that is known by its name alone: its path without the suffix."""
    path = PurePosixPath(file_name)
    return f"name:{path.with_suffix('') if path.name else path}"


@dataclasses.dataclass(frozen=True)
class ImageIdentity:
    """What identifies an image.

    Two images of COCO are the same if their numbers agree. Any other two are the same if their content agrees, which finds
    copies of COCO's images in other data.

    Attributes:
        number: COCO's, None for an image that is not from COCO.
        content: a digest of the file.
    """

    number: int | None
    content: str

    @property
    def identity(self) -> str:
        """Equal for the same image of COCO, and for the same image of other sources."""
        return f"content:{self.content}" if self.number is None else f"coco:{self.number}"

    @property
    def holds_out(self) -> tuple[str, ...]:
        """The keys that an image of an evaluation split holds out of training."""
        return (self.identity,) if self.number is None else (self.identity, f"copy:{self.content}")

    @property
    def held_out_by(self) -> tuple[str, ...]:
        """The keys of which one is enough to hold this image out of training."""
        return f"content:{self.content}", f"copy:{self.content}" if self.number is None else self.identity


def is_train_split(split: str) -> bool:
    """Whether a split of this name is trained on; every other one is held out for evaluation."""
    return split.startswith("train")

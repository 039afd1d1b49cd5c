"""A few examples of an evaluation, kept for the eye: good ones, random ones, failures.

Which are kept depends only on their ids, never on the order or the batch in which they were evaluated.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

GOOD, FAILED = 0.8, 0.5  # IoU from which an example counts as good, below which as failed
KINDS = ("good", "random", "failed")


@dataclasses.dataclass(frozen=True)
class GallerySample:
    """One sample with its pictures at the original image size.

    Attributes:
        record: the sample's line in the JSONL.
        image: uint8 [H, W, 3]. truth, selected, best: bool [H, W].
    """

    record: Mapping[str, Any]
    image: UInt8[np.ndarray, "y x 3"]
    truth: Bool[np.ndarray, "y x"]
    selected: Bool[np.ndarray, "y x"]
    best: Bool[np.ndarray, "y x"]


def choose(records: Sequence[Mapping[str, Any]], size: int) -> dict[str, list[int]]:
    """At most `size` samples of each kind: those whose ids hash lowest, a random draw that is the same every time.

    Returns:
        Kind -> indices into `records`, in a fixed order; a sample stands under its most telling kind only.
    """

    def draw(members: Iterable[int]) -> list[int]:
        return sorted(members, key=lambda i: _priority(records[i]))[:size]

    kinds = {
        "failed": (i for i, r in enumerate(records) if r["iou"] < FAILED),
        "good": (i for i, r in enumerate(records) if r["iou"] >= GOOD and not r["failed"]),
        "random": range(len(records)),
    }
    seen: set[int] = set()
    chosen = {}
    for kind, members in kinds.items():
        chosen[kind] = [i for i in draw(members) if i not in seen]
        seen.update(chosen[kind])
    return {kind: chosen[kind] for kind in KINDS}


def spread(count: int, size: int) -> list[int]:
    """At most `size` of the indices below `count`, at even distances: the same ones at every evaluation of a split."""
    return sorted({i * count // size for i in range(size)})


def _priority(record: Mapping[str, Any]) -> tuple[int, str]:
    key = f"{record['image_id']}/{record['ann_id']}/{record['sentence_id']}"
    return zlib.crc32(key.encode()), key

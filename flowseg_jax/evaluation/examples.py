"""A few examples of an evaluation, kept for the eye: good ones, random ones, failures.

Which are kept depends only on their ids, never on the order or the batch in which they were evaluated.
"""

from __future__ import annotations

import dataclasses
import heapq
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

GOOD, FAILED = 0.8, 0.5  # IoU from which an example counts as good, below which as failed
KINDS = ("good", "random", "failed")


@dataclasses.dataclass(frozen=True)
class Example:
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


class Gallery:
    """Keeps at most `size` examples of each kind: those whose ids hash lowest, a random draw that is the same every time."""

    def __init__(self, size: int):
        self._size = size
        self._kept: dict[str, list[tuple[int, str, Example]]] = {kind: [] for kind in KINDS}

    def wants(self, record: Mapping[str, Any]) -> list[str]:
        """The kinds in which this record would be kept now (so that masks are unpacked only when needed)."""
        kinds = ["random"]
        if record["iou"] >= GOOD and not record["failed"]:
            kinds.append("good")
        elif record["iou"] < FAILED:
            kinds.append("failed")
        priority = self._priority(record)
        return [
            kind
            for kind in kinds
            if len(self._kept[kind]) < self._size or (self._kept[kind] and priority > self._kept[kind][0][:2])
        ]

    def add(self, example: Example, kinds: list[str]) -> None:
        for kind in kinds:
            heapq.heappush(self._kept[kind], (*self._priority(example.record), example))
            if len(self._kept[kind]) > self._size:
                heapq.heappop(self._kept[kind])

    def examples(self) -> dict[str, list[Example]]:
        """kind -> examples, in a fixed order; an example stands under its most telling kind only."""
        seen: set[str] = set()
        kept: dict[str, list[Example]] = {}
        for kind in ("failed", "good", "random"):
            rows = [
                (key, example)
                for _, key, example in sorted(self._kept[kind], key=lambda r: r[:2], reverse=True)
                if key not in seen
            ]
            seen.update(key for key, _ in rows)
            kept[kind] = [example for _, example in rows]
        return {kind: kept[kind] for kind in KINDS}

    @staticmethod
    def _priority(record: Mapping[str, Any]) -> tuple[int, str]:
        key = f"{record['image_id']}/{record['ann_id']}/{record['sentence_id']}"
        return -zlib.crc32(key.encode()), key

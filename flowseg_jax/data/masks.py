"""COCO segmentations (polygons, run-length codes) to one compressed run-length code an object, and back to arrays.

pycocotools trusts its input: a polygon of two points is taken for a box, a NaN becomes a random outline and a damaged code
reads out of bounds. Everything is therefore checked here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int64, UInt8
from pycocotools import mask as coco

from flowseg_jax.errors import UserError, quoted

_DIGITS = 7  # of a run in compressed counts, 5 bits each: 2^34 pixels
_LONGEST_OUTLINE = 4_000_000  # pixels that an object's outlines run along: pycocotools' memory and time grow with them


def _polygon(points: Any, height: int, width: int, where: str) -> list[float]:
    if not isinstance(points, list) or not all(isinstance(p, (int, float)) and not isinstance(p, bool) for p in points):
        raise UserError(f"{where}: a polygon must be a flat list of numbers [x0, y0, x1, y1, ...]")
    if len(points) < 6 or len(points) % 2:
        raise UserError(f"{where}: a polygon needs at least 3 points (x, y pairs), got {len(points)} numbers")
    # Generous bounds: annotators overshoot the border, but a coordinate that is an image away is damage (and costs memory).
    reach = 2 * max(height, width)
    for p in points:
        if not abs(p) <= reach:  # neither is NaN; a whole number may be too large to become a float
            raise UserError(f"{where}: polygon coordinate {quoted(p)} is not a position in a {width}x{height} image")
    return [float(p) for p in points]


def _length(polygon: list[float]) -> float:
    """How many pixels a closed outline runs along."""
    points = np.array(polygon).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def run_lengths(counts: str, height: int, width: int) -> Int64[np.ndarray, " runs"]:
    """The run lengths of COCO's compressed counts: 5 bits a character, differences to the last but one run.

    Raises:
        ValueError: they are damaged, or do not add up to height x width.
    """
    pixels = height * width
    codes = np.frombuffer(counts.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63:
        raise ValueError("a character that is none of a code")
    last = codes & 32 == 0  # of a number
    if not last[-1]:
        raise ValueError("ends inside a number")
    ends = np.flatnonzero(last)
    digits = np.diff(ends, prepend=-1)
    if digits.max() > _DIGITS:
        raise ValueError("a number of too many digits")
    shifts = 5 * (np.arange(codes.size) - np.repeat(ends - digits + 1, digits))
    values = np.add.reduceat((codes & 31) << shifts, ends - digits + 1)
    values -= (codes[ends] >> 4 & 1) << 5 * digits  # the highest bit is the sign
    if abs(values).max() > pixels:
        raise ValueError(f"a run longer than the {pixels} pixels of the image")
    runs = values
    runs[1::2], runs[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])  # the first two have no run before them
    if runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"run lengths add up to {runs.sum()}, not to height x width = {pixels}")
    return runs


def _run_length(code: dict[str, Any], height: int, width: int, where: str) -> dict[str, Any]:
    counts, size = code.get("counts"), code.get("size")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise UserError(f"{where}: run-length size {quoted(size)} differs from the image's [height, width] [{height}, {width}]")
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        try:
            run_lengths(counts, height, width)
        except ValueError as error:
            raise UserError(f"{where}: damaged compressed run-length counts ({error})") from None
        return {"size": [height, width], "counts": counts.encode("ascii")}
    if not isinstance(counts, list) or not all(isinstance(c, int) and not isinstance(c, bool) for c in counts):
        raise UserError(f"{where}: run-length counts must be a string or a list of whole numbers")
    if any(r < 0 for r in counts) or sum(counts) != height * width:
        raise UserError(f"{where}: run lengths add up to {quoted(sum(counts))}, not to height x width = {height * width}")
    return coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def rasterise(segmentation: Any, height: int, width: int, where: str) -> str | None:
    """The union of an object's parts as compressed run-length counts.

    Args:
        segmentation: COCO's field: a list of polygons, a run-length code (compressed or not) or a list of run-length codes.
        height, width: the image's size, pixels.
        where: file and field, for the message.

    Returns:
        The counts, or None for a mask without a single pixel.

    Raises:
        UserError: the segmentation is damaged.
    """
    codes = _codes(segmentation, height, width, where)
    union = codes[0] if len(codes) == 1 else coco.merge(codes)
    if not coco.area(union):
        return None
    return union["counts"].decode("ascii")


def single_cover(segmentation: Any, height: int, width: int, where: str) -> str:
    """Compressed run-length counts of the pixels that exactly one part of an object covers; empty where no two parts overlap.

    Arguments and errors are those of `rasterise`.
    """
    layers: list[tuple[dict, dict | None]] = [(code, None) for code in _codes(segmentation, height, width, where)]
    while len(layers) > 1:  # two by two, never all at once: there may be thousands, as large as the image
        layers = [_overlaid(*layers[i : i + 2]) for i in range(0, len(layers), 2)]
    union, again = layers[0]
    if again is None or not coco.area(again):
        return ""
    return encode(coco.decode(union) - coco.decode(again))


def _overlaid(one: tuple[dict, dict | None], other: tuple[dict, dict | None] | None = None) -> tuple[dict, dict | None]:
    """(what is covered, what is covered more than once) by both of two groups of parts."""
    if other is None:
        return one
    both = coco.merge([one[0], other[0]], intersect=True)
    again = coco.merge([both, *(code for code in (one[1], other[1]) if code is not None)])
    return coco.merge([one[0], other[0]]), again


def fill_polygons(segmentation: Any, height: int, width: int, where: str) -> str:
    """Compressed run-length counts of an object's polygons, each filled by OpenCV on its points cut to whole numbers.

    So PSALM draws its truth. Empty where that is the union of the parts too, and for a segmentation without polygons.
    Arguments and errors are those of `rasterise`.
    """
    codes = _codes(segmentation, height, width, where)
    if isinstance(segmentation, dict) or isinstance(segmentation[0], dict):
        return ""
    mask = np.zeros((height, width), np.uint8)
    for polygon in segmentation:
        cv2.fillPoly(mask, [np.array(polygon, np.int32).reshape(-1, 2)], 1)
    return "" if np.array_equal(mask, coco.decode(coco.merge(codes))) else encode(mask)


def _codes(segmentation: Any, height: int, width: int, where: str) -> list[dict[str, Any]]:
    """The run-length codes of an object's parts, checked."""
    if isinstance(segmentation, dict):
        return [_run_length(segmentation, height, width, where)]
    if isinstance(segmentation, list) and segmentation and all(isinstance(s, dict) for s in segmentation):
        return [_run_length(s, height, width, f"{where}[{i}]") for i, s in enumerate(segmentation)]
    if isinstance(segmentation, list) and segmentation:
        polygons = [_polygon(p, height, width, f"{where}[{i}]") for i, p in enumerate(segmentation)]
        if (length := sum(map(_length, polygons))) > _LONGEST_OUTLINE:
            raise UserError(f"{where}: its outlines run along {length:.0f} pixels, more than {_LONGEST_OUTLINE}")
        return coco.frPyObjects(polygons, height, width)
    raise UserError(f"{where}: expected polygons or a run-length code, got {quoted(segmentation)}")


def encode(mask: UInt8[np.ndarray, "h w"]) -> str:
    """Compressed run-length counts of a 0/1 mask."""
    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode("ascii")


def decode(rles: Sequence[str], height: int, width: int) -> UInt8[np.ndarray, "n h w"]:
    """Masks (0/1) of compressed run-length counts."""
    if not rles:
        return np.zeros((0, height, width), np.uint8)
    stacked = coco.decode([{"size": [height, width], "counts": r.encode()} for r in rles])
    return np.ascontiguousarray(np.moveaxis(stacked, -1, 0))

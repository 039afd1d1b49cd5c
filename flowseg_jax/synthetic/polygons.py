"""Turns a mask into what COCO annotations hold: polygons along the pixel edges, or run lengths."""

from __future__ import annotations

import numpy as np

# Directions of travel along pixel edges, with the mask on the right-hand side (image y points down).
_EAST, _SOUTH, _WEST, _NORTH = range(4)
_STEP = ((1, 0), (0, 1), (-1, 0), (0, -1))


def polygons(mask: np.ndarray) -> list[list[float]] | None:
    """Traces the outlines of a non-empty bool mask [h, w]: one flat [x0, y0, x1, y1, ...] list a part, corners in pixel edges.

    Parts touch at corners only. Returns None for a mask with a hole, which COCO polygons cannot express.
    """
    x0, y0, w, h = (int(v) for v in bounding_box(mask))
    padded = np.zeros((h + 2, w + 2), bool)
    padded[1:-1, 1:-1] = mask[y0 : y0 + h, x0 : x0 + w]
    inside, above, left = padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]
    edges: dict[tuple[int, int], list[int]] = {}

    def add(where: np.ndarray, direction: int, dx: int, dy: int) -> None:
        ys, xs = np.nonzero(where)
        for x, y in zip((xs + (x0 + dx)).tolist(), (ys + (y0 + dy)).tolist(), strict=True):
            edges.setdefault((x, y), []).append(direction)

    add(inside & ~above, _EAST, 0, 0)  # top edge of pixel (x, y) runs from (x, y) to (x + 1, y)
    add(~inside & above, _WEST, 1, 0)
    add(inside & ~left, _NORTH, 0, 1)
    add(~inside & left, _SOUTH, 0, 0)
    parts = []
    while edges:
        start = min(edges)  # leftmost, so no two parts touch here and arriving again closes the loop
        at, previous, corners, area = start, None, [], 0
        while previous is None or at != start:
            outgoing = edges[at]
            if previous is None:
                direction = outgoing[0]
            else:  # where two parts touch, the right turn stays with the part
                turns = ((previous + 1) % 4, previous, (previous + 3) % 4)
                direction = next(d for d in turns if d in outgoing)
            outgoing.remove(direction)
            if not outgoing:
                del edges[at]
            if direction != previous:
                corners.append(at)
            step = _STEP[direction]
            after = (at[0] + step[0], at[1] + step[1])
            area += at[0] * after[1] - after[0] * at[1]
            at, previous = after, direction
        if area < 0:
            return None
        parts.append([float(v) for corner in corners for v in corner])
    return parts


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Uncompressed COCO RLE of a bool mask [h, w]: column-major run lengths that start with the background."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def bounding_box(mask: np.ndarray) -> list[float]:
    """[x, y, width, height] of a non-empty bool mask [h, w]."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(xs[0]), float(ys[0]), float(xs[-1] - xs[0] + 1), float(ys[-1] - ys[0] + 1)]

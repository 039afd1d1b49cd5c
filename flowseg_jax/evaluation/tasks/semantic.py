"""mIoU, from the confusion matrix of pixels, on the host.

mIoU is the mean, over the categories that occur in the truth, of IoU = diagonal / (row + column - diagonal) of the confusion
matrix of all pixels that are not void. Pixels of a crowd region have its category.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from flowseg_jax.evaluation.tasks.panoptic import Segments, exact_mean

Record = Mapping[str, Any]


def count_pixels(found: Int[np.ndarray, "y x"], truth: Segments) -> dict[str, list]:
    """The confusion of categories.

    Args:
        found: predicted category of every pixel, -1 for none.
        truth: the true segments.

    Returns:
        confusion: [true category, predicted category, pixels] of each pair that occurs; void pixels are left out.
    """
    category = np.array([-1, *truth.category])[truth.ids]
    pairs, pixels = np.unique(np.stack([category, found])[:, truth.ids > 0], axis=1, return_counts=True)
    return {"confusion": [[int(t), int(f), int(n)] for (t, f), n in zip(pairs.T, pixels, strict=True)]}


def semantic_table(records: Iterable[Record], categories: Sequence[str]) -> dict[str, Any]:
    """mIoU, in percent, and "by_category": {number: {"name", "iou"}} of each category that occurs in the truth.

    Args:
        records: with `confusion` of `count_pixels`.
        categories: their names.
    """
    matrix = np.zeros((len(categories), len(categories) + 1), np.int64)  # the last column: predicted to be nothing
    for record in records:
        for true, found, pixels in record["confusion"]:
            matrix[true, found] += pixels
    right, rows, columns = matrix.diagonal(), matrix.sum(1), matrix.sum(0)[:-1]
    iou = {
        c: 100 * int(right[c]) / int(rows[c] + columns[c] - right[c]) for c in range(len(categories)) if rows[c]
    }  # true division of integers: correctly rounded
    by_category = {str(c): {"name": categories[c], "iou": value} for c, value in iou.items()}
    return {"miou": exact_mean(iou.values()), "categories": len(iou), "by_category": by_category}

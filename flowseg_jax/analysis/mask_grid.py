"""What the grid of the mask logits itself costs: a perfect mask on the grid, measured as an evaluation measures.

A perfect model gives every cell of the grid the share of it that the truth covers, minus one half. Brought to the original size
and thresholded as every mask is, that is still not the truth: finer than a cell the grid knows nothing. No model on that grid
can be expected to do better, whatever it learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from flowseg_jax.analysis import page
from flowseg_jax.analysis.runner import AnalysisRunner
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, postprocess
from flowseg_jax.reports import plots
from flowseg_jax.system.console import heartbeat

TIMES = (Fraction(1), Fraction(4, 3), Fraction(2), Fraction(4))  # grids that are looked at, as multiples of the model's own


class PerfectMask(NamedTuple):
    """A truth on a grid: the family of its expression, and intersection and union with itself at the original size, pixels."""

    family: str
    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """In [0, 1]."""
        return metrics.iou(self.intersection, self.union)


def on_grid(truth: Bool[np.ndarray, "y x"], where: postprocess.ResizeMatrices, row: int) -> Bool[np.ndarray, "y x"]:
    """The truth as a perfect model on this grid answers it.

    Args:
        truth: at the original size.
        where: how the grids of a batch lie on their images. row: which of them.
    """
    h, w = truth.shape
    cells = where.cover_rows[row][:, :h] @ truth.astype(np.float32) @ where.cover_cols[row][:, :w].T
    return where.rows[row][:h] @ (cells - 0.5) @ where.cols[row][:w].T > 0


def measure(source: AnalysisRunner, grids: Sequence[int]) -> dict[int, list[PerfectMask]]:
    """{side of the grid: a perfect mask of every sample}, in the order of the split.

    Raises:
        UserError: the split holds no expression.
    """
    found: dict[int, list[PerfectMask]] = {side: [] for side in grids}
    with heartbeat("analyze mask-grid"):
        for batch in source.evaluation.open(source.split, images=source.images):
            padded = batch.views.sam_images.shape[1]
            for side, masks in found.items():
                where = postprocess.geometry(
                    batch.views.resized_hw, batch.sizes, grid=(side, side), padded_size=padded, bucket=batch.bucket
                )
                for query_round in batch.rounds:
                    for row, samples in enumerate(query_round.samples):
                        counted = ~batch.ignored[row][0] if samples else None
                        for sample, truth in zip(samples, query_round.truth[row], strict=True):
                            mask = on_grid(truth, where, row)
                            both, either = (int((x & counted).sum()) for x in (mask & truth, mask | truth))
                            masks.append(PerfectMask(sample.family, both, either))
    if not any(found.values()):
        raise UserError("the split holds no expression to measure; prepare it, or choose another split")
    return found


def summarise(masks: Sequence[PerfectMask]) -> dict[str, Any]:
    """n, ciou, giou and p_at 0.5, 0.7 and 0.9 of perfect masks; percent."""
    ious, union = np.array([mask.iou for mask in masks]), sum(mask.union for mask in masks)
    return {
        "n": len(masks),
        "ciou": 100 * sum(mask.intersection for mask in masks) / union if union else None,
        "giou": 100 * float(ious.mean()),
        "p_at": {str(least): 100 * float((ious >= least).mean()) for least in (0.5, 0.7, 0.9)},
    }


def run(source: AnalysisRunner, out: Path) -> Path:
    """Writes `mask_grid_<split>.json` and `.html`; returns the page."""
    own = source.evaluation.model.cfg.mask_grid_size
    grids = {side: summarise(masks) for side, masks in measure(source, [round(own * times) for times in TIMES]).items()}
    body = [
        page.heading("A perfect mask on the grid", "Percent. The first row is the model's own grid."),
        page.table(
            ["grid", "n", "cIoU", "gIoU", "P@0.5", "P@0.7", "P@0.9"],
            [[f"{side} x {side}", r["n"], r["ciou"], r["giou"], *r["p_at"].values()] for side, r in grids.items()],
        ),
        plots.lines(
            {
                "P@0.9": [(side, r["p_at"]["0.9"]) for side, r in grids.items()],
                "gIoU": [(side, r["giou"]) for side, r in grids.items()],
            },
            x="cells along a side",
            y="percent",
            x_range=(own, max(grids)),
            y_range=(0, 100),
        ),
    ]
    about = [f"{grids[own]['n']} samples of {source.split}, {source.about['images'] or 'all'} images."]
    result = {**source.about, "grids": {str(side): row for side, row in grids.items()}}
    found = {"conclusion": finding(own, grids), "origin": source.origin}
    return page.write(
        out, f"mask_grid_{source.split}", f"What the mask grid costs: {source.split}", about, result, body, **found
    )


def finding(own: int, grids: dict[int, dict[str, Any]]) -> str:
    """What the model's own grid allows, and the next finer one, in a sentence."""
    finer = min(side for side in grids if side > own)
    ours, theirs = grids[own], grids[finer]
    return (
        f"A perfect mask on the model's {own} x {own} cells has a gIoU of {ours['giou']:.1f} and a P@0.9 of "
        f"{ours['p_at']['0.9']:.1f}; on {finer} x {finer} it would be {theirs['giou']:.1f} and {theirs['p_at']['0.9']:.1f}."
    )

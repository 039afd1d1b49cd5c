"""What BAR does to the selected masks.

band            share of the image that lies in the band along the mask's boundary, the only place where BAR changes logits,
                on the grid of the mask logits; and the area of all bands as a share of that of all masks
IoU             at the original size, before and after
boundary IoU    IoU of both masks' boundary regions: the pixels of a mask within d of its outline, d = 2 % of the image's
                diagonal (Cheng et al., Boundary IoU, CVPR 2021). The image's edge is an outline.
helped, harmed  share of the samples whose IoU is higher, lower after BAR
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flowseg_jax.analysis import page
from flowseg_jax.analysis.runner import AnalysisRunner, SampleResult
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, postprocess
from flowseg_jax.models.flowseg import FlowSeg
from flowseg_jax.models.outputs import ImageCache
from flowseg_jax.reports import plots
from flowseg_jax.types import ExpressionQueries

EXAMPLES = 3  # on the page, of each kind
DILATION = 0.02  # of the diagonal


def before_and_after(
    model: FlowSeg,
    cache: ImageCache,
    questions: ExpressionQueries,
    truth: Float[Array, "b k h w"],
    inside: Float[Array, "b h w"],
) -> tuple[dict, Array]:
    """The selected mask's logits before and after BAR, and what its band covers; traced.

    Returns:
        {"band", "mask": [B, K]}, shares of the image in [0, 1]; mask logits [B, K, 2, h, w].
    """
    found = model.predict_cached(cache, questions)
    before = postprocess.top_k_masks(found, 1).logits[:, :, 0]
    after = model.refine_masks(before, found.mask_features)
    area = lambda cells: (cells * inside[:, None]).sum((-2, -1))  # noqa: E731
    edge = model.boundary.band(before)
    whole = area(jnp.ones_like(before))
    return {"band": area(edge) / whole, "mask": area(before > 0) / whole}, jnp.stack([before, after], 2)


def boundary(mask: Bool[np.ndarray, "y x"], distance: int) -> Bool[np.ndarray, "y x"]:
    """The pixels of a mask within `distance` steps (to eight neighbours) of a pixel outside it; beyond the image is outside."""
    inner = cv2.erode(np.pad(mask.astype(np.uint8), 1), np.ones((3, 3), np.uint8), iterations=distance)
    return mask & (inner[1:-1, 1:-1] == 0)


def boundary_iou(
    mask: Bool[np.ndarray, "y x"], truth: Bool[np.ndarray, "y x"], ignored: Bool[np.ndarray, "y x"] | None = None
) -> float:
    """Boundary IoU in [0, 1] of two masks of an image's size; 1 where neither has a boundary. Ignored pixels count nowhere."""
    distance = max(1, round(DILATION * float(np.hypot(*mask.shape))))
    ours, theirs = boundary(mask, distance), boundary(truth, distance)
    if ignored is not None:
        ours, theirs = ours & ~ignored, theirs & ~ignored
    return metrics.iou(int((ours & theirs).sum()), int((ours | theirs).sum()))


def with_boundary(measured: SampleResult) -> SampleResult:
    """The sample with `boundary_iou` [N] in [0, 1] of its masks among its values."""
    found = np.array([boundary_iou(mask, measured.truth, measured.ignored) for mask in measured.masks])
    return dataclasses.replace(measured, values={**measured.values, "boundary_iou": found})


def gain(measured: SampleResult) -> float:
    """IoU after BAR minus IoU before, in points."""
    return 100 * float(measured.iou[1] - measured.iou[0])


def summarise(measured: Sequence[SampleResult]) -> dict[str, Any]:
    """Means of the bands, of iou and boundary_iou ([before, after]), and the shares helped and harmed; percent."""
    iou = np.array([m.iou for m in measured])
    edge, area = ([float(m.values[name]) for m in measured] for name in ("band", "mask"))
    mean = lambda values: (100 * np.mean(values, 0)).tolist()  # noqa: E731
    return {
        "n": len(measured),
        "band_of_image": mean(edge),
        "band_of_mask": 100 * sum(edge) / sum(area) if sum(area) else None,
        "iou": mean(iou),
        "boundary_iou": mean([m.values["boundary_iou"] for m in measured]),
        "helped": mean(iou[:, 1] > iou[:, 0]),
        "harmed": mean(iou[:, 1] < iou[:, 0]),
    }


def run(source: AnalysisRunner, out: Path) -> Path:
    """Writes `boundary_<split>.json` and `.html`; returns the page. Raises UserError for a model without BAR."""
    if not source.evaluation.model.cfg.boundary.enabled:
        raise UserError("the model has no boundary refinement (model.boundary.enabled is False): there is nothing to diagnose")
    measured, most = [], []
    for m in map(with_boundary, source.measure(before_and_after, "bar")):
        measured.append(m.figures())
        most = sorted([*most, m], key=gain)
        most = most[:EXAMPLES] + most[EXAMPLES:][-EXAMPLES:]  # those that lose most, and those that gain most
    groups = {name: summarise(rows) for name, rows in page.groups(measured, family=lambda m: m.sample.family).items()}
    alpha = float(np.asarray(source.evaluation.model.params["boundary"]["alpha"]).item())
    change = [gain(m) for m in measured]
    reach = max(*map(abs, change), 0.1)
    counts, edges = np.histogram(change, 21, (-reach, reach))
    middles = (edges[1:] + edges[:-1]) / 2
    columns = ["n", "band, % of image", "band, % of mask", "IoU", "after", "boundary IoU", "after", "helped", "harmed"]
    body = [
        page.heading("Before and after", f"alpha is {alpha:.4g}: BAR moves a logit in the band by at most that."),
        page.table(
            ["", *columns],
            [
                [name, r["n"], r["band_of_image"], r["band_of_mask"], *r["iou"], *r["boundary_iou"], r["helped"], r["harmed"]]
                for name, r in groups.items()
            ],
        ),
        page.heading("Change of IoU", "Samples by IoU after BAR minus IoU before, in points."),
        plots.bars([(f"{m:.2g}", float(n)) for m, n in zip(middles, counts, strict=True)], x="points", y="samples"),
        page.heading("Examples", "From the samples that gained most to those that lost most."),
        page.gallery(_thumbnails(most[::-1], out, f"boundary_{source.split}"), out),
    ]
    about = [f"{len(measured)} samples of {source.split}, {source.about['images'] or 'all'} images."]
    result = {**source.about, "alpha": alpha, "groups": groups}
    found = {"conclusion": finding(groups["all"]), "origin": source.origin}
    return page.write(out, f"boundary_{source.split}", f"Boundary refinement: {source.split}", about, result, body, **found)


def finding(figures: dict[str, Any]) -> str:
    """What BAR gains and costs, in a sentence."""
    (before, after), (edge, refined) = figures["iou"], figures["boundary_iou"]
    return (
        f"BAR changes the mean IoU by {after - before:+.2f} points, to {after:.1f}, and the boundary IoU by "
        f"{refined - edge:+.2f}, to {refined:.1f}; it helps {figures['helped']:.1f} % of the samples and harms "
        f"{figures['harmed']:.1f} %."
    )


def _thumbnails(measured: Sequence[SampleResult], out: Path, name: str) -> list[page.Thumbnail]:
    shown = []
    for m in measured:
        panels = [("truth", m.truth, True)]
        panels += [
            (f"{when}: {100 * iou:.1f}, boundary {100 * edge:.1f}", mask, False)
            for when, mask, iou, edge in zip(("before", "after"), m.masks, m.iou, m.values["boundary_iou"], strict=True)
        ]
        shown.append(page.picture(out / name, len(shown), m.sample, m.image, panels, f"{gain(m):+.2f} points of IoU"))
    return shown

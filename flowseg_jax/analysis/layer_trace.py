"""What each decoder layer does with the condition and with the choice.

Prediction j of J = L + 1 is made after j layers; prediction 0 is made of the queries before any layer. C(j) is the sentence's
condition there, bg(j) the background row, q a query as the class head sees it. The head selects by cos(q, C) - cos(q, bg).

    margin           that difference for the highest query minus that for the runner-up, in cosines
    cosine selected  cos(q, C(j)) of the query with the highest score of prediction j
    cosine best      the same of the query whose mask is nearest to the truth in prediction j
    agreement        share of the samples whose selected query is the one that is selected at the end
    gate             mean of SR's gate of layer j over queries and channels: 1 keeps vision, 0 takes language
    step, drift      |C(j) - C(j-1)| and |C(j) - C(0)|, as shares of |C(0)|: what CR has changed
    proposals        how many of the queries show the object: an IoU of at least 0.5 on the mask grid
    IoU selected, IoU best    of these queries' masks before BAR, at the original size

C(j) and the gates are intermediates that the mask decoder gives on request (`MaskDecoder.__call__`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowseg_jax.analysis import page
from flowseg_jax.analysis.runner import AnalysisRunner, SampleResult
from flowseg_jax.evaluation import postprocess
from flowseg_jax.inference.explanation import layer_figures
from flowseg_jax.models.flowseg import FlowSeg
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.models.outputs import ImageCache
from flowseg_jax.reports import plots
from flowseg_jax.types import ExpressionQueries

EXAMPLES = 6  # on the page
FIGURES = ("margin", "cosine_selected", "cosine_best", "gate", "step", "drift", "proposals")
SHOWS = 0.5  # the IoU from which on a mask shows an object


def layer_trace(
    model: FlowSeg,
    cache: ImageCache,
    questions: ExpressionQueries,
    truth: Float[Array, "b k h w"],
    inside: Float[Array, "b h w"],
) -> tuple[dict, Array]:
    """The figures of every sample and the masks that they are about; traced.

    Returns:
        {name: [B, K, J]} with `FIGURES` and the queries `selected` and `best`; mask logits [B, K, 2 J, h, w]: selected and best
        of prediction 0, of prediction 1, ...
    """
    b, k = questions.query_valid.shape
    out: dict[str, Any] = {}
    model.predict_cached(cache, questions, out)
    decoded = out["decoder_output"]
    figures = layer_figures(out)
    cosines = figures.pop("cosines")

    def choose(inputs: tuple[Array, Array]) -> tuple[postprocess.SelectedMasks, Array]:
        embeds, score = inputs  # one prediction at a time: all masks of all would be huge
        masks = mask_logits(embeds.reshape(b, -1, embeds.shape[-1]), cache.mask_features)
        masks = masks.reshape(*score.shape, *masks.shape[2:])
        ious = jax.vmap(jax.vmap(postprocess.iou_on_grid, (0, 0, None)))(masks, truth, inside)
        return postprocess.select_masks(score, masks, truth, inside), (ious >= SHOWS).sum(-1)

    scores = jax.nn.softmax(decoded.class_logits, -1)[..., 0]
    chosen, proposals = jax.lax.map(choose, (decoded.mask_embeds, scores.reshape(-1, b, k, scores.shape[-1])))
    figures["proposals"] = proposals.reshape(-1, b * k)
    queries = chosen.query.reshape(-1, b * k, 2)
    picked = jnp.take_along_axis(cosines, queries, -1)
    for n, name in enumerate(("selected", "best")):
        figures[name], figures[f"cosine_{name}"] = queries[..., n], picked[..., n]
    by_sample = {name: jnp.moveaxis(value, 0, -1).reshape(b, k, -1) for name, value in figures.items()}
    logits = jnp.moveaxis(chosen.logits, 0, 2)  # [b, k, j, 2, h, w]
    return by_sample, logits.reshape(b, k, -1, *logits.shape[4:])


def summarise(measured: Sequence[SampleResult]) -> list[dict[str, Any]]:
    """One mapping a prediction: means over the samples of the figures (None: not defined), agreement and IoUs in percent."""
    values = {name: np.array([m.values[name] for m in measured], np.float64) for name in (*FIGURES, "selected")}
    iou = 100 * np.array([m.iou for m in measured]).reshape(len(measured), -1, 2).mean(0)
    rows = []
    for j in range(iou.shape[0]):
        row: dict[str, Any] = {"prediction": j}
        for name in FIGURES:
            mean = values[name][:, j].mean()
            row[name] = float(mean) if np.isfinite(mean) else None
        row["agreement"] = 100 * float((values["selected"][:, j] == values["selected"][:, -1]).mean())
        row["iou_selected"], row["iou_best"] = map(float, iou[j])
        rows.append(row)
    return rows


def run(source: AnalysisRunner, out: Path) -> Path:
    """Writes `layer_trace_<split>.json` and `.html`; returns the page."""
    measured, shown = [], {}
    for m in source.measure(layer_trace, "layers"):
        if len(shown) < EXAMPLES:
            shown.setdefault(m.sample.image_id, m)  # an image's first sentence
        measured.append(m.figures())
    groups = {name: summarise(rows) for name, rows in page.groups(measured, family=lambda m: m.sample.family).items()}
    rows = groups["all"]
    last = rows[-1]["prediction"]
    plot = lambda names, y, **more: plots.lines(  # noqa: E731
        {label: [(r["prediction"], r[key]) for r in rows] for label, key in names.items()},
        x="layers before the prediction",
        y=y,
        x_range=(0, last),
        whole=True,
        **more,
    )
    columns = (*FIGURES, "agreement", "iou_selected", "iou_best")
    body = [
        page.heading("Masks", "Mean IoU of the selected and of the best query of each prediction, before BAR, percent."),
        plot({"best": "iou_best", "selected": "iou_selected", "agreement": "agreement"}, "percent", y_range=(0, 100)),
        page.heading("Choice", "Cosine between the condition C(j) and a query; margin of the highest over the runner-up."),
        plot({"cosine selected": "cosine_selected", "cosine best": "cosine_best", "margin": "margin"}, "cosine"),
        page.heading("Semantic flow", "SR's mean gate (1 keeps vision, 0 takes language); CR's step and drift, in |C(0)|."),
        plot({"gate": "gate", "step": "step", "drift": "drift"}, "share"),
        page.heading("Proposals", "How many queries show the object (IoU of at least 50 on the mask grid), on average."),
        plot({"proposals": "proposals"}, "queries"),
        page.heading("All figures"),
        page.table(
            ["prediction", *(name.replace("_", " ") for name in columns)],
            [[r["prediction"], *(_shown(name, r[name]) for name in columns)] for r in rows],
        ),
    ]
    if len(groups) > 1:
        body += [
            page.heading("IoU of the selected query by family"),
            plots.lines(
                {name: [(r["prediction"], r["iou_selected"]) for r in each] for name, each in groups.items() if name != "all"},
                x="layers before the prediction",
                y="percent",
                x_range=(0, last),
                y_range=(0, 100),
                whole=True,
            ),
        ]
    body += [
        page.heading("Examples", "The selected mask of each prediction."),
        page.gallery(_thumbnails(list(shown.values()), out, f"layer_trace_{source.split}"), out),
    ]
    about = [f"{len(measured)} samples of {source.split}, {source.about['images'] or 'all'} images."]
    result = {**source.about, "n": len(measured), "groups": groups}
    found = {"conclusion": finding(rows), "origin": source.origin}
    return page.write(out, f"layer_trace_{source.split}", f"Layer by layer: {source.split}", about, result, body, **found)


def finding(rows: Sequence[dict[str, Any]]) -> str:
    """How the answer comes about over the layers, in a sentence."""
    first, last = rows[0], rows[-1]
    settled = next(row["prediction"] for row in rows if row["agreement"] >= 95)
    return (
        f"The selected query's IoU goes from {first['iou_selected']:.1f} before any layer to {last['iou_selected']:.1f} after "
        f"{last['prediction']}, that of the best query from {first['iou_best']:.1f} to {last['iou_best']:.1f}; from prediction "
        f"{settled} on, at least 95 % of the samples have the query that is selected at the end."
    )


def _shown(name: str, value: float | None) -> str:
    plain = ("agreement", "iou_selected", "iou_best", "proposals")
    return page.shown(value if value is None or name in plain else f"{value:.3f}")


def _thumbnails(measured: Sequence[SampleResult], out: Path, name: str) -> list[page.Thumbnail]:
    shown = []
    for m in measured:
        ious, queries = m.iou[::2], m.values["selected"].astype(int)
        panels = [("truth", m.truth, True)]
        panels += [
            (f"{j}: query {q}, IoU {100 * v:.0f}", m.masks[2 * j], False)
            for j, (q, v) in enumerate(zip(queries, ious, strict=True))
        ]
        shown.append(page.picture(out / name, len(shown), m.sample, m.image, panels, f"final query {queries[-1]}"))
    return shown

"""Which of the two embeddings that the language model hands over carries the answer.

C, pooled from the phrase, scores the candidates and is what SR and CR refine; S, the hidden state of <SEG>, is added to every
query. Here one of them, or both, come from another expression about the same image, whose truth is another object (their masks'
IoU is below `DIFFERENT`). What the IoU with the sample's own truth falls by is what the exchanged embedding carried. Samples
without such an expression in their round are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flowseg_jax.analysis import page
from flowseg_jax.analysis.runner import AnalysisRunner, SampleResult
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import postprocess
from flowseg_jax.models.flowseg import FlowSeg
from flowseg_jax.models.outputs import ImageCache
from flowseg_jax.types import ExpressionQueries

DIFFERENT = 0.5
EXCHANGED = ("nothing", "S", "C", "both")


def other_target(truth: Float[Array, "b k h w"], valid: Bool[Array, "b k"]) -> Array:
    """int32 [B, K]: for each phrase the first one about another object, -1 without; `truth` is on the grid, in [0, 1]."""
    common = jnp.einsum("bkhw,bjhw->bkj", truth, truth)
    area = truth.sum((-2, -1))
    union = area[:, :, None] + area[:, None] - common
    differs = (common < DIFFERENT * union) & valid[:, None] & valid[:, :, None]
    return jnp.where(differs.any(-1), differs.argmax(-1), -1)


def swapped(
    model: FlowSeg,
    cache: ImageCache,
    questions: ExpressionQueries,
    truth: Float[Array, "b k h w"],
    inside: Float[Array, "b h w"],
) -> tuple[dict, Array]:
    """The selected mask with each of EXCHANGED; traced.

    Returns:
        {"other": [B, K], see `other_target`}; mask logits [B, K, 4, h, w].
    """
    phrases, segs = model.encode_text_cached(cache, questions)
    other = other_target(truth, questions.query_valid)
    theirs = lambda x: jnp.take_along_axis(x, jnp.maximum(other, 0)[..., None], 1)  # noqa: E731

    def selected(phrases: Array, segs: Array) -> Array:
        found = model.decode_masks(cache.mask_features, cache.levels, phrases, segs)
        return model.refine_masks(postprocess.top_k_masks(found, 1).logits[:, :, 0], found.mask_features)

    pairs = (phrases, segs), (phrases, theirs(segs)), (theirs(phrases), segs), (theirs(phrases), theirs(segs))
    return {"other": other}, jnp.stack([selected(*pair) for pair in pairs], 2)


def summarise(measured: Sequence[SampleResult]) -> dict[str, Any]:
    """Mean IoU with the own truth, percent, by what was exchanged."""
    iou = 100 * np.array([m.iou for m in measured])
    return {"n": len(measured), "iou": dict(zip(EXCHANGED, iou.mean(0).tolist(), strict=True))}


def run(source: AnalysisRunner, out: Path) -> Path:
    """Writes `embedding_swap_<split>.json` and `.html`; returns the page.

    Raises:
        UserError: no image has expressions for two different objects.
    """
    measured = [m.figures() for m in source.measure(swapped, "embedding swap")]
    paired = [m for m in measured if m.values["other"] >= 0]
    if not paired:
        raise UserError(f"no image of {source.split} has expressions for two different objects: there is nothing to exchange")
    groups = {name: summarise(rows) for name, rows in page.groups(paired, family=lambda m: m.sample.family).items()}
    body = [
        page.heading("IoU by what comes from another expression", "Mean IoU with the sample's own truth, percent."),
        page.table(["", "n", *EXCHANGED], [[name, r["n"], *r["iou"].values()] for name, r in groups.items()]),
    ]
    about = [
        f"{len(paired)} of {len(measured)} samples of {source.split}, {source.about['images'] or 'all'} images: those with an "
        "expression about another object beside them."
    ]
    title, result = f"C and S: {source.split}", {**source.about, "groups": groups}
    found = {"conclusion": finding(groups["all"]["iou"]), "origin": source.origin}
    return page.write(out, f"embedding_swap_{source.split}", title, about, result, body, **found)


def finding(iou: dict[str, float]) -> str:
    """Which embedding carries the answer, in a sentence."""
    falls = {name: iou["nothing"] - iou[name] for name in ("C", "S")}
    carrier = max(falls, key=falls.get)
    return (
        f"{carrier} carries most of the answer: with another expression's C the IoU falls by {falls['C']:.1f} points, with its "
        f"S by {falls['S']:.1f}, with both by {iou['nothing'] - iou['both']:.1f}."
    )

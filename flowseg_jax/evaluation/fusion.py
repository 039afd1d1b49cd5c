"""From candidates to what is in an image: segments, the category of every pixel, ranked masks. After Mask2Former's inference.

    panoptic   candidates whose best score exceeds `Thresholds.score` compete for every pixel by score x mask probability; one
               keeps the pixels that it wins inside its own mask, if it wins at least `Thresholds.overlap` of that mask's area;
               the segments of a stuff category become one
    semantic   a pixel's category is the argmax of the sum over candidates of score x mask probability
    instance   the TOP best (candidate, category) pairs; a prediction's score is its category's times the mean probability
               inside its mask

A mask is where its logit is positive. Logits of all candidates at the original size would be the memory peak: [N, H, W] floats
are never there. An image is restored in blocks of rows (`postprocess.BLOCK`), and label maps, bits and counts leave the device.

B images, N candidates an image, C categories, h x w the mask logits, H x W the size bucket.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from flowseg_jax.evaluation import postprocess
from flowseg_jax.evaluation.postprocess import ResizeMatrices
from flowseg_jax.evaluation.tasks.panoptic import Segments
from flowseg_jax.ops.resize import apply_matrices

TOP = 100  # predictions an image for mask AP


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """How candidates become a panoptic segmentation; by default with the values of Mask2Former's COCO models.

    Attributes:
        score: candidates whose best category scores no more than this take no part.
        overlap: a candidate that wins less than this share of its mask's area is dropped.
    """

    score: float = 0.8
    overlap: float = 0.8


MASK2FORMER = Thresholds()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InstanceMasks:
    """The predictions for mask AP, best first, and all candidates' masks.

    Attributes:
        candidate, category: int32 [B, TOP], of each prediction.
        score: float32 [B, TOP], the category's score times the mean probability inside the mask.
        masks: uint8 [B, N, H, W // 8], where a candidate's logit is positive, packed along the width.
    """

    candidate: Int[Array, "b p"]
    category: Int[Array, "b p"]
    score: Float[Array, "b p"]
    masks: UInt8[Array, "b n H W8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelMaps:
    """What panoptic and semantic segmentation are made from.

    Attributes:
        category: int32 [B, N], the best category of each candidate.
        taken: bool [B, N], whether it takes part in the fusion.
        won, area, kept: int32 [B, N], pixels that it won, pixels of its mask, pixels that are both.
        winner: int16 [B, H, W], the candidate that a pixel belongs to, -1 where it lies outside the winner's mask or the image.
        semantic: int16 [B, H, W], each pixel's category.
    """

    category: Int[Array, "b n"]
    taken: Bool[Array, "b n"]
    won: Int[Array, "b n"]
    area: Int[Array, "b n"]
    kept: Int[Array, "b n"]
    winner: Int[Array, "b H W"]
    semantic: Int[Array, "b H W"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusionOutput:
    """Everything that leaves the device.

    Attributes:
        finite: bool [B]; False where a score or logit is no number: that image's predictions mean nothing.
        objects: for mask AP.
        labels: for the other two; None where they are not asked for.
    """

    finite: Bool[Array, " b"]
    objects: InstanceMasks
    labels: LabelMaps | None


def restore(
    scores: Float[Array, "b n c"], logits: Float[Array, "b n h w"], where: ResizeMatrices, threshold: float | None
) -> FusionOutput:
    """All candidates at the original size, an image and a block of rows at a time.

    Args:
        scores, logits: of the candidates.
        where: from `postprocess.geometry`.
        threshold: `Thresholds.score`; None: no labels, masks alone.
    """
    finite = jnp.isfinite(scores).all((1, 2)) & jnp.isfinite(logits).all((1, 2, 3))
    scores = jnp.where(finite[:, None, None], scores, 0)
    logits = jnp.where(finite[:, None, None, None], logits, -1)
    best, category = scores.max(-1), scores.argmax(-1).astype(jnp.int32)
    taken = jnp.zeros_like(best, bool) if threshold is None else best > threshold
    n, c = scores.shape[1:]
    height, width = where.bucket
    most = max(1, postprocess.BLOCK // ((n + c) * width))
    block = next(size for size in range(most, 0, -1) if height % size == 0)

    def image(of: tuple[Array, ...]) -> tuple[Array, Array, Array, tuple[Array, ...]]:
        scores, logits, best, taken, rows, cols = of

        def line(row: Float[Array, " h"]) -> tuple:  # one row of pixels; `map` computes `block` of them at a time
            x = apply_matrices(logits, row[None], cols)[:, 0]
            inside, probability = x > 0, jax.nn.sigmoid(x)
            sums = inside.sum(-1, dtype=jnp.int32), jnp.where(inside, probability, 0).sum(-1)
            exists = cols.any(-1) & row.any()
            labels = () if threshold is None else _label(scores, best, taken, inside, probability, exists)
            return jnp.packbits(inside, axis=-1), sums, labels

        packed, (area, certain), labels = jax.lax.map(line, rows, batch_size=block)
        if labels:
            winner, semantic, *counts = labels
            labels = (winner, semantic, *(count.sum(0) for count in counts))
        area = area.sum(0)
        return jnp.moveaxis(packed, 0, 1), area, certain.sum(0) / jnp.maximum(area, 1), labels

    masks, area, certainty, labels = jax.lax.map(image, (scores, logits, best, taken, where.rows, where.cols))
    if labels:
        winner, semantic, won, kept = labels
        labels = LabelMaps(category, taken, won, area, kept, winner, semantic)
    score, pair = jax.lax.top_k(scores.reshape(len(scores), -1), min(TOP, n * c))
    candidate = (pair // c).astype(jnp.int32)
    score = score * jnp.take_along_axis(certainty, candidate, 1)
    return FusionOutput(finite, InstanceMasks(candidate, (pair % c).astype(jnp.int32), score, masks), labels or None)


def _label(
    scores: Float[Array, "n c"],
    best: Float[Array, " n"],
    taken: Bool[Array, " n"],
    inside: Bool[Array, "n W"],
    probability: Float[Array, "n W"],
    exists: Bool[Array, " W"],
) -> tuple[Int[Array, " W"], Int[Array, " W"], Int[Array, " n"], Int[Array, " n"]]:
    """`winner` and `semantic` of one row of pixels, and its share of `won` and `kept` (see `LabelMaps`)."""
    strongest = jnp.where(taken[:, None], best[:, None] * probability, -1).argmax(0)
    won = (strongest == jnp.arange(len(taken))[:, None]) & taken[:, None] & exists
    kept = won & inside
    winner = jnp.where(kept.any(0), strongest, -1)
    semantic = jnp.einsum("nc,nw->cw", scores, probability, precision=jax.lax.Precision.HIGHEST).argmax(0)
    count = lambda bits: bits.sum(-1, dtype=jnp.int32)  # noqa: E731
    return winner.astype(jnp.int16), semantic.astype(jnp.int16), count(won), count(kept)


def fuse(labels: LabelMaps, things: tuple[bool, ...], size: tuple[int, int], overlap: float) -> Segments:
    """The panoptic segmentation of one image; on the host.

    Args:
        labels: of that image, without the leading axis, as NumPy arrays.
        things: which categories are things.
        size: (height, width) of the image.
        overlap: `Thresholds.overlap`.
    """
    number = np.zeros(len(labels.taken) + 1, np.int32)  # of each candidate's segment; the last: of no candidate (-1)
    category: list[int] = []
    stuff: dict[int, int] = {}
    for n in np.flatnonzero(labels.taken & (labels.kept > 0)):
        if labels.won[n] / labels.area[n] < overlap:
            continue
        found = int(labels.category[n])
        if found not in stuff:
            category.append(found)
        number[n] = stuff.get(found, len(category))
        if not things[found]:
            stuff[found] = int(number[n])
    ids = number[labels.winner[: size[0], : size[1]]]
    return Segments(ids, tuple(category), (False,) * len(category))

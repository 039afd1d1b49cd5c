"""What is minimised: next-token loss, and Hungarian-matched class, mask and dice losses on every decoder level.

Each term is kept as a sum and its denominator until the very end, so that micro-batches and devices add up before anything is
divided. Weights and formulas are the scaffold's (X-SAM, after Mask2Former): 2 class, 5 mask, 5 dice, background weight 0.1,
PointRend points. Three kinds of passes are supervised: referring (one target each), by name and by category (all objects).

A mask is a product of a mask embedding with the mask features. The matcher therefore samples features once at its points
and takes products with all queries; full masks exist only for the matched queries, which are also the only ones that
boundary refinement and the mask losses see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from flowseg_jax.data.batch import NO_LABEL, NONE, Batch
from flowseg_jax.models.flowseg import FlowSeg, TrainingOutput
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.ops.matcher import match
from flowseg_jax.ops.points import sample, sample_features, sample_packed, uncertain_points

Terms = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name -> (weighted sum, denominator)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and sampling of the losses.

    Attributes:
        language, class_, mask, dice: weights of the terms.
        background: class weight of the background (last) column.
        points: sampled points a mask.
        oversample: candidates a point for the uncertainty sampling.
        importance: share of the points taken where the prediction is most uncertain.
        named, category: weights of the pass by name and of the pass by category.
        vocabulary_chunk: tokens whose logits exist at a time.
    """

    language: float = 1.0
    class_: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    background: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75
    named: float = 1.0
    category: float = 1.0
    vocabulary_chunk: int = 512


def next_token_loss(
    hidden: Float[Array, "b t w"], unembedding: Float[Array, "v w"], labels: Int[Array, "b t"], chunk: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of cross-entropies of the next token over all labels, and their number; logits exist for `chunk` tokens at a time."""
    width = hidden.shape[-1]
    x, y = hidden[:, :-1].reshape(-1, width), labels[:, 1:].reshape(-1)
    chunk = min(chunk, x.shape[0])
    padding = -x.shape[0] % chunk
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, chunk, width)
    y = jnp.pad(y, (0, padding), constant_values=NO_LABEL).reshape(-1, chunk)

    @jax.checkpoint
    def part(total, inputs):
        x, y = inputs
        logits = jnp.einsum("nw,vw->nv", x, unembedding.astype(x.dtype), preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, jnp.maximum(y, 0)[:, None], -1)[:, 0]
        return total + jnp.where(y != NO_LABEL, jax.nn.logsumexp(logits, -1) - picked, 0).sum(), None

    total, _ = jax.lax.scan(part, jnp.zeros((), jnp.float32), (x, y))
    return total, (y != NO_LABEL).sum(dtype=jnp.float32)


def match_cost(
    class_logits: Float[Array, "q n"],
    labels: Int[Array, "m"],
    logits: Float[Array, "q k"],
    targets: Float[Array, "m k"],
    cfg: LossConfig,
) -> Float[Array, "m q"]:
    """Cost of assigning query q to target m from point samples (class, BCE and dice, weighted as the losses)."""
    probability = jax.nn.softmax(class_logits, -1)
    k = logits.shape[-1]
    # BCE summed over points is linear in the target once softplus(logit) is separated.
    bce = (jax.nn.softplus(logits).sum(-1)[None] - targets @ logits.T) / k
    p = jax.nn.sigmoid(logits)
    dice = 1 - (2 * targets @ p.T + 1) / (targets.sum(-1)[:, None] + p.sum(-1)[None] + 1)
    return cfg.mask * bce + cfg.dice * dice - cfg.class_ * probability.T[jnp.maximum(labels, 0)]


def class_loss(
    logits: Float[Array, "p q n"],
    labels: Int[Array, "p m"],
    assigned: Int[Array, "p m"],
    counted: Bool[Array, "p"],
    background: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted cross-entropy over all queries (the last column is the background), and the sum of the weights.

    `assigned` holds each target's query, NONE for a target that does not exist; passes that do not count weigh nothing.
    """
    q, n = logits.shape[1:]
    hit = assigned[:, :, None] == jnp.arange(q)  # [P, M, Q]; a query belongs to at most one target
    label = jnp.where(hit.any(1), jnp.einsum("pmq,pm->pq", hit.astype(jnp.int32), labels), n - 1)
    weight = jnp.where(label == n - 1, background, 1.0) * counted[:, None]
    logits = logits.astype(jnp.float32)
    # A one-hot product, not a gather: it shards, and its gradient needs no scatter.
    picked = jnp.where(label[..., None] == jnp.arange(n), logits, 0).sum(-1)
    return (weight * (jax.nn.logsumexp(logits, -1) - picked)).sum(), weight.sum()


def point_losses(
    logits: Float[Array, "n k"], targets: Float[Array, "n k"], counted: Bool[Array, "n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over masks of the mean BCE and of the dice loss on sampled points."""
    bce = (jax.nn.softplus(logits) - targets * logits).mean(-1)
    p = jax.nn.sigmoid(logits)
    dice = 1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)
    return jnp.where(counted, bce, 0).sum(), jnp.where(counted, dice, 0).sum()


@dataclasses.dataclass(frozen=True)
class Targets:
    """Targets of R passes an image: which masks, with which class labels.

    Attributes:
        masks: int32 [B, R, M], index into the image's packed masks, NONE without a target.
        labels: int32 [B, R, M], column of the class logits.
        counted: bool [B, R], passes that exist.
    """

    masks: Int[Array, "b r m"]
    labels: Int[Array, "b r m"]
    counted: Bool[Array, "b r"]


@dataclasses.dataclass(frozen=True)
class Points:
    """Random points of one prediction level, uniform in [0, 1]^2.

    Attributes:
        matcher: [B, R or 1, k, 2]; one set an image when the second axis is 1.
        candidates: [B, R * M, c, 2], for the uncertainty sampling.
        extra: [B, R * M, e, 2], kept as they are.
    """

    matcher: Float[Array, "b r k 2"]
    candidates: Float[Array, "b n c 2"]
    extra: Float[Array, "b n e 2"]

    @classmethod
    def draw(cls, keys: PRNGKeyArray, masks: int, cfg: LossConfig) -> Points:
        """One key an image, so that an image's points do not depend on how the batch is split over devices."""
        kept = int(cfg.importance * cfg.points)

        def image(key: PRNGKeyArray) -> Points:
            a, b, c = jax.random.split(key, 3)
            return (
                jax.random.uniform(a, (1, cfg.points, 2)),
                jax.random.uniform(b, (masks, int(cfg.oversample * cfg.points), 2)),
                jax.random.uniform(c, (masks, cfg.points - kept, 2)),
            )

        return cls(*jax.vmap(image)(keys))


def level_losses(
    class_logits: Float[Array, "b r q n"],
    mask_embeds: Float[Array, "b r q d"],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    targets: Targets,
    points: Points,
    cfg: LossConfig,
    refine: Callable[[Array, Array], Array] | None = None,
) -> tuple[dict[str, Float[Array, ""]], Int[Array, "b r m"]]:
    """Sums of the class, mask and dice losses of one prediction level, and the assignment.

    `refine` (BAR) is applied to the matched masks.
    """
    b, r, q, d = mask_embeds.shape
    m = targets.masks.shape[-1]
    exists = targets.masks != NONE
    index = jnp.maximum(targets.masks, 0)

    # Matching: everything here is a decision, not a prediction.
    fixed = jax.lax.stop_gradient
    sampled = jax.vmap(jax.vmap(sample_features, (None, 0)))(fixed(features), points.matcher)  # [B, R or 1, k, D]
    spread = jnp.broadcast_to(sampled, (b, r, *sampled.shape[2:]))
    at_points = jnp.einsum("brqd,brkd->brqk", fixed(mask_embeds), spread, preferred_element_type=jnp.float32)
    shared = points.matcher.shape[1]
    of_masks = jax.vmap(
        lambda masks, pts: jax.vmap(lambda p: sample_packed(masks, jnp.broadcast_to(p, (masks.shape[0], *p.shape))))(pts)
    )(packed, points.matcher)  # [B, R or 1, masks, k]
    of_masks = jnp.broadcast_to(of_masks, (b, r, *of_masks.shape[2:])) if shared == 1 else of_masks
    wanted = jnp.take_along_axis(of_masks, index[..., None], axis=2)
    cost = jax.vmap(jax.vmap(match_cost, (0, 0, 0, 0, None)), (0, 0, 0, 0, None))(
        fixed(class_logits.astype(jnp.float32)), targets.labels, at_points, wanted, cfg
    )
    assigned = match(cost, exists)

    flat = lambda x: x.reshape(b * r, *x.shape[2:])  # noqa: E731
    class_sum, class_weight = class_loss(
        flat(class_logits), flat(targets.labels), flat(assigned), flat(targets.counted), cfg.background
    )

    # Only the matched masks, gathered by a one-hot product.
    hit = (assigned[..., None] == jnp.arange(q)).astype(mask_embeds.dtype)
    matched = jnp.einsum("brmq,brqd->brmd", hit, mask_embeds).reshape(b, r * m, d)
    masks = mask_logits(matched, features)
    if refine is not None:
        masks = refine(masks, features)
    size = masks.shape[2:]
    keep = cfg.points - points.extra.shape[2]
    flat_masks = masks.reshape(b * r * m, *size)
    candidates = points.candidates.reshape(b * r * m, -1, 2)
    chosen = uncertain_points(fixed(sample(flat_masks, candidates)), candidates, points.extra.reshape(b * r * m, -1, 2), keep)
    truth = jnp.take_along_axis(packed, index.reshape(b, r * m)[..., None, None], axis=1).reshape(b * r * m, *packed.shape[2:])
    mask_sum, dice_sum = point_losses(sample(flat_masks, chosen), sample_packed(truth, chosen), exists.reshape(-1))
    return {"class": class_sum, "class_weight": class_weight, "mask": mask_sum, "dice": dice_sum}, assigned


def segmentation_terms(
    name: str,
    class_logits: Float[Array, "j b r q n"],
    mask_embeds: Float[Array, "j b r q d"],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    targets: Targets,
    keys: PRNGKeyArray,
    cfg: LossConfig,
    refine: Callable[[Array, Array], Array] | None,
) -> tuple[Terms, Int[Array, "b r m"]]:
    """Terms of one kind of pass, summed over all prediction levels, and the last level's assignment; BAR only on the last."""
    j = class_logits.shape[0]
    count = targets.masks.shape[1] * targets.masks.shape[2]
    by_level = jax.vmap(lambda key: jax.random.split(key, j), out_axes=1)(keys)  # [J, B]

    def body(total, inputs):
        logits, embeds, keys, final = inputs
        points = Points.draw(keys, count, cfg)
        # BAR belongs to the final prediction. Running it on every level and choosing keeps one loop body to compile.
        bar = None if refine is None else lambda masks, maps: jnp.where(final, refine(masks, maps), masks)
        sums, assigned = level_losses(logits, embeds, features, packed, targets, points, cfg, bar)
        return (jax.tree.map(jnp.add, total[0], sums), assigned), None

    zero = jnp.zeros((), jnp.float32)
    start = ({"class": zero, "class_weight": zero, "mask": zero, "dice": zero}, jnp.zeros(targets.masks.shape, jnp.int32))
    levels = (class_logits, mask_embeds, by_level, jnp.arange(j) == j - 1)
    (sums, assigned), _ = jax.lax.scan(jax.checkpoint(body), start, levels)
    weight = sums["class_weight"] / j  # the same on every level, so the levels' losses add up to one fraction
    masks = (targets.masks != NONE).sum(dtype=jnp.float32)
    terms = {
        f"{name}_class": (cfg.class_ * sums["class"], weight),
        f"{name}_mask": (cfg.mask * sums["mask"], masks),
        f"{name}_dice": (cfg.dice * sums["dice"], masks),
    }
    return terms, assigned


def training_terms(
    model: FlowSeg, batch: Batch, out: TrainingOutput, keys: PRNGKeyArray, cfg: LossConfig
) -> tuple[Terms, Terms]:
    """All loss terms of a batch, each as (weighted sum, denominator), and what is worth watching in the same form.

    Args:
        model, batch, out: the network, its input and its training output.
        keys: [B], one random key an image.
        cfg: weights and sampling.

    Returns:
        The terms, and `selected`: the share of phrases whose highest-scored query is the one that was matched.
    """
    (b, k), m = batch.phrase_mask.shape, batch.mask_valid.shape[1]
    total, count = next_token_loss(out.hidden, out.unembedding, batch.labels, cfg.vocabulary_chunk)
    terms: Terms = {"language": (cfg.language * total, count)}
    passes = out.conditions.own.shape[0] // b
    split = lambda x: x.reshape(x.shape[0], b, passes, *x.shape[2:])  # noqa: E731
    logits, embeds = split(out.decoder.class_logits), split(out.decoder.mask_embeds)
    refine = None if model.boundary is None else model.refine
    kinds = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)

    # Referring: one target a pass; its label is the phrase's row among its group's.
    place = jnp.arange(b)[:, None] % model.cfg.negatives_group * k + jnp.arange(k)
    exists = batch.phrase_mask != NONE
    targets = Targets(batch.phrase_mask[..., None], place[..., None], exists)
    found, assigned = segmentation_terms(
        "refer", logits[:, :, :k], embeds[:, :, :k], out.mask_features, batch.masks, targets, kinds[0], cfg, refine
    )
    terms |= found
    last = logits[-1, :, :k]
    score = jnp.take_along_axis(last, place[..., None, None], axis=-1)[..., 0] - last[..., -1]
    hits = ((score.argmax(-1) == assigned[..., 0]) & exists).sum(dtype=jnp.float32)
    watched: Terms = {"selected": (hits, exists.sum(dtype=jnp.float32))}

    def all_objects(
        name: str, logits: Array, embeds: Array, labels: Int[Array, "b m"], keys: PRNGKeyArray, weight: float
    ) -> Terms:
        masks = jnp.where(labels != NONE, jnp.arange(m), NONE)
        targets = Targets(masks[:, None], labels[:, None], (labels != NONE).any(-1, keepdims=True))
        found, _ = segmentation_terms(name, logits, embeds, out.mask_features, batch.masks, targets, keys, cfg, refine)
        return {name: (weight * total, count) for name, (total, count) in found.items()}

    at = k
    if model.cfg.named_pass != "off":
        terms |= all_objects(
            "named", logits[:, :, at : at + 1], embeds[:, :, at : at + 1], batch.object_name, kinds[1], cfg.named
        )
        at += 1
    if out.category_logits is not None:
        terms |= all_objects(
            "category", out.category_logits[:, :, None], embeds[:, :, at : at + 1], batch.object_class, kinds[2], cfg.category
        )
    return terms, watched


def divide(terms: Terms) -> dict[str, Float[Array, ""]]:
    """Each term once divided by its denominator."""
    return {name: total / jnp.maximum(count, 1.0) for name, (total, count) in terms.items()}

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
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from flowseg_jax.data.batch import NO_LABEL, NONE, NOTHING, Batch
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import FlowSeg, TrainingOutput
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.ops.collectives import ALONE, Peers
from flowseg_jax.ops.dot import einsum, product
from flowseg_jax.ops.matcher import match
from flowseg_jax.ops.points import sample, sample_features, sample_packed, uncertain_points
from flowseg_jax.ops.vocabulary import Vocabulary, cross_entropy

Terms = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name -> (weighted sum, denominator)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and sampling of the losses.

    Attributes:
        language, class_, mask, dice: weights of the terms; a language weight of 0 leaves that term out.
        class_gain: factor on the class loss on top of its weight, which the matcher does not see. Trained from scratch, what
            tells objects apart by kind and words is learned late, because the masks' gradients drown it.
        background: class weight of the background (last) column.
        points: sampled points a mask; 0: every pixel of the mask grid instead, where the grid is so small that sampling would
            be noise and save nothing.
        oversample: candidates a point for the uncertainty sampling.
        importance: share of the points taken where the prediction is most uncertain.
        named, category: weights of the pass by name and of the pass by category.
        vocabulary_chunk: tokens whose logits exist at a time.
    """

    language: float = 1.0
    class_: float = 2.0
    class_gain: float = 1.0
    mask: float = 5.0
    dice: float = 5.0
    background: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75
    named: float = 1.0
    category: float = 1.0
    vocabulary_chunk: int = 512

    def __post_init__(self):
        if not 0 <= self.importance <= 1 or int(self.oversample * self.points) < int(self.importance * self.points):
            raise UserError(
                f"losses: importance={self.importance} of points={self.points} cannot be chosen from oversample="
                f"{self.oversample} candidates each: importance lies in [0, 1], oversample is at least as large"
            )


def next_token_loss(
    hidden: Float[Array, "b t w"], vocabulary: Vocabulary, labels: Int[Array, "b t"], chunk: int, first: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of cross-entropies of the next token over all labels, and their number; logits exist for `chunk` tokens at a time.

    No label stands before `first`: the tokens before it, the visual ones in training, are not multiplied with the vocabulary.
    """
    x, y = hidden[:, first - 1 : -1].reshape(-1, hidden.shape[-1]), labels[:, first:].reshape(-1)
    counted = y != NO_LABEL
    total = jnp.where(counted, cross_entropy(x, vocabulary, y, chunk), 0).sum()
    return total, counted.sum(dtype=jnp.float32)


def match_cost(
    class_logits: Float[Array, "q n"],
    labels: Int[Array, " m"],
    logits: Float[Array, "q k"],
    targets: Float[Array, "m k"],
    cfg: LossConfig,
) -> Float[Array, "m q"]:
    """Cost of assigning query q to target m from point samples (class, BCE and dice, weighted as the losses)."""
    probability = jax.nn.softmax(class_logits, -1)
    k = logits.shape[-1]
    # BCE summed over points is linear in the target once softplus(logit) is separated.
    bce = (jax.nn.softplus(logits).sum(-1)[None] - product(targets, logits, 1, 1)) / k
    p = jax.nn.sigmoid(logits)
    dice = 1 - (2 * product(targets, p, 1, 1) + 1) / (targets.sum(-1)[:, None] + p.sum(-1)[None] + 1)
    return cfg.mask * bce + cfg.dice * dice - cfg.class_ * probability.T[jnp.maximum(labels, 0)]


def class_loss(
    logits: Float[Array, "p q n"],
    labels: Int[Array, "p m"],
    assigned: Int[Array, "p m"],
    counted: Bool[Array, " p"],
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
    logits: Float[Array, "n k"], targets: Float[Array, "n k"], counted: Bool[Array, " n"]
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

    def denominators(self, name: str, queries: int, background: float) -> dict[str, Float[Array, ""]]:
        """What the sums of each loss are divided by: the classes' weights (of one level) and the number of masks.

        They follow from the targets alone, whatever is predicted: a target takes one query, the others are background.
        """
        matched = jnp.minimum((self.masks != NONE).sum(-1), queries)
        weight = jnp.where(self.counted, matched + background * (queries - matched), 0).sum(dtype=jnp.float32)
        masks = (self.masks != NONE).sum(dtype=jnp.float32)
        return {f"{name}_class": weight, f"{name}_mask": masks, f"{name}_dice": masks}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Points:
    """Random points of one prediction level, uniform in [0, 1]^2. Handed in for all levels, a leading axis J counts these.

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LevelLosses:
    """What one prediction level gives, unweighted.

    Attributes:
        sums: "class", "mask", "dice": sums of the losses; "class_weight": the denominator of the first.
        assigned: int32 [B, R, M], the query of each target, NONE for one that does not exist.
        points: [B * R * M, k, 2], where the mask losses were taken; None for the whole grid.
    """

    sums: dict[str, Float[Array, ""]]
    assigned: Int[Array, "b r m"]
    points: Float[Array, "n k 2"] | None


def masks_on_grid(packed: UInt8[Array, "b m s s8"], size: tuple[int, int]) -> Float[Array, "b m k"]:
    """The share of each cell of a grid that a packed mask covers, row by row. ValueError where cells are no whole pixels."""
    b, m, s, _ = packed.shape
    height, width = size
    if s % height or s % width:
        raise ValueError(f"losses.points=0 needs a mask grid that divides the image: {s} pixels, a grid of {size}")
    bits = jnp.unpackbits(packed, axis=-1, count=s).astype(jnp.float32)
    return bits.reshape(b, m, height, s // height, width, s // width).mean((3, 5)).reshape(b, m, -1)


def level_costs(
    class_logits: Float[Array, "b r q n"],
    mask_embeds: Float[Array, "b r q d"],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    targets: Targets,
    points: Float[Array, "b _ k 2"] | None,
    cfg: LossConfig,
) -> Float[Array, "b r m q"]:
    """Costs of giving queries to targets on one prediction level, from `Points.matcher` or, with None, every pixel of the grid.

    Everything here is a decision, not a prediction: no gradient. Masks are compared as they are before boundary refinement.
    """
    b, r = mask_embeds.shape[:2]
    class_logits, mask_embeds, features = map(jax.lax.stop_gradient, (class_logits, mask_embeds, features))
    if points is None:
        sampled = features.reshape(b, 1, -1, features.shape[-1])
        of_masks = masks_on_grid(packed, features.shape[1:3])[:, None]
    else:
        sampled = jax.vmap(jax.vmap(sample_features, (None, 0)))(features, points)  # [B, R or 1, k, D]
        of_masks = jax.vmap(
            lambda masks, pts: jax.vmap(
                lambda p: sample_packed(masks, jnp.broadcast_to(p, (masks.shape[0], *p.shape)), masks.shape[1])
            )(pts)
        )(packed, points)  # [B, R or 1, masks, k]
    sampled = jnp.broadcast_to(sampled, (b, r, *sampled.shape[2:]))
    at_points = einsum("brqd,brkd->brqk", mask_embeds, sampled)
    wanted = _of_targets(jnp.broadcast_to(of_masks, (b, r, *of_masks.shape[2:])), targets)
    return jax.vmap(jax.vmap(match_cost, (0, 0, 0, 0, None)), (0, 0, 0, 0, None))(
        class_logits.astype(jnp.float32), targets.labels, at_points, wanted, cfg
    )


def _of_targets(of_masks: Float[Array, "b r n k"], targets: Targets) -> Float[Array, "b r m k"]:
    """From a row for every mask of the image to a row for every target."""
    return jnp.take_along_axis(of_masks, jnp.maximum(targets.masks, 0)[..., None], axis=2)


def assign(costs: Float[Array, "*j b r m q"], targets: Targets) -> Int[Array, "*j b r m"]:
    """Each target's query, NONE for a target that does not exist. Any number of levels are one batch of the matcher's loops."""
    with jax.named_scope("matcher"):
        return match(costs, jnp.broadcast_to(targets.masks != NONE, costs.shape[:-1]))


def level_losses(
    class_logits: Float[Array, "b r q n"],
    mask_embeds: Float[Array, "b r q d"],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    targets: Targets,
    points: Points | None,
    cfg: LossConfig,
    refine: Callable[[Array, Array], Array] | None = None,
    assigned: Int[Array, "b r m"] | None = None,
) -> LevelLosses:
    """Losses of one prediction level; `refine` (BAR) is applied to the matched masks.

    `assigned` is what `assign` has found; None: it is found here. Without `points`, costs and losses are taken on every pixel
    of the mask grid.
    """
    b, r, q, d = mask_embeds.shape
    m = targets.masks.shape[-1]
    exists = targets.masks != NONE
    if assigned is None:
        matcher_points = None if points is None else points.matcher
        assigned = assign(level_costs(class_logits, mask_embeds, features, packed, targets, matcher_points, cfg), targets)

    flat = lambda x: x.reshape(b * r, *x.shape[2:])  # noqa: E731
    class_sum, class_weight = class_loss(
        flat(class_logits), flat(targets.labels), flat(assigned), flat(targets.counted), cfg.background
    )

    # Only the matched masks, gathered by a one-hot product.
    hit = (assigned[..., None] == jnp.arange(q)).astype(mask_embeds.dtype)
    matched = einsum("brmq,brqd->brmd", hit, mask_embeds).astype(mask_embeds.dtype).reshape(b, r * m, d)
    masks = mask_logits(matched, features)
    if refine is not None:
        masks = refine(masks, features)
    flat_masks = masks.reshape(b * r * m, *masks.shape[2:])
    if points is None:
        grid = masks_on_grid(packed, features.shape[1:3])[:, None]
        truth = _of_targets(jnp.broadcast_to(grid, (b, r, *grid.shape[2:])), targets).reshape(b * r * m, -1)
        chosen, logits = None, flat_masks.reshape(b * r * m, -1)
    else:
        keep = cfg.points - points.extra.shape[2]
        candidates, extra = (x.reshape(b * r * m, -1, 2) for x in (points.candidates, points.extra))
        chosen = uncertain_points(sample(jax.lax.stop_gradient(flat_masks), candidates), candidates, extra, keep)
        index = jnp.maximum(targets.masks, 0).reshape(b, r * m)
        truth = jnp.take_along_axis(packed, index[..., None, None], axis=1)
        truth = sample_packed(truth.reshape(b * r * m, *packed.shape[2:]), chosen, packed.shape[2])
        logits = sample(flat_masks, chosen)
    mask_sum, dice_sum = point_losses(logits, truth, exists.reshape(-1))
    return LevelLosses({"class": class_sum, "class_weight": class_weight, "mask": mask_sum, "dice": dice_sum}, assigned, chosen)


def segmentation_terms(
    name: str,
    class_logits: Float[Array, "j b r q n"],
    mask_embeds: Float[Array, "j b r q d"],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    targets: Targets,
    points: PRNGKeyArray | Points,
    cfg: LossConfig,
    refine: Callable[[Array, Array], Array] | None,
) -> tuple[Terms, Int[Array, "b r m"]]:
    """Terms of one kind of pass, summed over all prediction levels, and the last level's assignment; BAR only on the last.

    `points` are keys, one an image, from which each level draws its own, or the points of all levels.
    """
    j = class_logits.shape[0]
    count = targets.masks.shape[1] * targets.masks.shape[2]
    given = isinstance(points, Points)
    by_level = points if given else jax.vmap(lambda key: jax.random.split(key, j), out_axes=1)(points)  # [J, B]

    def points_of(level: Array | Points) -> Points | None:
        return level if given else Points.draw(level, count, cfg) if cfg.points else None

    def costs(level: tuple[Array, Array, Array | Points]) -> Array:
        logits, embeds, drawn = level
        points = points_of(drawn)
        return level_costs(logits, embeds, features, packed, targets, None if points is None else points.matcher, cfg)

    # All levels are matched at once: the matcher's loops are as long as the slowest level's, not as all of them together.
    assigned = assign(jax.lax.map(costs, (class_logits, mask_embeds, by_level)), targets)

    def body(total, inputs):
        logits, embeds, drawn, matched, final = inputs
        # BAR belongs to the final prediction. Running it on every level and choosing keeps one loop body to compile.
        bar = None if refine is None else lambda masks, maps: jnp.where(final, refine(masks, maps), masks)
        level = level_losses(logits, embeds, features, packed, targets, points_of(drawn), cfg, bar, matched)
        return jax.tree.map(jnp.add, total, level.sums), None

    zero = jnp.zeros((), jnp.float32)
    start = {"class": zero, "class_weight": zero, "mask": zero, "dice": zero}
    levels = (class_logits, mask_embeds, by_level, assigned, jnp.arange(j) == j - 1)
    sums, _ = jax.lax.scan(jax.checkpoint(body), start, levels)
    weights = {"class": cfg.class_gain * cfg.class_, "mask": cfg.mask, "dice": cfg.dice}
    counts = targets.denominators(name, class_logits.shape[-2], cfg.background)
    return {f"{name}_{kind}": (w * sums[kind], counts[f"{name}_{kind}"]) for kind, w in weights.items()}, assigned[-1]


def referring_targets(phrase_mask: Int[Array, "b k"], group: int, first: int | Int[Array, ""] = 0) -> Targets:
    """One target a referring pass, or none where the phrase refers to nothing: then all queries are background.

    A target's label is the phrase's row among those of its group of images.
    `first` is the place of these images in the batch that is divided into groups.
    """
    b, k = phrase_mask.shape
    place = (first + jnp.arange(b))[:, None] % group * k + jnp.arange(k)
    return Targets(jnp.maximum(phrase_mask, NONE)[..., None], place[..., None], phrase_mask != NONE)


def object_targets(labels: Int[Array, "b m"], asked: Bool[Array, " b"]) -> Targets:
    """Every labelled mask of an image is a target of its one pass, which counts where anything was asked."""
    masks = jnp.where(labels != NONE, jnp.arange(labels.shape[1]), NONE)
    return Targets(masks[:, None], labels[:, None], asked[:, None])


def named_targets(batch: Batch) -> Targets:
    """Of the pass by name. Names of which the image has nothing make all queries background."""
    return object_targets(batch.object_name, batch.name_valid.any(-1))


def category_targets(batch: Batch) -> Targets:
    """Of the pass by category, which only images with categories have."""
    return object_targets(batch.object_class, (batch.object_class != NONE).any(-1))


def training_terms(
    model: FlowSeg,
    batch: Batch,
    out: TrainingOutput,
    points: PRNGKeyArray | Mapping[str, Points],
    cfg: LossConfig,
    peers: Peers = ALONE,
) -> tuple[Terms, Terms]:
    """All loss terms of a batch, each as (weighted sum, denominator), and what is worth watching in the same form.

    Args:
        model, batch, out: the network, its input and its training output.
        points: random keys [B], one an image; or the points of all levels of each kind of pass, "refer", "named", "category".
        cfg: weights and sampling.
        peers: who has the other parts of the batch.

    Returns:
        The terms, and what is worth watching: `selected`, the share of phrases whose highest-scored query is the one that was
        matched; `named` and `categorised`, the share of objects whose matched query ranks the right name, or category, first.
    """
    b, k = batch.phrase_mask.shape
    terms: Terms = {}
    # Not at weight 0: a vocabulary is expensive, and a frozen language model has nothing to learn from it.
    if cfg.language and out.hidden is not None:
        total, count = next_token_loss(
            out.hidden, out.vocabulary, batch.labels, cfg.vocabulary_chunk, first=max(1, model.cfg.visual_tokens)
        )
        terms["language"] = cfg.language * total, count
    watched: Terms = {}
    if out.decoder is None:
        return terms, watched
    passes = out.decoder.queries.shape[1] // b
    split = lambda x: x.reshape(x.shape[0], b, passes, *x.shape[2:])  # noqa: E731
    logits, embeds = None if out.conditions is None else split(out.decoder.class_logits), split(out.decoder.mask_embeds)
    refine = None if model.boundary is None else model.refine
    if not isinstance(points, Mapping):
        kinds = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(points)
        points = dict(zip(("refer", "named", "category"), kinds, strict=True))

    at = 0
    if logits is not None:
        targets = referring_targets(batch.phrase_mask, model.cfg.negatives_group, peers.first(b))
        exists = targets.counted & (batch.phrase_mask != NOTHING)
        found, assigned = segmentation_terms(
            "refer", logits[:, :, :k], embeds[:, :, :k], out.mask_features, batch.masks, targets, points["refer"], cfg, refine
        )
        terms |= found
        last = logits[-1, :, :k]
        score = jnp.take_along_axis(last, targets.labels[..., None], axis=-1)[..., 0] - last[..., -1]
        hits = ((score.argmax(-1) == assigned[..., 0]) & exists).sum(dtype=jnp.float32)
        watched["selected"] = hits, exists.sum(dtype=jnp.float32)
        at = k

    def all_objects(
        name: str, logits: Array, embeds: Array, targets: Targets, weight: float
    ) -> tuple[Terms, tuple[Array, Array]]:
        labels = targets.labels[:, 0]
        found, assigned = segmentation_terms(
            name, logits, embeds, out.mask_features, batch.masks, targets, points[name], cfg, refine
        )
        ranked_first = logits[-1, :, 0, :, :-1].argmax(-1)  # [B, Q], the background aside
        hit = jnp.take_along_axis(ranked_first, jnp.maximum(assigned[:, 0], 0), -1) == labels
        right = (hit & (labels != NONE)).sum(dtype=jnp.float32)
        terms = {name: (weight * total, count) for name, (total, count) in found.items()}
        return terms, (right, (labels != NONE).sum(dtype=jnp.float32))

    if model.cfg.named_pass != "off":
        found, watched["named"] = all_objects(
            "named", logits[:, :, at : at + 1], embeds[:, :, at : at + 1], named_targets(batch), cfg.named
        )
        terms |= found
        at += 1
    if out.category_logits is not None:
        found, watched["categorised"] = all_objects(
            "category", out.category_logits[:, :, None], embeds[:, :, at : at + 1], category_targets(batch), cfg.category
        )
        terms |= found
    return terms, watched


def denominators(model: FlowSegConfig, batch: Batch, cfg: LossConfig) -> dict[str, Float[Array, ""]]:
    """The denominator of every term of `training_terms`, from the batch alone.

    Known beforehand, they let parts of a batch be differentiated one after the other and still be divided once.
    """
    found, kinds = {}, {}
    if cfg.language and model.speaks:
        found["language"] = (batch.labels[:, 1:] != NO_LABEL).sum(dtype=jnp.float32)
    if model.speaks and model.segments:
        kinds["refer"] = referring_targets(batch.phrase_mask, model.negatives_group)
    if model.named_pass != "off" and model.segments:
        kinds["named"] = named_targets(batch)
    if model.classes and model.segments:
        kinds["category"] = category_targets(batch)
    for name, targets in kinds.items():
        found |= targets.denominators(name, model.decoder.queries, cfg.background)
    return found


def divide(terms: Terms) -> dict[str, Float[Array, ""]]:
    """Each term once divided by its denominator."""
    return {name: total / jnp.maximum(count, 1.0) for name, (total, count) in terms.items()}

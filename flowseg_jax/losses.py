"""What is minimised: next-token loss, and Hungarian-matched class, mask and dice losses on every decoder level.

Each term is kept as a sum and its denominator until the very end, so that micro-batches and devices add up before anything is
divided. Weights and formulas are X-SAM's (after Mask2Former): 2 class, 5 mask, 5 dice, background weight 0.1,
PointRend points. Three kinds of passes are supervised: referring (one target each), by name and by category (all objects).

A mask is a product of a mask embedding with the mask features. The matcher therefore samples features once at its points
and takes products with all queries; full masks exist only for the matched queries, which are also the only ones that
boundary refinement and the mask losses see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import FlowSeg, TrainingOutput
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.ops.collectives import SINGLE_DEVICE, DataParallelGroup
from flowseg_jax.ops.dot import TILE, einsum, matmul_f32
from flowseg_jax.ops.matcher import batched_hungarian
from flowseg_jax.ops.points import sample_features, sample_packed_masks, sample_points, uncertain_points
from flowseg_jax.ops.vocabulary import ShardedEmbedding, cross_entropy
from flowseg_jax.types import IGNORE_INDEX, NO_TARGET, PAD, Batch

# What a level keeps for its backward pass: choosing points and reading targets there costs more than predicting masks again.
POINTS_CHECKPOINT_NAME = "points"

LossTerms = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name -> (weighted sum, denominator)


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

    language_weight: float = 1.0
    class_weight: float = 2.0
    class_loss_scale: float = 1.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    generic_weight: float = 1.0
    closed_vocab_weight: float = 1.0
    logits_chunk_size: int = 512

    def __post_init__(self):
        if not 0 <= self.importance_sample_ratio <= 1 or int(self.oversample_ratio * self.num_points) < int(
            self.importance_sample_ratio * self.num_points
        ):
            raise UserError(
                f"losses: importance_sample_ratio={self.importance_sample_ratio} of num_points={self.num_points} cannot be "
                f"chosen from oversample_ratio={self.oversample_ratio} candidates each: importance_sample_ratio lies in "
                "[0, 1], oversample_ratio is at least as large"
            )


def next_token_loss(
    hidden: Float[Array, "b t w"], vocabulary: ShardedEmbedding, labels: Int[Array, "b t"], chunk: int, first: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of cross-entropies of the next token over all labels, and their number; logits exist for `chunk` tokens at a time.

    No label stands before `first`: the tokens before it, the visual ones in training, are not multiplied with the vocabulary,
    but for the last few, which fill a tile.
    """
    length = labels.shape[1]
    first = max(1, first - (first - length) % TILE)
    x, y = hidden[:, first - 1 : -1].reshape(-1, hidden.shape[-1]), labels[:, first:].reshape(-1)
    counted = y != IGNORE_INDEX
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
    bce = (jax.nn.softplus(logits).sum(-1)[None] - matmul_f32(targets, logits, 1, 1)) / k
    p = jax.nn.sigmoid(logits)
    dice = 1 - (2 * matmul_f32(targets, p, 1, 1) + 1) / (targets.sum(-1)[:, None] + p.sum(-1)[None] + 1)
    return cfg.mask_weight * bce + cfg.dice_weight * dice - cfg.class_weight * probability.T[jnp.maximum(labels, 0)]


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
    pass_valid: Bool[Array, "b r"]

    def denominators(self, name: str, queries: int, background: float) -> dict[str, Float[Array, ""]]:
        """What the sums of each loss are divided by: the classes' weights (of one level) and the number of masks.

        They follow from the targets alone, whatever is predicted: a target takes one query, the others are background.
        """
        matched = jnp.minimum((self.masks != PAD).sum(-1), queries)
        weight = jnp.where(self.pass_valid, matched + background * (queries - matched), 0).sum(dtype=jnp.float32)
        masks = (self.masks != PAD).sum(dtype=jnp.float32)
        return {f"{name}_class": weight, f"{name}_mask": masks, f"{name}_dice": masks}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PointSamples:
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
    def draw(cls, keys: PRNGKeyArray, masks: int, cfg: LossConfig) -> PointSamples:
        """One key an image, so that an image's points do not depend on how the batch is split over devices."""
        candidates = int(cfg.oversample_ratio * cfg.num_points)
        extra = cfg.num_points - int(cfg.importance_sample_ratio * cfg.num_points)

        def image(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
            of_matcher, of_masks = jax.random.split(key)
            drawn = jax.random.uniform(of_masks, (masks, candidates + extra, 2))  # at once: generators take long to compile
            return jax.random.uniform(of_matcher, (1, cfg.num_points, 2)), drawn[:, :candidates], drawn[:, candidates:]

        return cls(*jax.vmap(image)(keys))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PassPredictions:
    """What R passes of one kind predict an image on one prediction level, or on all, with a leading axis J.

    Attributes:
        class_logits: [B, R, Q, N].
        mask_embeds: [B, R, Q, D].
        points: where masks are compared; None: on every pixel of the grid. Of all levels, also random keys, one an image,
            from which each level draws its own.
    """

    class_logits: Float[Array, "*j b r q n"]
    mask_embeds: Float[Array, "*j b r q d"]
    points: PointSamples | PRNGKeyArray | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerLosses:
    """What one kind of pass gives on one prediction level, unweighted.

    Attributes:
        sums: "class", "mask", "dice": sums of the losses; "class_weight": the denominator of the first.
        assigned: int32 [B, R, M], the query of each target, NONE for one that does not exist.
        points: [B * R * M, k, 2], where the mask losses were taken; None for the whole grid.
    """

    sums: dict[str, Float[Array, ""]]
    assigned: Int[Array, "b r m"]
    points: Float[Array, "n k 2"] | None


def downsample_packed_masks(packed: UInt8[Array, "b m s s8"], size: tuple[int, int]) -> Float[Array, "b m k"]:
    """The share of each cell of a grid that a packed mask covers, row by row. ValueError where cells are no whole pixels."""
    b, m, s, _ = packed.shape
    height, width = size
    if s % height or s % width:
        raise ValueError(f"losses.num_points=0 needs a mask grid that divides the image: {s} pixels, a grid of {size}")
    bits = jnp.unpackbits(packed, axis=-1, count=s).astype(jnp.float32)
    return bits.reshape(b, m, height, s // height, width, s // width).mean((3, 5)).reshape(b, m, -1)


def matching_costs(
    passes: PassPredictions,
    targets: Targets,
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    cfg: LossConfig,
) -> Float[Array, "b r m q"]:
    """Costs of giving queries to targets on one prediction level.

    Everything here is a decision, not a prediction: no gradient. Masks are compared as they are before boundary refinement.
    """
    class_logits, mask_embeds, features = map(jax.lax.stop_gradient, (passes.class_logits, passes.mask_embeds, features))
    b, r = mask_embeds.shape[:2]
    if passes.points is None:
        sampled = features.reshape(b, 1, -1, features.shape[-1])
        of_masks = downsample_packed_masks(packed, features.shape[1:3])[:, None]
    else:
        points = passes.points.matcher
        sampled = jax.vmap(jax.vmap(sample_features, (None, 0)))(features, points)  # [B, R or 1, k, D]
        of_masks = jax.vmap(
            lambda masks, pts: jax.vmap(
                lambda p: sample_packed_masks(masks, jnp.broadcast_to(p, (masks.shape[0], *p.shape)), masks.shape[1])
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


def match_targets(costs: Float[Array, "*j b r m q"], targets: Targets) -> Int[Array, "*j b r m"]:
    """Each target's query, NONE for a target that does not exist. Any number of levels are one batch of the matcher's loops."""
    with jax.named_scope("matcher"):
        return batched_hungarian(costs, jnp.broadcast_to(targets.masks != PAD, costs.shape[:-1]))


def sample_matched_masks(
    masks: Float[Array, "b n h w"],
    index: Int[Array, "b n"],
    packed: UInt8[Array, "b m s s8"],
    points: Sequence[PointSamples | None],
    cfg: LossConfig,
) -> tuple[Float[Array, "b n k"], Float[Array, "b n k"], Float[Array, "b n k 2"] | None]:
    """Logits of masks, what they should be, and where: at points of which together there are enough for all; on the grid
    without. `index` says which of its image's masks each should be."""
    b, n = index.shape
    if None in points:
        grid = downsample_packed_masks(packed, masks.shape[2:])
        return masks.reshape(b, n, -1), jnp.take_along_axis(grid, index[..., None], axis=1), None
    flat = masks.reshape(b * n, *masks.shape[2:])
    candidates, extra = (
        jnp.concatenate([getattr(x, which) for x in points], 1).reshape(b * n, -1, 2) for which in ("candidates", "extra")
    )
    uncertain = sample_points(jax.lax.stop_gradient(flat), candidates)
    chosen = uncertain_points(uncertain, candidates, extra, cfg.num_points - extra.shape[1])
    # Places along the last axis: a TPU fills an array whose last axis has two with 126 lanes of nothing.
    chosen = jnp.moveaxis(checkpoint_name(jnp.moveaxis(chosen, -1, 0), POINTS_CHECKPOINT_NAME), 0, -1)
    truth = jnp.take_along_axis(packed, index[..., None, None], axis=1).reshape(b * n, *packed.shape[2:])
    truth = checkpoint_name(sample_packed_masks(truth, chosen, packed.shape[2]), POINTS_CHECKPOINT_NAME)
    return sample_points(flat, chosen).reshape(b, n, -1), truth.reshape(b, n, -1), chosen.reshape(b, n, -1, 2)


def layer_losses(
    kinds: Mapping[str, PassPredictions],
    targets: Mapping[str, Targets],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    cfg: LossConfig,
    refine: Callable[[Array, Array], Array] | None = None,
    assigned: Mapping[str, Int[Array, "b r m"]] | None = None,
) -> dict[str, LayerLosses]:
    """Losses of one prediction level, by kind of pass; `refine` (BAR) is applied to the matched masks.

    The masks of all kinds are one batch: they differ in who asked for them, and in nothing that is computed here.

    Args:
        kinds: what each kind of pass predicts.
        targets: of each kind.
        features: mask features.
        packed: the images' masks.
        cfg: weights and sampling.
        refine: (masks, features) -> masks.
        assigned: what `assign` has found; None: it is found here.
    """
    b = features.shape[0]
    if assigned is None:
        costs = {name: matching_costs(passes, targets[name], features, packed, cfg) for name, passes in kinds.items()}
        assigned = {name: match_targets(cost, targets[name]) for name, cost in costs.items()}
    sums, matched = {}, {}
    for name, passes in kinds.items():
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        of_classes = flat(passes.class_logits), flat(targets[name].labels), flat(assigned[name]), flat(targets[name].pass_valid)
        total, weight = class_loss(*of_classes, cfg.no_object_weight)
        sums[name] = {"class": total, "class_weight": weight}
        # Only the matched masks, gathered by a one-hot product.
        embeds = passes.mask_embeds
        hit = (assigned[name][..., None] == jnp.arange(embeds.shape[2])).astype(embeds.dtype)
        matched[name] = einsum("brmq,brqd->brmd", hit, embeds).astype(embeds.dtype).reshape(b, -1, embeds.shape[-1])

    together = lambda parts: jnp.concatenate(list(parts), 1)  # noqa: E731
    masks = mask_logits(together(matched.values()), features)
    if refine is not None:
        masks = refine(masks, features)
    index = jnp.maximum(together(targets[name].masks.reshape(b, -1) for name in kinds), 0)
    logits, truth, chosen = sample_matched_masks(masks, index, packed, [passes.points for passes in kinds.values()], cfg)

    found, done = {}, 0
    for name, embeds in matched.items():
        mine = slice(done, done := done + embeds.shape[1])
        of_kind = lambda x, mine=mine: x[:, mine].reshape(-1, *x.shape[2:])  # noqa: E731
        exists = (targets[name].masks != PAD).reshape(-1)
        sums[name]["mask"], sums[name]["dice"] = point_losses(of_kind(logits), of_kind(truth), exists)
        found[name] = LayerLosses(sums[name], assigned[name], None if chosen is None else of_kind(chosen))
    return found


def deep_supervision_terms(
    kinds: Mapping[str, PassPredictions],
    targets: Mapping[str, Targets],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    cfg: LossConfig,
    refine: Callable[[Array, Array], Array] | None,
) -> tuple[LossTerms, dict[str, Int[Array, "b r m"]]]:
    """Terms of all kinds of passes, summed over all prediction levels, and the last level's assignments; BAR only on the last.

    `kinds` have a leading axis J, or, in place of points, keys to draw them from.
    """
    j = next(iter(kinds.values())).class_logits.shape[0]

    def of_all_levels(points: PointSamples | PRNGKeyArray | None) -> PointSamples | PRNGKeyArray | None:
        keys = points is not None and not isinstance(points, PointSamples)
        return jax.vmap(lambda key: jax.random.split(key, j), out_axes=1)(points) if keys else points  # [J, B]

    def drawn(name: str, passes: PassPredictions) -> PassPredictions:
        if passes.points is None or isinstance(passes.points, PointSamples):
            return passes
        slots = targets[name].masks.shape[1] * targets[name].masks.shape[2]
        return dataclasses.replace(passes, points=PointSamples.draw(passes.points, slots, cfg) if cfg.num_points else None)

    kinds = {name: dataclasses.replace(passes, points=of_all_levels(passes.points)) for name, passes in kinds.items()}

    # All levels are matched at once: the matcher's loops are as long as the slowest level's, not as all of them together.
    assigned = {}
    for name, passes in kinds.items():
        costs = lambda level, name=name: matching_costs(drawn(name, level), targets[name], features, packed, cfg)  # noqa: E731
        assigned[name] = match_targets(jax.lax.map(costs, passes), targets[name])

    def body(total, inputs):
        level, matched, final = inputs
        level = {name: drawn(name, passes) for name, passes in level.items()}
        # BAR belongs to the final prediction alone. A branch, not a call behind the loop: one loop body to compile.
        bar = None if refine is None else lambda masks, maps: jax.lax.cond(final, refine, lambda masks, _: masks, masks, maps)
        found = layer_losses(level, targets, features, packed, cfg, bar, matched)
        return jax.tree.map(jnp.add, total, {name: losses.sums for name, losses in found.items()}), None

    start = {name: dict.fromkeys(("class", "class_weight", "mask", "dice"), jnp.zeros((), jnp.float32)) for name in kinds}
    body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(POINTS_CHECKPOINT_NAME), prevent_cse=False)
    sums, _ = jax.lax.scan(body, start, (kinds, assigned, jnp.arange(j) == j - 1))
    weights, terms = {"class": cfg.class_loss_scale * cfg.class_weight, "mask": cfg.mask_weight, "dice": cfg.dice_weight}, {}
    for name, passes in kinds.items():
        counts = targets[name].denominators(name, passes.class_logits.shape[-2], cfg.no_object_weight)
        terms |= {f"{name}_{kind}": (w * sums[name][kind], counts[f"{name}_{kind}"]) for kind, w in weights.items()}
    return terms, {name: found[-1] for name, found in assigned.items()}


def referring_targets(phrase_mask: Int[Array, "b k"], group: int, first: int | Int[Array, ""] = 0) -> Targets:
    """One target a referring pass, or none where the phrase refers to nothing: then all queries are background.

    A target's label is the phrase's row among those of its group of images.
    `first` is the place of these images in the batch that is divided into groups.
    """
    b, k = phrase_mask.shape
    place = (first + jnp.arange(b))[:, None] % group * k + jnp.arange(k)
    return Targets(jnp.maximum(phrase_mask, PAD)[..., None], place[..., None], phrase_mask != PAD)


def object_targets(labels: Int[Array, "b m"], asked: Bool[Array, " b"]) -> Targets:
    """Every labelled mask of an image is a target of its one pass, which counts where anything was asked."""
    masks = jnp.where(labels != PAD, jnp.arange(labels.shape[1]), PAD)
    return Targets(masks[:, None], labels[:, None], asked[:, None])


def named_targets(batch: Batch) -> Targets:
    """Of the pass by name. Names of which the image has nothing make all queries background."""
    return object_targets(batch.object_name, batch.name_valid.any(-1))


def category_targets(batch: Batch) -> Targets:
    """Of the pass by category, which only images with categories have."""
    return object_targets(batch.object_category, (batch.object_category != PAD).any(-1))


def loss_terms(
    model: FlowSeg,
    batch: Batch,
    out: TrainingOutput,
    points: PRNGKeyArray | Mapping[str, PointSamples],
    cfg: LossConfig,
    peers: DataParallelGroup = SINGLE_DEVICE,
) -> tuple[LossTerms, LossTerms]:
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
    b, k = batch.phrase_target.shape
    terms: LossTerms = {}
    # Not at weight 0: a vocabulary is expensive, and a frozen language model has nothing to learn from it.
    if cfg.language_weight and out.hidden_states is not None:
        total, count = next_token_loss(
            out.hidden_states, out.lm_head, batch.labels, cfg.logits_chunk_size, first=max(1, model.cfg.num_visual_tokens)
        )
        terms["language"] = cfg.language_weight * total, count
    watched: LossTerms = {}
    if out.decoder_output is None:
        return terms, watched
    passes = out.decoder_output.queries.shape[1] // b
    split = lambda x: x.reshape(x.shape[0], b, passes, *x.shape[2:])  # noqa: E731
    logits, embeds = (
        None if out.conditions is None else split(out.decoder_output.class_logits),
        split(out.decoder_output.mask_embeds),
    )
    refine = None if model.boundary is None else model.refine_masks
    if not isinstance(points, Mapping):
        kinds = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(points)
        points = dict(zip(("refer", "named", "category"), kinds, strict=True))

    passes_of, targets = {}, {}
    if logits is not None:
        targets["refer"] = referring_targets(batch.phrase_target, model.cfg.negatives_group_size, peers.batch_offset(b))
        passes_of["refer"] = PassPredictions(logits[:, :, :k], embeds[:, :, :k], points["refer"])
    if logits is not None and model.cfg.generic_pass != "off":
        targets["named"] = named_targets(batch)
        passes_of["named"] = PassPredictions(logits[:, :, k : k + 1], embeds[:, :, k : k + 1], points["named"])
    if out.category_logits is not None:
        targets["category"] = category_targets(batch)
        passes_of["category"] = PassPredictions(out.category_logits[:, :, None], embeds[:, :, -1:], points["category"])
    found, assigned = deep_supervision_terms(passes_of, targets, out.mask_features, batch.packed_masks, cfg, refine)
    weights = {"refer": 1.0, "named": cfg.generic_weight, "category": cfg.closed_vocab_weight}
    terms |= {term: (weights[term.split("_")[0]] * total, count) for term, (total, count) in found.items()}

    if "refer" in targets:
        exists = targets["refer"].pass_valid & (batch.phrase_target != NO_TARGET)
        last = logits[-1, :, :k]
        score = jnp.take_along_axis(last, targets["refer"].labels[..., None], axis=-1)[..., 0] - last[..., -1]
        hits = ((score.argmax(-1) == assigned["refer"][..., 0]) & exists).sum(dtype=jnp.float32)
        watched["selected"] = hits, exists.sum(dtype=jnp.float32)
    for name, what in (("named", "named"), ("category", "categorised")):
        if name in targets:
            labels = targets[name].labels[:, 0]
            ranked_first = passes_of[name].class_logits[-1, :, 0, :, :-1].argmax(-1)  # [B, Q], the background aside
            hit = jnp.take_along_axis(ranked_first, jnp.maximum(assigned[name][:, 0], 0), -1) == labels
            right = (hit & (labels != PAD)).sum(dtype=jnp.float32)
            watched[what] = right, (labels != PAD).sum(dtype=jnp.float32)
    return terms, watched


def denominators(model: FlowSegConfig, batch: Batch, cfg: LossConfig) -> dict[str, Float[Array, ""]]:
    """The denominator of every term of `training_terms`, from the batch alone.

    Known beforehand, they let parts of a batch be differentiated one after the other and still be divided once.
    """
    found, kinds = {}, {}
    if cfg.language_weight and model.has_language_model:
        found["language"] = (batch.labels[:, 1:] != IGNORE_INDEX).sum(dtype=jnp.float32)
    if model.has_language_model and model.has_mask_decoder:
        kinds["refer"] = referring_targets(batch.phrase_target, model.negatives_group_size)
    if model.generic_pass != "off" and model.has_mask_decoder:
        kinds["named"] = named_targets(batch)
    if model.num_classes and model.has_mask_decoder:
        kinds["category"] = category_targets(batch)
    for name, targets in kinds.items():
        found |= targets.denominators(name, model.mask_decoder.num_queries, cfg.no_object_weight)
    return found


def normalize_terms(terms: LossTerms) -> dict[str, Float[Array, ""]]:
    """Each term once divided by its denominator."""
    return {name: total / jnp.maximum(count, 1.0) for name, (total, count) in terms.items()}

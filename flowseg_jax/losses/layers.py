"""The losses of one decoder layer, and their sum over all layers (deep supervision)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from flowseg_jax.losses.config import LossConfig
from flowseg_jax.losses.masks import POINTS_CHECKPOINT_NAME, PointSamples, point_losses, sample_matched_masks
from flowseg_jax.losses.matching import PassPredictions, match_targets, matching_costs
from flowseg_jax.losses.targets import Targets
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.ops.dot import einsum
from flowseg_jax.types import PAD

LossTerms = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name -> (weighted sum, denominator)


def class_loss(
    logits: Float[Array, "p q n"],
    labels: Int[Array, "p m"],
    assigned: Int[Array, "p m"],
    pass_valid: Bool[Array, " p"],
    no_object_weight: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted cross-entropy over all queries (the last column is the background), and the sum of the weights.

    `assigned` holds each target's query, PAD for a target that does not exist. A pass that is not valid has the weight 0.
    """
    q, n = logits.shape[1:]
    hit = assigned[:, :, None] == jnp.arange(q)  # [P, M, Q]; a query belongs to at most one target
    label = jnp.where(hit.any(1), jnp.einsum("pmq,pm->pq", hit.astype(jnp.int32), labels), n - 1)
    weight = jnp.where(label == n - 1, no_object_weight, 1.0) * pass_valid[:, None]
    logits = logits.astype(jnp.float32)
    # A one-hot product and not a gather: it can be sharded, and its gradient needs no scatter.
    picked = jnp.where(label[..., None] == jnp.arange(n), logits, 0).sum(-1)
    return (weight * (jax.nn.logsumexp(logits, -1) - picked)).sum(), weight.sum()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerLosses:
    """The unweighted losses of one type of pass after one decoder layer.

    Attributes:
        sums: "class", "mask", "dice": sums of the losses; "class_weight": the denominator of the first.
        assigned: int32 [B, R, M], the query of each target; PAD for a target that does not exist.
        points: [B * R * M, k, 2], where the mask losses were taken; None for the whole grid.
    """

    sums: dict[str, Float[Array, ""]]
    assigned: Int[Array, "b r m"]
    points: Float[Array, "n k 2"] | None


def layer_losses(
    predictions: Mapping[str, PassPredictions],
    targets: Mapping[str, Targets],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    cfg: LossConfig,
    refine: Callable[[Array, Array], Array] | None = None,
    assigned: Mapping[str, Int[Array, "b r m"]] | None = None,
) -> dict[str, LayerLosses]:
    """The losses after one decoder layer, by type of pass.

    The masks of all passes are one batch: nothing that is computed here depends on the type.

    Args:
        predictions: of each type of pass.
        targets: of each type of pass.
        features: mask features.
        packed: the images' masks.
        cfg: weights and sampling.
        refine: (masks, features) -> masks, boundary refinement of the matched masks.
        assigned: what `match_targets` returned; None: it is computed here.
    """
    b = features.shape[0]
    if assigned is None:
        costs = {name: matching_costs(passes, targets[name], features, packed, cfg) for name, passes in predictions.items()}
        assigned = {name: match_targets(cost, targets[name]) for name, cost in costs.items()}
    sums, matched = {}, {}
    for name, passes in predictions.items():
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        class_inputs = (
            flat(passes.class_logits),
            flat(targets[name].labels),
            flat(assigned[name]),
            flat(targets[name].pass_valid),
        )
        total, weight = class_loss(*class_inputs, cfg.no_object_weight)
        sums[name] = {"class": total, "class_weight": weight}
        # Only the matched masks are computed. Their embeddings are gathered by a one-hot product.
        embeds = passes.mask_embeds
        hit = (assigned[name][..., None] == jnp.arange(embeds.shape[2])).astype(embeds.dtype)
        matched[name] = einsum("brmq,brqd->brmd", hit, embeds).astype(embeds.dtype).reshape(b, -1, embeds.shape[-1])

    concatenate = lambda arrays: jnp.concatenate(list(arrays), 1)  # noqa: E731
    masks = mask_logits(concatenate(matched.values()), features)
    if refine is not None:
        masks = refine(masks, features)
    index = jnp.maximum(concatenate(targets[name].masks.reshape(b, -1) for name in predictions), 0)
    logits, truth, chosen = sample_matched_masks(masks, index, packed, [passes.points for passes in predictions.values()], cfg)

    found, done = {}, 0
    for name, embeds in matched.items():
        mine = slice(done, done := done + embeds.shape[1])
        select = lambda x, mine=mine: x[:, mine].reshape(-1, *x.shape[2:])  # noqa: E731
        exists = (targets[name].masks != PAD).reshape(-1)
        sums[name]["mask"], sums[name]["dice"] = point_losses(select(logits), select(truth), exists)
        found[name] = LayerLosses(sums[name], assigned[name], None if chosen is None else select(chosen))
    return found


def deep_supervision_terms(
    predictions: Mapping[str, PassPredictions],
    targets: Mapping[str, Targets],
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    cfg: LossConfig,
    refine: Callable[[Array, Array], Array] | None,
) -> tuple[LossTerms, dict[str, Int[Array, "b r m"]]]:
    """The terms of all types of passes, summed over all decoder layers, and the assignments of the last layer.

    Boundary refinement is applied to the last prediction alone.

    Args:
        predictions: of each type of pass, with a leading axis J = layers + 1 (the first is made before the first layer). Their
            points may be random keys, one per image.
        targets, features, packed, cfg, refine: as in `layer_losses`.
    """
    j = next(iter(predictions.values())).class_logits.shape[0]

    def layer_keys(points: PointSamples | PRNGKeyArray | None) -> PointSamples | PRNGKeyArray | None:
        are_keys = points is not None and not isinstance(points, PointSamples)
        return jax.vmap(lambda key: jax.random.split(key, j), out_axes=1)(points) if are_keys else points  # [J, B]

    def with_points(name: str, passes: PassPredictions) -> PassPredictions:
        if passes.points is None or isinstance(passes.points, PointSamples):
            return passes
        num_masks = targets[name].masks.shape[1] * targets[name].masks.shape[2]
        return dataclasses.replace(passes, points=PointSamples.draw(passes.points, num_masks, cfg) if cfg.num_points else None)

    predictions = {name: dataclasses.replace(passes, points=layer_keys(passes.points)) for name, passes in predictions.items()}

    # All layers are matched at once: the matcher's loops then take as many rounds as the slowest layer, not as all together.
    assigned = {}
    for name, passes in predictions.items():
        costs = lambda layer, name=name: matching_costs(with_points(name, layer), targets[name], features, packed, cfg)  # noqa: E731
        assigned[name] = match_targets(jax.lax.map(costs, passes), targets[name])

    def body(total, inputs):
        layer, matched, final = inputs
        layer = {name: with_points(name, passes) for name, passes in layer.items()}
        # A branch and not a call after the loop: there is one loop body to compile.
        refine_last = (
            None if refine is None else lambda masks, maps: jax.lax.cond(final, refine, lambda masks, _: masks, masks, maps)
        )
        found = layer_losses(layer, targets, features, packed, cfg, refine_last, matched)
        return jax.tree.map(jnp.add, total, {name: losses.sums for name, losses in found.items()}), None

    start = {name: dict.fromkeys(("class", "class_weight", "mask", "dice"), jnp.zeros((), jnp.float32)) for name in predictions}
    body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(POINTS_CHECKPOINT_NAME), prevent_cse=False)
    sums, _ = jax.lax.scan(body, start, (predictions, assigned, jnp.arange(j) == j - 1))
    weights, terms = {"class": cfg.class_loss_scale * cfg.class_weight, "mask": cfg.mask_weight, "dice": cfg.dice_weight}, {}
    for name, passes in predictions.items():
        counts = targets[name].denominators(name, passes.class_logits.shape[-2], cfg.no_object_weight)
        terms |= {f"{name}_{loss}": (w * sums[name][loss], counts[f"{name}_{loss}"]) for loss, w in weights.items()}
    return terms, {name: found[-1] for name, found in assigned.items()}

"""Hungarian matching: which query answers for which target."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from flowseg_jax.losses.config import LossConfig
from flowseg_jax.losses.masks import PointSamples, downsample_packed_masks
from flowseg_jax.losses.targets import Targets
from flowseg_jax.ops.dot import einsum, matmul_f32
from flowseg_jax.ops.matcher import batched_hungarian
from flowseg_jax.ops.points import sample_features, sample_packed_masks
from flowseg_jax.types import PAD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PassPredictions:
    """What R passes of one type predict per image after one decoder layer, or after all of them, with a leading axis J.

    Attributes:
        class_logits: [B, R, Q, N].
        mask_embeds: [B, R, Q, D].
        points: where masks are compared; None: on every pixel of the grid. For all layers this may also be random keys, one
            per image, from which each layer draws its own points.
    """

    class_logits: Float[Array, "*j b r q n"]
    mask_embeds: Float[Array, "*j b r q d"]
    points: PointSamples | PRNGKeyArray | None


def match_cost(
    class_logits: Float[Array, "q n"],
    labels: Int[Array, " m"],
    logits: Float[Array, "q k"],
    targets: Float[Array, "m k"],
    cfg: LossConfig,
) -> Float[Array, "m q"]:
    """The cost of assigning query q to target m, from point samples (class, BCE and dice, weighted as the losses)."""
    probability = jax.nn.softmax(class_logits, -1)
    k = logits.shape[-1]
    # BCE summed over points is linear in the target once softplus(logit) is separated.
    # A plain log and not log1p: beside a sum over points its last digits count for nothing, and it takes half the time.
    softplus = jnp.maximum(logits, 0) + jnp.log(1 + jnp.exp(-jnp.abs(logits)))
    bce = (softplus.sum(-1)[None] - matmul_f32(targets, logits, 1, 1)) / k
    p = jax.nn.sigmoid(logits)
    dice = 1 - (2 * matmul_f32(targets, p, 1, 1) + 1) / (targets.sum(-1)[:, None] + p.sum(-1)[None] + 1)
    return cfg.mask_weight * bce + cfg.dice_weight * dice - cfg.class_weight * probability.T[jnp.maximum(labels, 0)]


def matching_costs(
    passes: PassPredictions,
    targets: Targets,
    features: Float[Array, "b h w d"],
    packed: UInt8[Array, "b m s s8"],
    cfg: LossConfig,
) -> Float[Array, "b r m q"]:
    """The costs of assigning queries to targets after one decoder layer.

    No gradient passes through them. Masks are compared as they are before boundary refinement.
    """
    class_logits, mask_embeds, features = map(jax.lax.stop_gradient, (passes.class_logits, passes.mask_embeds, features))
    b, r = mask_embeds.shape[:2]
    if passes.points is None:
        sampled = features.reshape(b, 1, -1, features.shape[-1])
        mask_values = downsample_packed_masks(packed, features.shape[1:3])[:, None]
    else:
        points = passes.points.matcher
        sampled = jax.vmap(jax.vmap(sample_features, (None, 0)))(features, points)  # [B, R or 1, k, D]
        mask_values = _read_masks(packed, points)
    # Points that all passes of an image share are one operand: a CPU multiplies the passes' queries as one matrix.
    shared = sampled.shape[1] == 1
    at_points = einsum("brqd,bkd->brqk" if shared else "brqd,brkd->brqk", mask_embeds, sampled[:, 0] if shared else sampled)
    target_values = _per_target(jnp.broadcast_to(mask_values, (b, r, *mask_values.shape[2:])), targets)
    return jax.vmap(jax.vmap(match_cost, (0, 0, 0, 0, None)), (0, 0, 0, 0, None))(
        class_logits.astype(jnp.float32), targets.labels, at_points, target_values, cfg
    )


def _read_masks(packed: UInt8[Array, "b n s s8"], points: Float[Array, "b r k 2"]) -> Float[Array, "b r n k"]:
    """Every mask of an image at the points of each of its passes."""
    (b, n), (r, k) = packed.shape[:2], points.shape[1:3]
    masks = jnp.broadcast_to(packed[:, None], (b, r, *packed.shape[1:])).reshape(-1, *packed.shape[2:])
    at = jnp.broadcast_to(points[:, :, None], (b, r, n, k, 2)).reshape(-1, k, 2)
    return sample_packed_masks(masks, at, packed.shape[2]).reshape(b, r, n, k)


def _per_target(mask_values: Float[Array, "b r n k"], targets: Targets) -> Float[Array, "b r m k"]:
    """Turns one row per mask of the image into one row per target."""
    return jnp.take_along_axis(mask_values, jnp.maximum(targets.masks, 0)[..., None], axis=2)


def match_targets(costs: Float[Array, "*j b r m q"], targets: Targets) -> Int[Array, "*j b r m"]:
    """Each target's query; PAD for a target that does not exist. The layers are one batch of the matcher's loops."""
    with jax.named_scope("matcher"):
        return batched_hungarian(costs, jnp.broadcast_to(targets.masks != PAD, costs.shape[:-1]))

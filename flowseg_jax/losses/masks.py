"""Mask losses: where masks are compared, with what, and BCE and dice there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from flowseg_jax.losses.config import LossConfig
from flowseg_jax.ops.points import sample_packed_masks, sample_points, uncertain_points

# What a layer keeps for its backward pass: to choose points and to read targets there costs more than to predict masks again.
POINTS_CHECKPOINT_NAME = "points"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PointSamples:
    """Random points of one decoder layer, uniform in [0, 1]^2. The points of all layers have a leading axis J.

    Attributes:
        matcher: [B, R or 1, k, 2]; one set per image when the second axis is 1.
        candidates: [B, R * M, c, 2], for the uncertainty sampling.
        extra: [B, R * M, e, 2], which are taken as they are.
    """

    matcher: Float[Array, "b r k 2"]
    candidates: Float[Array, "b n c 2"]
    extra: Float[Array, "b n e 2"]

    @classmethod
    def draw(cls, keys: PRNGKeyArray, num_masks: int, cfg: LossConfig) -> PointSamples:
        """Takes one key per image, so that an image's points do not depend on how the batch is split over devices."""
        candidates = int(cfg.oversample_ratio * cfg.num_points)
        extra = cfg.num_points - int(cfg.importance_sample_ratio * cfg.num_points)

        def image(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
            matcher_key, masks_key = jax.random.split(key)
            drawn = jax.random.uniform(masks_key, (num_masks, candidates + extra, 2))  # one generator: they compile slowly
            return jax.random.uniform(matcher_key, (1, cfg.num_points, 2)), drawn[:, :candidates], drawn[:, candidates:]

        return cls(*jax.vmap(image)(keys))


def downsample_packed_masks(packed: UInt8[Array, "b m s s8"], size: tuple[int, int]) -> Float[Array, "b m k"]:
    """The share of each cell of a grid that a packed mask covers, row by row. ValueError where a cell is no whole pixels."""
    b, m, s, _ = packed.shape
    height, width = size
    if s % height or s % width:
        raise ValueError(f"losses.num_points=0 needs a mask grid that divides the image: {s} pixels, a grid of {size}")
    bits = jnp.unpackbits(packed, axis=-1, count=s).astype(jnp.float32)
    return bits.reshape(b, m, height, s // height, width, s // width).mean((3, 5)).reshape(b, m, -1)


def sample_matched_masks(
    masks: Float[Array, "b n h w"],
    index: Int[Array, "b n"],
    packed: UInt8[Array, "b m s s8"],
    points: Sequence[PointSamples | None],
    cfg: LossConfig,
) -> tuple[Float[Array, "b n k"], Float[Array, "b n k"], Float[Array, "b n k 2"] | None]:
    """Mask logits, their targets and the points that both are read at; on every pixel of the grid where there are no points.

    Args:
        masks: logits.
        index: which mask of its image each of them should be.
        packed: the images' masks.
        points: of every type of pass; together as many as there are masks.
        cfg: number of points.

    Returns:
        logits, targets, and the chosen points; None in place of the points for the whole grid.
    """
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
    # Points along the last axis: a TPU pads an array whose last axis has two elements to 128 lanes.
    chosen = jnp.moveaxis(checkpoint_name(jnp.moveaxis(chosen, -1, 0), POINTS_CHECKPOINT_NAME), 0, -1)
    truth = jnp.take_along_axis(packed, index[..., None, None], axis=1).reshape(b * n, *packed.shape[2:])
    truth = checkpoint_name(sample_packed_masks(truth, chosen, packed.shape[2]), POINTS_CHECKPOINT_NAME)
    return sample_points(flat, chosen).reshape(b, n, -1), truth.reshape(b, n, -1), chosen.reshape(b, n, -1, 2)


def point_losses(
    logits: Float[Array, "n k"], targets: Float[Array, "n k"], exists: Bool[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over the masks that exist of the mean BCE and of the dice loss on sampled points."""
    bce = (jax.nn.softplus(logits) - targets * logits).mean(-1)
    p = jax.nn.sigmoid(logits)
    dice = 1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)
    return jnp.where(exists, bce, 0).sum(), jnp.where(exists, dice, 0).sum()

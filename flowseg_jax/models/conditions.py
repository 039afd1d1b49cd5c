"""Conditions of the decoder's passes: pooled from the language model's hidden states, and put together for each pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowseg_jax.models.semantic_flow import Conditions
from flowseg_jax.ops.dot import einsum
from flowseg_jax.types import PAD


def pool_spans(x: Float[Array, "b t d"], ids: Int[Array, "b t"], count: int) -> Float[Array, "b {count} d"]:
    """Mean over the tokens of each id 0..count-1; zeros for an id that no token has.

    It is a product with a 0/1 matrix, so that it shards as everything else does.
    """
    member = (ids[:, None, :] == jnp.arange(count)[:, None]).astype(x.dtype)
    total = einsum("bnt,btd->bnd", member, x)
    return (total / jnp.maximum(member.sum(-1, dtype=jnp.float32), 1)[..., None]).astype(x.dtype)


def referring_conditions(
    condition_embeds: Float[Array, "b k d"],
    background: Float[Array, "1 d"],
    phrase_target: Int[Array, "b k"],
    group_size: int,
    exclude_same_target: bool,
) -> Conditions:
    """Conditions of the B * K referring passes: all phrases of a group of images are each other's negatives.

    Args:
        condition_embeds: C(0) of the phrases [B, K, D].
        background: the learned background row.
        phrase_target: [B, K], the index of the mask that a phrase refers to; PAD for a padded phrase.
        group_size: number of images that share their phrases; it divides B. 1: an image has its own phrases alone.
        exclude_same_target: another phrase for the same object is no negative.

    Returns:
        Rows [B * K, group_size * K + 1, D], the background last.

    Raises:
        ValueError: the images do not split into such groups.
    """
    b, k, d = condition_embeds.shape
    if b % group_size:
        raise ValueError(f"{b} images do not split into groups of {group_size} that share their phrases")
    rows = group_size * k
    exists = (phrase_target != PAD).reshape(b // group_size, 1, rows)
    image = jnp.repeat(jnp.arange(group_size), k)
    same_image = image[:, None] == image[None, :]
    own = jnp.eye(rows, dtype=bool)
    valid = jnp.broadcast_to(exists, (b // group_size, rows, rows))
    if exclude_same_target:
        target = phrase_target.reshape(b // group_size, rows)
        valid = valid & ~(same_image & ~own & (target[:, :, None] == target[:, None, :]))
    valid = valid | own  # a padded phrase keeps its own row: its pass is computed, and ignored
    embeds = jnp.broadcast_to(condition_embeds.reshape(b // group_size, 1, rows, d), (b // group_size, rows, rows, d))
    own = jnp.broadcast_to(own, (b // group_size, rows, rows)).reshape(b * k, rows)
    return append_background(embeds.reshape(b * k, rows, d), own, valid.reshape(b * k, rows), background)


def append_background(
    embeds: Float[Array, "p n d"],
    attend_mask: Bool[Array, "p n"],
    valid_mask: Bool[Array, "p n"],
    background: Float[Array, "1 d"],
) -> Conditions:
    """Appends the learned background row: every pass attends to it, and it always exists."""
    p, _, d = embeds.shape
    row = jnp.broadcast_to(background.astype(embeds.dtype), (p, 1, d))
    yes = jnp.ones((p, 1), bool)
    return Conditions(
        jnp.concatenate([embeds, row], 1),
        jnp.concatenate([attend_mask, yes], 1),
        jnp.concatenate([valid_mask, yes], 1),
    )


def pad_conditions(conditions: Conditions, rows: int) -> Conditions:
    """Inserts rows that do not exist before the background, so that different passes share one decoder call."""
    missing = rows - conditions.attend_mask.shape[1]
    embeds, flags = ((0, 0), (0, missing), (0, 0)), ((0, 0), (0, missing))

    def insert(x: Array, padding: tuple) -> Array:
        return jnp.concatenate([jnp.pad(x[:, :-1], padding), x[:, -1:]], 1)

    return Conditions(
        insert(conditions.embeds, embeds), insert(conditions.attend_mask, flags), insert(conditions.valid_mask, flags)
    )


def interleave_passes(passes: list[Any], images: int) -> Any:
    """Puts runs of passes side by side, image by image: leaves [B * r_i, ...] become [B * sum(r_i), ...]."""

    def join(*leaves: Array) -> Array:
        split = [x.reshape(images, x.shape[0] // images, *x.shape[1:]) for x in leaves]
        joined = jnp.concatenate(split, 1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *passes)

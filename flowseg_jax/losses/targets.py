"""What each decoder pass should predict."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowseg_jax.types import PAD, Batch


@dataclasses.dataclass(frozen=True)
class Targets:
    """Targets of R passes per image: which masks, with which class labels.

    Attributes:
        masks: int32 [B, R, M], index into the image's packed masks; PAD where there is no target.
        labels: int32 [B, R, M], column of the class logits.
        pass_valid: bool [B, R], passes that exist.
    """

    masks: Int[Array, "b r m"]
    labels: Int[Array, "b r m"]
    pass_valid: Bool[Array, "b r"]

    def denominators(self, name: str, num_queries: int, no_object_weight: float) -> dict[str, Float[Array, ""]]:
        """What the sums of each loss are divided by: the class weights (of one layer) and the number of masks.

        They follow from the targets alone, whatever is predicted: a target takes one query, the others are background.
        """
        matched = jnp.minimum((self.masks != PAD).sum(-1), num_queries)
        weight = jnp.where(self.pass_valid, matched + no_object_weight * (num_queries - matched), 0).sum(dtype=jnp.float32)
        masks = (self.masks != PAD).sum(dtype=jnp.float32)
        return {f"{name}_class": weight, f"{name}_mask": masks, f"{name}_dice": masks}


def referring_targets(phrase_target: Int[Array, "b k"], group_size: int, first: int | Int[Array, ""] = 0) -> Targets:
    """One target per referring pass, or none where the phrase refers to nothing: then all queries are background.

    A target's label is the row of its phrase among the phrases of its group of images.

    Args:
        phrase_target: int32 [B, K], the mask of each phrase; PAD for one that does not exist, NO_TARGET for one without a mask.
        group_size: number of images that share their phrases as negatives.
        first: index of the first of these images in the batch that is divided into groups.
    """
    b, k = phrase_target.shape
    row = (first + jnp.arange(b))[:, None] % group_size * k + jnp.arange(k)
    return Targets(jnp.maximum(phrase_target, PAD)[..., None], row[..., None], phrase_target != PAD)


def object_targets(labels: Int[Array, "b m"], pass_valid: Bool[Array, " b"]) -> Targets:
    """Every labelled mask of an image is a target of its one pass; `pass_valid` says which images have that pass."""
    masks = jnp.where(labels != PAD, jnp.arange(labels.shape[1]), PAD)
    return Targets(masks[:, None], labels[:, None], pass_valid[:, None])


def generic_targets(batch: Batch) -> Targets:
    """Targets of the generic pass. If the image has nothing of the names in the prompt, all queries are background."""
    return object_targets(batch.object_name, batch.name_valid.any(-1))


def closed_vocab_targets(batch: Batch) -> Targets:
    """Targets of the closed-vocabulary pass, which only images with categories have."""
    return object_targets(batch.object_category, (batch.object_category != PAD).any(-1))

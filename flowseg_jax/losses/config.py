"""The weights of the losses, and where masks are compared."""

from __future__ import annotations

import dataclasses

from flowseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and sampling of the losses.

    Attributes:
        language_weight, class_weight, mask_weight, dice_weight: weights of the terms. A language weight of 0 leaves that term
            out.
        class_loss_scale: a further factor on the class loss, which the matcher does not see. A model that is trained from
            scratch learns categories and words late without it, because the gradients of the masks are much larger.
        no_object_weight: class weight of the background (the last column).
        num_points: sampled points per mask. 0: every pixel of the mask grid instead, for grids that are so small that sampling
            would add noise and save nothing.
        oversample_ratio: candidates per point for the uncertainty sampling.
        importance_sample_ratio: share of the points that are taken where the prediction is most uncertain.
        generic_weight, closed_vocab_weight: weights of the generic (open-vocabulary) and of the closed-vocabulary pass.
        logits_chunk_size: number of tokens whose logits exist at the same time.

    Raises:
        UserError: more points are asked for than there are candidates.
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

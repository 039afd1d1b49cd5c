"""The losses: next-token loss, and Hungarian-matched class, mask and dice losses after every decoder layer.

Each term is a sum and its denominator until the very end, so that micro-batches and devices are added up before anything is
divided. Weights and formulas are X-SAM's (after Mask2Former): 2 class, 5 mask, 5 dice, background weight 0.1, PointRend points.
Three types of decoder passes are supervised: referring (one target each), generic (open-vocabulary) and closed-vocabulary (all
objects).

A mask is the product of a mask embedding with the mask features. The matcher therefore samples the features once at its points
and multiplies them with all queries. Whole masks exist only for the matched queries, which are also the only ones that boundary
refinement and the mask losses see.
"""

from flowseg_jax.losses.config import LossConfig
from flowseg_jax.losses.language import next_token_loss
from flowseg_jax.losses.layers import LayerLosses, LossTerms, class_loss, deep_supervision_terms, layer_losses
from flowseg_jax.losses.masks import PointSamples, downsample_packed_masks, point_losses, sample_matched_masks
from flowseg_jax.losses.matching import PassPredictions, match_cost, match_targets, matching_costs
from flowseg_jax.losses.targets import Targets, closed_vocab_targets, generic_targets, object_targets, referring_targets
from flowseg_jax.losses.total import denominators, loss_terms, normalize_terms

__all__ = [
    "LayerLosses",
    "LossConfig",
    "LossTerms",
    "PassPredictions",
    "PointSamples",
    "Targets",
    "class_loss",
    "closed_vocab_targets",
    "deep_supervision_terms",
    "denominators",
    "downsample_packed_masks",
    "generic_targets",
    "layer_losses",
    "loss_terms",
    "match_cost",
    "match_targets",
    "matching_costs",
    "next_token_loss",
    "normalize_terms",
    "object_targets",
    "point_losses",
    "referring_targets",
    "sample_matched_masks",
]

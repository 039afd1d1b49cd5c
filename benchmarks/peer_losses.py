"""The losses of a train step in PyTorch: Hugging Face's functions for Mask2Former, put together as X-SAM does.

The random points are handed in. Where Hugging Face draws them itself, its functions are called one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from transformers.models.mask2former.modeling_mask2former import (
    dice_loss,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
    sample_point,
    sigmoid_cross_entropy_loss,
)

from benchmarks.peer import FlowSegTorch, Predictions
from flowseg_jax.losses import LossConfig
from flowseg_jax.types import IGNORE_INDEX

Points = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of one level: matcher [1, k, 2], candidates and extra [K, n, 2]


def point_terms(
    logits: torch.Tensor, truth: torch.Tensor, candidates: torch.Tensor, extra: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over masks of BCE and dice at PointRend's points: logits [N, h, w], truth [N, H, W] of zeros and ones."""
    with torch.no_grad():
        found = sample_point(logits[:, None], candidates, align_corners=False)[:, 0]
        index = torch.topk(-found.abs(), keep, dim=1).indices
        chosen = torch.gather(candidates, 1, index[..., None].expand(-1, -1, 2))
        points = torch.cat([chosen, extra], 1)
        labels = sample_point(truth[:, None], points, align_corners=False)[:, 0]
    at_points = sample_point(logits[:, None], points, align_corners=False)[:, 0]
    return sigmoid_cross_entropy_loss(at_points, labels, 1), dice_loss(at_points, labels, 1)


@torch.no_grad()
def matched(
    classes: torch.Tensor, masks: torch.Tensor, truth: torch.Tensor, points: torch.Tensor, cfg: LossConfig
) -> list[int]:
    """The query of each pass's one target: class logits [K, Q, N], masks [K, Q, h, w], truth [K, H, W], points [1, k, 2]."""
    queries = []
    for number in range(len(classes)):
        cost = -cfg.class_weight * classes[number].softmax(-1)[:, number : number + 1]
        found = sample_point(masks[number][:, None], points.expand(masks.shape[1], -1, -1), align_corners=False)[:, 0]
        wanted = sample_point(truth[number][None, None], points, align_corners=False)[:, 0]
        cost = cost + cfg.mask_weight * pair_wise_sigmoid_cross_entropy_loss(found, wanted)
        cost = cost + cfg.dice_weight * pair_wise_dice_loss(found, wanted)
        queries.append(int(linear_sum_assignment(cost.numpy())[0][0]))
    return queries


def segmentation_loss(
    model: FlowSegTorch, out: Predictions, features: torch.Tensor, truth: torch.Tensor, points: list[Points], cfg: LossConfig
) -> torch.Tensor:
    """Class, mask and dice losses of all predictions; pass k has target k. BAR refines the last prediction's masks."""
    total, count = torch.zeros(()), len(truth)
    keep = int(cfg.importance_sample_ratio * cfg.num_points)
    for level, (classes, masks) in enumerate(zip(out.classes, out.masks, strict=True)):
        shared, candidates, extra = points[level]
        queries = matched(classes, masks, truth, shared, cfg)
        labels = torch.full(classes.shape[:2], classes.shape[2] - 1)
        labels[torch.arange(count), queries] = torch.arange(count)
        weight = torch.ones(classes.shape[2])
        weight[-1] = cfg.no_object_weight
        total = total + cfg.class_loss_scale * cfg.class_weight * F.cross_entropy(classes.transpose(1, 2), labels, weight)
        chosen = masks[torch.arange(count), queries]
        if level == len(out.masks) - 1:
            chosen = model.boundary(chosen, features)
        bce, dice = point_terms(chosen, truth, candidates, extra, keep)
        total = total + (cfg.mask_weight * bce + cfg.dice_weight * dice) / count
    return total


def language_loss(model: FlowSegTorch, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token loss over the text after the image: before it no label stands."""
    first = model.cfg.num_visual_tokens
    logits = F.linear(hidden[0, first - 1 : -1], model.llm.embed_tokens.weight)
    return F.cross_entropy(logits, labels[0, first:], ignore_index=IGNORE_INDEX)


def training_loss(
    model: FlowSegTorch, batch: dict[str, torch.Tensor], truth: torch.Tensor, points: list[Points], cfg: LossConfig
) -> torch.Tensor:
    """The loss of one image with K expressions, which are each other's negatives."""
    count = len(truth)
    visual, features, levels = model.look(batch)
    hidden = model.run_llm(batch, visual)
    phrases, segs = model.pool(hidden, batch, count)
    conditions = torch.cat([phrases, model.background.weight])[:, None].expand(-1, count, -1)
    own = torch.cat([torch.eye(count, dtype=torch.bool), torch.ones(count, 1, dtype=torch.bool)], 1)
    out = model.decode(features, levels, conditions, segs, own)
    found = segmentation_loss(model, out, features, truth, points, cfg)
    return found + cfg.language_weight * language_loss(model, hidden, batch["labels"])

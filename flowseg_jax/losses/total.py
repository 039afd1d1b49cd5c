"""All loss terms of a batch, their denominators, and the metrics that go with them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flowseg_jax.losses.config import LossConfig
from flowseg_jax.losses.language import next_token_loss
from flowseg_jax.losses.layers import LossTerms, deep_supervision_terms
from flowseg_jax.losses.masks import PointSamples
from flowseg_jax.losses.matching import PassPredictions
from flowseg_jax.losses.targets import closed_vocab_targets, generic_targets, referring_targets
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import FlowSeg
from flowseg_jax.models.outputs import TrainingOutput
from flowseg_jax.ops.collectives import SINGLE_DEVICE, DataParallelGroup
from flowseg_jax.types import IGNORE_INDEX, NO_TARGET, PAD, Batch

PASS_TYPES = ("referring", "generic", "closed_vocab")  # in the order in which their random keys are split


def loss_terms(
    model: FlowSeg,
    batch: Batch,
    out: TrainingOutput,
    points: PRNGKeyArray | Mapping[str, PointSamples],
    cfg: LossConfig,
    dp_group: DataParallelGroup = SINGLE_DEVICE,
) -> tuple[LossTerms, LossTerms]:
    """All loss terms of a batch and its accuracies, each as (weighted sum, denominator).

    Args:
        model, batch, out: the network, its input and its training output.
        points: random keys [B], one per image; or the points of all layers of each type of pass, "referring", "generic",
            "closed_vocab".
        cfg: weights and sampling.
        dp_group: the devices that have the other images of the batch.

    Returns:
        The terms, and the accuracies: `referring_selection`, the share of phrases whose highest-scored query is the
        one that was matched; `generic` and `closed_vocab`, the share of objects whose matched query ranks the
        right name, or category, first.
    """
    b, k = batch.phrase_target.shape
    terms: LossTerms = {}
    # Not at weight 0: a vocabulary is expensive, and a frozen language model has nothing to learn from it.
    if cfg.language_weight and out.hidden_states is not None:
        total, count = next_token_loss(
            out.hidden_states, out.lm_head, batch.labels, cfg.logits_chunk_size, first=max(1, model.cfg.num_visual_tokens)
        )
        terms["language"] = cfg.language_weight * total, count
    accuracies: LossTerms = {}
    if out.decoder_output is None:
        return terms, accuracies
    passes = out.decoder_output.queries.shape[1] // b
    split = lambda x: x.reshape(x.shape[0], b, passes, *x.shape[2:])  # noqa: E731
    logits = None if out.conditions is None else split(out.decoder_output.class_logits)
    embeds = split(out.decoder_output.mask_embeds)
    refine = None if model.boundary is None else model.refine_masks
    if not isinstance(points, Mapping):
        keys = jax.vmap(lambda key: jax.random.split(key, len(PASS_TYPES)), out_axes=1)(points)
        points = dict(zip(PASS_TYPES, keys, strict=True))

    predictions, targets = {}, {}
    if logits is not None:
        targets["referring"] = referring_targets(batch.phrase_target, model.cfg.negatives_group_size, dp_group.batch_offset(b))
        predictions["referring"] = PassPredictions(logits[:, :, :k], embeds[:, :, :k], points["referring"])
    if logits is not None and model.cfg.generic_pass != "off":
        targets["generic"] = generic_targets(batch)
        predictions["generic"] = PassPredictions(logits[:, :, k : k + 1], embeds[:, :, k : k + 1], points["generic"])
    if out.category_logits is not None:
        targets["closed_vocab"] = closed_vocab_targets(batch)
        predictions["closed_vocab"] = PassPredictions(
            out.category_logits[:, :, None], embeds[:, :, -1:], points["closed_vocab"]
        )
    found, assigned = deep_supervision_terms(predictions, targets, out.mask_features, batch.packed_masks, cfg, refine)
    weights = {"referring": 1.0, "generic": cfg.generic_weight, "closed_vocab": cfg.closed_vocab_weight}
    terms |= {term: (weights[term.rpartition("_")[0]] * total, count) for term, (total, count) in found.items()}

    if "referring" in targets:
        exists = targets["referring"].pass_valid & (batch.phrase_target != NO_TARGET)
        last = logits[-1, :, :k]
        score = jnp.take_along_axis(last, targets["referring"].labels[..., None], axis=-1)[..., 0] - last[..., -1]
        hits = ((score.argmax(-1) == assigned["referring"][..., 0]) & exists).sum(dtype=jnp.float32)
        accuracies["referring_selection"] = hits, exists.sum(dtype=jnp.float32)
    for name in ("generic", "closed_vocab"):
        if name in targets:
            labels = targets[name].labels[:, 0]
            ranked_first = predictions[name].class_logits[-1, :, 0, :, :-1].argmax(-1)  # [B, Q], without the background
            hit = jnp.take_along_axis(ranked_first, jnp.maximum(assigned[name][:, 0], 0), -1) == labels
            right = (hit & (labels != PAD)).sum(dtype=jnp.float32)
            accuracies[name] = right, (labels != PAD).sum(dtype=jnp.float32)
    return terms, accuracies


def denominators(model: FlowSegConfig, batch: Batch, cfg: LossConfig) -> dict[str, Float[Array, ""]]:
    """The denominator of every term of `loss_terms`, from the batch alone.

    They are known before the forward pass. So micro-batches can be differentiated one after the other, and their sums are
    divided once.
    """
    found, targets = {}, {}
    if cfg.language_weight and model.has_language_model:
        found["language"] = (batch.labels[:, 1:] != IGNORE_INDEX).sum(dtype=jnp.float32)
    if model.has_language_model and model.has_mask_decoder:
        targets["referring"] = referring_targets(batch.phrase_target, model.negatives_group_size)
    if model.generic_pass != "off" and model.has_mask_decoder:
        targets["generic"] = generic_targets(batch)
    if model.num_classes and model.has_mask_decoder:
        targets["closed_vocab"] = closed_vocab_targets(batch)
    for name, of_pass in targets.items():
        found |= of_pass.denominators(name, model.mask_decoder.num_queries, cfg.no_object_weight)
    return found


def normalize_terms(terms: LossTerms) -> dict[str, Float[Array, ""]]:
    """Each term divided by its denominator."""
    return {name: total / jnp.maximum(count, 1.0) for name, (total, count) in terms.items()}

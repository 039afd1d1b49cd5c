"""Candidates of a generic pass: every query's scores for all category names, and its refined mask.

A model with a language model is asked for all category names of the data set in one conversation, as X-SAM does: they are the
conditions of one decoder pass, and a candidate's scores are the softmax over [names, background]. `CategoryPrompts` may divide
the names into several conversations about one image. These are several passes, whose candidates, each with scores for the names
of its own conversation, are put side by side. A segmentor without language classifies candidates with its linear head.

B images, N candidates an image, C categories, h x w the mask logits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowseg_jax.data.generic_dataset import CategoryPrompts
from flowseg_jax.models.conditions import append_background, pool_spans
from flowseg_jax.models.flowseg import FlowSeg
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.types import Batch


def score_categories(
    model: FlowSeg, batch: Batch, prompts: CategoryPrompts
) -> tuple[Float[Array, "b n c"], Float[Array, "b n h w"]]:
    """Scores and refined mask logits of all candidates of images whose rows ask for the categories (`GenericDataset`).

    N is the number of queries, times the number of conversations. SR and CR act as in training (`generic_pass`); without an
    open-vocabulary pass in training, as in "with_flow".
    """
    cfg, features = model.cfg, model.encode_image(batch)
    b, count, size, total = len(batch.sam_images), prompts.count, prompts.size, len(prompts.categories)
    if cfg.has_language_model:
        projected = model.llm_projector(model.run_llm(batch, features.visual_tokens))
        names = pool_spans(projected, batch.phrase_ids, count * size).reshape(b * count, size, -1)
        exists = batch.name_valid.reshape(b * count, size)
        conditions = append_background(names, exists, exists, model.background_embed[...])
        if cfg.generic_pass == "without_flow":
            conditions = dataclasses.replace(conditions, attend_mask=jnp.zeros_like(conditions.attend_mask))
        # A conversation's <SEG> bears the number of its first name.
        segs = pool_spans(projected, batch.seg_ids, count * size)[:, ::size].reshape(b * count, -1)
        out = model.mask_decoder(features.levels, count, conditions, segs)
        logits = out.class_logits[-1]
    else:
        count, size = 1, total
        out = model.mask_decoder(features.levels, 1)
        logits = model.category_head(out.queries[-1]).astype(jnp.float32)
    own = jax.nn.softmax(logits, -1)[..., :-1].reshape(b, count, -1, size)
    # A candidate's scores stand in the place of its own conversation; not a product, which would round them.
    blocks = jnp.where(jnp.eye(count, dtype=bool)[:, None, :, None], own[:, :, :, None], 0)
    scores = blocks.reshape(b, -1, count * size)[..., :total]
    embeds = out.mask_embeds[-1].reshape(b, scores.shape[1], -1)
    return scores, model.refine_masks(mask_logits(embeds, features.mask_features), features.mask_features)

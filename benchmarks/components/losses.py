"""Matching, the losses on points, and resizing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks import peer_losses
from benchmarks.components import Call, Pair, Wrap
from benchmarks.components.inputs import inference, random, to_torch
from benchmarks.components.msda import shapes_of
from benchmarks.components.sizes import Sizes, blobs
from flowseg_jax.losses import point_losses
from flowseg_jax.ops.matcher import batched_hungarian
from flowseg_jax.ops.points import sample_packed_masks, sample_points, uncertain_points
from flowseg_jax.ops.resize import resize as resized

LEVELS, TARGETS, RESIZED, IMAGES = 10, 32, 50, 16


def point_losses_grad(sizes: Sizes, dtype: str) -> Pair:
    """Both sides get the random candidates: drawing them is not part of it."""
    rng = np.random.default_rng(0)
    count, kept = sizes.points, int(0.75 * sizes.points)
    grid, side = shapes_of(sizes)[-1][0], sizes.model.sam.image_size
    logits = random(TARGETS, grid, grid)
    packed = jnp.asarray(blobs(rng, TARGETS, side))
    candidates, extra = (jnp.asarray(rng.random((TARGETS, n, 2), np.float32)) for n in (3 * count, count - kept))

    @jax.jit
    def ours(logits, packed, candidates, extra):
        def loss(logits):
            points = uncertain_points(sample_points(logits, candidates), candidates, extra, kept)
            truth = sample_packed_masks(packed, points, side)
            bce, dice = point_losses(sample_points(logits, points), truth, jnp.ones(TARGETS, bool))
            return 5 * (bce + dice) / TARGETS

        return jax.value_and_grad(loss)(logits)

    def theirs(wrap: Wrap) -> Call:
        leaf, places = to_torch(logits).requires_grad_(), (to_torch(candidates), to_torch(extra))
        truth = torch.from_numpy(np.unpackbits(np.asarray(packed), axis=-1)).float()
        terms = wrap(peer_losses.point_terms)

        def call() -> tuple:
            bce, dice = terms(leaf, truth, *places, kept)
            loss = 5 * (bce + dice) / TARGETS
            return loss, torch.autograd.grad(loss, leaf)[0]

        return call

    return Pair(lambda: ours(logits, packed, candidates, extra), theirs, 1e-4)


def matcher(sizes: Sizes, dtype: str, problems: int = LEVELS) -> Pair:
    queries = sizes.model.mask_decoder.num_queries
    targets = min(TARGETS, queries)
    cost = random(problems, targets, queries)
    exists = jnp.ones((problems, targets), bool)
    host, ours = np.asarray(cost), jax.jit(batched_hungarian)
    return Pair(
        lambda: ours(cost, exists),
        lambda wrap: lambda: np.stack([linear_sum_assignment(matrix)[1] for matrix in host]),
        0.0,
        compiled=False,
    )


def matcher_batch(sizes: Sizes, dtype: str) -> Pair:
    return matcher(sizes, dtype, IMAGES * LEVELS)


def resize(sizes: Sizes, dtype: str) -> Pair:
    grid, side = shapes_of(sizes)[-1][0], sizes.model.sam.image_size
    masks = random(1, RESIZED, grid, grid)
    ours = jax.jit(lambda x: resized(x, (side, side)))

    def theirs(wrap: Wrap) -> Call:
        given, interpolate = to_torch(masks), wrap(torch.nn.functional.interpolate)
        return inference(lambda: interpolate(given, size=(side, side), mode="bilinear", align_corners=False))

    return Pair(lambda: ours(masks), theirs, 1e-5)

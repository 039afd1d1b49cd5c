"""The whole model: an image and an expression to masks, a train step, an image with seven expressions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import peer_losses
from benchmarks.components import Call, Pair, Wrap
from benchmarks.components.inputs import bind, exported, inference, module, parameters, placed, to_torch
from benchmarks.components.sizes import Sizes, dummy_batch, experiment, one_of, prefix
from benchmarks.peer import FlowSegTorch, torch_batch
from flowseg_jax.losses import LossConfig, PointSamples
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.outputs import ImageCache
from flowseg_jax.training import flops
from flowseg_jax.training.optimizer import split_trainable
from flowseg_jax.training.program import TrainProgram
from flowseg_jax.training.step import TrainState
from flowseg_jax.types import PAD, Batch, BatchShape, ExpressionQueries, ImageInputs

# A pixel whose mask logit is zero up to rounding may be attended to on one side and not on the other.
TOLERANCE = 1e-3
EXPRESSIONS, TRAINED = 7, 4
STACKS = {"sam": 24, "siglip": 27, "llm": 36, "pixel_decoder": 6, "mask_decoder": 9}  # layers of the whole model


class Answer:
    """Our way from an image and expressions to all candidates: one pass encodes the image, one runs all expressions.

    A call returns scores [K, Q] and masks [K, Q, h, w].
    """

    def __init__(self, graphdef: Any, params: Any):
        self._params = placed(params)
        self._prefill = jax.jit(lambda params, views, prefix: bind(graphdef, params).prefill_image(views, prefix))

        @jax.jit
        def predict(params: Any, cache: ImageCache, questions: ExpressionQueries) -> tuple[jax.Array, jax.Array]:
            candidates = bind(graphdef, params).predict_cached(cache, questions)
            return candidates.scores[0], candidates.mask_logits[0]

        self._predict = predict

    def __call__(self, views: ImageInputs, prefix: jax.Array, questions: ExpressionQueries) -> tuple[jax.Array, jax.Array]:
        return self._predict(self._params, self._prefill(self._params, views, prefix), questions)


def _network(cfg: FlowSegConfig) -> tuple[dict[str, Any], Any]:
    return parameters("flowseg", cfg), module("flowseg", cfg)


def _on_device(batch: Batch, cfg: FlowSegConfig) -> tuple[ImageInputs, jax.Array, ExpressionQueries]:
    """A batch of one image as its inputs, the prompt's prefix and the expressions."""
    start = prefix(cfg)
    fields = {
        name: getattr(batch, name)[:, start:] for name in ("input_ids", "position_ids", "segment_ids", "phrase_ids", "seg_ids")
    }
    queries = ExpressionQueries(**fields, query_valid=batch.phrase_target != PAD)
    images = ImageInputs(batch.sam_images, batch.resized_hw, batch.siglip_images)
    return jax.tree.map(jnp.asarray, (images, batch.input_ids[0, :start], queries))


def _one_by_one(cfg: FlowSegConfig, tensors: Mapping[str, torch.Tensor], batches: list[Batch]) -> Callable[[Wrap], Call]:
    """The peer's answers to expressions that come one at a time, each with its image."""

    def make(wrap: Wrap) -> Call:
        model, given = FlowSegTorch(cfg, dict(tensors), wrap), [torch_batch(batch) for batch in batches]

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            scores, masks = zip(*(model.segment(batch, 1) for batch in given), strict=True)
            return torch.cat(scores), torch.cat(masks)

        return inference(call)

    return make


def forward(sizes: Sizes, dtype: str) -> Pair:
    cfg, batch = sizes.whole, dummy_batch(sizes.whole, 1, sizes.words)
    params, graphdef = _network(cfg)
    call, there = Answer(graphdef, params), _on_device(batch, cfg)
    return Pair(lambda: call(*there), _one_by_one(cfg, exported("flowseg", params, cfg), [batch]), TOLERANCE)


def seven_expressions(sizes: Sizes, dtype: str) -> Pair:
    cfg, batch = sizes.seven, dummy_batch(sizes.seven, EXPRESSIONS, sizes.words)
    params, graphdef = _network(cfg)
    singles = [one_of(batch, number, sizes.words) for number in range(EXPRESSIONS)]
    call, there = Answer(graphdef, params), _on_device(batch, cfg)
    tensors = exported("flowseg", params, cfg)
    return Pair(lambda: call(*there), _one_by_one(cfg, tensors, singles), TOLERANCE, facts=full_depth(cfg, sizes.words))


def seven_shared(sizes: Sizes, dtype: str) -> Pair:
    cfg, batch = sizes.seven, dummy_batch(sizes.seven, EXPRESSIONS, sizes.words)
    params, graphdef = _network(cfg)
    call, there = Answer(graphdef, params), _on_device(batch, cfg)
    singles = [_on_device(one_of(batch, number, sizes.words), cfg) for number in range(EXPRESSIONS)]
    return Pair(
        lambda: call(*there),
        lambda wrap: lambda: [jax.block_until_ready(call(*single)) for single in singles],
        TOLERANCE,
        peer_output=lambda found: tuple(jnp.concatenate(part) for part in zip(*found, strict=True)),
        compiled=False,
        facts=full_depth(cfg, sizes.words),
    )


def full_depth(cfg: FlowSegConfig, words: int) -> dict[str, float]:
    """By what the times of `cfg`, whose stacks are cut, are multiplied for the times of the whole depth: FLOPs / FLOPs.

    An extrapolation: it takes for granted that all parts run at the same speed.

    Returns:
        `extrapolate_ours` for all expressions in one pass, `extrapolate_peer` for one expression at a time.
    """
    replace = dataclasses.replace
    blocks = STACKS["sam"] // 4
    whole = replace(
        cfg,
        sam=replace(
            cfg.sam, num_hidden_layers=STACKS["sam"], global_attn_indexes=tuple(range(blocks - 1, STACKS["sam"], blocks))
        ),
        connector_hidden_layers=(12, 18, 24),
        **{name: replace(getattr(cfg, name), num_hidden_layers=STACKS[name]) for name in ("siglip", "llm")},
        **{name: replace(getattr(cfg, name), num_layers=STACKS[name]) for name in ("pixel_decoder", "mask_decoder")},
    )

    def work(model: FlowSegConfig, expressions: int) -> float:
        sides = model.sam.image_size, model.siglip.image_size
        shape = BatchShape(1, prefix(model) + expressions * words, expressions, expressions, *sides)
        parts = flops.forward(model, shape, LossConfig(language_weight=0.0))
        return sum(part.forward for name, part in parts.items() if name != "masks")  # of training: matching and its targets

    factor = {number: work(whole, number) / work(cfg, number) for number in (1, EXPRESSIONS)}
    return {"extrapolate_ours": factor[EXPRESSIONS], "extrapolate_peer": factor[1]}


class _Training:
    """Our train step as training makes it, with a state of its own that every call takes one step further."""

    def __init__(self, params: Any, cfg: FlowSegConfig, batch: Batch, points: int):
        self.config = experiment(cfg, batch, points)
        self.program = program = TrainProgram.build(self.config, jax.devices()[:1])
        trainable, frozen = split_trainable(placed(params), program.lr_multipliers)
        state = TrainState(jnp.int32(0), trainable, frozen, program.optimizer.init(trainable), jnp.zeros(2, jnp.int32))
        self._state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, program.state)
        self._batch = program.to_device(batch)
        self.first: dict[str, jax.Array] | None = None

    def __call__(self) -> Mapping[str, jax.Array]:
        """One step; its metrics, when the new state is there as well."""
        self._state, metrics = self.program.step(self._state, self._batch)
        jax.block_until_ready(self._state)
        self.first = self.first or {name: metrics[name] for name in ("loss", "optimizer/gradient_norm")}
        return self.first

    def points(self) -> PointSamples:
        """The random points of the first step of all levels [J, 1, ...], drawn as the step draws them."""
        losses, cfg = self.program.run_config.losses, self.program.run_config.model
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        referring = jax.random.split(jax.random.fold_in(key, 0), 3)[0]
        levels = jax.random.split(referring, cfg.mask_decoder.num_layers + 1)[:, None]
        count = self.program.run_config.shape.max_phrases
        return jax.vmap(lambda keys: PointSamples.draw(keys, count, losses))(levels)


def train_step(sizes: Sizes, dtype: str) -> Pair:
    """Forward, losses, backward, clipping and AdamW. The peer gets the random points of our first step, in every step; the
    losses and gradient norms of the first step are compared."""
    cfg, batch = sizes.whole, dummy_batch(sizes.whole, TRAINED, sizes.words)
    params = parameters("flowseg", cfg)
    ours = _Training(params, cfg, batch, sizes.points)
    run_config, drawn, tensors = ours.program.run_config, ours.points(), exported("flowseg", params, cfg)
    levels = [
        tuple(to_torch(x[level])[0] for x in (drawn.matcher, drawn.candidates, drawn.extra))
        for level in range(len(drawn.matcher))
    ]
    truth = torch.from_numpy(np.unpackbits(batch.packed_masks[0], axis=-1)).float()

    def theirs(wrap: Wrap) -> Call:
        # AdamW writes into its parameters: every mode starts from a copy of its own.
        model = FlowSegTorch(cfg, {name: x.clone() for name, x in tensors.items()}, wrap)
        opt, given, first = run_config.optimizer, torch_batch(batch), {}
        adamw = torch.optim.AdamW(
            model.parameters(), opt.learning_rate, (opt.b1, opt.b2), opt.eps, opt.weight_decay, fused=True
        )

        def call() -> dict[str, torch.Tensor]:
            adamw.zero_grad()
            loss = peer_losses.training_loss(model, given, truth, levels, run_config.losses)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), opt.clip)
            adamw.step()
            if not first:
                first.update({"loss": loss.detach(), "optimizer/gradient_norm": norm})
            return first

        return call

    return Pair(ours, theirs, TOLERANCE)

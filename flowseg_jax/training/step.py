"""One train step: forward, matched losses, backward, update; compiled once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from flowseg_jax.data.batch import Batch
from flowseg_jax.losses import LossConfig, Terms, denominators, divide, training_terms
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import bind
from flowseg_jax.parallel import BATCH_AXES
from flowseg_jax.training.optimizer import Params, merge

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run is, apart from its config and its data position (which is `step`).

    Attributes:
        step: int32, number of updates made.
        trainable: parameters with gradients and moments.
        frozen: the others.
        opt_state: of the optimizer, over `trainable`.
        skipped: int32 [2], updates that were not finite and therefore not made: in all, and in a row just now.
    """

    step: jax.Array
    trainable: Params
    frozen: Params
    opt_state: Any
    skipped: jax.Array

    @property
    def params(self) -> Params:
        return merge(self.trainable, self.frozen)


def make_train_step(
    graphdef: nnx.GraphDef,
    cfg: FlowSegConfig,
    losses: LossConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    mesh: Mesh,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function to jit: (state, batch) -> (state, metrics). Randomness is a function of (seed, step, place in the batch).

    Forward and backward run inside one `shard_map` over the axes the batch is split on: every device sees its own images and
    nothing else, so no loop (the matcher's above all) can hide a collective. With `accumulate` above 1 a device takes its
    images in so many parts, one after the other. The batch alone says what the losses are divided by, so neither the mesh
    nor the parts change the update.

    An update that is not finite is not made: parameters and moments stay as they are, and `TrainState.skipped` counts it.
    """

    def local(trainable: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
        images = batch.tokens.shape[0]
        first = jax.lax.axis_index(BATCH_AXES) * images
        keys = jax.vmap(lambda i: jax.random.fold_in(key, first + i))(jnp.arange(images))
        counts = jax.lax.psum(denominators(cfg, batch, losses), BATCH_AXES)

        def loss_of(trainable: Params, part: Batch, keys: jax.Array) -> tuple[jax.Array, tuple[Metrics, Terms]]:
            model = bind(graphdef, merge(trainable, frozen))
            terms, watched = training_terms(model, part, model(part), keys, losses)
            shares = divide({name: (total, counts[name]) for name, (total, _) in terms.items()})
            return sum(shares.values()), (shares, watched)

        def differentiate(part: Batch, keys: jax.Array) -> tuple[Params, tuple[Metrics, Terms]]:
            return jax.grad(loss_of, has_aux=True)(trainable, part, keys)

        if accumulate == 1:
            found = differentiate(batch, keys)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), (batch, keys))
            shapes = jax.eval_shape(differentiate, *jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = lambda total, part: (jax.tree.map(jnp.add, total, differentiate(*part)), None)  # noqa: E731
            found, _ = jax.lax.scan(add, zeros, parts)
        gradients, (shares, watched) = jax.lax.psum(found, BATCH_AXES)
        metrics = {"loss": sum(shares.values())} | {f"loss_{name}": value for name, value in shares.items()}
        return gradients, metrics | divide(watched)

    shared = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(BATCH_AXES), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, metrics = shared(state.trainable, state.frozen, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        new = optax.apply_updates(state.trainable, updates), opt_state
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), new, (state.trainable, state.opt_state)
        )
        skipped = jnp.where(finite, state.skipped * jnp.array([1, 0]), state.skipped + 1)
        metrics["skipped"], metrics["skipped_in_a_row"] = skipped
        return TrainState(state.step + 1, trainable, state.frozen, opt_state, skipped), metrics

    return train_step

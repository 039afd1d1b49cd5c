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
from flowseg_jax.losses import LossConfig, divide, training_terms
from flowseg_jax.models.flowseg import bind
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
    """

    step: jax.Array
    trainable: Params
    frozen: Params
    opt_state: Any

    @property
    def params(self) -> Params:
        return merge(self.trainable, self.frozen)


def make_train_step(
    graphdef: nnx.GraphDef,
    losses: LossConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function to jit: (state, batch) -> (state, metrics). Randomness is a function of (seed, step, place in the batch).

    Forward and backward run inside one `shard_map` over the axes the batch is split on: every device sees its own images and
    nothing else, so no loop (the matcher's above all) can hide a collective. Sums and denominators are added over devices
    before anything is divided, so the mesh does not change the update.
    """
    axes = ("data", "fsdp")

    def local(trainable: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
        images = batch.tokens.shape[0]
        first = jax.lax.axis_index(axes) * images
        keys = jax.vmap(lambda i: jax.random.fold_in(key, first + i))(jnp.arange(images))

        def loss_of(trainable: Params) -> tuple[jax.Array, Metrics]:
            model = bind(graphdef, merge(trainable, frozen))
            terms, watched = training_terms(model, batch, model(batch), keys, losses)
            # The share of this device: its sums over everybody's denominators.
            shares, seen = (
                divide({name: (total, jax.lax.psum(count, axes)) for name, (total, count) in group.items()})
                for group in (terms, watched)
            )
            return sum(shares.values()), {f"loss_{name}": value for name, value in shares.items()} | seen

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return jax.lax.psum((gradients, {"loss": loss} | metrics), axes)

    shared = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(axes), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, metrics = shared(state.trainable, state.frozen, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    return train_step

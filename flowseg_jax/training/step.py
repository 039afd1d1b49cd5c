"""One train step: forward, matched losses, backward, update; compiled once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig, LossTerms, denominators, loss_terms, normalize_terms
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import bind_params
from flowseg_jax.ops.collectives import DataParallelGroup
from flowseg_jax.sharding import BATCH_AXES, MESH_AXES
from flowseg_jax.training import ema as averages
from flowseg_jax.training.lora import dropout_keys
from flowseg_jax.training.optimizer import Params, merge_trainable
from flowseg_jax.types import Batch

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
        ema: the moving average of `trainable`; {} without one.
    """

    step: jax.Array
    trainable: Params
    frozen: Params
    opt_state: Any
    skipped: jax.Array
    ema: Params = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> Params:
        return merge_trainable(self.trainable, self.frozen)


@dataclasses.dataclass(frozen=True)
class BatchPartition:
    """How the images of a global batch are partitioned: among devices, and on each device into micro-batches.

    Attributes:
        images: in the batch (B).
        devices: that the batch is sharded over.
        micro_batches: per device, taken one after the other.

    A micro-batch is a run of consecutive rows of the batch, so which images share negatives depends on neither number. The
    array that the devices hold is therefore in another order than the batch: see `rows`.
    """

    images: int
    devices: int
    micro_batches: int

    @property
    def per_device_images(self) -> int:
        """Images of one device in one micro-batch."""
        return self.images // (self.devices * self.micro_batches)

    def rows(self) -> np.ndarray:
        """int [B], the row of the batch that stands at each place of the array split over devices."""
        return (
            np.arange(self.images).reshape(self.micro_batches, self.devices, self.per_device_images).swapaxes(0, 1).reshape(-1)
        )

    def validate(self, group: int) -> None:
        """Raises a UserError unless everything divides and micro-batches are whole groups of negatives."""
        share = self.devices * self.micro_batches
        if self.images % share:
            raise UserError(
                f"batch_size {self.images} cannot be split over {self.devices} device(s) and "
                f"optimizer.grad_accum_steps={self.micro_batches} micro-batch(es): make it a multiple of {share}"
            )
        if self.images // self.micro_batches % group or (self.per_device_images % group and group % self.per_device_images):
            raise UserError(
                f"batch_size {self.images} in optimizer.grad_accum_steps={self.micro_batches} micro-batch(es) on "
                f"{self.devices} device(s) is {self.images // self.micro_batches} images at a time, "
                f"{self.per_device_images} a device: that does not divide into groups of model.negatives_group_size={group}; "
                f"make batch_size a multiple of {math.lcm(share, group * self.micro_batches)}"
            )


def make_train_step(
    graphdef: nnx.GraphDef,
    cfg: FlowSegConfig,
    losses: LossConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    mesh: Mesh,
    specs: tuple[Any, Any],
    partition: BatchPartition,
    ema: averages.EmaConfig | None = None,
    dropout: Mapping[str, int] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function to jit: (state, batch) -> (state, metrics). Randomness is a function of (seed, step, row of the batch).

    Forward and backward run inside one `shard_map` over the axes the batch is split on. Every device sees its own images and
    its parts of the parameters, and every exchange is one that is written out: weights are gathered where they are used, one
    layer at a time, and their gradients scattered back; no loop (the matcher's above all) can hide a collective. The `tensor`
    axis, where it has more than one device, is left to the compiler.

    The batch alone says what the losses are divided by, so neither the mesh nor the micro-batches change the update. An update
    that is not finite is not made: parameters and moments stay as they are, and `TrainState.skipped` counts it.

    Args:
        graphdef: the model's, from `sharding.mark_fsdp_axes`.
        cfg, losses, optimizer, schedule, seed: of the run.
        mesh: the devices.
        specs: `PartitionSpec`s of the trainable and of the frozen parameters.
        partition: of the batch, whose rows come in the order of `BatchPartition.rows`.
        ema: of the average, for a state that has one.
        dropout: {linear layer: layers of its stack} whose adapters drop elements of their input; `graphdef` has their keys.
    """
    specs = jax.tree.map(lambda spec: shard_map_spec(spec, mesh), specs)
    several = [axis for axis in BATCH_AXES if mesh.shape[axis] > 1]  # a sum over one device would still be an all-reduce
    # A gradient is still to be summed over the axes along which its parameter is not sharded.
    unsummed = jax.tree.map(lambda spec: tuple(axis for axis in several if axis not in _axes(spec)), specs[0])
    micro_batches, each, dp_group = partition.micro_batches, partition.per_device_images, DataParallelGroup(BATCH_AXES)

    def device_gradients(trainable: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
        counts = jax.lax.psum(denominators(cfg, batch, losses), BATCH_AXES)
        row = jnp.arange(micro_batches)[:, None] * (each * partition.devices) + dp_group.batch_offset(each) + jnp.arange(each)
        keys = jax.vmap(jax.vmap(lambda row: jax.random.fold_in(key, row)))(row)

        def loss_of(trainable: Params, part: Batch, keys: jax.Array) -> tuple[jax.Array, tuple[Metrics, LossTerms]]:
            params = merge_trainable(trainable, frozen)
            if dropout:
                params = merge_trainable(params, dropout_keys(dropout, keys))
            model = bind_params(graphdef, params)
            out = model(part, dp_group)
            with jax.named_scope("losses"):
                terms, accuracies = loss_terms(model, part, out, keys, losses, dp_group)
            shares = normalize_terms({name: (total, counts[name]) for name, (total, _) in terms.items()})
            return sum(shares.values()), (shares, accuracies)

        def differentiate(part: Batch, keys: jax.Array) -> tuple[Params, tuple[Metrics, LossTerms]]:
            return jax.grad(loss_of, has_aux=True)(trainable, part, keys)

        if micro_batches == 1:
            found = differentiate(batch, keys[0])
        else:
            xs = jax.tree.map(lambda x: x.reshape(micro_batches, each, *x.shape[1:]), batch), keys
            shapes = jax.eval_shape(differentiate, *jax.tree.map(lambda x: x[0], xs))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = lambda total, part: (jax.tree.map(jnp.add, total, differentiate(*part)), None)  # noqa: E731
            found, _ = jax.lax.scan(add, zeros, xs)
        gradients, found_metrics = found
        with jax.named_scope("sum_gradients"):
            gradients = jax.tree.map(lambda x, axes: jax.lax.psum(x, axes) if axes else x, gradients, unsummed)
        shares, accuracies = jax.lax.psum(found_metrics, BATCH_AXES)
        metrics = {"loss": sum(shares.values())} | {f"loss/{name}": value for name, value in shares.items()}
        return gradients, metrics | {f"accuracy/{name}": value for name, value in normalize_terms(accuracies).items()}

    sharded_gradients = jax.shard_map(
        device_gradients,
        mesh=mesh,
        in_specs=(*specs, PartitionSpec(BATCH_AXES), PartitionSpec()),
        out_specs=(specs[0], PartitionSpec()),
        axis_names=shard_map_axes(mesh),
        check_vma=False,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, metrics = sharded_gradients(state.trainable, state.frozen, batch, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
            metrics["optimizer/gradient_norm"] = optax.global_norm(gradients)
            metrics["optimizer/learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
            trainable = optax.apply_updates(state.trainable, updates)
            average = averages.update(ema, state.ema, trainable, state.step) if state.ema else {}
            new = trainable, opt_state, average
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["optimizer/gradient_norm"])
            trainable, opt_state, average = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), new, (state.trainable, state.opt_state, state.ema)
            )
        # In all, and in a row just now: a finite update ends the row.
        skipped = jnp.where(finite, state.skipped * jnp.array([1, 0]), state.skipped + 1)
        metrics["optimizer/skipped"], metrics["optimizer/skipped_in_a_row"] = skipped
        return TrainState(state.step + 1, trainable, state.frozen, opt_state, skipped, average), metrics

    return train_step


def shard_map_axes(mesh: Mesh) -> set[str]:
    """The mesh axes that the step's `shard_map` takes for itself: all but a `tensor` axis of more than one device."""
    return set(MESH_AXES if mesh.shape["tensor"] == 1 else BATCH_AXES)


def _axes(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a partition spec uses."""
    return {axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,))}


def shard_map_spec(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """The spec for `shard_map`: without the `tensor` axis where that is left to the compiler."""
    if mesh.shape["tensor"] == 1:
        return spec
    return PartitionSpec(*(None if entry == "tensor" else entry for entry in spec))

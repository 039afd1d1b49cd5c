"""A config made into one program: the model's description, where everything lives, and the jitted train step.

Nothing is allocated here. Training builds a real state and real batches for the program; `flowseg plan` compiles it for
devices that need not be there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from flowseg_jax import sharding as parallel
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.data import collate
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.train_examples import TrainOptions
from flowseg_jax.errors import UserError
from flowseg_jax.experiment import check_keys
from flowseg_jax.losses import LossConfig
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.quantization import add_scales
from flowseg_jax.ops.portable import traced_for
from flowseg_jax.training import lora as adapters
from flowseg_jax.training.ema import EmaConfig
from flowseg_jax.training.initialization import initial_params
from flowseg_jax.training.lora import LoraConfig
from flowseg_jax.training.optimizer import (
    OptimizerConfig,
    Params,
    Rate,
    cast_frozen,
    decay_by_layer,
    lr_multipliers,
    lr_schedule,
    make_optimizer,
    split_trainable,
)
from flowseg_jax.training.step import BatchPartition, Metrics, TrainState, make_train_step
from flowseg_jax.types import Batch, BatchShape


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A config, read and checked: what `train` and `evaluate` are made from."""

    model: FlowSegConfig
    losses: LossConfig
    optimizer: OptimizerConfig
    prompts: PromptTemplates
    options: TrainOptions
    shape: BatchShape
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)

    @classmethod
    def from_config(cls, config: ConfigDict) -> RunConfig:
        """Raises UserError for unknown or missing keys and where values do not fit together."""
        check_keys(config)
        model = FlowSegConfig.from_dict(config.model.to_dict())
        optimizer = config.optimizer.to_dict()
        losses = LossConfig(**optimizer.pop("losses"))
        data = config.data
        objects = data.objects if model.num_classes or model.generic_pass != "off" else "referred"
        options = TrainOptions(
            objects=objects,
            include_generic=model.generic_pass != "off" and objects == "all",
            negatives=data.max_names > 0,
            curriculum=tuple((until, dict(weights)) for until, weights in data.curriculum),
            explanation_prob=data.explanation_prob,
            lsj_scale_range=data.lsj_scale_range,
            pad_to_square=data.pad_to_square,
            num_threads=data.num_threads,
            num_workers=data.num_workers,
        )
        names = 0 if model.generic_pass == "off" else data.max_names or data.max_masks
        sides = model.sam.image_size, model.siglip.image_size
        shape = BatchShape(config.batch_size, data.text_length, data.max_phrases, data.max_masks, *sides, names)
        if config.batch_size % model.negatives_group_size:
            raise UserError(
                f"batch_size {config.batch_size} is no multiple of model.negatives_group_size {model.negatives_group_size}"
            )
        if data.pad_to_square and model.components == "full":
            raise UserError(
                "data.pad_to_square is for models without a mask decoder (stage 2): evaluation and prediction stretch images"
            )
        if model.has_mask_decoder and data.max_masks > model.mask_decoder.num_queries:
            raise UserError(
                f"data.max_masks is {data.max_masks}, and a target takes one of the "
                f"model.mask_decoder.num_queries={model.mask_decoder.num_queries}: "
                "lower the one or raise the other"
            )
        if model.has_language_model and data.text_length <= model.num_visual_tokens:
            raise UserError(
                f"data.text_length is {data.text_length}, and an image alone takes {model.num_visual_tokens} tokens: raise it"
            )
        return cls(
            model,
            losses,
            OptimizerConfig(**optimizer),
            PromptTemplates(chat_template=data.chat_template, randomize=data.random_prompts),
            options,
            shape,
            LoraConfig(**config.lora.to_dict()),
            EmaConfig(**config.ema.to_dict()),
        )


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """Attributes:
    run_config: the config it is made from.
    mesh: the devices.
    graphdef: of the model as one device computes it (`sharding.mark_fsdp_axes`).
    lr_multipliers: {path: learning-rate multiplier, in a stack perhaps one for each layer, or None where frozen}.
    partition: of the batch among devices and into micro-batches.
    optimizer: over the trainable parameters.
    state: abstract, with shardings.
    batch: abstract, with shardings; its rows in the order of `partition.rows()`.
    step: jitted (state, batch) -> (state, metrics); the state is donated.
    """

    run_config: RunConfig
    mesh: Mesh
    graphdef: nnx.GraphDef
    lr_multipliers: Mapping[str, Rate]
    partition: BatchPartition
    optimizer: optax.GradientTransformation
    state: TrainState
    batch: Batch
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

    @classmethod
    def build(cls, config: ConfigDict, devices: Sequence[Any] | None = None) -> TrainProgram:
        """Raises UserError where the config's values do not fit together, or not the devices (None: all there are)."""
        run_config = RunConfig.from_config(config)
        mesh = parallel.make_mesh(config.mesh.to_dict(), devices)
        ways = math.prod(mesh.shape[axis] for axis in parallel.BATCH_AXES)
        partition = BatchPartition(run_config.shape.batch, ways, run_config.optimizer.grad_accum_steps)
        partition.validate(run_config.model.negatives_group_size)

        lora = run_config.lora
        whole, described = adapters.abstract_model(run_config.model, lora)
        network = nnx.merge(whole, described)
        rates = lr_multipliers(list(flatten_params(flowseg.params_dict(described))), run_config.optimizer.param_groups)
        rates = decay_by_layer(adapters.freeze_base(rates), run_config.model, run_config.optimizer.layer_decay)
        if run_config.optimizer.frozen_dtype == "int8":
            rates |= dict.fromkeys(add_scales(network, lambda path: rates[f"{path}/kernel"] is None), None)
            described = nnx.split(network)[1]
        graphdef = parallel.mark_fsdp_axes(network, mesh)
        shardings = flatten_params(parallel.param_shardings(described, mesh))
        flat = flatten_params(flowseg.params_dict(described))
        dropout = None
        if lora.dropout and lora.targets:
            graphdef = adapters.with_dropout(network)
            dropout = {path: flat[f"{path}/lora/a"].shape[0] for path in adapters.adapted(flat)}
        optimizer = make_optimizer(run_config.optimizer, config.num_steps, rates)
        params = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in flat.items()}
        trainable, frozen = split_trainable(unflatten_params(params), rates)
        state = _abstract_state(optimizer, trainable, frozen, run_config.optimizer.frozen_dtype, mesh)
        state = dataclasses.replace(state, ema=trainable if run_config.ema.decay else {})

        step = make_train_step(
            graphdef,
            run_config.model,
            run_config.losses,
            optimizer,
            lr_schedule(run_config.optimizer, config.num_steps),
            config.seed,
            mesh,
            jax.tree.map(lambda x: x.sharding.spec, (trainable, frozen)),
            partition,
            run_config.ema,
            dropout,
        )
        out = jax.tree.map(lambda x: x.sharding, state), parallel.replicated(mesh)
        # An axis that the compiler divides, over `tensor`, must not be joined with another one, as for a CPU alone.
        platform = mesh.devices.flat[0].platform if mesh.shape["tensor"] == 1 else "any"
        jitted = jax.jit(traced_for(platform)(step), donate_argnums=0, out_shardings=out)
        batch = _abstract_batch(run_config.shape, parallel.batch_sharding(mesh))
        return cls(run_config, mesh, graphdef, rates, partition, optimizer, state, batch, jitted)

    def compile(self) -> jax.stages.Compiled:
        """The step, compiled."""
        return self.step.lower(self.state, self.batch).compile()

    def initial_state(self, config: ConfigDict) -> tuple[TrainState, dict[str, str]]:
        """Parameters, fresh or from `init_from`, and moments, created where they belong; and with adapters the digests of
        their base, else {}.
        """
        run, kept = self.run_config, flatten_params(self.state.frozen)
        params, rounded_sums = initial_params(run.model, config.seed, config.init_from, self.mesh, run.lora, kept)
        trainable, frozen = split_trainable(params, self.lr_multipliers)
        base = adapters.base_digests(frozen, rounded_sums) if run.lora.targets else {}
        place = lambda abstract: jax.tree.map(lambda x: x.sharding, abstract)  # noqa: E731
        cast = lambda x: cast_frozen(x, self.run_config.optimizer.frozen_dtype)  # noqa: E731
        frozen = jax.jit(cast, donate_argnums=0, out_shardings=place(self.state.frozen))(frozen)
        moments = jax.jit(self.optimizer.init, out_shardings=place(self.state.opt_state))(trainable)
        zero = jax.jit(
            lambda: (jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32)), out_shardings=parallel.replicated(self.mesh)
        )
        step, skipped = zero()
        average = jax.tree.map(jnp.copy, trainable) if self.state.ema else {}  # the step is given both to keep
        return TrainState(step, trainable, frozen, moments, skipped, average), base

    def local_rows(self) -> list[int]:
        """The rows of the global batch that this process's devices hold, in the order in which they hold them."""
        places = self.batch.input_ids.sharding.addressable_devices_indices_map((self.partition.images,)).values()
        mine = sorted({place for (part,) in places for place in range(self.partition.images)[part]})
        return self.partition.rows()[mine].tolist()

    def to_device(self, batch: Batch) -> Batch:
        """This process's rows, in the order of `local_rows`, as its part of the global arrays that the step takes."""
        batch = dataclasses.replace(batch, example_id=batch.example_id.astype("int32"))  # 64 bits stay on the host
        return jax.tree.map(
            lambda x, like: jax.make_array_from_process_local_data(like.sharding, np.asarray(x), like.shape), batch, self.batch
        )


def model_params(run_config: RunConfig, state: TrainState) -> Params:
    """The parameters of the plain model that a state stands for: the moving average where there is one and `ema.export` says
    so, and adapters merged into their weights."""
    if state.ema and run_config.ema.export:
        state = dataclasses.replace(state, trainable=state.ema)
    return adapters.merge_adapters(state.params, run_config.lora.scale)


def _abstract_state(
    optimizer: optax.GradientTransformation, trainable: Any, frozen: Any, frozen_dtype: str, mesh: Mesh
) -> TrainState:
    """Moments are sharded like their parameters; the rest of the optimizer's state is small and replicated."""
    whole = parallel.replicated(mesh)

    def like(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def beside(moment: Any, param: jax.ShapeDtypeStruct) -> Any:
        if isinstance(moment, optax.MaskedNode):  # another of several optimizers has this parameter
            return moment
        return like(moment, param.sharding if moment.shape == param.shape else whole)  # adafactor's factors are small

    moments = optax.tree_utils.tree_map_params(
        optimizer,
        beside,
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda x: like(x, whole),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    stored = jax.eval_shape(lambda x: cast_frozen(x, frozen_dtype), frozen)
    stored = jax.tree.map(lambda x, param: like(x, param.sharding), stored, frozen)
    count = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)  # noqa: E731
    return TrainState(count(), trainable, stored, moments, count(2))


def _abstract_batch(shape: BatchShape, sharding: NamedSharding) -> Batch:
    one = collate.empty_batch(dataclasses.replace(shape, batch=1), pad=0)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (shape.batch, *x.shape[1:]), np.int32 if x.dtype == np.int64 else x.dtype, sharding=sharding
        ),
        one,
    )

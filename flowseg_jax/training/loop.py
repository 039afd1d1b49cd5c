"""The training run: data, state, step, loop, in that order on one page."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowseg_jax import parallel
from flowseg_jax.checkpoint import Checkpoints, changed_keys, prepare_workdir, save_model
from flowseg_jax.config import to_json
from flowseg_jax.data.batch import Batch, BatchShape
from flowseg_jax.data.builders import ensure_shapes
from flowseg_jax.data.pipeline import TrainData, TrainOptions, open_tokenizer
from flowseg_jax.data.prepared import Prepared
from flowseg_jax.data.prompts import Prompts
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig
from flowseg_jax.manifest import flatten
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.training.initial import initial_params
from flowseg_jax.training.optimizer import OptimizerConfig, make_optimizer, multipliers, schedule, split
from flowseg_jax.training.step import TrainState, make_train_step
from flowseg_jax.writers import Throughput, create_writer, heartbeat, say

# What the same run may change between two starts; anything else would be another run.
MAY_CHANGE = (
    "steps",
    "log_every",
    "checkpoint_every",
    "mesh",
    "data.dir",
    "data.threads",
    "init_from",
    "optimizer.accumulate",
    "optimizer.skip_limit",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config, read and checked: what `train` and `evaluate` are made from."""

    model: FlowSegConfig
    losses: LossConfig
    optimizer: OptimizerConfig
    prompts: Prompts
    options: TrainOptions
    shape: BatchShape

    @classmethod
    def read(cls, config: ConfigDict) -> Plan:
        """Raises UserError where values do not fit together."""
        model = FlowSegConfig.from_dict(config.model.to_dict())
        optimizer = config.optimizer.to_dict()
        losses = LossConfig(**optimizer.pop("losses"))
        data = config.data
        options = TrainOptions(
            objects="all" if model.classes or model.named_pass != "off" else "referred",
            include_generic=model.named_pass != "off",
            curriculum=tuple((until, dict(weights)) for until, weights in data.curriculum),
            threads=data.threads,
        )
        shape = BatchShape(
            config.batch_size, data.text, data.phrases, data.masks, model.sam.image_size, model.siglip.image_size
        )
        if config.batch_size % model.negatives_group:
            raise UserError(f"batch_size {config.batch_size} is no multiple of model.negatives_group {model.negatives_group}")
        return cls(model, losses, OptimizerConfig(**optimizer), Prompts(chat=data.chat, vary=data.vary_prompts), options, shape)


def open_data(config: ConfigDict) -> Prepared:
    """The data set of a config; the embedded `shapes` set is generated and prepared if it is missing."""
    data = config.data
    if data.images:
        options = {"mix": dict(data.mix)} if data.mix else {}
        if not data.tokenizer:
            options["tokenizer_vocab"] = config.model.llm.vocab
        return ensure_shapes(data.dir, data.images, data.seed, log=say, **options)
    return Prepared.open(data.dir)


def initial_state(plan: Plan, config: ConfigDict, optimizer: Any, rates: Mapping[str, float | None], mesh: Any) -> TrainState:
    """Parameters, fresh or from `init_from`, and moments, created where they belong."""
    trainable, frozen = split(initial_params(plan.model, config.seed, config.init_from, mesh), rates)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable), jnp.zeros(2, jnp.int32))


def train(config: ConfigDict, workdir: str | Path) -> Path:
    """Trains, or continues, the run in `workdir`; returns the directory of the trained model.

    Raises:
        UserError: an unusable config, workdir, data set or checkpoint; nothing is half-written.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    plan = Plan.read(config)
    workdir = prepare_workdir(workdir)
    (workdir / "config.json").write_text(to_json(config) + "\n")
    prepared = open_data(config)
    tokenizer = open_tokenizer(prepared, plan.prompts, config.data.tokenizer)
    if tokenizer.vocab > plan.model.llm.vocab:
        raise UserError(f"model.llm.vocab is {plan.model.llm.vocab}, the tokenizer {tokenizer.name} has {tokenizer.vocab} ids")
    data = TrainData(
        prepared,
        plan.shape,
        plan.prompts,
        config.seed,
        visual_tokens=plan.model.visual_tokens,
        tokenizer=tokenizer,
        options=plan.options,
    )
    if plan.model.classes and len(prepared.categories) > plan.model.classes:
        raise UserError(f"model.classes is {plan.model.classes}, the data set has {len(prepared.categories)} categories")

    mesh = parallel.make_mesh(config.mesh.to_dict())
    check_parts(plan, mesh)
    graphdef, abstract = flowseg.describe(plan.model)
    rates = multipliers(list(flatten(flowseg.at_rest(abstract))), plan.optimizer.groups)
    rate = schedule(plan.optimizer, config.steps)
    optimizer = make_optimizer(plan.optimizer, config.steps, rates)
    with heartbeat("initialising parameters"):
        state = initial_state(plan, config, optimizer, rates, mesh)
        everywhere = parallel.replicated(mesh)
        state = jax.device_put(state, jax.tree.map(lambda _: everywhere, state))
    total, trained = (sum(x.size for x in jax.tree.leaves(part)) for part in (state.params, state.trainable))
    say(f"{total:,} parameters, {trained:,} of them trained, on {mesh.devices.size} device(s)")

    def same_run(meta: dict[str, Any]) -> None:
        if changed := changed_keys(meta["config"], json.loads(to_json(config)), MAY_CHANGE):
            raise UserError(
                f"{workdir} holds a run with other values of {', '.join(changed)}; use another --workdir or its config"
            )

    with Checkpoints(workdir) as checkpoints:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), as_tree(state))
        restored = checkpoints.restore_latest(like, same_run)
        if restored:
            state = from_tree(state, restored.state)
            say(f"continuing from the checkpoint of step {restored.step} in {workdir}")
        start = restored.step if restored else 0
        step_function = make_train_step(
            graphdef, plan.model, plan.losses, optimizer, rate, config.seed, mesh, plan.optimizer.accumulate
        )
        train_step = jax.jit(step_function, donate_argnums=0)
        batches = data.iterate(start)
        placed = parallel.batch_sharding(mesh)
        meta = {"config": json.loads(to_json(config)), "data_position": start}

        def save(step: int) -> None:
            checkpoints.save(step, as_tree(state), meta | {"data_position": step})

        def report(step: int, metrics: Mapping[str, jax.Array]) -> None:
            values = log(writer, step, metrics, throughput)
            check_skipped(values, step, data, plan.optimizer.skip_limit)

        stopped: list[int] = []
        handlers = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
        writer = create_writer(workdir, steps=config.steps, start_step=start)
        try:
            if start < config.steps:
                batch = jax.device_put(device_part(next(batches)), placed)
                with heartbeat("compiling the train step"):
                    compiled = train_step.lower(state, batch).compile()
                throughput = Throughput(start, config.batch_size)
            pending: tuple[int, Any] | None = None
            for step in range(start + 1, config.steps + 1):
                state, metrics = compiled(state, batch)
                if step < config.steps:
                    batch = jax.device_put(device_part(next(batches)), placed)
                if pending:  # read one step late: the device never waits for the host
                    report(*pending)
                    pending = None
                if step % config.log_every == 0 or step == config.steps:
                    pending = step, metrics
                if step % config.checkpoint_every == 0 or step == config.steps or stopped:
                    save(step)
                if stopped:
                    break
            if pending:
                report(*pending)
            checkpoints.wait()
        finally:
            writer.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if stopped:
        say(f"stopped: the state of step {int(state.step)} is saved in {workdir}; the same command continues")
        if signal.SIGINT in stopped:
            raise KeyboardInterrupt
        raise SystemExit(0)
    return export(plan, state, config, prepared, tokenizer, workdir)


def check_parts(plan: Plan, mesh: Mesh) -> None:
    """Raises a UserError unless the batch can be split over the mesh, into parts, and those into groups of negatives."""
    ways = math.prod(mesh.shape[axis] for axis in parallel.BATCH_AXES)
    parts, group = plan.optimizer.accumulate, plan.model.negatives_group
    if plan.shape.batch % (ways * parts * group):
        raise UserError(
            f"batch_size {plan.shape.batch} cannot be split over {ways} device(s) and optimizer.accumulate={parts} part(s) "
            f"each in whole groups of model.negatives_group={group}: make it a multiple of {ways * parts * group}"
        )


def log(writer: Any, step: int, metrics: Mapping[str, jax.Array], throughput: Throughput) -> dict[str, float]:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    writer.write_scalars(step, values | throughput(step))
    return values


def check_skipped(values: Mapping[str, float], step: int, data: TrainData, limit: int) -> None:
    """Raises a UserError with the images of the last batches when too many updates in a row were not finite.

    Nothing is lost: parameters and moments are those before the first of them.
    """
    row = int(values["skipped_in_a_row"])
    if row > limit:
        last = [data.batch(i).example_id.tolist() for i in range(step - min(row, 3), step)]
        raise UserError(
            f"the last {row} updates up to step {step} were not finite and were skipped, optimizer.skip_limit is {limit}; "
            f"image ids of the last batches: {'; '.join(', '.join(map(str, ids)) for ids in last)}"
        )


def device_part(batch: Batch) -> Batch:
    """The batch as the device sees it: record ids stay on the host (they need 64 bits)."""
    return dataclasses.replace(batch, example_id=batch.example_id.astype("int32"))


def as_tree(state: TrainState) -> dict[str, Any]:
    """The state as a plain tree, which is what a checkpoint holds."""
    return {
        "step": state.step,
        "trainable": state.trainable,
        "frozen": state.frozen,
        "moments": jax.tree.leaves(state.opt_state),
        "skipped": state.skipped,
    }


def from_tree(like: TrainState, tree: Mapping[str, Any]) -> TrainState:
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), tree["moments"])
    return TrainState(tree["step"], tree["trainable"], tree["frozen"], opt_state, tree["skipped"])


def export(plan: Plan, state: TrainState, config: ConfigDict, prepared: Prepared, tokenizer: Tokenizer, workdir: Path) -> Path:
    """Writes the runnable model `<workdir>/model`, in float32."""
    extra = {"step": int(state.step), "seed": config.seed, "prompts": dataclasses.asdict(plan.prompts), "data": prepared.digest}
    cfg = plan.model.to_dict()
    target = save_model(workdir / "model", state.params, cfg, tokenizer.name, extra, dtype=None, overwrite=True)
    say(f"the model of step {int(state.step)} is in {target}")
    return target

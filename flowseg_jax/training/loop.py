"""The training run: program, data, state, loop, in that order on one page."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from flowseg_jax.checkpoints.local import LocalCheckpoints
from flowseg_jax.checkpoints.manager import CheckpointManager, config_diff
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.checkpoints.run_checkpoint import BEST, TOKENIZER
from flowseg_jax.checkpoints.storage import copy_tree, prepare_workdir, write_text_atomic
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.held_out import held_out_keys
from flowseg_jax.data.leakage import is_train_split
from flowseg_jax.data.mixture import MixtureComponent, build_mixture
from flowseg_jax.data.train_dataset import TrainDataset, open_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.experiment import check_names, to_json
from flowseg_jax.synthetic.shapes import load_or_build_shapes
from flowseg_jax.system import host
from flowseg_jax.system.console import heartbeat, log
from flowseg_jax.system.distributed import is_primary, locked
from flowseg_jax.system.json_files import expect, number
from flowseg_jax.system.paths import resolve_path
from flowseg_jax.training import lora as adapters
from flowseg_jax.training.adapters import save_adapters
from flowseg_jax.training.first_start import FirstStart
from flowseg_jax.training.metric_reporter import MetricReporter
from flowseg_jax.training.metric_writers import ProgressWriter, create_writer
from flowseg_jax.training.optimizer import OptimizerConfig, lr_schedule
from flowseg_jax.training.preemption import GracefulStop
from flowseg_jax.training.profiling import Profile, Profiler
from flowseg_jax.training.program import RunConfig, TrainProgram, model_params
from flowseg_jax.training.step import TrainState
from flowseg_jax.training.trackers import check_trackers

# What the same run may change between two starts; anything else would be another run.
RESUMABLE_KEYS = (
    "num_steps",
    "log_every",
    "trackers",
    "eval_every",
    "eval_split",
    "eval_images",
    "eval_data",
    "checkpoint_every",
    "checkpoint",
    "mesh",
    "data.dir",
    "data.mixture",
    "data.held_out",
    "data.num_threads",
    "data.num_workers",
    "init_from",
    "optimizer.grad_accum_steps",
    "optimizer.max_skipped_updates",
)


KEPT = ("keep", "keep_every", "local_dir", "local_every")  # of the section `checkpoint`

# (parameters) -> scores, {"eval/ciou": percent, ...}, and pictures of answers, uint8 [H, W, 3]. Every process calls it alike.
Validate = Callable[[Any], tuple[Mapping[str, float], Mapping[str, np.ndarray]]]
# Makes one: (model, mesh, data sets, split, images, tokenizer, prompts); `evaluation.validation.Validation`.
OpenValidation = Callable[..., Validate]


def load_dataset(config: ConfigDict) -> PreparedDataset:
    """The data set `data.dir` of a config; the embedded `shapes` set is generated and prepared if it is missing."""
    data = config.data
    if data.shapes_images:
        options = {"mix": dict(data.shapes_mix)} if data.shapes_mix else {}
        if not data.tokenizer:
            options["tokenizer_vocab"] = config.model.llm.vocab_size
        return load_or_build_shapes(data.dir, data.shapes_images, data.seed, log=log, **options)
    return PreparedDataset.open(data.dir)


def load_mixture(config: ConfigDict) -> tuple[MixtureComponent, ...]:
    """The data sets that a config trains on, without the images of what it evaluates on."""
    data = config.data
    sets = [(PreparedDataset.open(directory), weight) for directory, weight in data.mixture] or [(load_dataset(config), 0.0)]
    members = build_mixture(sets, held_out=held_out_keys([*data.held_out, *(prepared for prepared, _ in sets)]))
    for member in members:
        left = f", {member.held_out:,} held out for evaluation" if member.held_out else ""
        if len(members) > 1 and member.prepared.task != "chat" and all(map(is_train_split, member.prepared.splits)):
            left += "; it has no evaluation split, so no image is held out for it"
        if left or len(members) > 1:
            share = member.samples_per_epoch / sum(m.samples_per_epoch for m in members)
            log(f"{member.prepared.directory}: {len(member.indices):,} images, {share:.1%} of an epoch{left}")
    return members


def open_train_data(config: ConfigDict, program: TrainProgram) -> TrainDataset:
    """This process's share of the batches. Raises a UserError where data sets, tokenizer and model do not fit together."""
    run_config, members = program.run_config, load_mixture(config)
    tokenizer, model = None, run_config.model
    if model.has_language_model:
        own = [member.prepared for member in members if member.prepared.tokenizer_directory]
        tokenizer = open_tokenizer((own or [members[0].prepared])[0], run_config.prompts, config.data.tokenizer)
        if tokenizer.vocab > model.llm.vocab_size:
            raise UserError(
                f"model.llm.vocab_size is {model.llm.vocab_size}, the tokenizer {tokenizer.name} has {tokenizer.vocab} ids"
            )
    if model.num_classes:
        known = {m.prepared.categories: m.prepared.directory for m in members if m.prepared.task in ("referring", "generic")}
        if len(known) > 1:
            raise UserError(
                f"{' and '.join(map(str, known.values()))} have other categories, and the linear head (model.num_classes) "
                "knows one list: train on one of them, or without the head"
            )
        for categories, directory in known.items():
            if len(categories) > model.num_classes:
                raise UserError(f"model.num_classes is {model.num_classes}, {directory} has {len(categories)} categories")
    data = TrainDataset(
        members,
        run_config.shape,
        run_config.prompts,
        config.seed,
        visual_tokens=run_config.model.num_visual_tokens,
        tokenizer=tokenizer,
        options=run_config.options,
        rows=program.local_rows(),
    )
    for remark in data.remarks:
        log(f"WARNING: {remark}")
    return data


def open_validation(
    config: ConfigDict, program: TrainProgram, data: TrainDataset, make: OpenValidation | None
) -> Validate | None:
    """What `eval_every` asks for: the validation on `eval_data`, or on the training data's own split. None where it is 0."""
    if not config.eval_every:
        return None
    if make is None:
        raise UserError("eval_every is set, and nothing to validate by: train(..., validation=Validation), or set it to 0")
    run = program.run_config
    datasets = [PreparedDataset.open(config.eval_data)] if config.eval_data else [m.prepared for m in data.members]
    return make(run.model, program.mesh, datasets, config.eval_split, config.eval_images, data.tokenizer, run.prompts)


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    profile: Profile | None = None,
    validation: OpenValidation | None = None,
) -> Path:
    """Trains, or continues, the run in `workdir`; returns the directory of the trained model.

    Where there are several processes, each calls this with the same arguments.

    Args:
        config: the experiment.
        workdir: where the run lives.
        profile: steps to trace.
        validation: what a config with `eval_every` validates by; `evaluation.validation.Validation`.

    Raises:
        UserError: an unusable config, workdir, data set or checkpoint; nothing is half-written.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
        SystemExit: 0 after SIGTERM, once the state is saved.
    """
    program, workdir = TrainProgram.build(config), prepare_workdir(workdir)
    with locked(workdir):
        return run(config, program, workdir, profile, validation)


def run(
    config: ConfigDict,
    program: TrainProgram,
    workdir: Path,
    profile: Profile | None,
    validation: OpenValidation | None = None,
) -> Path:
    """`train` in a work directory that is ours."""
    first = FirstStart.of(workdir)
    began = time.perf_counter() - first.seconds_ago()
    resolved = json.loads(to_json(config))
    check_trackers(config.trackers)
    data = open_train_data(config, program)
    validate = open_validation(config, program, data, validation)
    best = tuple(config.checkpoint.best) or (BEST if validate else ())
    if ranks_validations(best) and not validate:
        raise UserError(f"checkpoint.best is {best}, and there is no validation: set eval_every")
    log_run_summary(program)

    def same_run(meta: dict[str, Any]) -> None:
        where = f"{workdir}: the config of its checkpoint"
        expect(isinstance(meta.get("config"), dict), meta.get("config"), where, "a config")
        check_names(meta["config"], where)
        if changed := config_diff(meta["config"], resolved, RESUMABLE_KEYS):
            raise UserError(
                f"{workdir} holds a run with other values of {', '.join(changed)}; use another --workdir or its config"
            )
        if meta.get("data", data.digest) != data.digest:
            raise UserError(
                f"{workdir} holds a run on other training data: a data set, or what is held out of it, has changed since; "
                "use another --workdir or the data as they were"
            )

    with contextlib.ExitStack() as stack:
        keep, keep_every, local_dir, local_every = (config.checkpoint[key] for key in KEPT)
        checkpoints = stack.enter_context(CheckpointManager(workdir, keep=keep, keep_every=keep_every, best=best))
        local = stack.enter_context(LocalCheckpoints(local_dir, local_every, first.run_id))
        abstract, spent, base = state_to_tree(program.state), 0.0, {}
        restored = local.restore(abstract, same_run, checkpoints.latest_step) or checkpoints.restore_latest(abstract, same_run)
        start = restored.step if restored else 0
        if restored:
            state = state_from_tree(program.state, restored.state)
            if "frozen" not in restored.state:
                initial, base = program.initial_state(config)
                state = dataclasses.replace(state, frozen=initial.frozen)
                adapters.check_base(restored.meta["base"], base, f"the run in {workdir}")
            log(f"continuing from the checkpoint of step {start} in {restored.directory or workdir}")
            counted = restored.meta.get("seconds_in_steps")
            spent = counted if number(counted, least=0) else 0.0
            before = restored.meta["config"].get("num_steps")
            if line := moved_rate(program.run_config.optimizer, before, config.num_steps, start):
                log(line)
        else:
            with heartbeat("initialising parameters"):
                state, base = program.initial_state(config)
        if is_primary():  # not before: a config that is refused leaves the config of the run as it is
            write_text_atomic(workdir / "config.json", to_json(config) + "\n")
            write_text_atomic(workdir / "parameters.txt", parameter_table(program.state))
            keep_tokenizer(data, workdir)
        stop = stack.enter_context(GracefulStop())
        batches = stack.enter_context(contextlib.closing(data.iterate(start)))
        progress = stack.enter_context(contextlib.closing(ProgressWriter(config.num_steps, start)))
        writer = create_writer(workdir, config, progress=progress, start_step=start, primary=is_primary())
        stack.callback(writer.close)
        profiler = Profiler(profile, workdir / "profile")
        stack.callback(profiler.close)
        if start < config.num_steps:
            batch = program.to_device(next(batches))
            with heartbeat("compiling the train step"):
                train_step = program.compile()
        report = MetricReporter(program, data, writer, start, began, spent)

        def meta_of(step: int) -> dict[str, Any]:
            extra = model_extra(program.run_config, config, data, step)
            counted = {"data_position": step, "seconds_in_steps": report.seconds_in_steps()}
            return {"config": resolved, "data": data.digest, "extra": extra} | counted | ({"base": base} if base else {})

        for step in range(start + 1, config.num_steps + 1):
            profiler.on_step_start(step)
            state, metrics = train_step(state, batch)
            progress.on_step(step)
            last = step == config.num_steps
            if not last:
                with report.waiting_for("input"):
                    batch = program.to_device(next(batches))
            report.flush()  # what was logged one step ago: the device never waits for the host
            if step % config.log_every == 0 or last:
                report.log(step, metrics)
            profiler.on_step_end(step, metrics)
            stopped = stop.should_stop(step) and not last
            validated = validate is not None and (step % config.eval_every == 0 or last) and not stopped
            if validated:
                with report.waiting_for("validation"):
                    scores, pictures = validate(model_params(program.run_config, state))
                metrics = metrics | scores
                report.log(step, metrics)
                writer.write_images(step, pictures)
            saved = step % config.checkpoint_every == 0 or last or stopped or validated
            if saved or local.due(step):
                report.flush()  # a checkpoint has all lines up to its step before it
                writer.flush()
                measured = metrics if validated or not ranks_validations(best) else None
                with report.waiting_for("checkpoint"):
                    if saved:
                        checkpoints.save(step, state_to_tree(state), meta_of(step), measured)
                    else:
                        local.save(step, state_to_tree(state), meta_of(step))
            if stopped:
                checkpoints.wait()
                log(f"stopped: the state of step {step} is saved in {workdir}; the same command continues")
                raise KeyboardInterrupt if stop.interrupted else SystemExit(0)
    local.remove()
    return save_final_model(program.run_config, state, config, data, workdir, base)


def ranks_validations(best: tuple[str, ...]) -> bool:
    """Whether the best checkpoint is one of those that were validated."""
    return bool(best) and best[0].startswith("eval/")


def moved_rate(optimizer: OptimizerConfig, before: Any, steps: int, start: int) -> str:
    """What another number of steps does to the learning rate after step `start`; "" where it is the same number."""
    if not number(before, whole=True, least=0) or before == steps or start >= steps:
        return ""
    old, new = (float(lr_schedule(optimizer, n)(start)) for n in (before, steps))
    return (
        f"num_steps is {steps} and was {before}: the schedule is that of {steps} steps from here on; the learning rate of step "
        f"{start + 1} is {new:.2e}, it would have been {old:.2e}"
    )


def log_run_summary(program: TrainProgram) -> None:
    """Reports what will be trained, and on which devices."""
    trained, frozen = (sum(x.size for x in jax.tree.leaves(part)) for part in (program.state.trainable, program.state.frozen))
    mesh = program.mesh
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    log(f"{trained + frozen:,} parameters, {trained:,} of them trained; mesh: {axes}")


def parameter_table(state: TrainState) -> str:
    """The name, shape, dtype and size of every parameter, those that are trained before the frozen ones."""
    from clu import parameter_overview

    parts = {"trained": state.trainable, "frozen": state.frozen}
    tables = [
        f"{name}\n{parameter_overview.get_parameter_overview(part, include_stats=False)}\n" for name, part in parts.items()
    ]
    return "\n".join(tables)


def state_to_tree(state: TrainState) -> dict[str, Any]:
    """The state as a plain tree, which is what a checkpoint holds.

    A state with adapters leaves out what is frozen: that is read from `init_from` again, and compared with what it was.
    """
    tree = {
        "step": state.step,
        "trainable": state.trainable,
        "frozen": state.frozen,
        "moments": jax.tree.leaves(state.opt_state),
        "skipped": state.skipped,
    }
    if adapters.adapted(flatten_params(state.trainable)):
        del tree["frozen"]
    return tree | ({"ema": state.ema} if state.ema else {})


def state_from_tree(like: TrainState, tree: Mapping[str, Any]) -> TrainState:
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), tree["moments"])
    frozen = tree.get("frozen", like.frozen)
    return TrainState(tree["step"], tree["trainable"], frozen, opt_state, tree["skipped"], tree.get("ema", {}))


def model_extra(run_config: RunConfig, config: ConfigDict, data: TrainDataset, step: int) -> dict[str, Any]:
    """What is kept with a model beside its config, in its directory and in every checkpoint."""
    prompts, card = dataclasses.asdict(run_config.prompts), {"trained_on": f"{data.description}, {step:,} steps."}
    return {"step": step, "seed": config.seed, "prompts": prompts, "data": data.digest, "model_card": card}


def keep_tokenizer(data: TrainDataset, workdir: Path) -> None:
    """Copies the run's tokenizer to `<workdir>/tokenizer`, where a checkpoint that is used as a model has it."""
    if data.tokenizer is not None and not (workdir / TOKENIZER).exists():
        fresh = resolve_path(workdir) / f".{TOKENIZER}.tmp"  # it appears complete or not at all
        fresh.rmtree(missing_ok=True)
        copy_tree(resolve_path(data.tokenizer.name), fresh)
        fresh.rename(workdir / TOKENIZER)


def save_final_model(
    run_config: RunConfig, state: TrainState, config: ConfigDict, data: TrainDataset, workdir: Path, base: Mapping[str, str]
) -> Path:
    """Writes the runnable model `<workdir>/model`; parameters keep the dtypes that they are stored in, int8 becomes bfloat16.

    A run with adapters has them merged in there, and writes what it trained to `<workdir>/adapters` as well, with the digests
    of its `base`.
    """
    step = int(state.step)
    extra = model_extra(run_config, config, data, step)
    cfg, tokenizer = run_config.model.to_dict(), data.tokenizer and data.tokenizer.name
    if adapters.adapted(flatten_params(state.trainable)):
        learned = state.ema if state.ema and run_config.ema.export else state.trainable
        log(f"the adapters are in {save_adapters(workdir / 'adapters', learned, run_config.lora, base, extra, overwrite=True)}")
    params = model_params(run_config, state)
    target = save_pretrained(workdir / "model", params, cfg, tokenizer, extra, dtype=None, overwrite=True)
    log(f"the model of step {step} is in {target}; {host.memory_line()}")
    return target

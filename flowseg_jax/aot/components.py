"""`flowseg plan --by-component`: each component of the train step, forward and backward, compiled by itself.

The compiler reports one sum for the whole step. So each component is compiled as a program of its own, on the same mesh, with
its parameters sharded and shaped as in the step. What it receives from other components, and the gradient that comes back to
it, are arguments of that program.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from flowseg_jax.aot.hlo import collective_stats
from flowseg_jax.aot.plan import compiler_effort, prepare, try_to_compile
from flowseg_jax.aot.pricing import price
from flowseg_jax.aot.tpu_cost import cycles
from flowseg_jax.losses import LossConfig, loss_terms
from flowseg_jax.models.flowseg import FlowSeg, bind_params
from flowseg_jax.models.outputs import ImageFeatures, TextFeatures, TrainingOutput
from flowseg_jax.ops.collectives import DataParallelGroup
from flowseg_jax.sharding import BATCH_AXES, replicated
from flowseg_jax.system.console import heartbeat
from flowseg_jax.system.hardware import DEVICE_SPECS, GIB, DeviceKind
from flowseg_jax.training.optimizer import Params, merge_trainable
from flowseg_jax.training.program import TrainProgram
from flowseg_jax.training.step import shard_map_axes, shard_map_spec
from flowseg_jax.types import Batch

DP_GROUP = DataParallelGroup(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class ComponentReport:
    """One component, forward and backward.

    Attributes:
        name: of the component.
        arguments, temporaries: bytes on one device; None if the compiler refused. What components pass to each other is among
            the arguments of both, so their sum is larger than the step's.
        cycles: the compiler's own estimate; None if it refused, or makes none.
        priced_cycles: with a price for what that leaves out (`aot.pricing`), collectives hidden; None likewise.
        hlo_lines: of the optimised program; None if the compiler refused.
        compile_seconds: wall time.
        refusal: the compiler's words if it refused for want of memory.
    """

    name: str
    arguments: int | None
    temporaries: int | None
    cycles: int | None
    priced_cycles: int | None
    hlo_lines: int | None
    compile_seconds: float
    refusal: str | None


Leaves = dict[str, list[Any]]  # the outputs of components, as bare arrays
# A component: (model, batch, outputs of other components, losses) -> its output. Everything is one device's.
Run = Callable[[FlowSeg, Batch, dict[str, Any], LossConfig], Any]


def _llm(model: FlowSeg, batch: Batch, given: dict[str, Any], losses: LossConfig) -> tuple[TextFeatures | None, Any]:
    """The language model and its loss."""
    text = model.encode_text(batch, given["siglip"]) if model.cfg.has_mask_decoder else None
    hidden = model.run_llm(batch, given["siglip"]) if text is None else text.hidden_states
    out = TrainingOutput(hidden, model.llm.lm_head_weight(hidden.dtype), None, None, None, None)
    terms, _ = loss_terms(model, batch, out, {}, losses, DP_GROUP)
    return text, [total for total, _ in terms.values()]


def _mask_decoder(model: FlowSeg, batch: Batch, given: dict[str, Any], losses: LossConfig) -> TrainingOutput:
    mask_features, multi_scale_features = given["pixel_decoder"]
    features = ImageFeatures(None, mask_features, model.mask_decoder.prepare_levels(mask_features, multi_scale_features))
    text = given["llm"][0] if model.cfg.has_language_model else None
    out = model.decode_training_passes(batch, features, text, DP_GROUP)
    return dataclasses.replace(out, hidden_states=None, lm_head=None)


def _losses(model: FlowSeg, batch: Batch, given: dict[str, Any], losses: LossConfig) -> list[Any]:
    """Matching, losses of masks and classes, and BAR."""
    keys = jax.random.split(jax.random.key(0), batch.phrase_target.shape[0])
    with jax.named_scope("losses"):
        terms, _ = loss_terms(model, batch, given["mask_decoder"], keys, losses, DP_GROUP)
    return [total for total, _ in terms.values()]


@dataclasses.dataclass(frozen=True)
class _Component:
    """Attributes:
    owns: its parameters, by the first word of their paths.
    reads: the components whose outputs it reads.
    needs: the property of `FlowSegConfig` that says whether a model has it; None: every model does.
    run: what it does.
    """

    owns: tuple[str, ...]
    reads: tuple[str, ...]
    needs: str | None
    run: Run


COMPONENTS = {
    "sam": _Component(("sam",), (), None, lambda model, batch, given, losses: model.sam_hidden_states(batch)),
    "siglip": _Component(
        ("siglip", "visual_projector", "seg_projector"),
        ("sam",),
        "has_language_model",
        lambda model, batch, given, losses: model.project_visual_tokens(batch, given["sam"][-1]),
    ),
    "pixel_decoder": _Component(
        ("connector", "pixel_decoder"),
        ("sam",),
        "has_mask_decoder",
        lambda model, batch, given, losses: model.pixel_features(tuple(given["sam"][:-1])),
    ),
    "llm": _Component(("llm", "llm_projector"), ("siglip",), "has_language_model", _llm),
    "mask_decoder": _Component(
        ("mask_decoder", "background_embed", "category_head"), ("pixel_decoder", "llm"), "has_mask_decoder", _mask_decoder
    ),
    "losses": _Component(("boundary",), ("mask_decoder",), "has_mask_decoder", _losses),
}


def compile_components(config: ConfigDict, topology: str, *, effort: str = "O0") -> list[ComponentReport]:
    """Compiles the components of a config's step one after the other, those that its model has, the optimizer last.

    Raises:
        UserError: as `aot.plan.plan`.
    """
    program, devices = prepare(config, topology, effort)
    return list(_measured(program, effort, DEVICE_SPECS.get(devices.devices[0].device_kind)))


def _measured(program: TrainProgram, effort: str, device: DeviceKind | None) -> Iterator[ComponentReport]:
    with compiler_effort(effort):
        for name, step, arguments in programs(program):
            with heartbeat(f"tracing and lowering {name}"):
                lowered = step.lower(*arguments)
            started = time.perf_counter()
            with heartbeat(f"compiling {name} at effort {effort}"):
                compiled, refusal = try_to_compile(lowered)
            seconds = time.perf_counter() - started
            if compiled is None:
                yield ComponentReport(name, None, None, None, None, None, seconds, refusal)
                continue
            text, memory = compiled.as_text(), compiled.memory_analysis()
            found = cycles(text)
            yield ComponentReport(
                name,
                memory.argument_size_in_bytes,
                memory.temp_size_in_bytes,
                found and found.total,
                found and device and device.clock and round(price(found, collective_stats(text), device, flops=0.0).hidden),
                text.count("\n"),
                seconds,
                None,
            )


def table(reports: Sequence[ComponentReport]) -> str:
    """The reports for people."""
    rows = [("component", "compiled in", "arguments", "temporaries", "million cycles", "priced", "lines of HLO")]
    for x in reports:
        if x.refusal is not None:
            rows.append((x.name, f"{x.compile_seconds:.0f} s", "does not fit", "", "", "", ""))
            continue
        size = lambda count: f"{count / GIB:.2f} GiB"  # noqa: E731
        millions = ["" if count is None else f"{count / 1e6:,.0f}" for count in (x.cycles, x.priced_cycles)]
        rows.append(
            (x.name, f"{x.compile_seconds:.0f} s", size(x.arguments), size(x.temporaries), *millions, f"{x.hlo_lines:,}")
        )
    rows.append(("together", f"{sum(x.compile_seconds for x in reports):.0f} s", "", "", "", "", ""))
    return "\n".join(f"{row[0]:<16}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows)


def programs(program: TrainProgram) -> Iterator[tuple[str, Any, tuple]]:
    """(name, jitted function, abstract arguments) of every component of the step: what a device does in one micro-batch."""
    model, state, mesh, losses = program.run_config.model, program.state, program.mesh, program.run_config.losses
    specs = jax.tree.map(lambda x: shard_map_spec(x.sharding.spec, mesh), (state.trainable, state.frozen))
    batch = _of_one_micro_batch(program)
    given: Leaves = {}
    structures: dict[str, Any] = {}
    for name, component in COMPONENTS.items():
        if component.needs and not getattr(model, component.needs):
            continue
        inputs = {other: given[other] for other in component.reads if other in given}

        def forward(trainable: Params, frozen: Params, batch: Batch, inputs: Leaves, name=name, run=component.run) -> list[Any]:
            """The component, from and to bare arrays: their containers need not take abstract ones."""
            inputs = {other: structures[other].unflatten(leaves) for other, leaves in inputs.items()}
            out = run(bind_params(program.graphdef, merge_trainable(trainable, frozen)), batch, inputs, losses)
            leaves, structures[name] = jax.tree.flatten(out)
            return leaves

        def both(
            trainable: Params,
            frozen: Params,
            batch: Batch,
            inputs: Leaves,
            cotangents: Any,
            owns=component.owns,
            forward=forward,
        ) -> Any:
            """The output of the component, and its gradients: of its own parameters, and of its inputs."""
            mine = {key: tree for key, tree in trainable.items() if key in owns}
            floats, join = _floats(inputs)
            give = lambda mine, floats: _floats(forward(trainable | mine, frozen, batch, join(floats)))[0]  # noqa: E731
            out, pull = jax.vjp(give, mine, floats)
            return out, pull(cotangents)

        # What components pass to each other is given as one device has it, as an array that is the same on all devices.
        shared = functools.partial(jax.shard_map, mesh=mesh, axis_names=shard_map_axes(mesh), check_vma=False)
        takes, same = (*specs, PartitionSpec(BATCH_AXES), PartitionSpec()), PartitionSpec()
        found = jax.eval_shape(shared(forward, in_specs=takes, out_specs=same), state.trainable, state.frozen, batch, inputs)
        given[name] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), found)
        owned = {key: tree for key, tree in specs[0].items() if key in component.owns}
        step = shared(both, in_specs=(*takes, same), out_specs=(same, (owned, same)))
        cotangents = _floats(given[name])[0]
        yield name, jax.jit(step), (state.trainable, state.frozen, batch, inputs, cotangents)
    update = lambda gradients, moments, params: program.optimizer.update(gradients, moments, params)  # noqa: E731
    yield "optimizer", jax.jit(update, donate_argnums=(0, 1)), (state.trainable, state.opt_state, state.trainable)


def _of_one_micro_batch(program: TrainProgram) -> Batch:
    partition = program.partition
    rows = partition.per_device_images * partition.devices
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding), program.batch)


def _floats(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves that have gradients, and what puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    differentiable = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def join(floats: list[Any]) -> Any:
        new = iter(floats)
        return structure.unflatten([next(new) if yes else x for x, yes in zip(leaves, differentiable, strict=True)])

    return [x for x, yes in zip(leaves, differentiable, strict=True) if yes], join

"""`flowseg plan`: the real train step, compiled for devices that need not be there, and what that says about a run.

State and batch exist as shapes only. The step is lowered and compiled as in training; the compiler's own buffer assignment says
whether it fits, its optimised program which collectives run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from flowseg_jax.aot import hlo, shardings
from flowseg_jax.aot import plan_lines as lines
from flowseg_jax.aot.plan_lines import gib
from flowseg_jax.aot.pricing import PricedStep, price
from flowseg_jax.aot.topology import Topology, open_topology
from flowseg_jax.aot.tpu_cost import CostEstimate, cycles
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.system.console import heartbeat
from flowseg_jax.system.hardware import DEVICE_SPECS, peak_flops
from flowseg_jax.training import flops
from flowseg_jax.training.program import TrainProgram

# How hard XLA optimises. The lower levels take a fraction of the time of "default", and mostly somewhat more memory.
XLA_OPT_LEVELS = ("O0", "O1", "O2", "O3", "default")
LARGEST = 20  # instructions that the JSON names
MFU = 0.4  # the share of peak arithmetic that step times are given for

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The first form counts what the program is given; the second counts temporaries alone.
_REFUSAL = re.compile(r"(?:Used |(?P<temporaries>required for HLO temporaries \())(?P<number>[\d.]+)(?P<unit>[KMGT])")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters, moments, batch: what the step is given, from shapes and shardings; a moving average counts as moments.
        arguments: the same as the compiler lays it out; None if it refused.
        temporaries: activations, gradients and workspace; None if it refused without a figure of them.
        outputs: results that take no argument's place; None if it refused.
        needed: all that must fit at once. Of a program that the compiler refused: what the step is given and the compiler's
            figure for temporaries; None if it gave none.
        usable: what a program may use; None where there is nothing to judge by.
    """

    parameters: int
    moments: int
    batch: int
    arguments: int | None
    temporaries: int | None
    outputs: int | None
    needed: int | None
    usable: int | None


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """What is known about a run before it is started.

    Attributes:
        topology, note: as asked for, and what kind of statement this is.
        device_kind, devices, mesh: what the step was compiled for.
        batch_size: images a step.
        effort: of the compiler.
        parameters: {component: {"trained": count, "frozen": count}}.
        memory: bytes a device.
        flops: a step, by part of the model.
        step_seconds: a step at `MFU` of peak arithmetic; None without a peak.
        traffic: collectives; None if the compiler refused.
        slices: that the devices are in.
        gradients: bytes of a device's part of all gradients.
        cycles: the compiler's own estimates; None if it refused, or makes none.
        priced: all of the step's cycles; None without estimates.
        lower_seconds, compile_seconds: wall time.
        refusal: the compiler's words if it refused for want of memory.
        warnings: of parameters that the mesh does not divide.
    """

    topology: str
    note: str
    device_kind: str
    devices: int
    mesh: Mapping[str, int]
    batch_size: int
    effort: str
    parameters: Mapping[str, Mapping[str, int]]
    memory: Memory
    flops: Mapping[str, float]
    step_seconds: float | None
    traffic: hlo.CollectiveStats | None
    cycles: CostEstimate | None
    priced: PricedStep | None
    lower_seconds: float
    compile_seconds: float
    refusal: str | None
    warnings: tuple[str, ...] = ()
    slices: int = 1
    gradients: int = 0

    @property
    def fits(self) -> bool:
        memory = self.memory
        return self.refusal is None and (memory.usable is None or memory.needed <= memory.usable)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `bytes_per_device`, `fits`, `compiled` and `compile_seconds` are what scripts read."""
        collectives, between = ({} if self.traffic is None else self.traffic.totals(only) for only in (False, True))
        loops = () if self.traffic is None else self.traffic.loops
        return {
            "topology": self.topology,
            "device_kind": self.device_kind,
            "devices": self.devices,
            "mesh": dict(self.mesh),
            "batch_size": self.batch_size,
            "effort": self.effort,
            "compiled": self.refusal is None,
            "fits": self.fits,
            "bytes_per_device": self.memory.needed,
            "memory": dataclasses.asdict(self.memory),
            "parameters": {component: dict(counts) for component, counts in self.parameters.items()},
            "flops": dict(self.flops),
            "step_seconds_at_mfu_0.4": self.step_seconds,
            "collectives": {kind: {"count": count, "bytes": size} for kind, (count, size) in collectives.items()},
            "slices": self.slices,
            "between_slices": {kind: {"count": count, "bytes": size} for kind, (count, size) in between.items()},
            "gradient_bytes": self.gradients,
            "largest_all_reduce_in_a_loop": self.traffic and self.traffic.largest_in_a_loop("all-reduce"),
            "largest_all_gather": self.traffic and self.traffic.largest("all-gather"),
            "cycles": self.cycles
            and {
                "total": self.cycles.total,
                "by_kind": self.cycles.by("kind"),
                "by_part": self.cycles.by("part"),
                "executions_without_estimate": self.cycles.without_estimate(),
                "largest": [dataclasses.asdict(cost) | {"total": cost.total} for cost in self.cycles.largest(LARGEST)],
            },
            "priced_cycles": self.priced and round(self.priced.hidden),
            "priced_cycles_nothing_hidden": self.priced and round(self.priced.exposed),
            "priced_by_source": self.priced and {name: round(count) for name, count in self.priced.by_source().items()},
            "priced_by_part": self.priced
            and {part: {name: round(x) for name, x in row.items()} for part, row in self.priced.by_part().items()},
            "without_a_price": self.priced and self.priced.unpriced(),
            "mfu": self.priced and self.priced.mfu,
            "data_dependent_loops_with_collectives": [x.name for x in loops if x.trip_count is None and x.collectives],
            "lower_seconds": round(self.lower_seconds, 1),
            "compile_seconds": round(self.compile_seconds, 1),
            "refusal": self.refusal,
            "warnings": list(self.warnings),
        }

    def text(self) -> str:
        """The report for people."""
        mesh = " ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        each, several = self.batch_size / self.devices, self.traffic is not None and self.slices > 1
        report = [
            f"{self.topology}: {self.devices} x {self.device_kind}, mesh {mesh}",
            f"{self.batch_size} images a step, {each:g} a device",
            self.note,
            *lines.parameters(self.parameters),
            *self.warnings,
            *_memory_lines(self.memory),
            lines.arithmetic(self.flops, self.step_seconds, MFU),
            *([] if self.traffic is None else lines.traffic(self.traffic)),
            *(lines.between_slices(self.traffic, self.slices, self.devices, self.gradients) if several else []),
            *([] if self.cycles is None else lines.cycles(self.cycles)),
            *([] if self.priced is None else lines.prices(self.priced)),
            f"lowered in {self.lower_seconds:.0f} s, compiled in {self.compile_seconds:.0f} s at effort {self.effort}",
            f"verdict: {self.verdict()}",
        ]
        return "\n".join(report)

    def verdict(self) -> str:
        if self.refusal is not None:
            return f"does not fit. The compiler: {self.refusal}"
        needed, usable = self.memory.needed, self.memory.usable
        if usable is None:
            return f"compiles, {gib(needed)} a device"
        spare = usable - needed
        if self.fits:
            return f"fits, {gib(spare)} to spare"
        again = "" if self.effort == "default" else "; --xla-opt-level=default, at which training compiles, may need less"
        return f"does not fit, {gib(-spare)} too much{again}"


def plan(config: ConfigDict, topology: str, *, effort: str = "O0") -> PlanReport:
    """Compiles the train step of a config for a topology, `v5e:4x4`, `h100:8` or `cpu:8`, and reports.

    Raises:
        UserError: an unknown topology or effort, a compiler that is not installed, a config that does not fit the devices.
    """
    return report(*prepare(config, topology, effort), effort)


def state_text(config: ConfigDict, topology: str) -> str:
    """`state_sizes` for people."""
    sizes, program, found = state_sizes(config, topology)
    rows = [f"  {name:<22}{gib(size):>12}" for name, size in (sizes | {"together": sum(sizes.values())}).items()]
    title = f"{found.name}: on each of {len(found.devices)} x {found.devices[0].device_kind}, without activations"
    parameters = _parameters_by_component(program.state.trainable, program.state.frozen)
    return "\n".join([*lines.parameters(parameters), title, *rows])


def state_sizes(config: ConfigDict, topology: str) -> tuple[dict[str, int], TrainProgram, Topology]:
    """What every device of a topology holds between two steps, and the gradients of one, by arithmetic: nothing is compiled.

    Activations and workspace, which `plan` gets from the compiler, come on top. Raises as `plan`.

    Returns:
        Bytes by what they are for; the program and the devices that they are of.
    """
    program, found = prepare(config, topology, XLA_OPT_LEVELS[0])
    state = program.state
    parts = {
        "parameters, trained": state.trainable,
        "parameters, frozen": state.frozen,
        "gradients": state.trainable,
        "moments": state.opt_state,
        "moving average": state.ema,
    }
    return {name: bytes_on_one_device(tree) for name, tree in parts.items()}, program, found


def prepare(config: ConfigDict, topology: str, effort: str) -> tuple[TrainProgram, Topology]:
    """The program to compile and the devices to compile it for; raises as `plan`."""
    if effort not in XLA_OPT_LEVELS:
        raise UserError(f"--xla-opt-level={effort}: choose {', '.join(XLA_OPT_LEVELS)}")
    found = open_topology(topology)
    if config.mesh.slices == 0:
        config = ConfigDict(config.to_dict())
        config.mesh.slices = found.slices
    found = dataclasses.replace(found, slices=max(config.mesh.slices, 1))
    with heartbeat(f"building the train step for {topology}"):
        return TrainProgram.build(config, found.devices), found


def report(program: TrainProgram, topology: Topology, effort: str) -> PlanReport:
    """`plan` for a program that is built already."""
    state, shape = program.state, program.run_config.shape
    with compiler_effort(effort):
        started = time.perf_counter()
        with heartbeat("tracing and lowering the train step"):
            lowered = program.step.lower(state, program.batch)
        lowered_at = time.perf_counter()
        with heartbeat(f"compiling the train step for {topology.name} at effort {effort}"):
            compiled, refusal = try_to_compile(lowered)
        compiled_at = time.perf_counter()
    text = None if compiled is None else compiled.as_text()
    by_part = flops.step_flops(program.run_config.model, shape, program.run_config.losses, state.trainable, state.frozen)
    peak = peak_flops(topology.devices[0])
    estimate, traffic, device = (
        text and cycles(text),
        text and hlo.collective_stats(text, len(topology.devices) // topology.slices if topology.slices > 1 else None),
        DEVICE_SPECS.get(topology.devices[0].device_kind),
    )
    return PlanReport(
        topology=topology.name,
        note=topology.note,
        device_kind=topology.devices[0].device_kind,
        devices=len(topology.devices),
        mesh=dict(program.mesh.shape),
        batch_size=shape.batch,
        effort=effort,
        parameters=_parameters_by_component(state.trainable, state.frozen),
        memory=_memory(program, compiled, refusal, topology.usable),
        flops=by_part,
        step_seconds=peak and flops.total(by_part) / (MFU * peak * len(topology.devices)),
        traffic=traffic,
        cycles=estimate,
        priced=estimate
        and device
        and device.clock
        and price(estimate, traffic, device, flops.total(by_part) / len(topology.devices)),
        lower_seconds=lowered_at - started,
        compile_seconds=compiled_at - lowered_at,
        refusal=refusal,
        warnings=tuple(shardings.warnings(program.run_config.model, program.mesh.shape)),
        slices=topology.slices,
        gradients=bytes_on_one_device(state.trainable),
    )


def try_to_compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str | None]:
    """The executable, or the compiler's words if the device's memory does not hold the program."""
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        words = str(error).splitlines()[0]
        if not words.startswith("RESOURCE_EXHAUSTED") or "hbm" not in words.lower():
            raise
        return None, words.removeprefix("RESOURCE_EXHAUSTED: ")


@contextlib.contextmanager
def compiler_effort(level: str) -> Iterator[None]:
    """Sets XLA's optimisation level, and keeps the compilation cache out of what is measured."""
    settings = {"jax_optimization_level": "UNKNOWN" if level == "default" else level, "jax_enable_compilation_cache": False}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _memory(program: TrainProgram, compiled: jax.stages.Compiled | None, refusal: str | None, usable: int | None) -> Memory:
    given = (
        bytes_on_one_device((program.state.trainable, program.state.frozen)),
        bytes_on_one_device((program.state.opt_state, program.state.ema)),
        bytes_on_one_device(program.batch),
    )
    if compiled is None:
        figure = _REFUSAL.search(refusal)
        if figure is None:
            return Memory(*given, None, None, None, None, usable)
        size = round(float(figure["number"]) * _UNITS[figure["unit"]])
        if not figure["temporaries"]:
            return Memory(*given, None, None, None, size, usable)
        return Memory(*given, None, size, None, sum(given) + size, usable)
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(*given, arguments, temporaries, outputs, arguments + temporaries + outputs, usable)


def bytes_on_one_device(tree: Any) -> int:
    """Of abstract arrays with shardings; the largest part where parts differ."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _parameters_by_component(trainable: Any, frozen: Any) -> dict[str, dict[str, int]]:
    components: dict[str, dict[str, int]] = {}
    for kind, tree in (("trained", trainable), ("frozen", frozen)):
        for path, x in flatten_params(tree).items():
            counts = components.setdefault(path.split("/")[0], {"trained": 0, "frozen": 0})
            counts[kind] += x.size
    return dict(sorted(components.items(), key=lambda item: -sum(item[1].values())))


def _memory_lines(memory: Memory) -> list[str]:
    given = f"parameters {gib(memory.parameters)}, moments {gib(memory.moments)}, batch {gib(memory.batch)}"
    found = [f"on each device: {given}"]
    if memory.arguments is not None:
        found.append(
            f"compiled: arguments {gib(memory.arguments)}, temporaries {gib(memory.temporaries)}, other results "
            f"{gib(memory.outputs)}"
        )
    elif memory.temporaries is not None:
        found.append(f"refused: temporaries {gib(memory.temporaries)} beside what the step is given")
    if memory.needed is not None:
        found.append(f"together {gib(memory.needed)}" + (f" of {gib(memory.usable)} usable" if memory.usable else ""))
    return found

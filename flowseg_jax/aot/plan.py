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
from flowseg_jax.aot.pricing import COLUMNS, PricedStep, price
from flowseg_jax.aot.topology import Topology, open_topology
from flowseg_jax.aot.tpu_cost import CostEstimate, cycles
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.system.console import heartbeat
from flowseg_jax.system.hardware import DEVICE_SPECS, GIB, peak_flops
from flowseg_jax.training import flops
from flowseg_jax.training.program import TrainProgram

# How hard XLA optimises. The lower levels take a fraction of the time of "default", with memory within a few percent of it.
XLA_OPT_LEVELS = ("O0", "O1", "O2", "O3", "default")
LARGEST = 20  # instructions that the JSON names
MFU = 0.4  # the share of peak arithmetic that step times are given for

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSAL = re.compile(r"(?:Used |required for HLO temporaries \()(?P<number>[\d.]+)(?P<unit>[KMGT])")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters, moments, batch: what the step is given, from shapes and shardings; a moving average counts as moments.
        arguments: the same as the compiler lays it out; None if it refused.
        temporaries: activations, gradients and workspace; None if it refused.
        outputs: results that take no argument's place; None if it refused.
        needed: all that must fit at once; for a program that the compiler refused its own figure, None if it gave none.
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

    @property
    def fits(self) -> bool:
        memory = self.memory
        return self.refusal is None and (memory.usable is None or memory.needed <= memory.usable)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `bytes_per_device`, `fits`, `compiled` and `compile_seconds` are what scripts read."""
        collectives = {} if self.traffic is None else self.traffic.totals()
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
        each = self.batch_size / self.devices
        lines = [
            f"{self.topology}: {self.devices} x {self.device_kind}, mesh {mesh}",
            f"{self.batch_size} images a step, {each:g} a device",
            self.note,
            *_parameter_lines(self.parameters),
            *self.warnings,
            *_memory_lines(self.memory),
            _arithmetic(self.flops, self.step_seconds),
            *([] if self.traffic is None else _traffic_lines(self.traffic)),
            *([] if self.cycles is None else _cycle_lines(self.cycles)),
            *([] if self.priced is None else _price_lines(self.priced)),
            f"lowered in {self.lower_seconds:.0f} s, compiled in {self.compile_seconds:.0f} s at effort {self.effort}",
            f"verdict: {self.verdict()}",
        ]
        return "\n".join(lines)

    def verdict(self) -> str:
        if self.refusal is not None:
            return f"does not fit. The compiler: {self.refusal}"
        needed, usable = self.memory.needed, self.memory.usable
        if usable is None:
            return f"compiles, {_gib(needed)} a device"
        spare = usable - needed
        return f"fits, {_gib(spare)} to spare" if self.fits else f"does not fit, {_gib(-spare)} too much"


def plan(config: ConfigDict, topology: str, *, effort: str = "O0") -> PlanReport:
    """Compiles the train step of a config for a topology, `v5e:4x4`, `h100:8` or `cpu:8`, and reports.

    Raises:
        UserError: an unknown topology or effort, a compiler that is not installed, a config that does not fit the devices.
    """
    return report(*prepare(config, topology, effort), effort)


def state_text(config: ConfigDict, topology: str) -> str:
    """What every device of a topology holds between two steps, and the gradients of one, by arithmetic: nothing is compiled.

    Activations and workspace, which `plan` gets from the compiler, come on top. Raises as `plan`.
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
    sizes = {name: _bytes_on_one_device(tree) for name, tree in parts.items()}
    rows = [f"  {name:<22}{_gib(size):>12}" for name, size in (sizes | {"together": sum(sizes.values())}).items()]
    title = f"{found.name}: on each of {len(found.devices)} x {found.devices[0].device_kind}, without activations"
    return "\n".join([*_parameter_lines(_parameters_by_component(state.trainable, state.frozen)), title, *rows])


def prepare(config: ConfigDict, topology: str, effort: str) -> tuple[TrainProgram, Topology]:
    """The program to compile and the devices to compile it for; raises as `plan`."""
    if effort not in XLA_OPT_LEVELS:
        raise UserError(f"--xla-opt-level={effort}: choose {', '.join(XLA_OPT_LEVELS)}")
    found = open_topology(topology)
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
        text and hlo.collective_stats(text),
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
        _bytes_on_one_device((program.state.trainable, program.state.frozen)),
        _bytes_on_one_device((program.state.opt_state, program.state.ema)),
        _bytes_on_one_device(program.batch),
    )
    if compiled is None:
        figure = _REFUSAL.search(refusal)
        needed = round(float(figure["number"]) * _UNITS[figure["unit"]]) if figure else None
        return Memory(*given, None, None, None, needed, usable)
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(*given, arguments, temporaries, outputs, arguments + temporaries + outputs, usable)


def _bytes_on_one_device(tree: Any) -> int:
    """Of abstract arrays with shardings; the largest part where parts differ."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _parameters_by_component(trainable: Any, frozen: Any) -> dict[str, dict[str, int]]:
    components: dict[str, dict[str, int]] = {}
    for kind, tree in (("trained", trainable), ("frozen", frozen)):
        for path, x in flatten_params(tree).items():
            counts = components.setdefault(path.split("/")[0], {"trained": 0, "frozen": 0})
            counts[kind] += x.size
    return dict(sorted(components.items(), key=lambda item: -sum(item[1].values())))


def _parameter_lines(components: Mapping[str, Mapping[str, int]]) -> list[str]:
    total = {kind: sum(counts[kind] for counts in components.values()) for kind in ("trained", "frozen")}
    rows = [("parameters", {"trained": "trained", "frozen": "frozen"}), *components.items(), ("all", total)]
    show = lambda x: x if isinstance(x, str) else f"{x:,}"  # noqa: E731
    return [f"  {name:<18}{show(counts['trained']):>16}{show(counts['frozen']):>16}" for name, counts in rows]


def _memory_lines(memory: Memory) -> list[str]:
    given = f"parameters {_gib(memory.parameters)}, moments {_gib(memory.moments)}, batch {_gib(memory.batch)}"
    lines = [f"on each device: {given}"]
    if memory.arguments is not None:
        lines.append(
            f"compiled: arguments {_gib(memory.arguments)}, temporaries {_gib(memory.temporaries)}, other results "
            f"{_gib(memory.outputs)}"
        )
    if memory.needed is not None:
        lines.append(f"together {_gib(memory.needed)}" + (f" of {_gib(memory.usable)} usable" if memory.usable else ""))
    return lines


def _arithmetic(by_part: Mapping[str, float], seconds: float | None) -> str:
    total = flops.total(by_part)
    largest = sorted(by_part, key=by_part.get, reverse=True)[:4]
    shares = ", ".join(f"{part} {by_part[part] / total:.0%}" for part in largest)
    at = "n/a" if seconds is None else f"{seconds:.3g} s"
    return f"arithmetic: {_flop(total)} a step ({shares}); a step at {MFU:.0%} MFU: {at}"


def _traffic_lines(traffic: hlo.CollectiveStats) -> list[str]:
    totals = ", ".join(f"{kind} {count} ({size / 1e6:,.1f} MB)" for kind, (count, size) in traffic.totals().items())
    waiting = [loop for loop in traffic.loops if loop.trip_count is None]
    exchanging = sum(bool(loop.collectives) for loop in waiting)
    return [
        f"collectives a step: {totals or 'none'}",
        f"largest all-reduce in a loop {traffic.largest_in_a_loop('all-reduce') / 1e6:,.1f} MB, largest all-gather "
        f"{traffic.largest('all-gather') / 1e6:,.1f} MB; of {len(waiting)} loops whose length depends on data {exchanging} "
        "exchange anything",
    ]


def _cycle_lines(found: CostEstimate) -> list[str]:
    share = lambda sums: ", ".join(f"{name} {count / 1e6:,.0f}" for name, count in sums.items() if count >= 5e5)  # noqa: E731
    missing = ", ".join(f"{what} {count:,}" for what, count in found.without_estimate().items())
    return [
        f"million cycles a step that the compiler estimates: {found.total / 1e6:,.0f}",
        f"  by kind: {share(found.by('kind'))}",
        f"  by part: {share(found.by('part'))}",
        f"  executions without an estimate, in none of these: {missing or 'none'}",
    ]


def _price_lines(found: PricedStep) -> list[str]:
    seconds = [cycles / found.device.clock for cycles in (found.hidden, found.exposed)]
    sources = ", ".join(f"{name} {count / 1e6:,.0f}" for name, count in found.by_source().items() if count >= 5e5)
    rows = [(part, *(row[name] / 1e6 for name in COLUMNS)) for part, row in found.by_part().items()]
    unpriced = ", ".join(f"{what} {count:,}" for what, count in found.unpriced().items())
    return [
        f"priced in full: {found.hidden / 1e6:,.0f} million cycles with all transfers hidden, "
        f"{found.exposed / 1e6:,.0f} with none; "
        f"MFU {found.mfu['low']:.0%} to {found.mfu['high']:.0%}; {seconds[0]:.3g} to {seconds[1]:.3g} s at "
        f"{found.device.clock / 1e9:.2f} GHz. Nothing of this was measured on a device",
        f"  by source: {sources}",
        f"  without a price: {unpriced or 'none'}",
        f"  {'million cycles by part':<28}{'priced':>9}{'FLOPs':>9}{'memory':>9}{'roofline':>10}",
        *(
            f"  {part:<28}{cycles:>9,.0f}{arithmetic:>9,.0f}{memory:>9,.0f}{floor:>10,.0f}"
            for part, cycles, arithmetic, memory, floor in rows
            if cycles >= 0.5
        ),
    ]


def _flop(count: float) -> str:
    scale, unit = next((x for x in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if count >= x[0]), (1e6, "M"))
    return f"{count / scale:.3g} {unit}FLOP"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"

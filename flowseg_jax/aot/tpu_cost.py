"""What the TPU compiler expects a program to cost: its own estimates of cycles, by kind of operation and by part of the model.

The compiler writes an estimate to most fusions that it makes, and to little else: sorts, gathers, scatters, kernels and
collectives have none. So a sum is a lower bound, good for comparing two forms of the same arithmetic, and what it leaves out
stands beside it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from flowseg_jax.aot import roofline
from flowseg_jax.aot.hlo import KINDS, Instruction, Module, array_bytes

# The first of these that a fusion contains is its kind.
OPCODES_BY_KIND = {
    "collectives": KINDS,
    "sorts": ("sort",),
    "scatters": ("scatter", "select-and-scatter"),
    "gathers": ("gather",),
    "matrix products": ("convolution", "dot"),
    "reductions": ("reduce", "reduce-window"),
}
MOVING = frozenset("copy transpose reshape bitcast slice pad concatenate dynamic-slice dynamic-update-slice broadcast".split())
ELEMENTWISE, MOVEMENT, KERNELS = "elementwise", "data movement", "kernels"
# Nothing is computed by these; a start has the cost, and its end none.
FREE_OPCODES = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier iota partition-id replica-id domain "
    "add-dependency".split()
)
# `jax.named_scope`s of the train step; the innermost one counts.
SCOPES = (
    *("sam", "siglip", "projectors", "connector", "pixel_decoder", "llm", "mask_decoder", "boundary", "matcher", "losses"),
    *("sum_gradients", "optimizer"),
)
SCALAR = 8  # bytes of the largest result that counts as a loop's bookkeeping, where it has no estimate
MAX_CYCLES = 10**13  # cycles of one instruction; at low effort the compiler writes some without meaning

_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_WORDS = re.compile(r"\w+")
_KERNEL = re.compile(r"kernel_metadata=\{([^{}]*)\}")
_PAIR = re.compile(r'"(\w+)":"([^"]*)"')
_SLICE_SIZES = re.compile(r"slice_sizes=\{([\d,]*)\}")
_UPDATE_WINDOW = re.compile(r"update_window_dims=\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True)
class Cost:
    """One instruction.

    Attributes:
        kind: a key of `OPCODES_BY_KIND`, or one of ELEMENTWISE, MOVEMENT, KERNELS.
        part: one of `SCOPES` with " forward", " again" (rematerialised) or " backward"; "other" for what has no scope.
        label: the opcode, or what a custom call calls.
        cycles: of one execution; None where the compiler gives no estimate.
        executions: in one run of the program; a loop of unknown length counts once, and each of n branches 1 / n: the decoder's
            levels take turns.
        op_name: JAX's path of the operation.
        flops: of one execution, of matrix products alone.
        bytes: to and from the device's memory in one execution; of a collective, of the whole array on a device.
        values: slices that gathers and scatters move one at a time, in one execution.
        kernel: what a Pallas kernel tells about itself.
        overlapped: whether it is a transfer that runs beside other instructions.
    """

    kind: str
    part: str
    label: str
    cycles: int | None
    executions: float
    op_name: str
    flops: float = 0.0
    bytes: int = 0
    values: int = 0
    kernel: Mapping[str, str] = dataclasses.field(default_factory=dict)
    overlapped: bool = False

    @property
    def total(self) -> int:
        return round((self.cycles or 0) * self.executions)


@dataclasses.dataclass(frozen=True)
class CostEstimate:
    """All costs of a program that has estimates."""

    costs: tuple[Cost, ...]

    @property
    def total(self) -> int:
        return sum(cost.total for cost in self.costs)

    def by(self, field: str) -> dict[str, int]:
        """{kind or part: cycles}, the most expensive first."""
        found: collections.Counter[str] = collections.Counter()
        for cost in self.costs:
            found[getattr(cost, field)] += cost.total
        return {name: count for name, count in found.most_common() if count}

    def without_estimate(self) -> dict[str, int]:
        """{what: executions} of all that the sums leave out, the most frequent first."""
        found: collections.Counter[str] = collections.Counter()
        for cost in self.costs:
            if cost.cycles is None:
                plain = cost.kind in (MOVEMENT, ELEMENTWISE, "reductions")
                found[cost.label if plain else f"{cost.kind} ({cost.label})"] += cost.executions
        return {what: math.ceil(count) for what, count in found.most_common()}

    def largest(self, count: int) -> list[Cost]:
        """The most expensive instructions, all executions together."""
        return sorted(self.costs, key=lambda cost: -cost.total)[:count]


def cycles(text: str) -> CostEstimate | None:
    """Reads optimised HLO text (`jax.stages.Compiled.as_text()`); None where the compiler estimates nothing, as all but TPU's.

    Raises:
        ValueError: text without an entry computation.
    """
    module = Module(text)
    found = tuple(_walk(module, module.entry, 1))
    return CostEstimate(found) if any(cost.cycles is not None for cost in found) else None


def _walk(module: Module, computation: str, executions: float) -> Iterator[Cost]:
    for x in module.instructions(computation).values():
        if x.opcode == "while":
            trips = module.trip_count(x)
            times = executions * (1 if trips is None else trips)
            for part in ("condition", "body"):
                yield from _walk(module, x.called(part), times)
        elif x.opcode == "conditional":
            names = module.branches(x)
            for name in names:
                yield from _walk(module, name, executions / len(names))
        elif x.opcode == "call":
            yield from _walk(module, x.called("to_apply"), executions)
        elif not (x.opcode in FREE_OPCODES or x.opcode.endswith(("-done", "-update")) or "AllocateBuffer" in x.attributes):
            cost = _cost(module, computation, x, executions)
            if cost.cycles is not None or cost.kind != ELEMENTWISE or array_bytes(x.type) > SCALAR:
                yield cost


def _cost(module: Module, computation: str, x: Instruction, executions: float) -> Cost:
    estimate, name, target = (pattern.search(x.attributes) for pattern in (_ESTIMATE, _OP_NAME, _TARGET))
    found = int(estimate[1]) if estimate else 0
    op_name = name[1] if name else ""
    label = target[1] if target else x.opcode.removesuffix("-start")
    kind = _kind(module, x)
    return Cost(
        kind=kind,
        part=part_of(op_name),
        label=label,
        cycles=found if 0 < found < MAX_CYCLES else None,
        executions=executions,
        op_name=op_name,
        flops=roofline.flops(module, computation, x),
        bytes=array_bytes(x.type) if kind == "collectives" else roofline.memory_bytes(module, computation, x),
        values=_values(module, computation, x) if kind in ("gathers", "scatters") else 0,
        kernel=kernel_metadata(x),
        overlapped=x.opcode.endswith("-start"),
    )


def kernel_metadata(x: Instruction) -> dict[str, str]:
    """What a Pallas kernel tells about itself; empty for any other instruction, and for a kernel that tells nothing."""
    found = _KERNEL.search(x.attributes) if x.opcode == "custom-call" else None
    return dict(_PAIR.findall(found[1])) if found else {}


def _values(module: Module, computation: str, x: Instruction) -> int:
    """Slices that the gathers and scatters in an instruction move."""
    local = module.instructions(computation)
    if x.opcode == "gather":
        sizes = [int(size) for size in _SLICE_SIZES.search(x.attributes)[1].split(",") if size]
        return roofline.elements(x.type) // max(1, math.prod(sizes))
    if x.opcode in ("scatter", "select-and-scatter"):
        window = _UPDATE_WINDOW.search(x.attributes)
        sizes = roofline.sizes(local[x.operands[-1]].type)
        axes = [int(axis) for axis in window[1].split(",") if axis] if window else []
        return math.prod(sizes) // max(1, math.prod(sizes[axis] for axis in axes))
    called = x.called("calls")
    return 0 if called is None else sum(_values(module, called, inner) for inner in module.instructions(called).values())


def _kind(module: Module, x: Instruction) -> str:
    if x.opcode == "custom-call":
        return KERNELS
    inside = _opcodes(module, x)
    for kind, opcodes in OPCODES_BY_KIND.items():
        if inside & set(opcodes):
            return kind
    return MOVEMENT if inside <= MOVING | FREE_OPCODES else ELEMENTWISE


def _opcodes(module: Module, x: Instruction) -> set[str]:
    """Of an instruction or, where it is a fusion or runs beside others, of everything in it."""
    called = x.called("calls")
    if called is None:
        return {x.opcode.removesuffix("-start")}
    return set().union(*(_opcodes(module, inner) for inner in module.instructions(called).values()))


def part_of(op_name: str) -> str:
    """The part of the model that an operation belongs to, from JAX's path of it (`Cost.part`)."""
    scope = next((word for word in reversed(_WORDS.findall(op_name)) if word in SCOPES), None)
    if scope is None:
        return "other"
    direction = "again" if "rematted_computation" in op_name else "backward" if "transpose(" in op_name else "forward"
    return f"{scope} {direction}"

"""What a step costs on a TPU in full: the compiler's estimates, and a price for all that it estimates nothing for.

The compiler says nothing about Pallas kernels, gathers, scatters, sorts, plain copies and collectives. Here each has a price:

- a kernel costs the bundles (one is one cycle without stalls) of its compiled code times how often they run. The table
  `kernel_bundles.json` has them by kernel and shape; `python -m benchmarks.kernels` makes it. How often a body runs is not in
  the compiled code: the kernel tells it (`metadata` of its `pallas_call`);
- a gather or scatter costs `GATHER` or `SCATTER` cycles for each slice that it moves, counted in the compiled code;
- a sort costs a bitonic network's compare-and-swaps on whole vector registers;
- whatever moves bytes costs at least their time at the memory's bandwidth;
- a collective costs its bytes at the bandwidth of one axis of the torus.

Collectives, and transfers that run beside other instructions, cost nothing where arithmetic hides them. Whether it does is not
known, so two figures are given: all of them hidden, and none.

No figure of this comes from a TPU. Real times are longer: stalls, short loops and the host are in none of it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.resources
import json
import math

from flowseg_jax.aot.hlo import CollectiveStats
from flowseg_jax.aot.tpu_cost import KERNELS, Cost, CostEstimate
from flowseg_jax.system.hardware import DeviceKind

GATHER, SCATTER = 13.6, 8.0  # cycles a slice, counted in compiled code for v5e
REGISTER = 1024  # 32-bit values of a vector register
SORT = 4  # cycles of a compare-and-swap of two registers of one operand
TABLE = "kernel_bundles.json"
COLLECTIVES = "collectives"
COLUMNS = ("cycles", "flops", "memory", "floor")  # of a part


@dataclasses.dataclass(frozen=True)
class Price:
    """One instruction, all executions together, in cycles.

    Attributes:
        cost: the instruction.
        cycles: of it; None where nothing is known. Of a collective without an estimate 0.
        floor: the longer of its FLOPs at peak and its bytes at the memory's bandwidth.
        estimated: whether `cycles` is the compiler's.
    """

    cost: Cost
    cycles: float | None
    floor: float
    estimated: bool


@dataclasses.dataclass(frozen=True)
class PricedStep:
    """A step in full.

    Attributes:
        prices: of every instruction.
        device: what it was compiled for.
        flops: of the model, a step and device.
        wire: cycles of the bytes of all collectives inside a slice, at the links' bandwidth.
    """

    prices: tuple[Price, ...]
    device: DeviceKind
    flops: float
    wire: float

    @property
    def hidden(self) -> float:
        """Cycles if arithmetic hides all that can run beside it: collectives, and transfers to and from the chip's memory."""
        return sum(price.cycles or 0 for price in self.prices if not price.cost.overlapped)

    @property
    def exposed(self) -> float:
        """Cycles if none of it is."""
        return self.wire + sum(price.cycles or 0 for price in self.prices)

    @property
    def mfu(self) -> dict[str, float]:
        """Model FLOPs over what the device could do in the time: "low" with nothing hidden, "high" with all."""
        of = lambda cycles: self.flops / (cycles * self.device.cycle_flops)  # noqa: E731
        return {"low": of(self.exposed), "high": of(self.hidden)}

    def by_source(self) -> dict[str, float]:
        """Cycles of the compiler's estimates, of what has none by kind, and of exposed collectives."""
        found: collections.Counter[str] = collections.Counter()
        for price in self.prices:
            kind = price.cost.kind
            other = "transfers beside" if price.cost.overlapped else "other, by bytes"
            name = "estimated" if price.estimated else kind if kind in PRICED_KINDS else other
            found[name] += price.cycles or 0
        found[COLLECTIVES] += self.wire
        return {name: count for name, count in found.most_common() if count}

    def by_part(self) -> dict[str, dict[str, float]]:
        """{part: {cycles without what may be hidden; FLOPs at peak; bytes at the memory's bandwidth; the sum of `floor`}}."""
        found: dict[str, dict[str, float]] = {}
        for price in self.prices:
            row, cost = found.setdefault(price.cost.part, dict.fromkeys(COLUMNS, 0.0)), price.cost
            row["cycles"] += 0.0 if price.cost.overlapped else price.cycles or 0.0
            row["flops"] += cost.flops * cost.executions / self.device.cycle_flops
            if cost.kind != COLLECTIVES:
                row["memory"] += cost.bytes * cost.executions * self.device.clock / self.device.memory
            row["floor"] += price.floor
        return dict(sorted(found.items(), key=lambda item: -item[1]["cycles"]))

    def unpriced(self) -> dict[str, int]:
        """{what has no price: executions}."""
        found: collections.Counter[str] = collections.Counter()
        for price in self.prices:
            if price.cycles is None:
                found[price.cost.kernel.get("kernel", price.cost.label)] += math.ceil(price.cost.executions)
        return dict(found.most_common())


PRICED_KINDS = (KERNELS, "gathers", "scatters", "sorts")


def price(estimate: CostEstimate, traffic: CollectiveStats, device: DeviceKind, flops: float) -> PricedStep:
    """Prices all instructions of a program.

    Args:
        estimate: the program's instructions.
        traffic: its collectives.
        device: with a clock, as TPUs have in `hardware.DEVICE_SPECS`.
        flops: model FLOPs a step and device.
    """
    table = bundles().get(device.name, {})
    # A sum travels twice: the parts to where they are added up, and the sum back.
    inside = [x for x in traffic.collectives if not x.between_slices]  # nothing is assumed about the network between slices
    travelled = sum(x.executions * x.bytes * (2 if x.kind == "all-reduce" else 1) for x in inside)
    wire = travelled * device.clock / device.links
    return PricedStep(tuple(_price(cost, device, table) for cost in estimate.costs), device, flops, wire)


@functools.cache
def bundles() -> dict[str, dict[str, dict]]:
    """{device: {kernel: {"step": bundles of a step without its bodies, "bodies": bundles of each body}}}."""
    return json.loads(importlib.resources.files("flowseg_jax.aot").joinpath(TABLE).read_text(encoding="utf-8"))


def kernel_cycles(metadata: dict[str, str], row: dict) -> float:
    """Of all steps of a kernel; `metadata` is what it tells about itself."""
    counts = [int(count) for count in metadata["bodies"].split()]
    return int(metadata["steps"]) * row["step"] + sum(n * size for n, size in zip(counts, row["bodies"], strict=True))


def _price(cost: Cost, device: DeviceKind, table: dict[str, dict]) -> Price:
    memory = cost.bytes * device.clock / device.memory
    floor = max(cost.flops / device.cycle_flops, memory)
    if cost.cycles is not None:
        return Price(cost, cost.cycles * cost.executions, floor * cost.executions, estimated=True)
    if cost.kind == COLLECTIVES:
        return Price(cost, 0.0, 0.0, estimated=False)
    if cost.kind == "gathers":
        each = max(cost.values * GATHER, floor)
    elif cost.kind == "scatters":
        each = max(cost.values * SCATTER, floor)
    elif cost.kind == "sorts":
        each = max(_sort(cost.bytes / 8), floor)
    elif cost.kernel:
        row = table.get(cost.kernel["kernel"])
        each = None if row is None else max(kernel_cycles(cost.kernel, row), floor)
    else:
        each = floor
    return Price(cost, None if each is None else each * cost.executions, floor * cost.executions, estimated=False)


def _sort(values: float) -> float:
    rounds = math.log2(max(2.0, values))
    return SORT * values / REGISTER * rounds * (rounds + 1) / 2

"""What a step costs on a TPU in full: the compiler's estimates, and a price for all that it estimates nothing for.

The compiler says nothing about Pallas kernels, gathers, scatters, sorts, plain copies and collectives. Here each has a price:

- a kernel costs the bundles (one is one cycle without stalls) of its compiled code times how often they run. The table
  `kernel_bundles.json` has them by kernel and shape; `python -m benchmarks.kernels` makes it. How often a body runs is not in
  the compiled code: the kernel tells it (`metadata` of its `pallas_call`);
- a gather or scatter costs `GATHER` or `SCATTER` cycles for each slice that it moves, counted in the compiled code;
- a sort costs a bitonic network's compare-and-swaps on whole vector registers;
- whatever moves bytes costs at least their time at the memory's bandwidth;
- a collective costs its bytes at the bandwidth of one axis of the torus. Whether it hides behind arithmetic is not known, so
  two figures are given: all of them hidden, and none.

No figure of this comes from a TPU. Real times are longer: stalls, short loops and the host are in none of it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.resources
import json
import math

from flowseg_jax.aot.tpu_cost import Cost, CostEstimate
from flowseg_jax.system.hardware import DeviceKind

GATHER, SCATTER = 13.6, 8.0  # cycles a slice, counted in compiled code for v5e
REGISTER = 1024  # 32-bit values of a vector register
SORT = 4  # cycles of a compare-and-swap of two registers of one operand
TABLE = "kernel_bundles.json"
COLLECTIVES, KERNELS = "collectives", "kernels"


@dataclasses.dataclass(frozen=True)
class Price:
    """One instruction, all executions together, in cycles.

    Attributes:
        cost: the instruction.
        cycles: of it; of a collective 0, None where nothing is known.
        exposed: of a collective, if nothing hides it.
        floor: the longer of its FLOPs at peak and its bytes at the memory's bandwidth.
        estimated: whether `cycles` is the compiler's.
    """

    cost: Cost
    cycles: float | None
    exposed: float
    floor: float
    estimated: bool


@dataclasses.dataclass(frozen=True)
class PricedStep:
    """A step in full.

    Attributes:
        prices: of every instruction.
        device: what it was compiled for.
        flops: of the model, a step and device.
    """

    prices: tuple[Price, ...]
    device: DeviceKind
    flops: float

    @property
    def hidden(self) -> float:
        """Cycles if all collectives are hidden."""
        return sum(price.cycles or 0 for price in self.prices)

    @property
    def exposed(self) -> float:
        """Cycles if no collective is."""
        return self.hidden + sum(price.exposed for price in self.prices)

    @property
    def mfu(self) -> dict[str, float]:
        """Model FLOPs over what the device could do in the time: "low" with all collectives exposed, "high" with none."""
        of = lambda cycles: self.flops / (cycles * self.device.cycle_flops)  # noqa: E731
        return {"low": of(self.exposed), "high": of(self.hidden)}

    def by_source(self) -> dict[str, float]:
        """Cycles of the compiler's estimates, and of what has none by kind; collectives exposed."""
        found: collections.Counter[str] = collections.Counter()
        for price in self.prices:
            kind = price.cost.kind
            name = "estimated" if price.estimated else kind if kind in PRICED_KINDS else "other, by bytes"
            found[name] += (price.cycles or 0) + price.exposed
        return {name: count for name, count in found.most_common() if count}

    def by_part(self) -> dict[str, dict[str, float]]:
        """{part: cycles, and the part's rooflines: FLOPs at peak, bytes at the memory's bandwidth, and the sum of `floor`}."""
        found: dict[str, collections.Counter[str]] = {}
        for price in self.prices:
            row, cost = found.setdefault(price.cost.part, collections.Counter()), price.cost
            row["cycles"] += price.cycles or 0
            row["flops"] += cost.flops * cost.executions / self.device.cycle_flops
            if cost.kind != COLLECTIVES:
                row["memory"] += cost.bytes * cost.executions * self.device.clock / self.device.memory
            row["floor"] += price.floor
        return {part: dict(row) for part, row in sorted(found.items(), key=lambda item: -item[1]["cycles"])}

    def unpriced(self) -> dict[str, int]:
        """{what has no price: executions}."""
        found: collections.Counter[str] = collections.Counter()
        for price in self.prices:
            if price.cycles is None:
                found[price.cost.kernel.get("kernel", price.cost.label)] += math.ceil(price.cost.executions)
        return dict(found.most_common())


PRICED_KINDS = (COLLECTIVES, KERNELS, "gathers", "scatters", "sorts")


def price(estimate: CostEstimate, device: DeviceKind, flops: float) -> PricedStep:
    """Prices all instructions of a program.

    Args:
        estimate: the program's instructions.
        device: with a clock, as TPUs have in `hardware.DEVICE_SPECS`.
        flops: model FLOPs a step and device.
    """
    table = bundles().get(device.name, {})
    return PricedStep(tuple(_price(cost, device, table) for cost in estimate.costs), device, flops)


@functools.cache
def bundles() -> dict[str, dict[str, dict]]:
    """{device: {kernel: {"step": bundles of a step without its bodies, "bodies": bundles of each body}}}."""
    return json.loads(importlib.resources.files("flowseg_jax.aot").joinpath(TABLE).read_text())


def kernel_cycles(metadata: dict[str, str], row: dict) -> float:
    """Of all steps of a kernel; `metadata` is what it tells about itself."""
    counts = [int(count) for count in metadata["bodies"].split()]
    return int(metadata["steps"]) * row["step"] + sum(n * size for n, size in zip(counts, row["bodies"], strict=True))


def _price(cost: Cost, device: DeviceKind, table: dict[str, dict]) -> Price:
    memory = cost.bytes * device.clock / device.memory
    floor = max(cost.flops / device.cycle_flops, memory)
    if cost.kind == COLLECTIVES:
        return Price(cost, 0.0, cost.executions * cost.bytes * device.clock / device.links, 0.0, estimated=False)
    if cost.cycles is not None:
        return Price(cost, cost.cycles * cost.executions, 0.0, floor * cost.executions, estimated=True)
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
    return Price(cost, None if each is None else each * cost.executions, 0.0, floor * cost.executions, estimated=False)


def _sort(values: float) -> float:
    rounds = math.log2(max(2.0, values))
    return SORT * values / REGISTER * rounds * (rounds + 1) / 2

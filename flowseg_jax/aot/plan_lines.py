"""The report of `flowseg plan` for people, line by line."""

from __future__ import annotations

from collections.abc import Mapping

from flowseg_jax.aot.hlo import CollectiveStats
from flowseg_jax.aot.pricing import COLUMNS, PricedStep
from flowseg_jax.aot.tpu_cost import CostEstimate
from flowseg_jax.system.hardware import GIB
from flowseg_jax.training import flops


def parameters(components: Mapping[str, Mapping[str, int]]) -> list[str]:
    total = {kind: sum(counts[kind] for counts in components.values()) for kind in ("trained", "frozen")}
    rows = [("parameters", {"trained": "trained", "frozen": "frozen"}), *components.items(), ("all", total)]
    show = lambda x: x if isinstance(x, str) else f"{x:,}"  # noqa: E731
    return [f"  {name:<18}{show(counts['trained']):>16}{show(counts['frozen']):>16}" for name, counts in rows]


def arithmetic(by_part: Mapping[str, float], seconds: float | None, mfu: float) -> str:
    total = flops.total(by_part)
    largest = sorted(by_part, key=by_part.get, reverse=True)[:4]
    shares = ", ".join(f"{part} {by_part[part] / total:.0%}" for part in largest)
    at = "n/a" if seconds is None else f"{seconds:.3g} s"
    return f"arithmetic: {flop(total)} a step ({shares}); a step at {mfu:.0%} MFU: {at}"


def traffic(found: CollectiveStats) -> list[str]:
    waiting = [loop for loop in found.loops if loop.trip_count is None]
    exchanging = sum(bool(loop.collectives) for loop in waiting)
    return [
        f"collectives a step: {_kinds(found.totals()) or 'none'}",
        f"largest all-reduce in a loop {found.largest_in_a_loop('all-reduce') / 1e6:,.1f} MB, largest all-gather "
        f"{found.largest('all-gather') / 1e6:,.1f} MB; of {len(waiting)} loops whose length depends on data {exchanging} "
        "exchange anything",
    ]


def between_slices(found: CollectiveStats, slices: int, devices: int, gradients: int) -> list[str]:
    """Which collectives cross the slow network, and how much that is beside the bytes of a device's gradients."""
    totals = found.totals(between_slices=True)
    sent = sum(size for _, size in totals.values()) * devices / slices
    others = [kind for kind in totals if kind != "all-reduce"]
    return [
        f"between {slices} slices, a step and device: {_kinds(totals) or 'nothing'}; its gradients are {gradients / 1e6:,.1f} "
        f"MB. A slice adds {sent / 1e6:,.1f} MB to the sums",
        *([f"WARNING: not only gradients cross: {', '.join(others)}"] if others else []),
    ]


def _kinds(totals: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{kind} {count} ({size / 1e6:,.1f} MB)" for kind, (count, size) in totals.items())


def cycles(found: CostEstimate) -> list[str]:
    share = lambda sums: ", ".join(f"{name} {count / 1e6:,.0f}" for name, count in sums.items() if count >= 5e5)  # noqa: E731
    missing = ", ".join(f"{what} {count:,}" for what, count in found.without_estimate().items())
    return [
        f"million cycles a step that the compiler estimates: {found.total / 1e6:,.0f}",
        f"  by kind: {share(found.by('kind'))}",
        f"  by part: {share(found.by('part'))}",
        f"  executions without an estimate, in none of these: {missing or 'none'}",
    ]


def prices(found: PricedStep) -> list[str]:
    seconds = [count / found.device.clock for count in (found.hidden, found.exposed)]
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
            f"  {part:<28}{priced:>9,.0f}{flop:>9,.0f}{memory:>9,.0f}{floor:>10,.0f}"
            for part, priced, flop, memory, floor in rows
            if priced >= 0.5
        ),
    ]


def flop(count: float) -> str:
    scale, unit = next((x for x in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if count >= x[0]), (1e6, "M"))
    return f"{count / scale:.3g} {unit}FLOP"


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"

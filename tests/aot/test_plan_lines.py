"""The lines of a plan, by figures that tell which is which."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flowseg_jax.aot import plan_lines


def test_parameters_add_up():
    lines = plan_lines.parameters({"llm": {"trained": 1234, "frozen": 0}, "sam": {"trained": 6, "frozen": 7_000_000}})
    assert [line.split() for line in lines] == [
        ["parameters", "trained", "frozen"], ["llm", "1,234", "0"], ["sam", "6", "7,000,000"], ["all", "1,240", "7,000,000"],
    ]  # fmt: skip
    assert {len(line) for line in lines} == {2 + 18 + 16 + 16}


def test_arithmetic_names_the_four_largest_parts():
    parts = {"a": 10e12, "b": 40e12, "c": 20e12, "d": 5e12, "e": 25e12}
    shares = "b 40%, e 25%, c 20%, a 10%"
    assert plan_lines.arithmetic(parts, 1.2345, 0.4) == (f"arithmetic: 100 TFLOP a step ({shares}); a step at 40% MFU: 1.23 s")
    assert plan_lines.arithmetic({"a": 1.0}, None, 0.4).endswith("a step at 40% MFU: n/a")


@pytest.mark.parametrize(
    ("count", "text"),
    [(1e15, "1 PFLOP"), (999e12, "999 TFLOP"), (1e12, "1 TFLOP"), (2.5e9, "2.5 GFLOP"), (1e9, "1 GFLOP"), (9e8, "900 MFLOP"),
     (12345, "0.0123 MFLOP")],
)  # fmt: skip
def test_flops(count, text):
    assert plan_lines.flop(count) == text


def test_sizes():
    hundredth = int(0.01 * 2**30) + 1
    assert [plan_lines.gib(size) for size in (3 << 29, hundredth, hundredth - 1, 3 << 19)] == [
        "1.50 GiB", "0.01 GiB", "10.24 MiB", "1.50 MiB",
    ]  # fmt: skip


def collectives(**changes):
    loops = [
        SimpleNamespace(trip_count=None, collectives=["x"]), SimpleNamespace(trip_count=None, collectives=[]),
        SimpleNamespace(trip_count=3, collectives=["x", "y"]), SimpleNamespace(trip_count=None, collectives=[]),
    ]  # fmt: skip
    fields = {
        "loops": loops,
        "totals": lambda between_slices=False: {"all-reduce": (2, 3e6)} if between_slices else {"all-gather": (4, 5e6)},
        "largest_in_a_loop": {"all-reduce": 6e6}.get,
        "largest": {"all-gather": 7e9}.get,
    }
    return SimpleNamespace(**fields | changes)


def test_collectives():
    assert plan_lines.traffic(collectives()) == [
        "collectives a step: all-gather 4 (5.0 MB)",
        "largest all-reduce in a loop 6.0 MB, largest all-gather 7,000.0 MB; of 3 loops whose length depends on data 1 "
        "exchange anything",
    ]
    assert plan_lines.traffic(collectives(totals=dict))[0] == "collectives a step: none"


def test_what_crosses_between_slices():
    line = (
        "between 2 slices, a step and device: all-reduce 2 (3.0 MB); its gradients are 4.5 MB. A slice adds 12.0 MB to the sums"
    )
    assert plan_lines.between_slices(collectives(), 2, 8, 4_500_000) == [line]
    more = collectives(totals=lambda between_slices: {"all-reduce": (1, 1e6), "all-gather": (1, 2e6), "all-to-all": (1, 3e6)})
    found = plan_lines.between_slices(more, 2, 4, 0)
    assert found[0].endswith("A slice adds 12.0 MB to the sums")
    assert found[1:] == ["WARNING: not only gradients cross: all-gather, all-to-all"]
    assert (
        "a step and device: nothing; " in plan_lines.between_slices(collectives(totals=lambda between_slices: {}), 2, 4, 0)[0]
    )


def test_cycles():
    by = {"kind": {"fusion": 2e6, "copy": 4.9e5, "sort": 5e5}, "part": {"llm": 3e6}}
    found = SimpleNamespace(total=1234e6, by=by.get, without_estimate=lambda: {"sort": 1234, "copy": 5})
    assert plan_lines.cycles(found) == [
        "million cycles a step that the compiler estimates: 1,234",
        "  by kind: fusion 2, sort 0",
        "  by part: llm 3",
        "  executions without an estimate, in none of these: sort 1,234, copy 5",
    ]
    found.without_estimate = dict
    assert plan_lines.cycles(found)[-1].endswith(": none")


def test_prices():
    row = dict(zip(plan_lines.COLUMNS, (2e6, 3e6, 4e6, 5e6), strict=True))
    small = dict.fromkeys(plan_lines.COLUMNS, 4e5)
    found = SimpleNamespace(
        device=SimpleNamespace(clock=1.5e9), hidden=3e9, exposed=6e9, mfu={"low": 0.301, "high": 0.352},
        by_source=lambda: {"compiler": 2e9, "table": 4e5, "counted": 5e5}, by_part=lambda: {"llm": row, "sam": small},
        unpriced=lambda: {"sort": 1234},
    )  # fmt: skip
    assert plan_lines.prices(found) == [
        "priced in full: 3,000 million cycles with all transfers hidden, 6,000 with none; MFU 30% to 35%; 2 to 4 s at 1.50 "
        "GHz. Nothing of this was measured on a device",
        "  by source: compiler 2,000, counted 0",
        "  without a price: sort 1,234",
        f"  {'million cycles by part':<28}   priced    FLOPs   memory  roofline",
        f"  {'llm':<28}        2        3        4         5",
    ]
    found.unpriced = dict
    assert plan_lines.prices(found)[2] == "  without a price: none"

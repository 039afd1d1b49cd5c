"""Prices of what the TPU compiler estimates nothing for, and the rooflines beside them."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernels import bodies
from flowseg_jax.aot import pricing, roofline
from flowseg_jax.aot.hlo import Collective, CollectiveStats, Module
from flowseg_jax.aot.tpu_cost import Cost, CostEstimate, cycles
from flowseg_jax.ops.attention import flash_call
from flowseg_jax.ops.attention.blocks import Blocks, Loops, metadata
from flowseg_jax.ops.attention.mask import causal_mask
from flowseg_jax.system.hardware import DEVICE_SPECS

V5E = DEVICE_SPECS["TPU v5 lite"]
LABELS = "dim_labels=b0f_0io->b0f"


def cost(kind: str, **fields) -> Cost:
    return Cost(
        **{"kind": kind, "part": "losses forward", "label": "x", "cycles": None, "executions": 2, "op_name": ""} | fields
    )


def priced(*costs: Cost, flops: float = 1e9, traffic: tuple[Collective, ...] = ()) -> pricing.PricedStep:
    return pricing.price(CostEstimate(costs), CollectiveStats(traffic, ()), V5E, flops)


def test_clocks_follow_from_peak_and_matrix_units() -> None:
    clocks = {"TPU v5 lite": 1.503, "TPU v5": 1.751, "TPU v6 lite": 1.751}
    for name, gigahertz in clocks.items():
        assert DEVICE_SPECS[name].clock / 1e9 == pytest.approx(gigahertz, abs=1e-3)


def test_each_kind_has_its_price() -> None:
    memory = V5E.memory / V5E.clock  # bytes a cycle
    assert priced(cost("matrix products", cycles=500, flops=2**17 * 300.0)).hidden == 1000
    assert priced(cost("gathers", values=1000)).hidden == pytest.approx(2 * 13.6 * 1000)
    assert priced(cost("gathers", values=1, bytes=10**9)).hidden == pytest.approx(2 * 1e9 / memory)
    assert priced(cost("scatters", values=1000)).hidden == pytest.approx(2 * 8 * 1000)
    assert priced(cost("data movement", bytes=10**6)).hidden == pytest.approx(2 * 1e6 / memory)
    # 2**20 values of 4 bytes, read and written, are 1,024 registers; a bitonic sort of 2**20 has 20 * 21 / 2 = 210 passes.
    assert priced(cost("sorts", bytes=8 * 2**20)).hidden == pytest.approx(2 * 4 * 1024 * 210)


def test_collectives_cost_nothing_or_all_of_their_time() -> None:
    """A sum travels twice. A fusion that the compiler spread a collective over has an estimate, which counts in both.

    What crosses slices is on another network, which has no price.
    """
    across = Collective("all-reduce", 10**9, 1, (), between_slices=True)
    traffic = Collective("all-gather", 10**6, 2, ()), Collective("all-reduce", 10**5, 3, ()), across
    costs = cost("collectives", cycles=1000), cost("collectives", bytes=10**6)
    found = priced(*costs, flops=1000.0 * 2**17, traffic=traffic)
    wire = (2 * 1e6 + 2 * 3 * 1e5) / (V5E.links / V5E.clock)
    assert (found.hidden, found.exposed) == (2000, pytest.approx(2000 + wire))
    assert found.mfu == {"high": pytest.approx(0.5), "low": pytest.approx(1000 / (2000 + wire))}
    assert found.by_source() == {"collectives": pytest.approx(wire), "estimated": 2000}


def test_a_transfer_beside_other_instructions_may_be_hidden() -> None:
    found = priced(cost("elementwise", cycles=1000), cost("data movement", bytes=10**6, overlapped=True))
    beside = 2 * 1e6 / (V5E.memory / V5E.clock)
    assert (found.hidden, found.exposed) == (2000, pytest.approx(2000 + beside))
    assert found.by_part()["losses forward"]["cycles"] == 2000
    assert found.by_source() == {"transfers beside": pytest.approx(beside), "estimated": 2000}


def test_a_kernel_costs_its_steps_and_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing, "bundles", lambda: {"v5e": {"attend 8x8": {"step": 100, "bodies": [1000, 30]}}})
    known = {"kernel": "attend 8x8", "steps": "6", "bodies": "4 5"}
    found = priced(cost("kernels", kernel=known), cost("kernels", kernel=known | {"kernel": "attend 9x9"}))
    assert found.hidden == 2 * (6 * 100 + 4 * 1000 + 5 * 30)
    assert found.unpriced() == {"attend 9x9": 2}


def test_parts_stand_beside_their_rooflines() -> None:
    found = priced(cost("matrix products", cycles=500, flops=2**17 * 300.0, bytes=10**5), cost("elementwise", bytes=10**6))
    row = found.by_part()["losses forward"]
    memory = V5E.memory / V5E.clock
    assert row["flops"] == 600
    assert row["memory"] == pytest.approx(2 * 1.1e6 / memory)
    assert row["floor"] == pytest.approx(2 * (max(300, 1e5 / memory) + 1e6 / memory))


def _convolution(lhs: str, rhs: str, out: str, attributes: str) -> float:
    text = (
        f"ENTRY %main (a: f32[1]) -> f32[1] {{\n  %a = bf16[{lhs}]{{0}} parameter(0)\n  %b = bf16[{rhs}]{{0}} parameter(1)\n"
        f"  ROOT %c = bf16[{out}]{{0}} convolution(%a, %b), {attributes}\n}}"
    )
    module = Module(text)
    return roofline.flops(module, "main", module.instructions("main")["c"])


@pytest.mark.parametrize(("stride", "low", "spread", "step"), itertools.product((1, 2), (0, 2), (1, 3), (1, 2)))
def test_flops_of_a_convolution_are_its_taps_inside_the_operand(stride: int, low: int, spread: int, step: int) -> None:
    length, taps, out = 7, 3, 5
    window = f"window={{size={taps} stride={stride} pad={low}_9 lhs_dilate={spread} rhs_dilate={step}}}"
    dilated = np.zeros((length - 1) * spread + 1, bool)
    dilated[::spread] = True
    inside = sum(
        0 <= i * stride + tap * step - low < len(dilated) and dilated[i * stride + tap * step - low]
        for i in range(out)
        for tap in range(taps)
    )
    assert _convolution(f"4,{length},6", f"{taps},6,8", f"4,{out},8", f"{window}, {LABELS}") == 2 * 4 * 6 * 8 * inside


def test_bytes_of_slices_are_those_of_the_slice_and_the_chip_has_memory_of_its_own() -> None:
    text = """%cut (p: f32[100,128], q: s32[]) -> f32[1,128] {
  %p = f32[100,128]{1,0} parameter(0)
  %q = s32[] parameter(1)
  ROOT %d = f32[1,128]{1,0} dynamic-slice(%p, %q), dynamic_slice_sizes={1,128}
}

ENTRY %main (a: f32[100,128], i: s32[], v: f32[8,128]) -> f32[8,128] {
  %a = f32[100,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %v = f32[8,128]{1,0:T(8,128)S(1)} parameter(2)
  %row = f32[1,128]{1,0} fusion(%a, %i), kind=kLoop, calls=%cut
  %all = f32[100,128]{1,0} add(%a, %a)
  ROOT %near = f32[8,128]{1,0:T(8,128)S(1)} add(%v, %v)
}"""
    module = Module(text)
    read = {name: roofline.memory_bytes(module, "main", x) for name, x in module.instructions("main").items()}
    assert (read["row"], read["all"], read["near"]) == (4 + 2 * 512, 3 * 51200, 0)


def test_gathers_and_scatters_count_slices() -> None:
    text = """ENTRY %main (t: f32[50,256], i: s32[7]) -> f32[7,256] {
  %t = f32[50,256]{1,0} parameter(0)
  %i = s32[7]{0} parameter(1)
  %rows = f32[7,256]{1,0} gather(%t, %i), offset_dims={1}, slice_sizes={1,256}
  %ones = f32[7,256]{1,0} gather(%t, %i), offset_dims={}, slice_sizes={1,1}
  %put = f32[50,256]{1,0} scatter(%t, %i, %rows), update_window_dims={1}, to_apply=%add
  ROOT %x = f32[7,256]{1,0} add(%rows, %ones), backend_config={"estimated_cycles":"9"}
}"""
    values = [x.values for x in cycles(text).costs]
    assert values == [7, 7 * 256, 7, 0]


@pytest.mark.parametrize("window", (None, 300))
def test_the_kernel_tells_how_many_blocks_a_causal_mask_leaves(window: int | None) -> None:
    tokens, heads = 1100, 2
    q = jnp.zeros((1, tokens, heads, 64))
    blocks = Blocks.of(q, q)
    steps = (1, heads, blocks.rows, blocks.columns)
    mask = causal_mask(jnp.ones((1, tokens), jnp.int32), jnp.arange(tokens)[None], window)
    found = metadata("attend", blocks, steps, [("q", 128)], jnp.dtype("float32"), mask)
    active = int(flash_call.describe(mask, blocks)[0].sum())
    assert 0 < active < blocks.rows * blocks.columns
    assert (int(found["steps"]), int(found["bodies"])) == (heads * blocks.rows * blocks.columns, heads * active)
    # The steps of a causal mask are the pairs of blocks that are not too late.
    assert Loops.by_query(blocks, True).steps == (heads, blocks.rows * (blocks.rows + 1) // 2)
    assert metadata("attend", blocks, steps, [], jnp.dtype("float32"), None)["bodies"] == found["steps"]


def _bundles(*parts: tuple[int, int, dict[int, str]]) -> str:
    """Final code: (bundles, depth of loops, {bundle: code})."""
    lines, address = [], 0
    for size, depth, code in parts:
        for n in range(size):
            lines.append(f"  {address:#x}   : {'> ' * depth}{{ {code.get(n, '%v0 = vadd')} }}")
            address += 1
    return "\n".join(lines)


def test_bundles_of_a_region_that_a_step_may_skip_are_a_body() -> None:
    """The guard around the whole step (region 9) is no body, and what ends a step (region 3, the smaller one) is not either."""
    text = _bundles(
        (20, 1, {19: "%1 = sbr.rel (%p0) target = $region9"}),
        (10, 1, {9: "%2 = sbr.rel (%p1) target = $region2"}),
        (300, 1, {}),
        (5, 1, {0: "%v /* Start/End empty region 2 :: Start region 4 */", 4: "%3 = sbr.rel (!%p2) target = $region3"}),
        (80, 1, {}),
        (9, 1, {0: "%v /* Start/End empty region 3 */", 8: "%v /* Start region 9 */"}),
    )
    assert bodies(text) == (424 - 301, [301])


def test_bundles_of_inner_loops_are_bodies() -> None:
    """As many as the kernel tells of, the longest, in their order. A loop that the compiler made is none of them."""
    loops = ((size, 2, {}) for size in (20, 17, 9, 200))
    code = _bundles((30, 1, {}), *(part for loop in loops for part in (loop, (3, 1, {}))))
    assert bodies(code, 2) == (30 + 12 + 17 + 9, [20, 200])
    with pytest.raises(ValueError, match="3 loops in a kernel of 4 bodies"):
        bodies(code, 4)
    with pytest.raises(ValueError, match="no bundles"):
        bodies("nothing")

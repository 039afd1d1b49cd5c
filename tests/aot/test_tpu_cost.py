"""Sums of the TPU compiler's estimates: over loops, of kinds and parts, and what has none."""

from __future__ import annotations

import pytest

from flowseg_jax.aot.tpu_cost import cycles


def estimate(count: int) -> str:
    return f'backend_config={{"flag_configs":[],"estimated_cycles":"{count}","iteration_bounds":["1"]}}'


def named(path: str) -> str:
    return f'metadata={{op_name="jit(train_step)/{path}" stack_frame_id=7}}'


PRODUCT = "%product (a: bf16[8,128]) -> bf16[8,128] {\n  %a = bf16[8,128]{1,0} parameter(0)\n"
PRODUCT += "  %c = bf16[8,128]{1,0} convolution(%a, %a), dim_labels=bf_io->bf\n  ROOT %t = bf16[8,128]{1,0} tanh(%c)\n}"
NESTED = "%nested (a: bf16[8,128]) -> bf16[8,128] {\n  %a = bf16[8,128]{1,0} parameter(0)\n"
NESTED += "  ROOT %f = bf16[8,128]{1,0} fusion(%a), kind=kOutput, calls=%product\n}"
MOVE = "%move (a: bf16[8,128]) -> bf16[128,8] {\n  %a = bf16[8,128]{1,0} parameter(0)\n"
MOVE += "  ROOT %t = bf16[128,8]{1,0} transpose(%a), dimensions={1,0}\n}"
TAKE = "%take (a: bf16[8,128], i: s32[4]) -> bf16[4,128] {\n  %a = bf16[8,128]{1,0} parameter(0)\n  %i = s32[4] parameter(1)\n"
TAKE += "  ROOT %g = bf16[4,128]{1,0} gather(%a, %i), offset_dims={1}, slice_sizes={1,128}\n}"
CONDITION = "%cond (w: (s32[], bf16[8,128])) -> pred[] {\n  %w = (s32[], bf16[8,128]{1,0}) parameter(0)\n"
CONDITION += "  %i = s32[] get-tuple-element(%w), index=0\n  %n = s32[] constant(5)\n"
CONDITION += "  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}"
BODY = "%body (w: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {\n  %w = (s32[], bf16[8,128]{1,0}) parameter(0)\n"
BODY += "  %i = s32[] get-tuple-element(%w), index=0\n  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)\n"
BODY += "  %x = bf16[8,128]{1,0} get-tuple-element(%w), index=1\n"
BODY += f"  %y = bf16[8,128]{{1,0}} fusion(%x), kind=kOutput, calls=%product, {named('jvp(llm)/dot')}, {estimate(100)}\n"
BODY += f'  %k = bf16[8,128]{{1,0}} custom-call(%y), custom_call_target="tpu_custom_call", {named("jvp(llm)/flash")}\n'
BODY += "  ROOT %out = (s32[], bf16[8,128]{1,0}) tuple(%next, %k)\n}"
ENTRY = f"""ENTRY %main (p: bf16[8,128], q: s32[4]) -> bf16[4,128] {{
  %p = bf16[8,128]{{1,0}} parameter(0)
  %q = s32[4] parameter(1)
  %start = (s32[], bf16[8,128]{{1,0}}) tuple(%zero, %p)
  %loop = (s32[], bf16[8,128]{{1,0}}) while(%start), condition=%cond, body=%body
  %z = bf16[8,128]{{1,0}} get-tuple-element(%loop), index=1
  %n = bf16[8,128]{{1,0}} fusion(%z), kind=kOutput, calls=%nested, \
{named("transpose(jvp(llm))/rematted_computation/dot")}, {estimate(30)}
  %m = bf16[128,8]{{1,0}} fusion(%n), kind=kLoop, calls=%move, {named("transpose(jvp(decoder))/boundary/x")}, {estimate(7)}
  %s = bf16[8,128]{{1,0}} sort(%n), dimensions={{0}}, {named("losses/matcher/sort")}
  %odd = bf16[8,128]{{1,0}} add(%s, %s), {named("optimizer/add")}, {estimate(28_000_000_000_000_000)}
  ROOT %taken = bf16[4,128]{{1,0}} fusion(%odd, %q), kind=kCustom, calls=%take, {named("take")}
}}"""
TEXT = "\n\n".join(["HloModule m, is_scheduled=true", PRODUCT, NESTED, MOVE, TAKE, CONDITION, BODY, ENTRY])


def test_loops_multiply_and_kinds_and_parts_are_told_apart() -> None:
    found = cycles(TEXT)
    assert found.total == 5 * 100 + 30 + 7
    assert found.by("kind") == {"matrix products": 530, "data movement": 7}
    assert found.by("part") == {"llm forward": 500, "llm again": 30, "boundary backward": 7}
    assert [cost.total for cost in found.largest(2)] == [500, 30]
    assert found.largest(1)[0].op_name == "jit(train_step)/jvp(llm)/dot"


def test_what_has_no_estimate_is_told_with_how_often_it_runs() -> None:
    """A counter's addition is no work, and an estimate beyond reason is none."""
    assert cycles(TEXT).without_estimate() == {
        "kernels (tpu_custom_call)": 5,
        "sorts (sort)": 1,
        "add": 1,
        "gathers (fusion)": 1,
    }


def test_branches_take_turns() -> None:
    branches = "\n\n".join(
        f"%{name} (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} exp(%a), {estimate(count)}\n}}"
        for name, count in (("one", 3), ("two", 12), ("three", 6))
    )
    text = (
        f"HloModule m\n\n{branches}\n\nENTRY %main (i: s32[], p: f32[8]) -> f32[8] {{\n  %i = s32[] parameter(0)\n"
        "  %p = f32[8]{0} parameter(1)\n"
        "  ROOT %c = f32[8]{0} conditional(%i, %p, %p, %p), branch_computations={%one, %two, %three}\n}"
    )
    assert cycles(text).total == 7
    assert cycles(text).without_estimate() == {}


def test_other_compilers_estimate_nothing() -> None:
    text = "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n  ROOT %r = f32[8]{0} exp(%p)\n}"
    assert cycles(text) is None
    with pytest.raises(ValueError, match="no HLO text"):
        cycles("func.func public @main() {\n}")

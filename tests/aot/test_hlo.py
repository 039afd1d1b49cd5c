"""Collectives read from HLO: of small programs compiled for eight host devices, and of written-down TPU and GPU dialects."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from flowseg_jax.aot import hlo
from flowseg_jax.aot.hlo import Collective

# Compiled apart, because how many host devices a process has is fixed when JAX starts.
PROGRAMS = """
import json
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

def text(f, *shapes):
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P("x"))) for s in shapes]
    return jax.jit(mapped).lower(*args).compile().as_text()

def summed(x):
    return x + lax.psum(x.sum(), "x")

def layers(w, x):  # as FSDP: every layer's weight is gathered, its gradient scattered
    def loss(w):
        body = lambda x, w: (jnp.tanh(x @ lax.all_gather(w, "x", axis=1, tiled=True)), None)
        return lax.scan(body, x[0], w[0])[0].sum()
    return jax.grad(loss)(w)

def nested(x):
    ring = [(i, (i + 1) % 8) for i in range(8)]
    inner = lambda y: lax.fori_loop(0, 5, lambda i, z: jnp.sin(z + lax.ppermute(z, "x", ring)), y)
    return lax.fori_loop(0, 3, lambda i, y: inner(y) + 1, x)

def waiting(x):  # how long depends on data, and every turn asks all devices
    return lax.while_loop(lambda y: lax.psum(y.sum(), "x") < 1e3, lambda y: y * lax.pmax(y.max(), "x"), x)

def alone(x):  # how long depends on data, and nobody is asked
    return lax.psum(lax.while_loop(lambda y: y.sum() < 1e3, lambda y: y * 2, x), "x")

once = lambda y: lax.psum(y, "x")
twice = lambda y: once(once(y) * y)

def chosen(x):
    return lax.cond(x[0, 0] > 0, once, twice, x)

def otherwise(x):
    return lax.cond(x[0, 0] > 0, twice, once, x)

two = jax.make_mesh((2, 4), ("slice", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def across(axes):
    def f(w):  # of a layer: gathered inside the slice, its gradient summed over the axes
        g = jax.grad(lambda w: jnp.sum(lax.all_gather(w, "x", axis=0, tiled=True) ** 2))(w)
        return lax.psum(g, "slice") + lax.all_gather(w.sum(), axes).sum()
    mapped = jax.shard_map(f, mesh=two, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    w = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(two, P("x")))
    return jax.jit(mapped).lower(w).compile().as_text()

print(json.dumps({
    "inside": across("x"), "across": across(("slice", "x")),
    "summed": text(summed, (8, 4)), "layers": text(layers, (8, 6, 16, 2), (8, 4, 16)), "nested": text(nested, (8, 4)),
    "waiting": text(waiting, (8, 4)), "alone": text(alone, (8, 4)), "chosen": text(chosen, (8, 4)),
    "otherwise": text(otherwise, (8, 4)),
}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAMS], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def exchanging(text: str) -> list[hlo.Loop]:
    return [loop for loop in hlo.collective_stats(text).loops if loop.collectives]


def test_a_collective_outside_loops(compiled):
    assert hlo.collective_stats(compiled["summed"]).collectives == (Collective("all-reduce", 4, 1, ()),)
    assert exchanging(compiled["summed"]) == []


def test_collectives_of_a_scan_count_once_a_layer(compiled):
    traffic = hlo.collective_stats(compiled["layers"])
    weight = 16 * 16 * 4
    assert traffic.totals() == {"all-gather": (6, 6 * weight), "reduce-scatter": (6, 6 * weight)}
    assert all(x.loops for x in traffic.collectives)
    assert {loop.trip_count for loop in traffic.loops} == {6}


def test_inner_loops_multiply(compiled):
    traffic = hlo.collective_stats(compiled["nested"])
    assert traffic.totals() == {"collective-permute": (15, 15 * 16)}
    assert sorted(loop.trip_count for loop in traffic.loops if loop.collectives) == [3, 5]
    (collective,) = traffic.collectives
    assert len(collective.loops) == 2


def test_a_loop_of_unknown_length_tells_whether_it_waits_for_others(compiled):
    (loop,) = exchanging(compiled["waiting"])
    assert loop.trip_count is None
    assert hlo.collective_stats(compiled["waiting"]).totals() == {"all-reduce": (2, 8)}  # one to decide, one to go on
    traffic = hlo.collective_stats(compiled["alone"])
    assert [loop.trip_count for loop in traffic.loops] == [None]
    assert exchanging(compiled["alone"]) == []
    assert traffic.totals() == {"all-reduce": (1, 16)}


def test_of_branches_the_one_that_exchanges_most_counts(compiled):
    for name in ("chosen", "otherwise"):
        assert hlo.collective_stats(compiled[name]).totals() == {"all-reduce": (2, 32)}


def test_what_crosses_slices(compiled):
    """Two slices of four devices: the first four of the mesh, and the others."""
    between = lambda name, size: hlo.collective_stats(compiled[name], size).totals(between_slices=True)  # noqa: E731
    assert between("inside", 4) == {"all-reduce": (1, 2 * 4 * 4)}
    assert between("across", 4) == {"all-gather": (1, 8 * 4), "all-reduce": (1, 2 * 4 * 4)}
    assert between("across", None) == {}
    assert hlo.collective_stats(compiled["inside"], 4).totals()["all-gather"][0] > 0


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[2,2]<=[4], channel_id=1", [[0, 1], [2, 3]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups={}, to_apply=%add", []),
    ],
)
def test_groups_of_devices(attributes, groups):
    assert hlo.device_groups(hlo.Instruction("a", "f32[]", "all-reduce", ("p",), attributes)) == groups


def test_the_tpu_compiler_hands_what_crosses_slices_to_the_hosts():
    text = module(
        "  %p = f32[64]{0} parameter(0)\n"
        "  %in = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add\n"
        "  %send = (f32[64]{0}, u32[], token[]) send(%in, %token), channel_id=2, is_host_transfer=true, frontend_attributes="
        '{_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %other = (f32[64]{0}, u32[], token[]) send(%in, %token), channel_id=3, is_host_transfer=true\n"
        "  ROOT %r = f32[64]{0} copy(%p)"
    )
    found = hlo.collective_stats(text, 4)
    assert found.totals() == {"all-reduce": (2, 512)} and found.totals(between_slices=True) == {"all-reduce": (1, 256)}


def module(body: str, *others: str) -> str:
    return "HloModule m, is_scheduled=true\n\n" + "\n\n".join([*others, f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}"])


# A scan as the TPU compiler prints it: layouts with tiles, no trip count, a fusion that reduces and scatters, an asynchronous
# permutation, and weights that are gathered in steps which other work is fused with.
TPU = module(
    "  %tuple = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}) tuple(%p)\n"
    "  ROOT %while.1 = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/u32[]) while(%tuple), "
    'condition=%cond, body=%body, metadata={op_name="jit(step)/while"}',
    "%cond (w: (s32[], bf16[16,128])) -> pred[] {\n"
    "  %bound = s32[]{:T(128)} constant(36)\n"
    "  %w = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}) parameter(0)\n"
    "  %i = s32[]{:T(128)} get-tuple-element(%w), index=0\n"
    "  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT\n}",
    "%all-reduce-scatter.2.clone (input: bf16[2048,128]) -> bf16[520,128] {\n"
    "  %input = bf16[2048,128]{1,0:T(8,128)(2,1)} parameter(0)\n"
    "  %pad = bf16[2080,128]{1,0:T(8,128)(2,1)} pad(%input), padding=0_32x0_0\n"
    "  %all-reduce.12 = bf16[2080,128]{1,0:T(8,128)(2,1)} all-reduce(%pad), replica_groups={{0,1},{2,3}}, to_apply=%add\n"
    "  ROOT %slice = bf16[520,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.12), dynamic_slice_sizes={520,128}\n}",
    "%fused_computation.start (a: bf16[512,128]) -> bf16[2048,128] {\n"
    "  %a = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(0)\n"
    '  ROOT %all-gather.1 = bf16[2048,128]{1,0:T(8,128)(2,1)} all-gather(%a), frontend_attributes={chain_id="0"}\n}',
    "%async_collective_fusion.3 (a: bf16[512,128]) -> bf16[2048,128] {\n"
    "  %a = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(0)\n"
    '  ROOT %all-gather.2 = bf16[2048,128]{1,0:T(8,128)(2,1)} all-gather(%a), frontend_attributes={chain_id="0"}\n}',
    "%body (w: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {\n"
    "  %w = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}) parameter(0)\n"
    "  %part = bf16[512,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%w), index=1\n"
    "  %async-collective-start = (bf16[2048,128]{1,0}, u32[]) fusion(%part), kind=kCustom, calls=%fused_computation.start\n"
    "  %fusion.7 = bf16[2048,128]{1,0} fusion(%part), kind=kOutput, calls=%async_collective_fusion.3\n"
    "  %collective-permute-start.2 = (bf16[96,128]{1,0:T(8,128)(2,1)}, bf16[96,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, "
    "u32[]{:S(2)}) collective-permute-start(%edge), source_target_pairs={{0,1},{1,0}}\n"
    "  %edge = bf16[96,128]{1,0:T(8,128)(2,1)} slice(%part), slice={[0:96], [0:128]}\n"
    "  %collective-permute-done.2 = bf16[96,128]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start.2)\n"
    "  ROOT %fusion.116 = bf16[520,128]{1,0} fusion(%part), kind=kCustom, calls=%all-reduce-scatter.2.clone\n}",
)


def test_the_tpu_compilers_dialect():
    traffic = hlo.collective_stats(TPU)
    assert [(loop.name, loop.trip_count) for loop in traffic.loops] == [("while.1", 36)]
    assert traffic.totals() == {
        "all-gather": (36, 36 * 2048 * 128 * 2),
        "collective-permute": (36, 36 * (96 * 128 * 2 + 8)),  # two words of synchronisation
        "reduce-scatter": (36, 36 * 2080 * 128 * 2),
    }
    assert traffic.largest_in_a_loop("all-reduce") == 0
    assert traffic.largest_in_a_loop("reduce-scatter") == 2080 * 128 * 2


GPU = module(
    "  %a = bf16[1024,256]{1,0} parameter(0)\n"
    "  %b = bf16[512,64]{1,0} parameter(1)\n"
    "  %c = f32[8]{0} parameter(2)\n"
    "  %start = (bf16[512,64]{1,0}, bf16[2048,64]{1,0}) all-gather-start(%b), replica_groups={{0,1,2,3}}, dimensions={0}\n"
    "  %done = bf16[2048,64]{1,0} all-gather-done(%start)\n"
    "  %scatter = ((bf16[1024,256]{1,0}, bf16[512,64]{1,0}), (bf16[256,256]{1,0}, bf16[128,64]{1,0})) "
    "reduce-scatter-start(%a, %b), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add\n"
    "  %scattered = (bf16[256,256]{1,0}, bf16[128,64]{1,0}) reduce-scatter-done(%scatter)\n"
    "  %reduce = (f32[8]{0}, f32[8]{0}) all-reduce-start(%c, %c), to_apply=%add\n"
    "  ROOT %reduced = (f32[8]{0}, f32[8]{0}) all-reduce-done(%reduce)"
)


def test_the_gpu_compilers_dialect():
    assert hlo.collective_stats(GPU).totals() == {
        "all-gather": (1, 2048 * 64 * 2),
        "all-reduce": (1, 64),
        "reduce-scatter": (1, (1024 * 256 + 512 * 64) * 2),
    }
    assert hlo.collective_stats(GPU).largest_in_a_loop("all-reduce") == 0


def test_a_known_trip_count_is_taken_from_the_compiler():
    body = "%body (w: s32[]) -> s32[] {\n  %w = s32[] parameter(0)\n  ROOT %r = s32[] all-reduce(%w), to_apply=%add\n}"
    condition = "%cond (w: s32[]) -> pred[] {\n  %w = s32[] parameter(0)\n  ROOT %r = pred[] fusion(%w), calls=%compare\n}"
    loop = '  ROOT %while = s32[] while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    assert hlo.collective_stats(module(loop, body, condition)).totals() == {"all-reduce": (9, 36)}


@pytest.mark.parametrize(
    "root",
    [
        "compare(%w, %bound), direction=NE",
        "compare(%bound, %w), direction=LT",
        "and(%w, %bound), direction=LT",
        "fusion(%w), kind=kLoop, calls=%compare",
    ],
)
def test_any_other_condition_is_one_on_data(root):
    condition = (
        f"%cond (w: s32[]) -> pred[] {{\n  %w = s32[] parameter(0)\n  %bound = s32[] constant(7)\n  ROOT %r = pred[] {root}\n}}"
    )
    body = "%body (w: s32[]) -> s32[] {\n  ROOT %w = s32[] parameter(0)\n}"
    loop = "  ROOT %while = s32[] while(%p), condition=%cond, body=%body"
    assert hlo.collective_stats(module(loop, body, condition)).loops[0].trip_count is None
    counted = condition.replace(root, "compare(%w, %bound), direction=LT")
    assert hlo.collective_stats(module(loop, body, counted)).loops[0].trip_count == 7


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no HLO text"):
        hlo.collective_stats("func.func public @main() {\n}")

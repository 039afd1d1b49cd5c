"""Attention against torch's scaled_dot_product_attention, and the kernels against the plain form: values and gradients."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flowseg_jax.ops.attention import (
    AttentionMask,
    TokenInfo,
    attention,
    blocks,
    causal_mask,
    cudnn,
    decomposed_rel_pos_attention,
    flash_backward,
    flash_call,
    grid,
    xla,
)
from tests.helpers import tpu

B, S, T, H, E, F = 2, 7, 9, 4, 8, 6


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def inputs(kv_heads: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) for s in ((B, S, H, E), (B, T, kv_heads, E), (B, T, kv_heads, F))]


@functools.partial(jax.jit, static_argnames=("scale", "chunk", "impl"))
def run(q, k, v, cotangent, mask=None, scale=None, chunk=None, impl="xla"):
    out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, mask=mask, scale=scale, chunk=chunk, impl=impl), q, k, v)
    return out, vjp(cotangent)


def reference(q, k, v, mask, ct, scale=None):
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    repeat = H // k.shape[2]
    tq, tk, tv = (x.transpose(1, 2) for x in leaves)
    tk, tv = tk.repeat_interleave(repeat, 1), tv.repeat_interleave(repeat, 1)
    mask = None if mask is None else torch.tensor(mask)
    out = torch.nn.functional.scaled_dot_product_attention(tq, tk, tv, attn_mask=mask, scale=scale).transpose(1, 2)
    out.backward(torch.tensor(ct))
    return out.detach().numpy(), [x.grad.numpy() for x in leaves]


@pytest.mark.parametrize(
    ("kv_heads", "mask_shape", "chunk"),
    [
        (1, None, None),
        (2, None, 3),
        (4, (1, 1, S, T), None),
        (2, (B, 1, S, T), 3),
        (2, (B, H, S, T), None),
        (2, (B, H, S, T), 3),
        (1, (B, 1, 1, T), 3),
    ],
)
def test_matches_torch(kv_heads, mask_shape, chunk):
    q, k, v = inputs(kv_heads)
    rng = np.random.default_rng(1)
    mask = None
    if mask_shape:
        mask = rng.random(mask_shape) < 0.4
        mask[..., 2] = True
    ct = rng.standard_normal((B, S, H, F)).astype(np.float32)
    out, got = run(q, k, v, ct, mask=mask, scale=0.3, chunk=chunk)
    expected, gradients = reference(q, k, v, mask, ct, scale=0.3)
    assert relative(out, expected) < 1e-5
    for gradient, want in zip(got, gradients, strict=True):
        assert relative(gradient, want) < 1e-5


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_row_without_keys_is_zero_and_has_zero_gradient(chunk):
    q, k, v = inputs(2)
    mask = np.ones((1, 1, S, T), bool)
    mask[0, 0, 4] = False
    out, gradients = run(q, k, v, np.ones((B, S, H, F), np.float32), mask=mask, chunk=chunk)
    assert not np.asarray(out[:, 4]).any() and not np.asarray(gradients[0][:, 4]).any()
    assert np.asarray(out[:, 3]).any() and all(np.isfinite(g).all() for g in gradients)
    rest = np.arange(S) != 4
    np.testing.assert_allclose(out[:, rest], run(q, k, v, np.ones((B, S, H, F), np.float32))[0][:, rest], rtol=1e-6, atol=1e-6)


def test_bfloat16_accumulates_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(2))
    q *= 8  # scores of about 20, which bfloat16 would round to multiples of an eighth
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert relative(out.astype(jnp.float32), exact) < 2**-7


def test_large_scores_do_not_overflow():
    q, k, v = inputs(4)
    out = attention(q * 1e3, k * 1e3, v)
    assert np.isfinite(out).all()


def test_chunks_are_chosen_by_size_and_bound_memory(monkeypatch):
    """Scores of 2 x 16 x 256 x 256 float32 are 8 MiB: under a budget of 1 MiB an element neither pass may hold them all."""
    x = jax.ShapeDtypeStruct((2, 256, 16, 8), jnp.float32)

    def temporary() -> int:
        step = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)))
        return step.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary() > 8 * 2**20
    monkeypatch.setattr(xla, "WHOLE_BYTES", 8 * 2**20 - 1)  # of the whole batch: one element's scores are fewer
    monkeypatch.setattr(xla, "CHUNK_BYTES", 2**20)
    assert temporary() < 8 * 2**20


@pytest.mark.parametrize("bad", ["heads", "mask", "keys", "rule", "order", "impl", "flash"])
def test_shapes_that_do_not_fit_are_refused(monkeypatch, bad):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the function's own checks are under test
    q, k, v = inputs(2)
    with pytest.raises(ValueError, match="do not fit|does not broadcast|a mask for|not the same|unknown|differs between heads"):
        if bad == "heads":
            attention(q[:, :, :3], k, v)
        elif bad == "keys":
            attention(q, k[:, 1:], v)
        elif bad == "rule":
            attention(q, k, v, mask=causal_mask(jnp.zeros((B, S), int), jnp.zeros((B, S), int)))
        elif bad == "order":  # a kernel would pass over keys of a cache as too late
            attention(q, k, v, mask=dataclasses.replace(packed(B, S, T - S, None), in_order=True))
        elif bad == "impl":
            attention(q, k, v, impl="fast")
        elif bad == "flash":
            attention(q, k, v, mask=jnp.ones((B, H, S, T), bool), impl="flash")
        else:
            attention(q, k, v, mask=jnp.ones((B, 1, S, T + 1), bool))


def test_a_mask_by_hand():
    positions = jnp.array([[0, 1, 2, 3, 2, 0]])
    segments = jnp.array([[0, 0, 1, 1, 2, -1]])
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 0, 0],
        ]
    )
    assert (np.asarray(causal_mask(segments, positions).materialize())[0, 0] == expected).all()
    expected[[2, 3, 3, 4], [0, 0, 1, 0]] = 0  # two or more positions back
    assert (np.asarray(causal_mask(segments, positions, window=2).materialize())[0, 0] == expected).all()


def packed(rows: int, new: int, cached: int, window: int | None) -> AttentionMask:
    """New tokens of two conversations after a prefix, of which some (and the prefix) are cached; both end in padding."""
    segments = np.zeros((rows, cached + new), np.int32)
    segments[:, cached + new // 4 : cached + new // 2], segments[:, cached + new // 2 :] = 1, 2
    segments[:, -5:], segments[:, cached - 3 : cached] = -1, -1
    segments[0, : cached + 2] = -1  # the first row's first queries see nothing at all
    positions = np.tile(np.arange(cached + new, dtype=np.int32), (rows, 1))
    positions[:, cached + new // 2 :] -= new // 4
    order = np.tile(np.maximum(np.arange(-cached, new, dtype=np.int32), -1), (rows, 1))
    tokens = [jnp.asarray(x) for x in (order, segments, positions)]
    return AttentionMask(TokenInfo(*(x[:, cached:] for x in tokens)), TokenInfo(*tokens), window)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run as plain JAX."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


@pytest.mark.parametrize("case", ["plain", "packed", "in order", "cached", "window", "matrix", "keys"])
@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "in parts"])
def test_flash_equals_the_plain_form(monkeypatch, interpreted, case, in_parts):
    """In parts: the backward pass of one block of queries at a time."""
    monkeypatch.setattr(blocks, "BLOCKS", (128,))
    if in_parts:
        monkeypatch.setattr(flash_backward, "HELD_BYTES", 1)
    s, t = {"plain": (130, 300), "cached": (140, 270), "matrix": (140, 270)}.get(case, (300, 300))
    rule = None if case == "plain" else packed(B, s, t - s, 40 if case == "window" else None)
    if case == "in order":
        rule = dataclasses.replace(rule, in_order=True)
    if case in ("matrix", "keys"):  # "keys": the same for all images and queries
        rule = rule.materialize() if case == "matrix" else (jnp.arange(t) % 3 == 0)[None, None, None]
    rng, groups = np.random.default_rng(3), 1 if case == "in order" else 2
    q, k, v, ct = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((B, s, H, E), (B, t, groups, E), (B, t, groups, F), (B, s, H, F))
    )
    expected, gradients = run(q, k, v, ct, mask=rule, scale=0.3)
    out, got = run(q, k, v, ct, mask=rule, scale=0.3, impl="flash")
    assert relative(out, expected) < 1e-5
    for gradient, want in zip(got, gradients, strict=True):
        assert gradient.shape == want.shape and relative(gradient, want) < 1e-5
    if case not in ("plain", "keys"):
        blind = ~np.asarray(rule if case == "matrix" else rule.materialize()).any((1, 3))
        assert blind[0].any() and not np.asarray(out)[blind].any() and not np.asarray(got[0])[blind].any()


def test_flash_passes_over_blocks_in_which_nobody_sees_anybody(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCKS", (128,))
    segments = jnp.asarray(np.repeat([[0, 1, 2, -1]], 128, 1))
    q = jnp.zeros((1, 512, 1, 8))
    active, *_ = flash_call.describe(causal_mask(segments, jnp.zeros_like(segments)), blocks.Blocks.of(q, q))
    assert active[0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]


def test_blocks_are_large_where_padding_costs_less():
    sizes = {n: blocks.tokens_a_block(n) for n in (100, 192, 729, 1600, 1792, 2304, 4096)}
    assert sizes == {100: 128, 192: 256, 729: 384, 1600: 384, 1792: 256, 2304: 384, 4096: 512}


@pytest.mark.parametrize(
    ("rule", "real", "code", "bodies"),
    [
        (None, 384, "plain", 18),
        (None, 383, "padded", 18),
        ({}, 384, "causal", 12),  # 6 of 9 blocks have a key that is no later than a query
        ({"in_order": False}, 384, "masked", 12),
        ({"window": 1}, 384, "causal", 6),
        ({"window": 2}, 383, "causal", 10),
    ],
)
def test_flash_tells_a_plan_which_code_runs_and_how_often(rule, real, code, bodies):
    """Two heads in one step, whose sums begin and end three times a head; or each with its own keys. A body has two of four."""
    ids = jnp.zeros((1, 3), jnp.int32)
    mask = None if rule is None else dataclasses.replace(causal_mask(ids, ids), **rule)
    widths, dtype = [("q", 128), ("k", 256)], jnp.dtype("bfloat16")
    name = f"128x128 q128 k256 bfloat16 {code}"
    apart = blocks.metadata("attend", blocks.Blocks(128, 128, 3, 3, 2, 2, real), (1, 2, 3, 3), widths, dtype, mask)
    assert apart == {"kernel": f"attend {name}", "steps": "18", "bodies": str(bodies)}
    counts = {"attend": f"{bodies} 6", "differentiate": f"6 {bodies} 6"}
    for (kernel, expected), heads in itertools.product(counts.items(), (2, 4)):
        found = blocks.metadata(kernel, blocks.Blocks(128, 128, 3, 3, heads, 1, real), (1, 1, 3, 3), widths, dtype, mask)
        assert found == {"kernel": f"{kernel} {name} {heads} heads", "steps": "9", "bodies": expected}


def test_flash_reads_nothing_outside_of_its_blocks_and_nothing_that_was_not_written(monkeypatch):
    """In an interpreter of a TPU's memory, which refuses the one and makes the other NaN. Plain JAX clamps an index."""
    monkeypatch.setattr(blocks, "BLOCKS", (128,))
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=pltpu.InterpretParams()))
    rng = np.random.default_rng(3)
    q, k, v, ct = (jnp.asarray(rng.standard_normal((1, 130, 1, width)), jnp.float32) for width in (E, E, F, F))
    out, pull = jax.vjp(lambda *x: attention(*x, impl="flash"), q, k, v)
    expected, gradients = run(q, k, v, ct)
    for found, want in zip((out, *pull(ct)), (expected, *gradients), strict=True):
        assert relative(found, want) < 1e-5


def test_the_backward_kernel_has_memory_for_the_gradients_of_all_queries(monkeypatch):
    """Two copies of the result in bfloat16, the sums and a row of numbers in float32: of 512 more queries with two heads."""
    given, plain = [], flash_call.pltpu.CompilerParams
    monkeypatch.setattr(flash_call.pltpu, "CompilerParams", lambda **k: given.append(k["vmem_limit_bytes"]) or plain(**k))
    draw = lambda *shape: jnp.zeros((1, *shape), jnp.bfloat16)  # noqa: E731
    for s in (512, 1024):
        arguments = draw(s, 4, 128), *[draw(512, 2, 128)] * 2, *[draw(s, 4, 128)] * 2, jnp.zeros((1, 4, s))
        jax.eval_shape(lambda *x: flash_backward.run(1.0, *x, None), *arguments)
    assert given[1] - given[0] == 512 * 2 * (2 * 2 * 128 + 4 * 128 + 4) and given[0] > flash_call.STEP_BYTES + 512 * 2 * 1028


def test_flash_in_bfloat16_accumulates_in_float32(interpreted):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(2))
    out = attention(8 * q, k, v, impl="flash")
    assert out.dtype == jnp.bfloat16
    exact = attention(*(x.astype(jnp.float32) for x in (8 * q, k, v)))
    assert relative(out.astype(jnp.float32), exact) < 2**-7


@pytest.mark.parametrize("queries", [None, 1, 4, 7], ids=["folded", "one by one", "a ragged end", "whole"])
def test_grid_attention_matches_torch(monkeypatch, queries):
    """Folded into the product, and added to chunks of queries, the last of which is padded."""
    if queries:
        monkeypatch.setattr(xla, "WHOLE_BYTES", 0)
        monkeypatch.setattr(grid, "CHUNK_BYTES", 4 * H * 15 * queries)
    rng = np.random.default_rng(0)
    shapes = (B, S, H, E), (B, 15, H, E), (B, 15, H, F), (B, S, H, 3), (B, S, H, 5)
    operands = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    cotangent = rng.standard_normal((B, S, H, F)).astype(np.float32)
    if queries:
        traced, chunks = str(jax.make_jaxpr(lambda *x: decomposed_rel_pos_attention(*x))(*operands)), -(-S // queries)
        assert chunks == 1 or f"length={chunks} " in traced.replace("\n", " ")
    got, pull = jax.vjp(jax.jit(lambda *x: decomposed_rel_pos_attention(*x)), *operands)
    leaves = [torch.tensor(x, requires_grad=True) for x in operands]
    q, k, v, rows, columns = (x.transpose(1, 2) for x in leaves)
    bias = (rows[..., None] + columns[..., None, :]).flatten(-2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2)
    want.backward(torch.tensor(cotangent))
    assert relative(got, want.detach()) < 1e-5
    for mine, leaf in zip(pull(jnp.asarray(cotangent)), leaves, strict=True):
        assert relative(mine, leaf.grad) < 1e-5


def test_grid_attention_in_bfloat16_accumulates_in_float32(monkeypatch):
    monkeypatch.setattr(xla, "WHOLE_BYTES", 0)
    rng = np.random.default_rng(1)
    operands = [jnp.asarray(rng.standard_normal((1, 64, 2, 8)), jnp.bfloat16) for _ in range(5)]
    exact = jax.jit(lambda *x: decomposed_rel_pos_attention(*x))(*(x.astype(jnp.float32) for x in operands))
    got = jax.jit(lambda *x: decomposed_rel_pos_attention(*x))(*operands)
    assert got.dtype == jnp.bfloat16 and relative(got.astype(jnp.float32), exact) < 1e-2


@pytest.mark.parametrize(("platform", "kernels"), [("tpu", 2), ("cpu", 0)])
def test_grid_attention_is_a_kernel_on_tpu(monkeypatch, platform, kernels):
    monkeypatch.setattr(xla, "WHOLE_BYTES", 0)
    x, place = jnp.zeros((1, 256, 2, 64), jnp.bfloat16), jnp.zeros((1, 256, 2, 16), jnp.bfloat16)
    step = jax.jit(jax.grad(lambda *x: decomposed_rel_pos_attention(*x).astype(jnp.float32).sum()))
    text = step.trace(x, x, x, place, place).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@tpu_custom_call") == kernels


@pytest.mark.parametrize(
    ("platform", "tokens", "mask", "kernels"),
    [
        ("tpu", 256, "rule", 2),
        ("tpu", 256, "none", 2),
        ("tpu", 256, "matrix", 2),
        ("tpu", 256, "matrix by head", 0),
        ("tpu", 255, "none", 0),
        ("tpu", (192, 384), "none", 2),
        ("tpu", (127, 1024), "none", 0),
        ("cpu", 256, "rule", 0),
    ],
)
def test_the_platform_compiled_for_chooses(platform, tokens, mask, kernels):
    """One kernel forward and one backward, or none; that the program is traced on a CPU does not matter."""
    s, t = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    ids = jnp.zeros((1, t), jnp.int32)
    masks = {"none": None, "rule": causal_mask(ids, ids), "matrix": causal_mask(ids, ids).materialize()}
    masks["matrix by head"] = jnp.tile(masks["matrix"], (1, 2, 1, 1))
    q, k = (jnp.zeros((1, n, 2, 128), jnp.bfloat16) for n in (s, t))
    step = jax.jit(
        jax.value_and_grad(lambda q, k, v: attention(q, k, v, mask=masks[mask]).astype(jnp.float32).sum(), (0, 1, 2))
    )
    text = step.trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@tpu_custom_call") == kernels


@tpu.needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("case", ["sam", "llm"])
def test_flash_compiles_for_tpu(topology, case):
    """Forward and backward at the sizes of training, two heads: SAM's folded global attention, and Qwen3's with the rule."""
    program = {
        "sam": """
from flowseg_jax.ops.attention import decomposed_rel_pos_attention
step = lambda q, k, v, rows, columns: decomposed_rel_pos_attention(q, k, v, rows, columns).astype(jnp.float32).sum()
function, wide = jax.grad(step, range(5)), array(jnp.bfloat16, 1, 4096, 2, 64)
arguments = [wide] * 5
""",
        "llm": """
from flowseg_jax.ops.attention import attention, causal_mask
step = lambda q, k, v, ids: attention(q, k, v, mask=causal_mask(ids, ids)).astype(jnp.float32).sum()
function, narrow = jax.grad(step, range(3)), array(jnp.bfloat16, 1, 1920, 1, 128)
arguments = array(jnp.bfloat16, 1, 1920, 2, 128), narrow, narrow, array(jnp.int32, 1, 1920)
""",
    }[case]
    assert tpu.compiled(topology, program, ("sort", "scatter")) == ([0, 0], True)


def as_cudnn(q, k, v, *, mask, scale, implementation):
    """JAX's plain attention under cuDNN's conditions: what stands in for a GPU here."""
    assert implementation == "cudnn" and q.shape[3] == k.shape[3] == v.shape[3]
    if q.shape[3] % 8:
        raise NotImplementedError("The head dim must be a multiple of 8")
    return PLAIN(q, k, v, mask=mask, scale=scale)


PLAIN = jax.nn.dot_product_attention


@pytest.mark.parametrize("mask", ["none", "rule", "keys"])
def test_cudnn_is_called_as_the_plain_form_is_meant(monkeypatch, mask):
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    rng = np.random.default_rng(4)
    q, k, v, ct = (
        rng.standard_normal(s).astype(np.float32) for s in ((B, 30, H, E), (B, 30, 2, E), (B, 30, 2, F), (B, 30, H, F))
    )
    masks = {"none": None, "rule": packed(B, 30, 0, None), "keys": jnp.asarray(rng.random((B, 1, 1, 30)) < 0.5)}
    out, got = run(q, k, v, ct, mask=masks[mask], scale=0.3, impl="cudnn")
    expected, gradients = run(q, k, v, ct, mask=masks[mask], scale=0.3)
    assert relative(out, expected) < 1e-5
    for gradient, want in zip(got, gradients, strict=True):
        assert relative(gradient, want) < 1e-5


def test_cudnn_is_asked_what_it_takes(monkeypatch):
    x = jnp.zeros((1, 4, 1, 8), jnp.bfloat16)
    assert not cudnn.takes(x, x, x, None)  # it is not here
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    assert cudnn.takes(x, x, x, None)
    assert not cudnn.takes(*3 * [x.astype(jnp.float32)], None) and not cudnn.takes(*3 * [x[..., :7]], None)

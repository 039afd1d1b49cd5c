"""Every implementation of multi-scale deformable attention against torch's grid_sample and X-SAM's recorded numbers.

The TPU kernel is interpreted where values matter, and compiled for TPUs that are not there where its program does.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from flowseg_jax.ops import msda as module
from flowseg_jax.ops.msda import IMPLEMENTATIONS, kernel
from tests.helpers import tpu

GOLDEN = Path(__file__).parent.parent / "golden" / "units_ops.npz"
SHAPES = ((3, 5), (6, 4), (7, 8))
B, Q, H, E, K = 2, 11, 3, 4, 2
ALL = sorted(IMPLEMENTATIONS)
msda = jax.jit(module.msda, static_argnums=1, static_argnames=("impl", "chunk"))


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def inputs(seed: int = 0):
    """Locations reach far outside the maps and stay away from pixel centres, where the derivative jumps."""
    rng = np.random.default_rng(seed)
    value = rng.standard_normal((B, sum(h * w for h, w in SHAPES), H, E)).astype(np.float32)
    weights = rng.random((B, Q, H, len(SHAPES), K)).astype(np.float32)
    size = np.array([(w, h) for h, w in SHAPES])[:, None]
    pixel = rng.integers(-4, size + 4, (B, Q, H, len(SHAPES), K, 2)) + rng.uniform(0.1, 0.9, (B, Q, H, len(SHAPES), K, 2))
    return value, ((pixel + 0.5) / size).astype(np.float32), weights


def reference(value, locations, weights, shapes):
    """As Hugging Face's Mask2Former computes it."""
    (b, _, heads, e), (_, q, _, _, k) = value.shape, weights.shape
    out, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(b * heads, e, h, w)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).reshape(b * heads, q, k, 2) - 1
        samples = torch.nn.functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (samples * weights[:, :, :, level].transpose(1, 2).reshape(b * heads, 1, q, k)).sum(-1)
        start += h * w
    return out.reshape(b, heads, e, q).permute(0, 3, 1, 2).reshape(b, q, heads * e)


def torch_results(arrays, cotangent, shapes=SHAPES):
    """The output and all gradients."""
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    out = reference(*leaves, shapes)
    out.backward(torch.tensor(cotangent))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def results(arrays, cotangent, shapes=SHAPES, **options):
    """The output and all gradients."""

    @jax.jit
    def run(cotangent, *arrays):
        out, vjp = jax.vjp(lambda v, p, a: module.msda(v, shapes, p, a, **options), *arrays)
        return [out, *vjp(cotangent)]

    return run(cotangent, *arrays)


def draw_cotangent(*shape: int):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("impl", "chunk"), [("auto", None), ("gather", 4), ("packed_gather", 4), ("dense", 4), ("pallas", None)]
)
def test_values_and_gradients_match_grid_sample(impl, chunk):
    arrays, cotangent = inputs(), draw_cotangent(B, Q, H * E)
    found = results(arrays, cotangent, impl=impl, chunk=chunk)
    for got, expected in zip(found, torch_results(arrays, cotangent), strict=True):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("impl", ALL)
def test_gradients_on_pixel_centres_are_those_of_grid_sample(impl):
    """Where the derivative jumps, all take it to the right. Sizes are powers of two, so that centres are exact."""
    shapes = ((4, 8),)
    rng = np.random.default_rng(2)
    pixel = rng.integers(-1, (9, 5), (1, 30, 1, 1, 1, 2))
    locations = ((pixel + 0.5) / (8, 4)).astype(np.float32)
    value = rng.standard_normal((1, 32, 1, 3)).astype(np.float32)
    arrays, cotangent = (value, locations, rng.random((1, 30, 1, 1, 1)).astype(np.float32)), draw_cotangent(1, 30, 3)
    for got, expected in zip(
        results(arrays, cotangent, shapes, impl=impl), torch_results(arrays, cotangent, shapes), strict=True
    ):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("impl", ALL)
def test_matches_xsam(impl):
    with np.load(GOLDEN) as golden:
        shapes = tuple(map(tuple, golden["msda/shapes_hw"].tolist()))
        out = msda(golden["msda/value"], shapes, golden["msda/locations_xy"], golden["msda/weights"], impl=impl)
        assert relative(out, golden["msda/out"]) < 1e-5


@pytest.mark.parametrize("impl", ALL)
def test_on_pixel_centres_and_far_outside(impl):
    """Centres give the pixel itself; infinite or huge coordinates contribute nothing and break nothing, gradients included."""
    value = np.arange(1, 13, dtype=np.float32).reshape(1, 12, 1, 1)
    points = [(0.5 / 4, 0.5 / 3), (3.5 / 4, 2.5 / 3), (0.0, 0.0), (np.inf, 0.5), (-1e30, -1e30), (0.5, -2.0)]
    locations = np.array(points, np.float32).reshape(1, 6, 1, 1, 1, 2)
    arrays = value, locations, np.ones((1, 6, 1, 1, 1), np.float32)
    out, *gradients = results(arrays, np.ones((1, 6, 1), np.float32), ((3, 4),), impl=impl)
    np.testing.assert_allclose(np.asarray(out).ravel(), [1, 12, 0.25, 0, 0, 0], atol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.asarray(gradients[1])[0, 3:].any()


@pytest.mark.parametrize("impl", ALL)
def test_bfloat16_values_keep_float32_coordinates(impl):
    value, locations, weights = inputs()
    rounded = jnp.asarray(value, jnp.bfloat16)
    out = msda(rounded, SHAPES, locations, weights, impl=impl)
    assert out.dtype == jnp.bfloat16
    exact = msda(rounded.astype(jnp.float32), SHAPES, locations, weights, impl=impl)
    assert relative(out.astype(jnp.float32), exact) < 2**-6


@pytest.mark.parametrize("impl", ALL)
def test_bfloat16_gradients_are_sums_in_float32(impl):
    """Many queries at one place: partial sums in bfloat16 would stop growing."""
    value = jnp.ones((1, 4, 1, 2), jnp.bfloat16)
    locations, weights = jnp.full((1, 600, 1, 1, 1, 2), 0.25), jnp.ones((1, 600, 1, 1, 1))
    gradient = jax.jit(jax.grad(lambda v: module.msda(v, ((2, 2),), locations, weights, impl=impl, chunk=100).sum()))(value)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradient[0, :, 0, 0], np.float32), [600, 0, 0, 0], rtol=2**-8)


@pytest.mark.parametrize("impl", ["packed_gather", "gather"])
def test_large_inputs_are_chunked(impl, monkeypatch):
    """The samples of all queries never exist at once, neither forward nor backward."""
    value, locations, weights = (jnp.asarray(x) for x in inputs())
    locations, weights = (jnp.concatenate([x] * 40, 1) for x in (locations, weights))
    samples = weights.size * 4 * E * 4

    def temporary() -> int:
        step = jax.jit(jax.grad(lambda v, p, a: module.msda(v, SHAPES, p, a, impl=impl).sum(), (0, 1, 2)))
        return step.lower(value, locations, weights).compile().memory_analysis().temp_size_in_bytes

    assert temporary() > samples
    monkeypatch.setattr(module, "CHUNK_BYTES", samples // 10 // B)
    assert temporary() < samples


def test_the_forward_pass_on_cpu_stores_no_samples():
    value, locations, weights = (jnp.asarray(x) for x in inputs())
    locations, weights = (jnp.concatenate([x] * 40, 1) for x in (locations, weights))
    memory = msda.lower(value, SHAPES, locations, weights, impl="gather").compile().memory_analysis()
    assert memory.temp_size_in_bytes < weights.size * 4 * E * 4


def test_auto_chooses_by_platform(monkeypatch):
    args = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs()]

    def program(platform: str) -> str:
        def step(v, p, a):
            return jax.value_and_grad(lambda *x: module.msda(x[0], SHAPES, *x[1:]).sum(), (0, 1, 2))(v, p, a)

        return jax.jit(step).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    def rows(text: str) -> int:
        """Width of the rows that the program gathers."""
        sizes = [line.split("slice_sizes = array<i64:")[1].split(">")[0] for line in text.splitlines() if "slice_sizes" in line]
        assert sizes
        return max(int(size.split(",")[-1]) for size in sizes)

    assert rows(program("cpu")) == E and rows(program("cuda")) == 4 * E
    on_tpu = program("tpu")
    assert on_tpu.count("tpu_custom_call") == 2 and "stablehlo.gather" not in on_tpu and "stablehlo.scatter" not in on_tpu
    monkeypatch.setattr(kernel, "RESIDENT_BYTES", kernel.resident_bytes(SHAPES, E, 4) - 1)
    without_room = program("tpu")
    assert "tpu_custom_call" not in without_room and rows(without_room) == 4 * E


def test_the_kernel_sums_over_blocks_of_queries():
    """Two blocks of queries, several rows a strip, and rows longer than a strip."""
    shapes = ((3, 5), (2, 130))
    rng = np.random.default_rng(3)
    queries = kernel.BLOCK + 4
    value = rng.standard_normal((1, 3 * 5 + 2 * 130, 1, 2)).astype(np.float32)
    arrays = (
        value,
        rng.uniform(-0.2, 1.2, (1, queries, 1, 2, 1, 2)).astype(np.float32),
        rng.random((1, queries, 1, 2, 1)).astype(np.float32),
    )
    cotangent = draw_cotangent(1, queries, 2)
    found = results(arrays, cotangent, shapes, impl="pallas")
    for got, expected in zip(found, results(arrays, cotangent, shapes, impl="gather"), strict=True):
        assert relative(got, expected) < 1e-5


def test_the_kernel_visits_only_rows_that_are_touched():
    """NaN times a weight of zero would show."""
    value = np.full((1, 8, 128, 1, 2), np.nan, np.float32)
    value[:, 3:5] = 1
    locations = np.broadcast_to(np.float32([0.5, 0.5]), (1, 5, 1, 1, 1, 2))  # between rows 3 and 4
    arrays = value.reshape(1, 1024, 1, 2), locations, np.ones((1, 5, 1, 1, 1), np.float32)
    out, of_value, *_ = results(arrays, np.ones((1, 5, 2), np.float32), ((8, 128),), impl="pallas")
    np.testing.assert_allclose(out, 1)
    assert np.asarray(of_value).reshape(8, 128, 2).any((1, 2)).tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_the_kernel_touches_its_own_blocks_alone():
    """In an interpreter of a TPU's memory, which refuses a place outside of a block. Plain JAX clamps an index."""
    shapes, rng = ((3, 5),), np.random.default_rng(5)
    value, weights = rng.random((1, 15, 2, 3), np.float32), rng.random((1, 4, 2, 2), np.float32)
    points = rng.uniform(-1, 4, (1, 4, 2, 2, 2)).astype(np.float32).reshape(1, 4, 2, 1, 2, 2)
    arguments = shapes, 4, value, points, weights.reshape(1, 4, 2, 1, 2)
    cotangent = rng.random((1, 4, 2, 3), np.float32)
    strict, plain = (
        [one.forward(*arguments), *one.backward(shapes, 4, cotangent, *arguments[2:])]
        for one in (kernel.Kernel(pltpu.InterpretParams()), kernel.Kernel(True))
    )
    for mine, theirs in zip(strict, plain, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


@tpu.needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernel_compiles_for_tpu(topology):
    """Forward and backward, at the head width and dtype of training: nothing is sorted, gathered or scattered."""
    program = """
from flowseg_jax.ops.msda import msda
shapes = ((8, 8), (16, 16), (32, 32))
n = sum(y * x for y, x in shapes)
arguments = array(jnp.bfloat16, 1, n, 2, 32), array(jnp.float32, 1, n, 2, 3, 4, 2), array(jnp.float32, 1, n, 2, 3, 4)
function = jax.value_and_grad(lambda v, p, a: msda(v, shapes, p, a).astype(jnp.float32).sum(), (0, 1, 2))
"""
    assert tpu.compiled(topology, program, ("sort", "gather", "scatter")) == ([0, 0, 0], True)


def test_shapes_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the function's own checks are under test
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        msda(value[:, 1:], SHAPES, locations, weights)
    with pytest.raises(ValueError, match="do not fit"):
        msda(value, SHAPES, locations, weights[..., :1])


def test_an_unknown_implementation_is_refused():
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match="no implementation 'palas': choose auto, gather, packed_gather, dense, pallas"):
        msda(value, SHAPES, locations, weights, impl="palas")

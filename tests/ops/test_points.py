"""Point sampling against torch's grid_sample, packed masks against unpacked ones, and X-SAM's recorded numbers."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from flowseg_jax.ops.points import (
    _gather,
    _gather_features,
    _gather_patches,
    _of_smallest,
    _packed_gather,
    _running_count,
    _scatter,
    _spread,
    kernel,
    sample_features,
    sample_packed_masks,
    sample_points,
    uncertain_points,
)
from tests.helpers import tpu

GOLDEN = Path(__file__).parent.parent / "golden" / "units_ops.npz"
N, HEIGHT, WIDTH, P = 3, 5, 9, 40


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def grid_sample(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """maps [n, c, h, w], points [n, p, 2] -> [n, c, p]."""
    return torch.nn.functional.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def inputs():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((N, HEIGHT, WIDTH)).astype(np.float32)
    points = rng.uniform(-0.3, 1.3, (N, P, 2)).astype(np.float32)
    return maps, points


def test_sample_matches_grid_sample_with_gradients():
    maps, points = inputs()
    cotangent = np.random.default_rng(1).standard_normal((N, P)).astype(np.float32)
    out, vjp = jax.vjp(jax.jit(sample_points), maps, points)
    tm, tp = torch.tensor(maps, requires_grad=True), torch.tensor(points, requires_grad=True)
    expected = grid_sample(tm[:, None], tp)[:, 0]
    expected.backward(torch.tensor(cotangent))
    assert relative(out, expected.detach()) < 1e-5
    for got, want in zip(vjp(jnp.asarray(cotangent)), (tm.grad, tp.grad), strict=True):
        assert relative(got, want) < 1e-5


def test_sample_matches_xsam():
    with np.load(GOLDEN) as golden:
        out = sample_points(golden["sample_point/in"][:, 0], golden["sample_point/coords_xy"])
        assert relative(out, golden["sample_point/out"]) < 1e-5


def test_feature_sampling_matches_grid_sample_and_commutes_with_the_product():
    rng = np.random.default_rng(2)
    features = rng.standard_normal((HEIGHT, WIDTH, 6)).astype(np.float32)
    points = inputs()[1][0]
    out, vjp = jax.vjp(lambda f: sample_features(f, points), features)
    leaf = torch.tensor(features, requires_grad=True)
    expected = grid_sample(leaf.permute(2, 0, 1)[None], torch.tensor(points)[None])[0].T
    expected.sum().backward()
    assert relative(out, expected.detach()) < 1e-5
    assert relative(vjp(jnp.ones_like(out))[0], leaf.grad) < 1e-5
    queries = rng.standard_normal((4, 6)).astype(np.float32)
    masks = np.einsum("qd,hwd->qhw", queries, features)
    assert relative(queries @ np.asarray(out).T, sample_points(masks, np.stack([points] * 4))) < 1e-5
    assert sample_features(jnp.asarray(features, jnp.bfloat16), points).dtype == jnp.bfloat16


def test_packed_masks_sample_as_unpacked_ones():
    rng = np.random.default_rng(3)
    masks = rng.integers(0, 2, (N, 16, 16)).astype(np.uint8)
    points = rng.uniform(-0.1, 1.1, (N, 200, 2)).astype(np.float32)
    packed = np.packbits(masks, axis=-1)
    assert packed.shape == (N, 16, 2)
    got = jax.jit(sample_packed_masks)(packed, points)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, sample_points(masks.astype(np.float32), points), rtol=0, atol=1e-6)
    # Centres of pixels give the pixels themselves, bit by bit.
    centre = (np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).reshape(1, 256, 2) + 0.5) / 16
    got = sample_packed_masks(packed, np.repeat(centre, N, 0).astype(np.float32))
    np.testing.assert_allclose(got, masks.reshape(N, -1), atol=1e-5)


def test_packed_masks_of_any_width():
    """A width that fills no whole number of bytes is told apart from its packed one."""
    rng = np.random.default_rng(4)
    masks = rng.integers(0, 2, (N, 13, 13)).astype(np.uint8)
    points = rng.uniform(-0.1, 1.1, (N, 200, 2)).astype(np.float32)
    got = sample_packed_masks(np.packbits(masks, axis=-1), points, 13)
    np.testing.assert_allclose(got, sample_points(masks.astype(np.float32), points), rtol=0, atol=1e-6)


def test_packed_masks_are_never_unpacked():
    """At full size, 64 masks of 1,024 pixels are 256 MiB as float32; sampling them must need less than a tenth."""
    masks = jax.ShapeDtypeStruct((64, 1024, 128), jnp.uint8)
    points = jax.ShapeDtypeStruct((64, 1024, 2), jnp.float32)
    memory = jax.jit(sample_packed_masks).lower(masks, points).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 25 * 2**20


@pytest.mark.parametrize("far", [1e30, -1e30])
def test_points_far_outside_are_zero(far):
    maps = np.ones((1, 4, 8), np.float32)
    points = np.array([[[far, 0.5], [0.5, far], [0.5, 0.5]]], np.float32)
    np.testing.assert_allclose(sample_points(maps, points), [[0, 0, 1]])
    packed = np.full((1, 4, 1), 255, np.uint8)
    np.testing.assert_allclose(sample_packed_masks(packed, points), [[0, 0, 1]])


def test_uncertain_points_are_those_nearest_to_zero():
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((N, 30)).astype(np.float32)
    candidates, extra = rng.random((N, 30, 2)).astype(np.float32), rng.random((N, 4, 2)).astype(np.float32)
    got = np.asarray(uncertain_points(logits, candidates, extra, 7))
    for i in range(N):
        order = torch.topk(-torch.tensor(logits[i]).abs(), 7).indices.numpy()
        np.testing.assert_array_equal(got[i], np.concatenate([candidates[i][np.sort(order)], extra[i]]))
    gradient = jax.grad(lambda x, c: uncertain_points(x, c, extra, 7).sum(), (0, 1))(logits, candidates)
    assert not any(np.asarray(g).any() for g in gradient)


@pytest.mark.parametrize("keep", [1, 7, 29, 30])
def test_of_ties_the_first_stay(keep):
    """Zeros of both signs, denormal numbers and infinities included; NumPy's stable sort decides."""
    rng = np.random.default_rng(5)
    logits = rng.integers(-3, 4, (N, 30)) * rng.choice([0.25, 1e-40, 1e30, 1e39], (N, 30))
    with np.errstate(over="ignore"):  # 1e39 is infinite
        logits = logits.astype(np.float32)
    logits[0] = 1.0  # nothing but ties
    candidates, extra = rng.random((N, 30, 2)).astype(np.float32), np.zeros((N, 0, 2), np.float32)
    got = np.asarray(jax.jit(uncertain_points, static_argnames="keep")(logits, candidates, extra, keep=keep))
    for i in range(N):
        stays = np.sort(np.argsort(np.abs(logits[i]), kind="stable")[:keep])
        np.testing.assert_array_equal(got[i], candidates[i][stays])


@pytest.mark.parametrize("count", [1, 63, 64, 65, 300])
def test_running_counts_are_exact(count):
    flags = np.random.default_rng(6).random((2, count)) < 0.7
    np.testing.assert_array_equal(jax.jit(_running_count)(flags), np.cumsum(flags, 1))


def test_points_are_chosen_without_a_sort():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 30), (2, 30, 2), (2, 4, 2))]
    text = jax.jit(lambda *x: uncertain_points(*x, 7)).lower(*shapes).as_text()
    assert "top_k" not in text and "stablehlo.sort" not in text


def edges() -> np.ndarray:
    """Points in, on the edge of and far outside the map."""
    points = inputs()[1]
    points[0, :6] = [[0, 0], [1, 1], [0.5 / WIDTH, 0.5 / HEIGHT], [1e30, 0.5], [0.5, -1e30], [1 - 0.5 / WIDTH, 0.5]]
    return points


def test_the_gradient_without_a_scatter_is_the_gradient():
    """What is compiled for TPUs."""
    points = edges()
    cotangent = np.random.default_rng(1).standard_normal((N, P)).astype(np.float32)
    want = _scatter(points, cotangent, HEIGHT, WIDTH)
    got = jax.jit(_spread, static_argnums=(2, 3))(points, cotangent, HEIGHT, WIDTH)
    assert relative(got, want) < 1e-6


def test_reading_patches_is_reading_features():
    """What is compiled for TPUs."""
    features, points = np.random.default_rng(9).standard_normal((HEIGHT, WIDTH, 6)).astype(np.float32), edges()[0]
    got = jax.jit(_gather_patches)(features, points)
    np.testing.assert_allclose(got, _gather_features(jnp.asarray(features), points), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (3, 128), (9, 150)])
def test_the_kernel_reads_maps(height, width):
    """What is compiled for TPUs: more and fewer maps and points than a step takes, and maps wider than a register."""
    rng = np.random.default_rng(6)
    maps = rng.standard_normal((9, height, width)).astype(np.float32)
    points = np.concatenate([rng.uniform(-0.1, 1.1, (9, 530, 2)).astype(np.float32), np.tile(edges()[:1], (9, 1, 1))], 1)
    got = kernel.read(maps, points, interpret=True)
    rounding = 2e-7 * max(height, width)  # of a place in pixels
    np.testing.assert_allclose(got, _gather(maps, points), rtol=0, atol=rounding)


@pytest.mark.parametrize(("height", "width"), [(13, 13), (16, 16), (100, 33), (140, 100)])
def test_the_kernel_reads_packed_masks(height, width):
    rng = np.random.default_rng(7)
    packed = np.packbits(rng.integers(0, 2, (N, height, width)).astype(np.uint8), axis=-1)
    points = np.concatenate([rng.uniform(-0.1, 1.1, (N, 200, 2)).astype(np.float32), edges()], 1)
    got = kernel.read_packed(packed, points, width, interpret=True)
    np.testing.assert_allclose(got, _packed_gather(packed, points, width), rtol=0, atol=2e-7 * max(height, width))


_LONG = [pytest.param(2000, 131, marks=pytest.mark.slow), pytest.param(2000, 1999, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("count", "keep"), [(30, 1), (30, 30), (300, 256), *_LONG])
def test_the_kernel_chooses_the_same_points(count, keep):
    """Ties, zeros of both signs and infinities included."""
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((9, count)).astype(np.float32)
    logits[1], logits[2] = 1.0, np.arange(count) < keep
    logits[3:6] = rng.choice([0.0, -0.0, 1.0, 2.0, np.inf], (3, count))
    candidates = rng.random((9, count, 2)).astype(np.float32)
    want = _of_smallest(jnp.abs(logits), candidates, keep)
    np.testing.assert_array_equal(kernel.of_smallest(jnp.abs(logits), candidates, keep, interpret=True), want)


def test_the_kernels_read_their_own_blocks_alone():
    """In an interpreter of a TPU's memory, which refuses a place outside of a block. Plain JAX clamps an index."""
    rng, strict = np.random.default_rng(10), pltpu.InterpretParams()
    points = rng.random((9, 40, 2)).astype(np.float32)
    maps = rng.standard_normal((9, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(kernel.read(maps, points, interpret=strict), _gather(maps, points), rtol=0, atol=2e-6)
    packed = np.packbits(rng.integers(0, 2, (9, 5, 12)).astype(np.uint8), axis=-1)
    got = kernel.read_packed(packed, points, 12, interpret=strict)
    np.testing.assert_allclose(got, _packed_gather(packed, points, 12), rtol=0, atol=2e-6)


@tpu.needs_libtpu
@pytest.mark.parametrize("n", [20, 160])
def test_tpus_neither_sort_nor_gather_nor_scatter(n):
    """Choosing points, reading maps and packed masks at them and the gradient, at the size of training."""
    program = f"""
from flowseg_jax.ops.points import sample_packed_masks, sample_points, uncertain_points
def loss(maps, masks, candidates, extra):
    chosen = uncertain_points(sample_points(jax.lax.stop_gradient(maps), candidates), candidates, extra, 9408)
    return ((sample_points(maps, chosen) - sample_packed_masks(masks, chosen)) ** 2).sum()
function = jax.grad(loss)
arguments = [array(jnp.float32, {n}, 128, 128), array(jnp.uint8, {n}, 1024, 128)]
arguments += [array(jnp.float32, {n}, count, 2) for count in (37632, 3136)]
"""
    assert tpu.compiled("v5e:2x2", program, ("sort", "gather", "scatter")) == ([0, 0, 0], True)

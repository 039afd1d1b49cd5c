"""Every formulation of multi-scale deformable attention against torch's grid_sample and X-SAM's recorded numbers."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from flowseg_jax.ops import msda as module
from flowseg_jax.ops.msda import IMPLEMENTATIONS

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


def reference(value, locations, weights):
    out, start = 0, 0
    for level, (h, w) in enumerate(SHAPES):
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * H, E, h, w)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).reshape(B * H, Q, K, 2) - 1
        samples = torch.nn.functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (samples * weights[:, :, :, level].transpose(1, 2).reshape(B * H, 1, Q, K)).sum(-1)
        start += h * w
    return out.reshape(B, H, E, Q).permute(0, 3, 1, 2).reshape(B, Q, H * E)


@pytest.mark.parametrize(("impl", "chunk"), [("gather", None), ("gather", 4), ("packed", 4), ("tent", 4), ("auto", None)])
def test_values_and_gradients_match_grid_sample(impl, chunk):
    arrays = inputs()
    cotangent = np.random.default_rng(1).standard_normal((B, Q, H * E)).astype(np.float32)

    @jax.jit
    def run(*arrays):
        out, vjp = jax.vjp(lambda v, p, a: module.msda(v, SHAPES, p, a, impl=impl, chunk=chunk), *arrays)
        return out, vjp(jnp.asarray(cotangent))

    out, gradients = run(*arrays)
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = reference(*leaves)
    expected.backward(torch.tensor(cotangent))
    assert relative(out, expected.detach()) < 1e-5
    for got, leaf in zip(gradients, leaves, strict=True):
        assert relative(got, leaf.grad) < 1e-5


@pytest.mark.parametrize("impl", ALL)
def test_matches_xsam(impl):
    with np.load(GOLDEN) as golden:
        shapes = tuple(map(tuple, golden["msda/shapes_hw"].tolist()))
        out = msda(golden["msda/value"], shapes, golden["msda/locations_xy"], golden["msda/weights"], impl=impl)
        assert relative(out, golden["msda/out"]) < 1e-5


@pytest.mark.parametrize("impl", ALL)
def test_on_pixel_centres_and_far_outside(impl):
    """Centres give the pixel itself; infinite or huge coordinates contribute nothing and break nothing."""
    value = np.arange(1, 13, dtype=np.float32).reshape(1, 12, 1, 1)
    points = [(0.5 / 4, 0.5 / 3), (3.5 / 4, 2.5 / 3), (0.0, 0.0), (1e30, 0.5), (-1e30, -1e30), (0.5, -2.0)]
    locations = np.array(points, np.float32).reshape(1, 6, 1, 1, 1, 2)
    out = msda(value, ((3, 4),), locations, np.ones((1, 6, 1, 1, 1), np.float32), impl=impl)
    np.testing.assert_allclose(np.asarray(out).ravel(), [1, 12, 0.25, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("impl", ALL)
def test_bfloat16_values_keep_float32_coordinates(impl):
    value, locations, weights = inputs()
    rounded = jnp.asarray(value, jnp.bfloat16)
    out = msda(rounded, SHAPES, locations, weights, impl=impl)
    assert out.dtype == jnp.bfloat16
    exact = msda(rounded.astype(jnp.float32), SHAPES, locations, weights, impl=impl)
    assert relative(out.astype(jnp.float32), exact) < 2**-6


def test_large_inputs_are_chunked(monkeypatch):
    """The samples of all queries never exist at once, neither forward nor backward."""
    value, locations, weights = (jnp.asarray(x) for x in inputs())
    locations, weights = (jnp.concatenate([x] * 40, 1) for x in (locations, weights))
    samples = weights.size * 4 * E * 4

    def temporary() -> int:
        step = jax.jit(jax.grad(lambda v, p, a: module.msda(v, SHAPES, p, a, impl="gather").sum(), (0, 1, 2)))
        return step.lower(value, locations, weights).compile().memory_analysis().temp_size_in_bytes

    assert temporary() > samples
    monkeypatch.setattr(module, "CHUNK_BYTES", samples // 10 // B)
    assert temporary() < samples


def test_auto_packs_on_accelerators_and_gathers_rows_on_cpu():
    args = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs()]
    traced = jax.jit(lambda v, p, a: module.msda(v, SHAPES, p, a)).trace(*args)

    def rows(platform: str) -> int:
        """Width of the rows that the program gathers."""
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        sizes = [line.split("slice_sizes = array<i64:")[1].split(">")[0] for line in text.splitlines() if "slice_sizes" in line]
        assert sizes
        return max(int(size.split(",")[-1]) for size in sizes)

    assert rows("cpu") == E and rows("tpu") == rows("cuda") == 4 * E


def test_shapes_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the function's own checks are under test
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        msda(value[:, 1:], SHAPES, locations, weights)
    with pytest.raises(ValueError, match="do not fit"):
        msda(value, SHAPES, locations, weights[..., :1])
    with pytest.raises(ValueError, match="known are"):
        msda(value, SHAPES, locations, weights, impl="magic")

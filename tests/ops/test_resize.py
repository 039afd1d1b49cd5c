"""Resizing against torch's interpolate, single steps and the way back to the original image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from flowseg_jax.ops.resize import apply_matrices, bilinear_matrix, resize, restore_matrices


def interpolate(x, size):
    return torch.nn.functional.interpolate(torch.tensor(x), size=size, mode="bilinear", align_corners=False).numpy()


@pytest.mark.parametrize(
    ("before", "after"),
    [((8, 8), (32, 32)), ((32, 32), (8, 8)), ((7, 12), (19, 5)), ((9, 4), (9, 11)), ((1, 3), (5, 1)), ((24, 24), (427, 640))],
)
def test_matches_torch(before, after):
    x = np.random.default_rng(0).standard_normal((2, 3, *before)).astype(np.float32)
    expected = interpolate(x, after)
    got = jax.jit(resize, static_argnums=1)(x, after)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("before", "after"), [((8, 6), (32, 24)), ((9, 4), (9, 11)), ((24, 24), (7, 50))])
def test_gradient_is_torchs(before, after):
    rng = np.random.default_rng(7)
    x, cotangent = (rng.standard_normal((2, *size)).astype(np.float32) for size in (before, after))
    leaf = torch.tensor(x[None], requires_grad=True)
    resized = torch.nn.functional.interpolate(leaf, size=after, mode="bilinear", align_corners=False)
    (expected,) = torch.autograd.grad(resized, leaf, torch.tensor(cotangent[None]))
    got = jax.jit(jax.grad(lambda x: (resize(x, after) * cotangent).sum()))(x)
    np.testing.assert_allclose(got, expected[0].numpy(), rtol=0, atol=1e-5 * np.abs(expected.numpy()).max())


def test_a_tpu_multiplies_and_a_cpu_reads_rows_where_they_grow():
    for platform, reads in (("cpu", True), ("tpu", False)):
        text = jax.jit(resize, static_argnums=1).trace(jnp.zeros((2, 8, 8)), (32, 32)).lower(lowering_platforms=(platform,))
        assert ("gather" in text.as_text()) == reads


def test_bfloat16_is_resized_in_float32():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, 6, 6)), jnp.bfloat16)
    got = resize(x, (24, 24))
    expected = interpolate(np.asarray(x, np.float32), (24, 24))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float32))


def test_rows_sum_to_one_and_the_cached_matrix_is_read_only():
    matrix = bilinear_matrix(128, 1000)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 2


@pytest.mark.parametrize(
    ("scaled", "original"), [((96, 72), (160, 120)), ((64, 96), (50, 75)), ((96, 96), (96, 96)), ((41, 96), (83, 199))]
)
def test_restoring_equals_upsample_crop_resize(scaled, original):
    x = np.random.default_rng(2).standard_normal((1, 4, 24, 24)).astype(np.float32)
    rows, cols = restore_matrices((24, 24), 96, scaled, original, (200, 208))
    got = np.asarray(apply_matrices(x, rows, cols))
    expected = interpolate(interpolate(x, (96, 96))[..., : scaled[0], : scaled[1]], original)
    assert got.shape == (1, 4, 200, 208)
    np.testing.assert_allclose(got[..., : original[0], : original[1]], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert not got[..., original[0] :, :].any() and not got[..., original[1] :].any()


def test_one_pair_of_matrices_an_image():
    x = np.random.default_rng(3).standard_normal((2, 3, 24, 24)).astype(np.float32)
    pairs = [
        restore_matrices((24, 24), 96, (96, 72), (60, 45), (64, 64)),
        restore_matrices((24, 24), 96, (48, 96), (30, 60), (64, 64)),
    ]
    rows, cols = (np.stack(m)[:, None] for m in zip(*pairs, strict=True))
    got = apply_matrices(x, rows, cols)
    for i, (r, c) in enumerate(pairs):
        np.testing.assert_allclose(got[i], apply_matrices(x[i], r, c), rtol=1e-5, atol=1e-6)


def test_sizes_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the function's own checks are under test
    with pytest.raises(ValueError, match="do not fit"):
        restore_matrices((24, 24), 96, (97, 96), (10, 10), (16, 16))
    with pytest.raises(ValueError, match="positive"):
        bilinear_matrix(0, 4)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 1)])
def test_sizes_are_positive(sizes):
    with pytest.raises(ValueError, match=f"bilinear_matrix: sizes must be positive, got {sizes[0]} -> {sizes[1]}"):
        bilinear_matrix(*sizes)
    assert bilinear_matrix(1, 1).tolist() == [[1.0]]

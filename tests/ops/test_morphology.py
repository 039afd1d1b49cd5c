"""The boundary band against torch's max pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flowseg_jax.ops.morphology import boundary_band


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matches_max_pooling(kernel, dtype):
    prob = jnp.asarray(np.random.default_rng(0).random((2, 3, 11, 8)) ** 8, dtype)
    x = torch.tensor(np.asarray(prob, np.float32))
    pool = torch.nn.MaxPool2d(kernel, stride=1, padding=kernel // 2)  # torch pads a maximum with -inf
    gradient = pool(x) + pool(-x)
    got = jax.jit(boundary_band, static_argnums=(1, 2))(prob, kernel, 0.3)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), (gradient.to(torch.float32) > 0.3).numpy())
    assert kernel == 1 or 0 < np.asarray(got, np.float32).mean() < 1


def test_the_edge_of_the_map_is_no_boundary():
    for value in (0.0, 1.0):
        assert not np.asarray(boundary_band(jnp.full((6, 6), value), 3, 0.1)).any()


def test_a_step_has_a_band_one_pixel_wide_on_either_side():
    prob = np.zeros((4, 8), np.float32)
    prob[:, 4:] = 1
    np.testing.assert_array_equal(boundary_band(prob, 3, 0.1), np.tile([0, 0, 0, 1, 1, 0, 0, 0], (4, 1)))


def test_even_windows_are_refused():
    with pytest.raises(ValueError, match="odd"):
        boundary_band(jnp.zeros((4, 4)), 2, 0.1)


@pytest.mark.parametrize("size", [0, -1, 2])
def test_a_window_has_an_odd_side(size):
    with pytest.raises(ValueError, match=f"boundary_band: kernel_size {size} must be odd"):
        boundary_band(jnp.zeros((3, 3)), size, 0.5)
    assert not boundary_band(jnp.eye(3), 1, 0.5).any()  # of a window of one pixel there is no gradient

"""The kernels that divide maps into windows against the plain form: values and gradients, windows that do not fill the map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax.ops import windows, windows_kernel
from tests.helpers import tpu


@pytest.mark.parametrize(("side", "grid", "dtype"), [(4, 12, "float32"), (14, 24, "bfloat16"), (5, 16, "float32")])
def test_the_kernels_are_the_plain_form(side, grid, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, grid, grid, 256)), dtype)
    expected = windows._plain_split(side, grid, x)
    found = windows_kernel.split(side, grid, x, interpret=True)
    assert found.dtype == x.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(windows_kernel.join(side, grid, expected, interpret=True), x)


@pytest.mark.parametrize("size", [6, 7])
def test_gradients_and_what_was_divided_comes_back(size):
    """The gradients of the plain form, also where zeros fill the last windows; those zeros are counted as constants."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 12, 12, 3)), jnp.float32)
    np.testing.assert_array_equal(windows.join_windows(windows.split_windows(x, size), size, 12), x)
    parts = windows._plain_split(size, 12, x)
    factors = jnp.asarray(rng.standard_normal(parts.shape), jnp.float32)
    of = lambda f: jax.grad(lambda x: (f(x) * factors).sum())(x)  # noqa: E731
    expected = of(lambda x: windows._plain_split(size, 12, x))
    np.testing.assert_array_equal(of(lambda x: windows.split_windows(x, size)), expected)
    back = lambda f: jax.grad(lambda parts: (f(parts) * x).sum())(factors)  # noqa: E731
    expected = back(lambda parts: windows._plain_join(size, 12, parts))
    np.testing.assert_array_equal(back(lambda parts: windows.join_windows(parts, size, 12)), expected)


@tpu.needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernels_compile_for_tpu(topology):
    """Both directions at SAM's size: nothing is padded or transposed outside the kernels."""
    program = """
from flowseg_jax.ops.windows import join_windows, split_windows
arguments = array(jnp.bfloat16, 1, 64, 64, 256), array(jnp.bfloat16, 1, 64, 64, 256)
function = lambda x, y: jax.vjp(lambda x: join_windows(split_windows(x, 14) * 2, 14, 64), x)[1](y)
"""
    assert tpu.compiled(topology, program, ("pad", "transpose", "copy")) == ([0, 0, 0], True)

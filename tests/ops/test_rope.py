"""The kernel that normalises and rotates heads against the plain form: values and gradients, odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from flowseg_jax.models.rope import rope_cos_sin
from flowseg_jax.ops import rope, rope_kernel


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("normed", [True, False])
def test_the_kernel_is_the_plain_form(normed, dtype):
    """Tokens that fill no whole step, and heads in two groups."""
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.standard_normal((2, 150, 12, 128)), dtype) for _ in range(2))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, 128), jnp.float32) if normed else None
    cos, sin = rope_cos_sin(jnp.asarray(rng.integers(0, 900, (2, 150))), 128, 1e4)
    exactly = x.astype(jnp.float32)  # in bfloat16 the plain form's sum over all tokens has hardly two digits
    want, vjp = jax.vjp(lambda x, scale: rope._plain(1e-6, x, scale, cos, sin), exactly, scale)
    got = rope_kernel.forward(1e-6, x, scale, cos, sin, interpret=True)
    gradients = rope_kernel.backward(1e-6, x, scale, cos, sin, cotangent, interpret=True)
    assert got.dtype == gradients[0].dtype == dtype
    exact = dtype == jnp.float32
    for mine, theirs in zip([got, *gradients], [want, *vjp(cotangent.astype(jnp.float32))], strict=True):
        if theirs is not None:
            bound = float(jnp.abs(theirs).max()) * (2e-6 if exact else 2e-2)
            np.testing.assert_allclose(mine.astype(jnp.float32), theirs.astype(jnp.float32), rtol=0, atol=bound)


def test_the_kernel_touches_its_own_block_alone():
    """In an interpreter of a TPU's memory, which refuses a place outside of a block. Plain JAX clamps an index."""
    rng = np.random.default_rng(2)
    x, cotangent = (jnp.asarray(rng.standard_normal((2, 130, 2, 128)), jnp.float32) for _ in range(2))
    arguments = 1e-6, x, jnp.ones(128), *rope_cos_sin(jnp.arange(260).reshape(2, 130), 128, 1e4)
    strict, plain = (
        [rope_kernel.forward(*arguments, interpret=how), *rope_kernel.backward(*arguments, cotangent, interpret=how)]
        for how in (pltpu.InterpretParams(), True)
    )
    for mine, theirs in zip(strict, plain, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * float(jnp.abs(theirs).max()))


def test_where_there_is_no_kernel():
    """The same values to the bit, and the gradients of the plain form."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, 256, 2, 128)), jnp.float32)
    cos, sin = rope_cos_sin(jnp.arange(256)[None], 128, 1e4)
    scale = jnp.ones(128)
    of = lambda f: jax.jit(lambda x, s: (f(x, s), jax.grad(lambda x, s: (f(x, s) ** 2 * x).sum(), (0, 1))(x, s)))(x, scale)  # noqa: E731
    got, gradients = of(lambda x, s: rope.norm_rope(x, s, cos, sin, eps=1e-6))
    want, expected = of(lambda x, s: rope._plain(1e-6, x, s, cos, sin))
    np.testing.assert_array_equal(got, want)
    for mine, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * float(jnp.abs(theirs).max()))

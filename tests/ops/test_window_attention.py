"""SAM's kernel of windows against the plain form: values and all gradients, sides that fill no register."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from flowseg_jax.ops.attention import decomposed_rel_pos_attention, grid, rel_pos_attention, window
from flowseg_jax.ops.portable import without_kernels


def operands(side: int, heads: int):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, side**2, heads * 64)), jnp.float32) for _ in range(4)]
    tables = [jnp.asarray(rng.standard_normal((2 * side - 1, 64)) * 0.3, jnp.float32) for _ in range(2)]
    return *arrays[:3], *tables, arrays[3]


@pytest.mark.parametrize(("side", "heads"), [(14, 2), (9, 4), (16, 2)])
def test_the_kernel_is_the_plain_form(side, heads):
    *inputs, cotangent = operands(side, heads)

    def plain(q, k, v, rows, columns):
        with without_kernels():
            return rel_pos_attention(q, k, v, rows, columns, heads)

    want, pull = jax.vjp(jax.jit(plain), *inputs)
    got, gradients = window.forward(*inputs, interpret=True), window.backward(*inputs, cotangent, interpret=True)
    for mine, theirs in zip([got, *gradients], [want, *pull(cotangent)], strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=5e-6 * float(jnp.abs(theirs).max()))


def test_where_there_is_no_kernel():
    """The same values to the bit, and the gradients of the plain form."""
    *inputs, cotangent = operands(8, 2)

    def plain(q, k, v, rows, columns):
        scaled, *positions = grid.rel_pos_operands(2, q, rows, columns)
        k, v = (x.reshape(2, 64, 2, 64) for x in (k, v))
        return decomposed_rel_pos_attention(scaled, k, v, *positions).reshape(q.shape)

    want, pull = jax.vjp(jax.jit(plain), *inputs)
    got, pull_mine = jax.vjp(jax.jit(lambda *x: rel_pos_attention(*x, 2)), *inputs)
    np.testing.assert_array_equal(got, want)
    for mine, theirs in zip(pull_mine(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=5e-6 * float(jnp.abs(theirs).max()))


def test_in_bfloat16_the_kernel_is_as_exact_as_the_plain_form():
    *inputs, cotangent = operands(14, 2)
    exact = [window.forward(*inputs, interpret=True), *window.backward(*inputs, cotangent, interpret=True)]
    inputs[:3] = (x.astype(jnp.bfloat16) for x in inputs[:3])
    got = [window.forward(*inputs, interpret=True)]
    got += window.backward(*inputs, cotangent.astype(jnp.bfloat16), interpret=True)
    for mine, theirs in zip(got, exact, strict=True):
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol=0, atol=3e-2 * float(jnp.abs(theirs).max()))


def test_tokens_beyond_a_window_do_not_count():
    """In an interpreter of a TPU's memory, where what no block has written is NaN."""
    *inputs, cotangent = operands(9, 2)
    got, gradients = (
        run(*arguments, interpret=pltpu.InterpretParams())
        for run, arguments in ((window.forward, inputs), (window.backward, [*inputs, cotangent]))
    )
    want = [window.forward(*inputs, interpret=True), *window.backward(*inputs, cotangent, interpret=True)]
    for mine, theirs in zip([got, *gradients], want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * float(jnp.abs(theirs).max()))

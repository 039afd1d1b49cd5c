"""Attention against torch's scaled_dot_product_attention, values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from flowseg_jax.ops import attention as module
from flowseg_jax.ops.attention import attention

B, S, T, H, E, F = 2, 7, 9, 4, 8, 6


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def inputs(kv_heads: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) for s in ((B, S, H, E), (B, T, kv_heads, E), (B, T, kv_heads, F))]


@functools.partial(jax.jit, static_argnames=("scale", "chunk"))
def run(q, k, v, cotangent, mask=None, scale=None, chunk=None):
    out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, mask=mask, scale=scale, chunk=chunk), q, k, v)
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
    monkeypatch.setattr(module, "WHOLE_BYTES", 8 * 2**20 - 1)  # of the whole batch: one element's scores are fewer
    monkeypatch.setattr(module, "CHUNK_BYTES", 2**20)
    assert temporary() < 8 * 2**20


@pytest.mark.parametrize("bad", ["heads", "mask", "keys"])
def test_shapes_that_do_not_fit_are_refused(monkeypatch, bad):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the function's own checks are under test
    q, k, v = inputs(2)
    with pytest.raises(ValueError, match="do not fit|does not broadcast"):
        if bad == "heads":
            attention(q[:, :, :3], k, v)
        elif bad == "keys":
            attention(q, k[:, 1:], v)
        else:
            attention(q, k, v, mask=jnp.ones((B, 1, S, T + 1), bool))

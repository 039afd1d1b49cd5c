"""What products are made of: float32 of all digits, half precision as it is, float32 sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax.losses import LossConfig, match_cost
from flowseg_jax.models.mask_decoder import cosine_logits, mask_logits
from flowseg_jax.ops.dot import dot, einsum, matmul_f32
from flowseg_jax.ops.portable import traced_for
from flowseg_jax.ops.vocabulary import ShardedEmbedding, cross_entropy

PRODUCTS = {
    "dot": (dot, (3, 4), (4, 5)),
    "product": (lambda x, y: matmul_f32(x, y, 1, 1), (3, 4), (5, 4)),
    "einsum": (lambda x, y: einsum("ij,kj->ik", x, y), (3, 4), (5, 4)),
    "mask_logits": (mask_logits, (1, 3, 4), (1, 2, 2, 4)),
    "cosine_logits": (lambda x, y: cosine_logits(x, y, jnp.ones((1, 5), bool), jnp.ones(1), 9.0), (1, 3, 4), (1, 5, 4)),
    "match_cost": (
        lambda x, y: match_cost(x[:, :2], jnp.zeros(5, jnp.int32), x, y, LossConfig()), (3, 4), (5, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_tpu_does_not_round_float32(name):
    function, *shapes = PRODUCTS[name]
    with jax.default_matmul_precision("default"):  # as users run, not as tests do
        lowered = jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
        text = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert "dot_general" in text
    assert "DEFAULT" not in text and "HIGHEST" in text


def test_half_precision_is_summed_in_float32_without_more_work():
    x = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
    with jax.default_matmul_precision("default"):
        text = jax.jit(lambda x, y: matmul_f32(x, y, 1, 1)).trace(x, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "HIGHEST" not in text and "-> tensor<3x3xf32>" in text


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4), (2, 4)])
def test_a_single_row_is_multiplied_as_one_of_several(rng, shape):
    """With its gradients; and it is not alone in the compiled product (`dot`)."""
    x = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(4, 5)), jnp.bfloat16)
    beside = jnp.concatenate([x.reshape(-1, 4), jnp.ones((3, 4), x.dtype)])
    value, pull = jax.vjp(dot, x, w)
    of_several, pull_several = jax.vjp(lambda x, w: dot(x, w)[:-3].reshape(*shape[:-1], 5), beside, w)
    assert value.shape == (*shape[:-1], 5) and value.dtype == x.dtype
    np.testing.assert_array_equal(value, of_several)
    cotangent = jnp.ones_like(value)
    (dx, dw), (dx_several, dw_several) = pull(cotangent), pull_several(cotangent)
    np.testing.assert_array_equal(dx, dx_several[:-3].reshape(shape))
    np.testing.assert_array_equal(dw, dw_several)
    products = jax.jit(dot).lower(x, w).as_text().count("tensor<1x4xbf16>, tensor<4x5xbf16>")
    assert products == 0


def test_the_gradient_of_the_vocabulary_does_not_depend_on_the_chunk(rng):
    """In bfloat16 the gradients of many chunks, added up in it, would lose several times as much as one."""
    hidden, rows = (jnp.asarray(rng.normal(size=(n, 16)), jnp.float32) for n in (512, 50))
    labels = jnp.asarray(rng.integers(0, 50, 512))

    def gradient(dtype, chunk: int) -> np.ndarray:
        loss = lambda rows: cross_entropy(hidden.astype(dtype), ShardedEmbedding.whole(rows.astype(dtype)), labels, chunk).sum()  # noqa: E731
        return np.asarray(jax.grad(loss)(rows))

    exact = gradient(jnp.float32, 512)
    whole, parts = (np.linalg.norm(gradient(jnp.bfloat16, chunk) - exact) for chunk in (512, 8))
    assert parts < 1.5 * whole


def test_for_a_cpu_no_operand_of_a_gradient_is_transposed(rng):
    """The same bits, from products of matrices alone."""
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 4), (4, 5)))

    def gradients(x, w):
        return jax.grad(lambda x, w: jnp.sin(dot(x, w)).sum(), argnums=(0, 1))(x, w)

    on_cpu = jax.jit(traced_for("cpu")(gradients))
    jax.tree.map(np.testing.assert_array_equal, on_cpu(x, w), jax.jit(gradients)(x, w))
    for function, contracted in (
        (on_cpu, "contracting_dims = [0] x [0]"),
        (jax.jit(gradients), "contracting_dims = [0, 1] x [0, 1]"),
    ):
        assert contracted in function.lower(x, w).as_text()

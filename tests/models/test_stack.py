"""What the rematerialisation policies compute again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax.models.stack import remat
from flowseg_jax.ops.attention import attention, decomposed_rel_pos_attention
from flowseg_jax.ops.msda import msda

SAMPLES = jnp.full((1, 4, 1, 1, 2, 2), 0.4), jnp.ones((1, 4, 1, 1, 2))
CASES = {
    "attention": lambda x: attention(x, x, x, impl="xla"),
    "relative positions": lambda x: decomposed_rel_pos_attention(x, x, x, x[..., :2], x[..., :2]),
    "deformable attention": lambda x: msda(x, ((2, 2),), *SAMPLES, impl="dense"),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_is_computed_once_where_its_results_are_kept(case):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 1, 4)), jnp.float32)
    products, gradients = {}, {}
    for policy in ("none", "attention", "full"):
        layer = remat(lambda x: jnp.sin(CASES[case](jnp.sin(x))), policy)
        gradient = jax.grad(lambda x, layer=layer: layer(x).sum())
        products[policy] = str(jax.make_jaxpr(gradient)(x)).count("dot_general[")
        gradients[policy] = jax.jit(gradient)(x)
    assert products["none"] == products["attention"] < products["full"]
    for policy in ("attention", "full"):
        np.testing.assert_allclose(gradients[policy], gradients["none"], rtol=0, atol=1e-6)

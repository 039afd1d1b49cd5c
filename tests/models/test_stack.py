"""What the rematerialisation policies compute again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowseg_jax.models.layers import Linear
from flowseg_jax.models.stack import remat, scan_blocks, scan_layers, stack_layers
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


@pytest.mark.parametrize("part", [(0, 2), (1, 3), (2, None)])
def test_a_part_of_a_stack_is_those_layers_and_no_copy_of_them(part):
    """But where a gradient is taken: there each layer's own is as large as the layer, not as the stack."""
    graphdef, params = nnx.split(stack_layers(lambda rngs: Linear(3, 3, rngs=rngs), 3, nnx.Rngs(0)))
    params, x = nnx.to_pure_dict(params), jnp.arange(6.0).reshape(2, 3)

    def run(params, x):
        layers = nnx.merge(graphdef, params)
        return scan_layers(layers, lambda layer, x, _: (jnp.sin(layer(x)),) * 2, x, start=part[0], stop=part[1])

    def plain(params, x):
        found = [x]
        for kernel, bias in zip(params["kernel"][slice(*part)], params["bias"][slice(*part)], strict=True):
            found.append(jnp.sin(found[-1] @ kernel + bias))
        return found[-1], jnp.stack(found[1:])

    for function in (lambda f: f, lambda f: jax.grad(lambda *x: sum(jnp.sum(y * y) for y in f(*x)), (0, 1))):
        found, expected = (jax.tree.leaves(jax.jit(function(f))(params, x)) for f in (run, plain))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert " slice[" not in str(jax.make_jaxpr(run)(params, x))


def test_blocks_of_two_stacks_are_their_layers_in_turn_and_no_copy_of_them():
    """Two blocks: two layers of the one stack, then one of the other. Where a gradient is taken, as above."""
    stacks = [stack_layers(lambda rngs: Linear(3, 3, rngs=rngs), count, nnx.Rngs(count)) for count in (4, 2)]
    graphdefs, params = zip(*map(nnx.split, stacks), strict=True)
    params, x = tuple(map(nnx.to_pure_dict, params)), jnp.arange(6.0).reshape(2, 3)

    def run(params, x):
        layers = [nnx.merge(*both) for both in zip(graphdefs, params, strict=True)]
        return scan_blocks(layers, lambda layer, x: jnp.sin(layer(x)), x, 2)

    def plain(params, x):
        found = [x]
        for stack, i in ((0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1)):
            found.append(jnp.sin(found[-1] @ params[stack]["kernel"][i] + params[stack]["bias"][i]))
        return jnp.stack([found[2], found[5]]), jnp.stack([found[3], found[6]])

    for function in (lambda f: f, lambda f: jax.grad(lambda *x: sum(jnp.sum(y * y) for y in f(*x)), (0, 1))):
        found, expected = (jax.tree.leaves(jax.jit(function(f))(params, x)) for f in (run, plain))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert " reshape[" not in str(jax.make_jaxpr(run)(params, x))

"""SR and CR against the paper's equations written out, in NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowseg_jax.models.semantic_flow import ConditionRefinement, SemanticFlowConfig, SemanticRefinement

WIDTH, HEADS = 12, 3


def attend(module, query, key, value, allowed):
    """Multi-head attention in float64; `allowed` [P, S, T]."""
    f = lambda layer, x: x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)  # noqa: E731
    split = lambda x: x.reshape(*x.shape[:2], HEADS, -1)  # noqa: E731
    q, k, v = split(f(module.q_proj, query)), split(f(module.k_proj, key)), split(f(module.v_proj, value))
    logits = np.einsum("pshe,pthe->phst", q, k) / np.sqrt(WIDTH / HEADS)
    weights = np.exp(np.where(allowed[:, None], logits, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    return f(module.out_proj, np.einsum("phst,pthe->pshe", weights, v).reshape(query.shape[0], -1, WIDTH))


def randomise(module, rng):
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            node[...] = jnp.asarray(rng.normal(size=node.shape), jnp.float32)


@pytest.fixture
def arrays(rng):
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    own = np.array([[True, False, True, True], [False, True, False, True]])
    return draw(2, 5, WIDTH), draw(5, WIDTH), draw(2, 4, WIDTH), own


@pytest.mark.parametrize("norm", ["post", "residual"])
def test_sr_is_the_papers_equation(rng, arrays, norm):
    module = SemanticRefinement(WIDTH, HEADS, SemanticFlowConfig(norm=norm), rngs=nnx.Rngs(0))
    randomise(module, rng)
    q_vis, position, conditions, own = arrays
    q_sem = q_vis + attend(module.attn, q_vis + position, conditions, conditions, np.repeat(own[:, None], 5, 1))
    if norm == "post":
        q_sem = (q_sem - q_sem.mean(-1, keepdims=True)) / np.sqrt(q_sem.var(-1, keepdims=True) + 1e-5)
        q_sem = q_sem * np.asarray(module.norm.scale[...]) + np.asarray(module.norm.bias[...])
    joined = np.concatenate([q_vis, q_sem], -1)
    gate = 1 / (1 + np.exp(-(joined @ np.asarray(module.gate.kernel[...], np.float64) + np.asarray(module.gate.bias[...]))))
    expected = gate * q_vis + (1 - gate) * q_sem
    found = np.asarray(module(*map(jnp.asarray, arrays)))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_sr_leaves_a_pass_without_conditions_alone(arrays):
    module = SemanticRefinement(WIDTH, HEADS, SemanticFlowConfig(), rngs=nnx.Rngs(0))
    q_vis, position, conditions, own = map(jnp.asarray, arrays)
    out = module(q_vis, position, conditions, own.at[1].set(False))
    np.testing.assert_array_equal(np.asarray(out[1]), np.asarray(q_vis[1]))
    assert np.abs(np.asarray(out[0] - q_vis[0])).max() > 0.1


def test_cr_refines_the_rows_it_is_told_to(rng, arrays):
    module = ConditionRefinement(WIDTH, HEADS, SemanticFlowConfig(), rngs=nnx.Rngs(0))
    queries, _, conditions, rows = arrays
    same = module(jnp.asarray(conditions), jnp.asarray(queries), jnp.asarray(rows))
    np.testing.assert_array_equal(np.asarray(same), conditions)  # starts at zero
    randomise(module, rng)
    refined = np.asarray(module(jnp.asarray(conditions), jnp.asarray(queries), jnp.asarray(rows)))
    expected = conditions + attend(module.attn, conditions, queries, queries, np.ones((2, 4, 5), bool))
    np.testing.assert_allclose(refined[rows], expected[rows], atol=2e-5)
    np.testing.assert_array_equal(refined[~rows], conditions[~rows])


def test_the_gate_starts_where_it_is_told(arrays):
    """With zero gate weights the bias alone decides: a large one keeps vision."""
    module = SemanticRefinement(WIDTH, HEADS, SemanticFlowConfig(gate_bias=30.0), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.asarray(module(*map(jnp.asarray, arrays))), arrays[0], atol=1e-6)


@pytest.mark.parametrize("change", [{"mode": "both"}, {"norm": "pre"}])
def test_unknown_switches_are_refused(change):
    with pytest.raises(ValueError, match="choose"):
        SemanticFlowConfig(**change)

"""The matcher against SciPy's linear_sum_assignment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from flowseg_jax.ops.matcher import LIMIT, batched_hungarian, hungarian

M, Q = 6, 9
solve = jax.jit(batched_hungarian)


def check(cost, valid, got, rtol=1e-6):
    """`got` must be a proper assignment of the valid targets whose total cost is SciPy's."""
    clean = np.clip(np.nan_to_num(np.asarray(cost, np.float64), nan=0.0, posinf=LIMIT, neginf=-LIMIT), -LIMIT, LIMIT)
    for c, v, g in zip(clean.reshape(-1, M, Q), valid.reshape(-1, M), np.asarray(got).reshape(-1, M), strict=True):
        assert (g[~v] == -1).all()
        assert len(set(g[v])) == v.sum() and ((g[v] >= 0) & (g[v] < Q)).all()
        rows, columns = linear_sum_assignment(c[v])
        best = c[v][rows, columns].sum()
        assert abs(c[v, g[v]].sum() - best) <= rtol * np.abs(c[v]).max(initial=1.0)


def problems(kind: str, rng: np.random.Generator) -> np.ndarray:
    shape = (64, M, Q)
    cost = rng.standard_normal(shape).astype(np.float32) * 5
    if kind == "ties":
        cost = rng.integers(0, 3, shape).astype(np.float32)
    elif kind == "duplicate rows":
        cost[:, 1::2] = cost[:, ::2]
    elif kind == "constant":
        cost[:] = 2.5
    elif kind == "large":
        cost *= 1e4
    elif kind == "offset":  # differences far below the precision of bfloat16
        cost += 1e3
    elif kind == "nan":
        cost[rng.random(shape) < 0.2] = np.nan
    elif kind == "product":  # every target wants the same queries: the longest augmenting paths
        cost = np.outer(np.arange(1, M + 1), np.arange(1, Q + 1)).astype(np.float32)[None] * rng.random((64, 1, 1), np.float32)
    elif kind == "infinite":
        cost[rng.random(shape) < 0.2] = np.inf
        cost[rng.random(shape) < 0.1] = -np.inf
        cost[rng.random(shape) < 0.1] = np.nan
        cost[:, 2] = np.inf
    return cost


@pytest.mark.parametrize(
    "kind", ["random", "ties", "duplicate rows", "constant", "large", "offset", "product", "nan", "infinite"]
)
def test_is_optimal(kind):
    rng = np.random.default_rng(0)
    cost = problems(kind, rng)
    valid = rng.random(cost.shape[:2]) < 0.6
    valid[0], valid[1] = True, False
    check(cost, valid, solve(cost, valid))


def test_unique_optimum_is_scipys():
    rng = np.random.default_rng(1)
    cost = rng.standard_normal((64, M, Q)).astype(np.float32)
    got = np.asarray(solve(cost, np.ones((64, M), bool)))
    for c, g in zip(cost, got, strict=True):
        np.testing.assert_array_equal(g, linear_sum_assignment(c)[1])


def test_one_infinite_row_leaves_the_others_optimal():
    cost = np.random.default_rng(2).standard_normal((1, M, Q)).astype(np.float32)
    cost[0, 3] = np.inf
    got = np.asarray(solve(cost, np.ones((1, M), bool)))[0]
    others = np.arange(M) != 3
    np.testing.assert_array_equal(got[others], linear_sum_assignment(cost[0, others])[1])


def test_as_many_targets_as_queries():
    cost = np.random.default_rng(3).standard_normal((12, 12)).astype(np.float32)
    got = np.asarray(jax.jit(hungarian)(cost, np.ones(12, bool)))
    np.testing.assert_array_equal(got, linear_sum_assignment(cost)[1])


def test_bfloat16_costs_are_solved_in_float32():
    cost = jnp.asarray(np.random.default_rng(4).standard_normal((8, M, Q)), jnp.bfloat16)
    valid = np.ones((8, M), bool)
    check(cost.astype(jnp.float32), valid, batched_hungarian(cost, valid))


def test_padding_does_not_change_the_assignment():
    rng = np.random.default_rng(5)
    cost = rng.standard_normal((3, Q)).astype(np.float32)
    padded = np.full((M, Q), np.nan, np.float32)
    rows = [1, 2, 5]
    padded[rows] = cost
    valid = np.isin(np.arange(M), rows)
    got = np.asarray(hungarian(padded, valid))
    np.testing.assert_array_equal(got[rows], hungarian(cost, np.ones(3, bool)))


def test_leading_axes_and_gradient():
    cost = np.random.default_rng(6).standard_normal((2, 3, M, Q)).astype(np.float32)
    valid = np.ones((2, 3, M), bool)
    got = batched_hungarian(cost, valid)
    assert got.shape == (2, 3, M) and got.dtype == jnp.int32
    check(cost, valid, got)

    def picked(cost):
        return jnp.take_along_axis(cost, batched_hungarian(cost, valid)[..., None], -1).sum()

    gradient = np.asarray(jax.grad(picked)(cost))
    np.testing.assert_array_equal(gradient.sum(-1), np.ones((2, 3, M)))


def test_more_targets_than_queries_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the function's own checks are under test
    with pytest.raises(ValueError, match="at least as many queries"):
        hungarian(jnp.zeros((3, 2)), jnp.ones(3, bool))


def test_no_collective_inside_the_loops_under_shard_map():
    """On a mesh of two, plain jit synchronises the devices inside the loops; under shard_map nothing does."""
    script = """
import re
import jax, jax.numpy as jnp
from flowseg_jax.ops.matcher import batched_hungarian
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
spec = jax.P("data")
mapped = jax.shard_map(batched_hungarian, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
sharding = jax.sharding.NamedSharding(mesh, spec)
args = [jax.ShapeDtypeStruct(s, t, sharding=sharding) for s, t in (((4, 6, 9), jnp.float32), ((4, 6), bool))]
for f in (batched_hungarian, mapped):
    text = jax.jit(f).lower(*args).compile().as_text()
    collectives = re.findall(r"(?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?[(]", text)
    print(len(collectives), text.count(" while("))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | flags | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    plain, mapped = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert plain[0] > 0
    assert mapped[0] == 0 and mapped[1] == 4  # over problems, waiting targets, steps of a search, and a path back

"""The vocabulary in one piece and divided among devices: the same rows, losses and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from flowseg_jax.ops import vocabulary
from flowseg_jax.ops.collectives import SHARD_AXIS, all_gather_2d, reduce_scatter_2d, squarest_grid
from flowseg_jax.ops.vocabulary import ShardedEmbedding, cross_entropy, embedding_lookup

WORDS, WIDTH, TOKENS = 22, 8, 3  # 22 words do not divide by 4 devices


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), (SHARD_AXIS,), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))


def everywhere(mesh, function, *specs, out):
    parts = tuple(PartitionSpec(*spec) for spec in specs)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=parts, out_specs=PartitionSpec(*out), check_vma=False))


def test_factors_are_the_squarest_grid():
    assert [squarest_grid(n) for n in (1, 2, 4, 8, 16, 24, 7)] == [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 6), (1, 7)]


def test_gather_puts_the_parts_in_order_and_scatter_sum_is_its_transpose(mesh, rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    weights = rng.normal(size=(4, 8, 3)).astype(np.float32)  # what each device makes of the whole

    def local(x, weights):
        whole, back = jax.vjp(lambda x: all_gather_2d(x, -2), x)
        return whole[None], back(weights[0])[0]

    whole, gradient = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(SHARD_AXIS), PartitionSpec(SHARD_AXIS)),
            out_specs=(PartitionSpec(SHARD_AXIS), PartitionSpec(SHARD_AXIS)),
            check_vma=False,
        )
    )(x, weights)
    for seen in whole:
        assert np.array_equal(seen, x)
    np.testing.assert_allclose(gradient, weights.sum(0), rtol=1e-5, atol=1e-6)
    summed = everywhere(mesh, lambda w: reduce_scatter_2d(w[0], 0), (SHARD_AXIS,), out=(SHARD_AXIS,))(weights)
    np.testing.assert_allclose(summed, weights.sum(0), rtol=1e-5, atol=1e-6)


def test_a_divided_table_gives_the_rows_and_gradients_of_the_whole(mesh, rng):
    table = rng.normal(size=(WORDS, WIDTH)).astype(np.float32)
    tokens = rng.integers(0, WORDS, (4, TOKENS))
    tokens[0, 0], tokens[3, 2] = WORDS - 1, -200
    probe = rng.normal(size=(4, TOKENS, WIDTH)).astype(np.float32)

    def local(table, tokens, probe):
        rows, back = jax.vjp(lambda table: embedding_lookup(ShardedEmbedding.from_fsdp_shard(table), tokens), table)
        return rows, back(probe)[0]

    split = PartitionSpec(SHARD_AXIS), PartitionSpec(None, SHARD_AXIS)
    rows, gradient = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(split[1], split[0], split[0]), out_specs=split, check_vma=False)
    )(table, tokens, probe)
    expected, back = jax.vjp(lambda table: embedding_lookup(ShardedEmbedding.whole(table), tokens), jnp.asarray(table))
    assert np.array_equal(rows, expected)
    np.testing.assert_allclose(gradient, back(probe)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("chunk", "gathered"), [(2, 1 << 28), (64, 1 << 28), (64, 4 * 2 * WIDTH * 4)])
def test_a_divided_table_gives_the_loss_and_gradients_of_the_whole(mesh, rng, monkeypatch, chunk, gathered):
    monkeypatch.setattr(vocabulary, "GATHERED_BYTES", gathered)  # the last: two tokens of each device, so two rounds for three
    monkeypatch.setattr(vocabulary, "TILE", 2)
    table = rng.normal(size=(WORDS, WIDTH)).astype(np.float32)
    hidden = 2 * rng.normal(size=(4 * TOKENS, WIDTH)).astype(np.float32)
    labels = rng.integers(0, WORDS, 4 * TOKENS)
    labels[:2] = WORDS - 1, 0
    scale = rng.normal(size=4 * TOKENS).astype(np.float32)

    def loss(table, hidden, labels):
        return cross_entropy(hidden, table, labels, chunk)

    def local(table, hidden, labels, scale):
        losses, back = jax.vjp(lambda t, h: loss(ShardedEmbedding.from_fsdp_shard(t), h, labels), table, hidden)
        return losses, *back(scale)

    rows, columns = PartitionSpec(SHARD_AXIS), PartitionSpec(None, SHARD_AXIS)
    found = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(columns, rows, rows, rows), out_specs=(rows, columns, rows), check_vma=False)
    )(table, hidden, labels, scale)
    p = np.exp((hidden @ table.T).astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    wrong = scale[:, None] * (p - np.eye(WORDS)[labels])
    expected = -np.log(p[np.arange(len(labels)), labels]), wrong.T @ hidden, wrong @ table
    whole, back = jax.vjp(lambda t, h: loss(ShardedEmbedding.whole(t), h, labels), jnp.asarray(table), jnp.asarray(hidden))
    for divided, one, formula in zip(found, (whole, *back(scale)), expected, strict=True):
        np.testing.assert_allclose(one, formula, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(divided, formula, rtol=2e-5, atol=2e-5)

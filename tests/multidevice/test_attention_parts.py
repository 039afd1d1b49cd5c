"""Kernels along mesh axes that are left to the compiler: they run on the parts that devices have, and give the same."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from flowseg_jax.ops.attention import attention, blocks, causal_mask, flash_forward
from flowseg_jax.ops.msda import kernel, msda


@pytest.mark.parametrize(
    ("batch", "groups", "manual"), [(2, 2, ()), (2, 1, ()), (3, 2, ()), (2, 2, ("fsdp",)), (2, 1, ("fsdp",))]
)
def test_flash_on_the_parts_of_each_device(monkeypatch, rng, manual, batch, groups):
    """Heads over `tensor`, images over `fsdp`, or whole where they do not divide: one key/value head, three images."""
    monkeypatch.setattr(blocks, "BLOCKS", (128,))
    seen = []
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(flash_forward, "run", lambda *x, run=flash_forward.run: seen.append(x[1].shape) or run(*x))
    q, k, v = (jnp.asarray(rng.normal(size=(batch, 8, heads, 4)), jnp.float32) for heads in (4, groups, groups))
    ids = jnp.zeros((batch, 8), jnp.int32)

    def run(q, k, v, ids, impl="flash"):
        out, back = jax.vjp(lambda *x: attention(*x, mask=causal_mask(ids, ids), impl=impl), q, k, v)
        return out, *back(jnp.cos(out))

    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("fsdp")
    whole = (
        jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=set(manual), check_vma=False) if manual else run
    )
    with jax.set_mesh(mesh):
        found = jax.jit(whole)(q, k, v, ids)
    assert seen[0] == (batch // 2 if batch == 2 else 3, 8, 4 // groups, 4)
    for x, y in zip(found, run(q, k, v, ids, "xla"), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "part"), [(4, 2), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_deformable_attention_on_the_parts_of_each_device(monkeypatch, rng, heads, part):
    """Heads over `tensor`, or whole where they do not divide, beside an axis that the program takes for itself."""
    seen, shapes = [], ((4, 5),)
    monkeypatch.setattr(
        kernel, "_lanes_of_values", lambda x, *y, run=kernel._lanes_of_values, **z: seen.append(x.shape) or run(x, *y, **z)
    )
    value = jnp.asarray(rng.normal(size=(2, 20, heads, 4)), jnp.float32)
    locations = jnp.asarray(rng.uniform(size=(2, 7, heads, 1, 2, 2)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=(2, 7, heads, 1, 2)), jnp.float32)

    def run(*arrays, impl="pallas"):
        out, back = jax.vjp(lambda value, *rest: msda(value, shapes, *rest, impl=impl), *arrays)
        return out, *back(jnp.cos(out))

    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("fsdp")
    whole = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"fsdp"}, check_vma=False)
    with jax.set_mesh(mesh):
        found = jax.jit(whole)(value, locations, weights)
    assert set(seen) == {(1, 20, part, 4)}
    for x, y in zip(found, run(value, locations, weights, impl="dense"), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)

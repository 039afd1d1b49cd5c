"""Adapters on several devices: divided where the weight beside them is, and the same training."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flowseg_jax import sharding
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.training.lora import base_digests, is_adapter
from flowseg_jax.training.program import TrainProgram, model_params
from tests.helpers import encoders


def trained(frozen_dtype: str = "float32", **mesh: int):
    """(program, state after two steps, their metrics), with dropout and an average."""
    config = encoders.config(images=4, **mesh)
    config.optimizer.frozen_dtype = frozen_dtype
    config.lora.update(targets=(r"(llm|siglip)/layers/.*", r"sam/.*_layers/mlp/lin2"), rank=2, dropout=0.25)
    config.ema.decay = 0.9
    with encoders.only_encoders():
        program = TrainProgram.build(config, jax.devices()[: int(np.prod([*mesh.values()]))])
    return program, *encoders.go_on(program, encoders.start(program), 2)


@pytest.mark.slow  # two programs; where adapters lie is in tests/training/test_lora.py
def test_the_same_training_with_divided_adapters(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 256)
    program, state, seen = trained(data=1, fsdp=2)
    place = {name: tuple(x.sharding.spec) for name, x in flatten_params(state.trainable).items()}
    assert place["llm/layers/self_attn/q_proj/lora/a"] == (None, "fsdp", None)  # as its weight, however small it is
    assert place["llm/layers/self_attn/q_proj/lora/b"] == (None, None, "fsdp")
    assert {name: tuple(x.sharding.spec) for name, x in flatten_params(state.ema).items()} == place
    one, alone, expected = trained(data=1)
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for tree, other in jax.device_get(((state.trainable, alone.trainable), (state.ema, alone.ema))):
        for (name, x), y in zip(flatten_params(tree).items(), flatten_params(other).values(), strict=True):
            assert not is_adapter(name) or np.abs(x - y).max() <= 1e-4 * np.abs(y).max(), name
    assert base_digests(state.frozen) == base_digests(alone.frozen)
    merged = [flatten_params(jax.device_get(model_params(p.run_config, s))) for p, s in ((program, state), (one, alone))]
    assert all(np.abs(x - merged[1][name]).max() <= 1e-4 for name, x in merged[0].items())


@pytest.mark.slow
def test_an_int8_base_is_divided_and_trains_the_same(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 256)
    _, state, seen = trained("int8", data=1, fsdp=2)
    base = flatten_params(state.frozen)
    kernel, scale = (base[f"llm/layers/self_attn/q_proj/{name}"] for name in ("kernel", "kernel_scale"))
    assert kernel.dtype == np.int8 and tuple(kernel.sharding.spec) == (None, "fsdp", None)
    assert scale.is_fully_replicated
    _, _, expected = trained("int8", data=1)
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)

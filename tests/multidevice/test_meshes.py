"""One program on any mesh: the same losses and parameters, everything divided where the rules say, no hidden exchange."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flowseg_jax import sharding
from flowseg_jax.aot import hlo
from flowseg_jax.checkpoints.local import LocalCheckpoints
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.training import program as module
from flowseg_jax.training.program import TrainProgram
from tests.helpers import small

AXES = ("data", "fsdp", "tensor")
WHOLE, LEAN = small.config(negatives_group_size=4), small.lean(negatives_group_size=4)


@pytest.fixture(autouse=True, scope="module")
def _setting():
    """Small parameters are divided too, and an optimizer shows gradients as they are: Adam would hide their scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 256)
        patch.setattr(module, "make_optimizer", lambda *_: optax.sgd(1e-3, momentum=0.5))
        yield


@functools.cache
def trained(cfg, mesh: tuple[int, ...], accumulate: int = 1):
    """(program, text of the compiled step, [metrics of two steps], parameters after them)."""
    batch = small.batch(cfg, images=8)
    slices = 2 if mesh[0] == 2 else 0  # of simulated slices, the first half of the devices and the second
    config = small.experiment(cfg, batch, **dict(zip(AXES, mesh, strict=True)), slices=slices)
    config.optimizer.grad_accum_steps = accumulate
    program = TrainProgram.build(config, jax.devices()[: int(np.prod(mesh))])
    state = small.start(program, small.params(cfg))
    order = program.partition.rows()
    batch = program.to_device(jax.tree.map(lambda x: np.asarray(x)[order], batch))
    step = program.step.lower(program.state, program.batch).compile()
    seen = []
    for _ in range(2):
        state, metrics = step(state, batch)
        seen.append({name: float(value) for name, value in metrics.items()})
    jax.tree.map(lambda x, like: None if x.sharding == like.sharding else pytest.fail(f"{x.shape} moved"), state, program.state)
    return program, step.as_text(), seen, flatten_params(jax.device_get(state.trainable))


def assert_equal_training(cfg, mesh: tuple[int, ...], accumulate: int = 1) -> None:
    _, _, seen, params = trained(cfg, mesh, accumulate)
    _, _, expected, others = trained(cfg, (1, 1, 1))
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    start = flatten_params(small.params(cfg))
    scale = max(np.abs(others[name] - start[name]).max() for name in start)
    for name, x in params.items():
        assert np.abs(x - others[name]).max() <= 1e-4 * scale, name


def test_the_same_training_on_eight_devices_in_two_parts():
    """Groups of four images lie on four devices, one image each."""
    assert_equal_training(LEAN, (2, 2, 2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_the_same_training_of_the_whole_model(mesh):
    assert_equal_training(WHOLE, mesh)


def test_moments_lie_where_their_parameters_do():
    program, *_ = trained(LEAN, (2, 2, 2), 2)
    (momentum,) = jax.tree.leaves(program.state.opt_state, is_leaf=lambda x: isinstance(x, dict))
    place = lambda tree: {name: x.sharding.spec for name, x in flatten_params(tree).items()}  # noqa: E731
    assert place(momentum) == place(program.state.trainable)
    divided = [name for name, spec in place(momentum).items() if "fsdp" in jax.tree.leaves(tuple(spec))]
    assert "llm/layers/self_attn/q_proj/kernel" in divided and "llm/embed_tokens" in divided


def test_heads_hidden_widths_and_the_vocabulary_are_divided_over_tensor():
    program, *_ = trained(LEAN, (2, 2, 2), 2)
    state = flatten_params(program.state.trainable)
    axis_of = {
        "llm/layers/self_attn/o_proj": 1,
        "llm/layers/mlp/down_proj": 1,
    }  # the widths that come in
    axis_of |= {f"llm/layers/self_attn/{name}_proj": 2 for name in "qkv"} | {
        f"llm/layers/mlp/{n}_proj": 2 for n in ("gate", "up")
    }
    axis_of |= {"sam/window_layers/attn/q_proj": 2, "sam/window_layers/mlp/lin1": 2, "siglip/layers/mlp/fc2": 1}
    for layer, axis in axis_of.items():
        x = state[f"{layer}/kernel"]
        assert x.sharding.spec[axis] == "tensor", layer
        assert x.sharding.shard_shape(x.shape)[axis] == x.shape[axis] // 2
    table = state["llm/embed_tokens"]
    assert tuple(table.sharding.spec) == ("tensor", "fsdp")
    assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, table.shape[1] // 2)


@pytest.mark.slow
def test_the_same_training_of_a_llama_with_a_head_of_its_own_on_four_tensor_devices():
    llm = dataclasses.replace(LEAN.llm, model_type="llama", qk_norm=False, tie_word_embeddings=False, num_attention_heads=4)
    llm = dataclasses.replace(llm, num_key_value_heads=2, rope_scaling=(8.0, 1.0, 4.0, 64.0))
    assert_equal_training(dataclasses.replace(LEAN, llm=llm), (1, 2, 4))


def test_no_loop_of_unknown_length_exchanges_anything():
    """A collective in the matcher's loops would make every device wait for the slowest image of the whole mesh."""
    _, text, *_ = trained(LEAN, (2, 2, 2), 2)
    searches = [loop for loop in hlo.collective_stats(text).loops if loop.trip_count is None]
    assert searches and not [loop for loop in searches if loop.collectives]


@pytest.mark.parametrize(
    ("mesh", "slices", "accumulate"), [((2, 4, 1), 2, 1), ((2, 2, 1), 2, 2), ((4, 1, 1), 4, 2), ((1, 4, 1), 1, 1)]
)
def test_any_slices_and_micro_batches_take_the_same_images_in_the_same_order(mesh, slices, accumulate):
    """So a run that is started again on other devices continues the same data."""
    batch = small.batch(LEAN, images=8)
    config = small.experiment(LEAN, batch, **dict(zip(AXES, mesh, strict=True)), slices=slices)
    config.optimizer.grad_accum_steps = accumulate
    program = TrainProgram.build(config, jax.devices()[: int(np.prod(mesh))])
    ids = dataclasses.replace(batch, example_id=np.arange(8))
    placed = program.to_device(jax.tree.map(lambda x: np.asarray(x)[program.local_rows()], ids)).example_id
    held = {shard.device: np.asarray(shard.data).reshape(accumulate, -1) for shard in placed.addressable_shards}
    taken = [held[device][part].tolist() for part in range(accumulate) for device in program.mesh.devices.flat]
    assert np.concatenate(taken).tolist() == list(range(8))


def test_local_checkpoints_hold_shards_and_fit_the_same_shards_alone(tmp_path, capsys):
    def abstract(fsdp: int) -> dict:
        mesh = sharding.make_mesh({"data": -1, "fsdp": fsdp})
        place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
        shape = lambda *sizes, on: jax.ShapeDtypeStruct(sizes, np.float32, sharding=on)  # noqa: E731
        return {"divided": shape(8, 6, on=place("fsdp")), "whole": shape(3, on=place())}

    wanted = abstract(4)
    state = jax.tree.map(lambda x: jax.device_put(np.random.default_rng(0).random(x.shape, np.float32), x.sharding), wanted)
    for _ in range(2):
        checkpoints = LocalCheckpoints(str(tmp_path), 1, "run")
        checkpoints.save(3, state, {})
        checkpoints.close()
    found = checkpoints.restore(wanted, lambda meta: None, None).state
    assert jax.tree.all(jax.tree.map(np.array_equal, found, state))
    assert jax.tree.all(jax.tree.map(lambda x, like: x.sharding == like.sharding, found, wanted))
    assert (tmp_path / "run/process_0/3.safetensors").stat().st_size < 8 * 6 * 4 + 3 * 4 + 2000  # each shard once
    assert checkpoints.restore(abstract(2), lambda meta: None, None) is None
    assert "this process now holds other shards" in capsys.readouterr().out

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from flowseg_jax import checkpoint
from flowseg_jax.errors import UserError
from flowseg_jax.manifest import checksums, device_checksums, flatten, manifest, nest


def make_params():
    w = jax.random.normal(jax.random.key(1), (60, 100))
    return {"a": {"w": w, "b": jnp.ones(7, jnp.bfloat16)}, "layers": {"0": {"x": jnp.zeros(3)}, "1": {"x": jnp.arange(3.0)}}}


def make_state():
    params = make_params()
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "step": jnp.asarray(3), "key": jax.random.key(0)}


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and checksums(a) == checksums(b)


def test_saves_and_restores_everything(tmp_path):
    state = make_state()
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=10) as checkpoints:
        assert checkpoints.restore_latest(abstract_of(state)) is None
        for step in (10, 11, 12, 13):
            later = state | {"step": jnp.asarray(step)}
            assert checkpoints.save(step, later, {"config": {"a": (1, 2)}, "position": step * 8})
        assert not checkpoints.save(13, state, {})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 13
        assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["10", "12", "13"]
        restored = checkpoints.restore_latest(abstract_of(state))
    assert restored.step == 13
    assert same(restored.state, later)
    assert restored.meta["position"] == 104
    assert restored.meta["config"] == {"a": [1, 2]}
    assert restored.meta["manifest"]["params/a/b"] == [[7], "bfloat16"]
    assert restored.meta["versions"]["jax"] == jax.__version__
    assert "revision" in restored.meta


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = step({"w": jnp.zeros(2_000_000)})
    abstract = abstract_of(state)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(30):
            state = step(state)
        checkpoints.wait()
        restored = checkpoints.restore_latest(abstract)
    assert np.unique(np.asarray(restored.state["w"])).tolist() == [1.0]


def largest(directory: Path) -> Path:
    return max((path for path in directory.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit": lambda d: flip(largest(d / "state")),
    "truncated": lambda d: os.truncate(largest(d / "state"), 100),
    "empty file": lambda d: os.truncate(largest(d / "state"), 0),
    "array file gone": lambda d: largest(d / "state").unlink(),
    "tree metadata gone": lambda d: (d / "state" / "_METADATA").unlink(),
    "state gone": lambda d: shutil.rmtree(d / "state"),
    "json truncated": lambda d: os.truncate(d / "meta" / "metadata", 20),
    "json gone": lambda d: shutil.rmtree(d / "meta"),
    "empty directory": lambda d: [shutil.rmtree(d), d.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, capsys, damage):
    state = make_state()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state | {"step": jnp.asarray(step)}, {})
    DAMAGE[damage](tmp_path / "checkpoints" / "2")
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(abstract_of(state))
        assert restored.step == int(restored.state["step"]) == 1
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"checkpoint {checkpoints.directory / '2'} is damaged (")
        assert line.endswith("set aside as 2.damaged")
        assert checkpoints.save(2, state, {})  # the run gets there again
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "2.damaged"]


def test_a_damaged_only_checkpoint_starts_over_and_says_so(tmp_path, capsys):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
    flip(largest(tmp_path / "checkpoints" / "1"))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(abstract_of(make_state())) is None
        assert checkpoints.latest_step is None
    assert "starting from step 0" in capsys.readouterr().out


def test_another_model_is_an_error_and_not_damage(tmp_path):
    state = make_state()
    other = abstract_of(state)
    del other["params"]["a"]["b"]
    other["params"]["a"]["w"] = jax.ShapeDtypeStruct((60, 101), jnp.float32)
    other["params"]["new"] = jax.ShapeDtypeStruct((2,), jnp.float32)

    def refuse(meta):
        raise UserError(f"changed: {checkpoint.changed_keys(meta['config'], {'width': 8})}")

    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"config": {"width": 4}})
        with pytest.raises(UserError) as error:
            checkpoints.restore_latest(other)
        for part in (
            "missing params/new (2,)",
            "unexpected params/a/b (7,)",
            "params/a/w is (60, 100), the model's is (60, 101)",
        ):
            assert part in str(error.value)
        with pytest.raises(UserError, match=r"changed: \['width'\]"):
            checkpoints.restore_latest(abstract_of(state), refuse)
        assert checkpoints.latest_step == 1


def test_restores_into_another_dtype(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (5, 6))}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        abstract = {"w": jax.ShapeDtypeStruct((5, 6), jnp.bfloat16, sharding=state["w"].sharding)}
        restored = checkpoints.restore_latest(abstract)
    assert restored.state["w"].dtype == jnp.bfloat16
    assert same(restored.state, {"w": state["w"].astype(jnp.bfloat16)})


def test_killed_while_saving_leaves_the_older_checkpoint(tmp_path):
    code = f"""
    import jax.numpy as jnp, os, signal
    from flowseg_jax import checkpoint
    checkpoints = checkpoint.Checkpoints({str(tmp_path)!r})
    checkpoints.save(1, {{"w": jnp.full(100, 1.0)}}, {{}})
    checkpoints.wait()
    checkpoints.save(2, {{"w": jnp.full(20_000_000, 2.0)}}, {{}})
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        assert checkpoints.restore_latest(abstract_of({"w": jnp.zeros(100)})).step == 1
        assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]


@pytest.fixture
def tokenizer(tmp_path):
    directory = tmp_path / "tok"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_model_directory_round_trip(tmp_path, tokenizer):
    params = make_params()
    path = checkpoint.save_model(tmp_path / "model", params, {"width": (1, 2)}, tokenizer, {"seed": 3})
    loaded = checkpoint.load_model(path)
    assert loaded.model_config == {"width": [1, 2]}
    assert loaded.extra == {"seed": 3}
    assert (loaded.tokenizer_dir / "tokenizer.json").read_text() == "{}"
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in jax.tree.leaves(loaded.params))
    assert same(loaded.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    stored = checkpoint.load_model(path, dtype=None).params
    assert stored["a"]["w"].dtype == jnp.bfloat16
    sharded = checkpoint.load_model(path, abstract_of(params)).params
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(sharded))
    assert manifest(sharded) == manifest(params)
    exact = checkpoint.save_model(path, params, {}, tokenizer, dtype=None, overwrite=True)
    assert same(checkpoint.load_model(exact, dtype=None).params, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tok"]  # nothing temporary is left


def test_a_model_directory_appears_whole_or_not_at_all(tmp_path, tokenizer, monkeypatch):
    params = make_params()
    path = checkpoint.save_model(tmp_path / "model", params, {"good": 1}, tokenizer)
    with pytest.raises(UserError, match="model exists: remove it or choose another name"):
        checkpoint.save_model(path, params, {}, tokenizer)
    with pytest.raises(UserError, match="no tokenizer directory"):
        checkpoint.save_model(tmp_path / "other", params, {}, tmp_path / "nope")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.shutil, "copytree", full)
    for target in (path, tmp_path / "other"):
        with pytest.raises(UserError, match=r"could not be written: .*No space left"):
            checkpoint.save_model(target, params, {}, tokenizer, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tok"]
    assert checkpoint.load_model(path).model_config == {"good": 1}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: flip(largest(d / "params")), "is damaged: the bytes of a/w have changed"),
        (lambda d: os.truncate(largest(d / "params"), 50), "is damaged: "),
        (lambda d: (d / "config.json").unlink(), "is not a model directory: it has no config.json"),
        (lambda d: (d / "config.json").write_text('{"format'), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text('{"model_type": "qwen3"}'), "was not written by flowseg_jax"),
        (lambda d: shutil.rmtree(d / "params"), "is incomplete: it lacks params"),
        (lambda d: shutil.rmtree(d / "tokenizer"), "is incomplete: it lacks tokenizer"),
        (shutil.rmtree, "no model directory"),
    ],
)
def test_a_spoilt_model_directory_is_one_line(tmp_path, tokenizer, spoil, message):
    path = checkpoint.save_model(tmp_path / "model", make_params(), {}, tokenizer)
    spoil(path)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_model(path)
    assert "\n" not in str(error.value)


def test_a_model_of_another_format_version(tmp_path, tokenizer):
    path = checkpoint.save_model(tmp_path / "model", make_params(), {}, tokenizer)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(UserError, match="has format version 99, this flowseg_jax reads 1"):
        checkpoint.load_model(path)


def test_loading_is_strict_both_ways(tmp_path, tokenizer):
    path = checkpoint.save_model(tmp_path / "model", make_params(), {}, tokenizer)
    abstract = {"a": {"w": jax.ShapeDtypeStruct((60, 99), jnp.float32), "c": jax.ShapeDtypeStruct((1,), jnp.float32)}}
    with pytest.raises(UserError) as error:
        checkpoint.load_model(path, abstract)
    wanted = (
        "missing a/c (1,)",
        "unexpected a/b (7,)",
        "unexpected layers/1/x (3,)",
        "a/w is (60, 100), the model's is (60, 99)",
    )
    for part in wanted:
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"this does not fit the model: missing a/c \(1,\)"):
        checkpoint.check_params({"a": {"c": jnp.zeros(1)}}, {}, "this")
    checkpoint.check_params(abstract_of(make_params()), make_params())


def test_changed_keys():
    saved = {"steps": 10, "model": {"width": 8, "sizes": [1, 2], "old": 1}, "optimizer": {"lr": 1.0, "b1": 0.9}}
    new = {"steps": 20, "model": {"width": 16, "sizes": (1, 2), "new": {"x": 1}}, "optimizer": {"lr": 1, "b1": 0.8}}
    assert checkpoint.changed_keys(saved, saved) == []
    changed = checkpoint.changed_keys(saved, ConfigDict(new), ignore=("steps",))
    assert sorted(changed) == ["model.new", "model.old", "model.width", "optimizer.b1"]
    assert checkpoint.changed_keys(saved, new, ignore=("steps", "model", "optimizer.b1")) == []


def test_prepare_workdir(tmp_path):
    workdir = checkpoint.prepare_workdir(tmp_path / "a" / "b")
    assert workdir.is_dir()
    assert list(workdir.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"workdir .*file.run cannot be written: Not a directory; choose another with --workdir"
    ):
        checkpoint.prepare_workdir(tmp_path / "file" / "run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "int32"])
def test_checksums_are_the_same_on_host_and_device_and_see_every_change(rng, dtype):
    x = np.asarray(rng.integers(0, 2, (3, 40, 7)), dtype)
    x.flat[5], x.flat[6] = 0, 1
    (host,) = checksums({"x": x}).values()
    assert int(device_checksums({"x": jnp.asarray(x)})["x"]) == host
    swapped = x.copy()
    swapped.flat[5], swapped.flat[6] = 1, 0
    assert checksums({"x": swapped})["x"] != host
    bits = x.copy().view(np.uint8).reshape(-1)
    for at in (0, 13, bits.size - 1):
        bits[at] ^= 1
        assert checksums({"x": bits.view(x.dtype).reshape(x.shape)})["x"] != host
        bits[at] ^= 1


def test_checksums_of_scalars_keys_and_eight_bytes():
    tree = {"scalar": jnp.asarray(3.0), "key": jax.random.key(1), "long": np.arange(5), "empty": np.zeros((0, 3))}
    first = checksums(tree)
    assert set(first) == set(tree)
    assert checksums(tree | {"key": jax.random.key(2)})["key"] != first["key"]
    assert checksums(tree | {"long": np.arange(5) + 2**40})["long"] != first["long"]


def test_names_go_there_and_back():
    tree = {"a": {"b": 1, "layers": {"0": {"x": 2}, "11": {"x": 3}}}}
    assert flatten(tree) == {"a/b": 1, "a/layers/0/x": 2, "a/layers/11/x": 3}
    assert nest(flatten(tree)) == tree

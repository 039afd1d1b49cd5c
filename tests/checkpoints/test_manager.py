from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from flowseg_jax.checkpoints import manager, run_checkpoint
from flowseg_jax.checkpoints.manifest import checksums, device_checksums, flatten_params, unflatten_params
from flowseg_jax.checkpoints.storage import prepare_workdir
from flowseg_jax.errors import UserError
from flowseg_jax.system import json_files
from flowseg_jax.system.paths import resolve_path
from tests.helpers.trees import abstract_of, flip, largest, make_state, same


def test_saves_and_restores_everything(tmp_path):
    state = make_state()
    with manager.CheckpointManager(tmp_path, keep=2, keep_every=10) as checkpoints:
        assert checkpoints.restore_latest(abstract_of(state)) is None
        for step in (10, 11, 12, 13):
            later = state | {"step": jnp.asarray(step)}
            assert checkpoints.save(step, later, {"config": {"a": (1, 2)}, "position": step * 8})
        assert not checkpoints.save(13, state, {})
    with manager.CheckpointManager(tmp_path) as checkpoints:
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


def steps_of(directory):
    return sorted(int(path.name) for path in Path(directory).iterdir())


LOSSES = {1: 4.0, 2: 1.0, 3: 3.0, 4: math.nan, 5: -math.inf, 6: 2.0}


@pytest.mark.parametrize(
    ("policy", "kept", "best"),
    [
        ({"keep": 1}, [7], None),
        ({"keep": 3, "keep_every": 0, "best": ()}, [5, 6, 7], None),
        ({"keep": 1, "keep_every": 3}, [3, 6, 7], None),
        ({"keep": 1, "best": ("loss", "min")}, [2, 7], 2),
        ({"keep": 1, "best": ("loss", "max")}, [1, 7], 1),
        ({"keep": 2, "keep_every": 4, "best": ("loss", "min")}, [2, 4, 6, 7], 2),
    ],
)
def test_what_is_kept(tmp_path, policy, kept, best):
    """Also over two restarts; what is not finite, and what was saved without metrics, is never the best."""
    state = {"w": jnp.arange(3.0)}
    for steps in ((1, 2, 3), (4, 5), (6, 7)):
        with manager.CheckpointManager(tmp_path, **policy) as checkpoints:
            for step in steps:
                metrics = {"loss": jnp.float32(LOSSES[step]), "other": 1} if step in LOSSES else None
                checkpoints.save(step, state, {}, metrics)
    with manager.CheckpointManager(tmp_path, **policy) as checkpoints:
        assert checkpoints.best_step == best
    assert steps_of(tmp_path / "checkpoints") == kept


def test_another_metric_may_become_the_one_that_counts(tmp_path):
    state = {"w": jnp.arange(3.0)}
    with manager.CheckpointManager(tmp_path, best=("loss", "min")) as checkpoints:
        checkpoints.save(1, state, {}, {"loss": 1.0})
    with manager.CheckpointManager(tmp_path, keep=1, best=("iou", "max")) as checkpoints:
        for step, iou in ((2, 0.5), (3, 0.4)):
            checkpoints.save(step, state, {}, {"loss": 2.0, "iou": iou})
        assert checkpoints.best_step == 2
        checkpoints.wait()
        assert steps_of(checkpoints.directory) == [2, 3]
        with pytest.raises(UserError, match=r"checkpoint.best: no metric 'iou' \(known: loss\)"):
            checkpoints.save(4, state, {}, {"loss": 1.0})


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"keep": 0}, "checkpoint.keep must be at least 1, got 0"),
        ({"keep_every": -1}, "checkpoint.keep_every must be a number of steps, or 0 for none, got -1"),
        ({"best": ("loss",)}, r"checkpoint.best must be a metric and 'min' or 'max', as in \('loss', 'min'\), got \('loss',\)"),
        ({"best": ("loss", "low")}, "got .*'low'"),
    ],
)
def test_policies_that_make_no_sense(tmp_path, policy, message):
    with pytest.raises(UserError, match=message):
        manager.CheckpointManager(tmp_path, **policy)


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = step({"w": jnp.zeros(2_000_000)})
    abstract = abstract_of(state)
    with manager.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(30):
            state = step(state)
        checkpoints.wait()
        restored = checkpoints.restore_latest(abstract)
    assert np.unique(np.asarray(restored.state["w"])).tolist() == [1.0]


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
    "metrics truncated": lambda d: os.truncate(d / "metrics" / "metrics", 5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, capsys, damage):
    state = make_state()
    with manager.CheckpointManager(tmp_path, best=("loss", "min")) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state | {"step": jnp.asarray(step)}, {}, {"loss": float(step)})
    DAMAGE[damage](tmp_path / "checkpoints" / "2")
    with manager.CheckpointManager(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(abstract_of(state))
        assert restored.step == int(restored.state["step"]) == 1
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"checkpoint {checkpoints.directory / '2'} is damaged (")
        assert line.endswith("set aside as 2.damaged")
        assert checkpoints.save(2, state, {})  # the run gets there again
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "2.damaged"]


def test_the_next_call_waits_for_the_checkpoint_before_it(tmp_path, monkeypatch):
    """What cannot be written is told of the step that it belongs to, and what is being written is read when it is there."""
    state = {"w": jnp.arange(3.0)}
    with manager.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        assert checkpoints.restore_latest(abstract_of(state)).step == 1
        checkpoints.save(2, state, {})
        with monkeypatch.context() as patch:

            def full():
                raise ValueError("No space left on device")

            patch.setattr(checkpoints._manager, "wait_until_finished", full)
            for call in (lambda: checkpoints.save(3, state, {}), lambda: checkpoints.restore_latest({}), checkpoints.close):
                with pytest.raises(
                    UserError, match=r"checkpoint of step 2 in .*/checkpoints could not be written: No space left"
                ):
                    call()


def test_a_damaged_only_checkpoint_starts_over_and_says_so(tmp_path, capsys):
    with manager.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
    flip(largest(tmp_path / "checkpoints" / "1"))
    with manager.CheckpointManager(tmp_path) as checkpoints:
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
        raise UserError(f"changed: {manager.config_diff(meta['config'], {'width': 8})}")

    with manager.CheckpointManager(tmp_path) as checkpoints:
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
    with manager.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        abstract = {"w": jax.ShapeDtypeStruct((5, 6), jnp.bfloat16, sharding=state["w"].sharding)}
        restored = checkpoints.restore_latest(abstract)
    assert restored.state["w"].dtype == jnp.bfloat16
    assert same(restored.state, {"w": state["w"].astype(jnp.bfloat16)})


def test_killed_while_saving_leaves_the_older_checkpoint(tmp_path):
    code = f"""
    import jax.numpy as jnp, os, signal
    from flowseg_jax.checkpoints.manager import CheckpointManager
    checkpoints = CheckpointManager({str(tmp_path)!r})
    checkpoints.save(1, {{"w": jnp.full(100, 1.0)}}, {{}})
    checkpoints.wait()
    checkpoints.save(2, {{"w": jnp.full(20_000_000, 2.0)}}, {{}})
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    with manager.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        assert checkpoints.restore_latest(abstract_of({"w": jnp.zeros(100)})).step == 1
        assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]


def test_changed_keys():
    saved = {"num_steps": 10, "model": {"width": 8, "sizes": [1, 2], "old": 1}, "optimizer": {"lr": 1.0, "b1": 0.9}}
    new = {"num_steps": 20, "model": {"width": 16, "sizes": (1, 2), "new": {"x": 1}}, "optimizer": {"lr": 1, "b1": 0.8}}
    assert manager.config_diff(saved, saved) == []
    changed = manager.config_diff(saved, ConfigDict(new), ignore=("num_steps",))
    assert sorted(changed) == ["model.new", "model.old", "model.width", "optimizer.b1"]
    assert manager.config_diff(saved, new, ignore=("num_steps", "model", "optimizer.b1")) == []


def test_prepare_workdir(tmp_path):
    workdir = prepare_workdir(tmp_path / "a" / "b")
    assert workdir.is_dir()
    assert list(workdir.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"workdir .*file.run cannot be written: Not a directory; choose another with --workdir"
    ):
        prepare_workdir(tmp_path / "file" / "run")


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
    assert flatten_params(tree) == {"a/b": 1, "a/layers/0/x": 2, "a/layers/11/x": 3}
    assert unflatten_params(flatten_params(tree)) == tree


def test_a_renamed_step_is_not_that_step(tmp_path):
    state = make_state()
    with manager.CheckpointManager(tmp_path) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state, {})
    (tmp_path / "checkpoints/20").rename(tmp_path / "checkpoints/30")
    with manager.CheckpointManager(tmp_path) as checkpoints:
        message = r"checkpoint .*/30 is that of step 20: give the directory its name back, or remove it"
        with pytest.raises(UserError, match=message):
            checkpoints.restore_latest(abstract_of(state))
        assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["10", "30"]  # nothing is set aside


def rewritten(directory: Path, change) -> None:
    """A checkpoint's JSON after `change`, which may leave its checksum as it is."""
    path = directory / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def sealed(**changes):
    def change(meta):
        meta.update(changes)
        meta[json_files.ITSELF] = json_files.checksum(meta)

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda meta: meta["config"].update(width=5), "its JSON has changed since it was written"),
        (lambda meta: meta.update(data="another"), "its JSON has changed since it was written"),
        (lambda meta: meta["checksums"].update({"step": 1}), "its JSON has changed since it was written"),
        (sealed(manifest={"step": [[-1], "int32"]}), "its JSON: manifest.step is "),
        (sealed(checksums=3), "its JSON: checksums is 3, expected a group of keys"),
    ],
)
def test_a_changed_json_is_damage(tmp_path, capsys, change, fault):
    state = make_state()
    with manager.CheckpointManager(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"config": {"width": 4}, "data": "a"})
    rewritten(tmp_path / "checkpoints/2", change)
    with manager.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(abstract_of(state)).step == 1
    assert f"2 is damaged ({fault}" in capsys.readouterr().out


def test_a_json_without_a_checksum_is_refused(tmp_path):
    state = make_state()
    with manager.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    rewritten(tmp_path / "checkpoints/1", lambda meta: meta.pop(json_files.ITSELF))
    with manager.CheckpointManager(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="1 has no checksum of its JSON, an older flowseg_jax wrote it"):
            checkpoints.restore_latest(abstract_of(state))


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_read_outlives_its_turn(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(run_checkpoint, "is_remote", lambda path: True)

    def steps():
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    state, meta = {"x": jnp.arange(3.0)}, {"config": {}, "data_position": 0}
    with manager.CheckpointManager(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, meta)
        checkpoints.wait()
        path = run_checkpoint.checkpoint_of(resolve_path(tmp_path), "latest")
        for step in (2, 3):
            checkpoints.save(step, state, meta)
        checkpoints.wait()
        assert steps() == [1, 3] and run_checkpoint.is_checkpoint(path) and path.name == "1"
        assert (path.parent != checkpoints.directory) == links
        (mark,) = (entry for entry in (tmp_path / "in_use").iterdir() if entry.is_file())
        os.utime(mark, (time.time() - 2 * run_checkpoint.HELD_SECONDS,) * 2)  # its reader was killed long ago
        checkpoints.save(4, state, meta)
        checkpoints.wait()
        assert steps() == [4]
        assert run_checkpoint.read_meta(path)["step"] == 1 if links else not path.exists()

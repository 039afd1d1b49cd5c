"""Checkpoints in front of the work directory: what comes back, from whom it is taken, and what is left alone."""

from __future__ import annotations

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from flowseg_jax.checkpoints import local as module
from flowseg_jax.checkpoints.local import LocalCheckpoints
from flowseg_jax.errors import UserError
from tests.helpers.trees import flip

HERE = SingleDeviceSharding(jax.devices()[0])


def state_of(step: int) -> dict:
    return {
        "step": jnp.int32(step),
        "trainable": {"a": jnp.arange(6.0).reshape(2, 3) / 7 + step, "b": jnp.full((4,), step / 3, jnp.bfloat16)},
        "moments": [jnp.zeros((0, 2)), jnp.array([True, False])],
    }


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=HERE), state_of(0))


def opened(tmp_path, run: str = "run") -> LocalCheckpoints:
    return LocalCheckpoints(str(tmp_path / "local"), 2, run)


def saved(tmp_path, *steps: int) -> LocalCheckpoints:
    checkpoints = opened(tmp_path)
    for step in steps:
        checkpoints.save(step, state_of(step), {"data": "digest"})
    checkpoints.close()
    return opened(tmp_path)


def restored(checkpoints: LocalCheckpoints, newer_than: int | None = None, abstract=ABSTRACT):
    return checkpoints.restore(abstract, lambda meta: None, newer_than)


def names(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "local/run/process_0").iterdir())


def test_the_newest_state_comes_back_to_the_bit(tmp_path):
    checkpoints = saved(tmp_path, 2, 4, 6)
    assert names(tmp_path) == ["4.safetensors", "6.safetensors"]
    found = restored(checkpoints, 3)
    assert (found.step, found.meta["data"], found.meta["step"]) == (6, "digest", 6)
    assert found.directory == str(tmp_path / "local/run/process_0")
    for ours, theirs in zip(jax.tree.leaves(found.state), jax.tree.leaves(state_of(6)), strict=True):
        assert (ours.dtype, ours.shape, ours.sharding) == (theirs.dtype, theirs.shape, HERE)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_arrays_may_be_donated_at_once(tmp_path):
    checkpoints, state = opened(tmp_path), state_of(2)
    expected = np.array(state["trainable"]["a"])
    checkpoints.save(2, state, {})
    state["trainable"]["a"] = jax.jit(lambda x: x * 0, donate_argnums=0)(state["trainable"]["a"])
    checkpoints.close()
    assert np.array_equal(restored(opened(tmp_path)).state["trainable"]["a"], expected)


def test_an_older_one_and_that_of_another_run_are_left_alone(tmp_path):
    checkpoints = saved(tmp_path, 2, 4)
    assert restored(checkpoints, 4) is None and restored(opened(tmp_path, "other")) is None
    assert names(tmp_path) == ["2.safetensors", "4.safetensors"]


def test_what_another_process_lacks_is_not_used(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 2, 4)
    other = lambda *steps: lambda mine: [mine, json.dumps(["its shards", steps]).encode()]  # noqa: E731
    monkeypatch.setattr(module, "all_gather_bytes", other(2))
    assert restored(checkpoints).step == 2
    monkeypatch.setattr(module, "all_gather_bytes", other())  # its host is a new one, and nobody holds its shards
    assert restored(checkpoints) is None


def test_what_is_lacking_comes_from_a_process_that_holds_the_same_shards(tmp_path, monkeypatch, capsys):
    """Between two processes: `tests/system/test_distributed.py`."""
    saved(tmp_path, 2, 4)
    (peer := tmp_path / "peer").mkdir()
    for file in (tmp_path / "local/run/process_0").iterdir():
        file.rename(peer / file.name)
    checkpoints, sent = opened(tmp_path), []
    there = lambda mine: [mine, json.dumps([json.loads(mine)[0], [2, 4]]).encode()]  # noqa: E731
    monkeypatch.setattr(module, "all_gather_bytes", there)

    def send(path, source, target):
        sent.append((path.name, source, target))
        shutil.copy(peer / path.name, path)

    monkeypatch.setattr(module, "send_file", send)
    assert restored(checkpoints, 2).step == 4 and sent == [("4.safetensors", 1, 0)]
    assert "the local checkpoint of step 4 of process 0 is sent by process 1" in capsys.readouterr().out
    flip(tmp_path / "local/run/process_0/4.safetensors")  # what is damaged here is fetched anew
    assert restored(checkpoints).step == 4 and sent == [("4.safetensors", 1, 0)] * 2
    (tmp_path / "local/run/process_0/4.safetensors").unlink()
    flip(peer / "4.safetensors")  # and what is damaged there is not used
    assert restored(checkpoints).step == 2 and sent[2:] == [("4.safetensors", 1, 0), ("2.safetensors", 1, 0)]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "send_file", full)
    assert restored(checkpoints, 2) is None
    assert "step 4 is not used: " in capsys.readouterr().out


@pytest.mark.parametrize("at", [-1, 300])  # a byte of the last array, and one of the JSON
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path, capsys, at):
    checkpoints = saved(tmp_path, 2, 4)
    file = tmp_path / "local/run/process_0/4.safetensors"
    whole = bytearray(file.read_bytes())
    whole[at] ^= 1
    file.write_bytes(whole)
    assert restored(checkpoints).step == 2
    assert "the local checkpoint of step 4 is not used: " in capsys.readouterr().out
    file.write_bytes(whole[:50])
    (file.parent / "6.part").write_text("killed while it wrote")
    assert restored(checkpoints).step == 2


def test_other_shards_are_not_used(tmp_path, capsys):
    other = ABSTRACT | {"moments": []}
    assert restored(saved(tmp_path, 2), abstract=other) is None
    assert "step 2 is not used: this process now holds other shards" in capsys.readouterr().out


def test_another_config_is_refused(tmp_path):
    def check(meta):
        raise UserError(f"no run on {meta['data']}")

    with pytest.raises(UserError, match="no run on digest"):
        saved(tmp_path, 2).restore(ABSTRACT, check, None)


def test_a_full_disk_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    saved(tmp_path, 2, 4)
    said = capsys.readouterr().out
    assert (
        said.count("could not be written: [Errno 28] No space left on device; the run goes on") == 2 and names(tmp_path) == []
    )


def test_when_they_are_due_and_gone(tmp_path):
    checkpoints = saved(tmp_path, 2)
    assert [step for step in range(1, 7) if checkpoints.due(step)] == [2, 4, 6]
    checkpoints.remove()
    assert list((tmp_path / "local").iterdir()) == []
    none = LocalCheckpoints("", 0, "run")
    none.remove()
    assert not none.due(4) and restored(none) is None


def test_what_is_still_being_written_is_waited_for(tmp_path, monkeypatch):
    """Else the next one would be written beside it, and a file come back after the directory is gone."""
    checkpoints, told = opened(tmp_path), []

    def slowly(*arguments, save=module.save_file):
        time.sleep(0.2)
        save(*arguments)
        told.append(arguments[1].name)

    monkeypatch.setattr(module, "save_file", slowly)
    checkpoints.save(2, state_of(2), {})
    checkpoints.save(4, state_of(4), {})
    assert told == ["2.part"]
    checkpoints.remove()
    assert told == ["2.part", "4.part"] and list((tmp_path / "local").iterdir()) == []


@pytest.mark.parametrize(
    ("directory", "every", "message"),
    [
        ("", 2, "checkpoint.local_dir is '' and checkpoint.local_every 2: set both, or neither"),
        ("here", 0, "set both"),
        ("here", -1, "set both"),
        ("gs://bucket/local", 2, "checkpoint.local_dir is gs://bucket/local: it must be a disk or memory of this host"),
        ("/proc/nowhere", 2, "checkpoint.local_dir /proc/nowhere cannot be written: No such file or directory; choose another"),
    ],
)
def test_what_makes_no_sense_is_refused(directory, every, message):
    with pytest.raises(UserError, match=message):
        LocalCheckpoints(directory, every, "run")

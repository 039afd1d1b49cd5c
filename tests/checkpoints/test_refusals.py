"""What checkpoints and model directories do with leftovers: metrics, JSON, interrupted replacements."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from flowseg_jax.checkpoints import manager, pretrained
from flowseg_jax.errors import UserError
from tests.helpers.trees import abstract_of

STATE = {"w": jnp.arange(3.0)}


def two_checkpoints(workdir: Path) -> Path:
    """The directory of checkpoints 1 and 2, with metrics."""
    with manager.CheckpointManager(workdir, keep=2, best=("loss", "min")) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE, {}, {"loss": float(step)})
    return workdir / "checkpoints"


@pytest.mark.parametrize("text", ['{"loss": "low"}', '{"loss": null}', "[1.0]", "3"])
def test_metrics_that_are_no_numbers_are_damage(tmp_path, capsys, text):
    directory = two_checkpoints(tmp_path)
    (directory / "2/metrics/metrics").write_text(text)
    with manager.CheckpointManager(tmp_path, best=("loss", "min")) as checkpoints:
        assert checkpoints.latest_step == checkpoints.best_step == 1
    assert capsys.readouterr().out == (
        f"checkpoint {directory / '2'} is damaged (its metrics are no numbers): set aside as 2.damaged\n"
    )
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2.damaged"]


def test_metrics_of_what_is_no_step_are_left_alone(tmp_path):
    directory = two_checkpoints(tmp_path)
    (directory / "mine/metrics").mkdir(parents=True)
    (directory / "mine/metrics/metrics").write_text("not JSON")
    with manager.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 2
    assert (directory / "mine/metrics/metrics").read_text() == "not JSON"


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_json_that_is_no_group_of_keys_is_damage(tmp_path, capsys, text):
    directory = two_checkpoints(tmp_path)
    (directory / "2/meta/metadata").write_text(text)
    with manager.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(abstract_of(STATE)).step == 1
    assert f"{directory / '2'} is damaged (its JSON is no group of keys): set aside" in capsys.readouterr().out


def test_a_damaged_checkpoint_that_cannot_be_set_aside_ends_the_run(tmp_path, monkeypatch):
    directory = two_checkpoints(tmp_path)
    (directory / "2/meta/metadata").write_text("[]")

    def refused(path, target):
        raise PermissionError(13, "Permission denied")

    with manager.CheckpointManager(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(type(checkpoints.directory), "rename", refused)
            with pytest.raises(UserError) as error:
                checkpoints.restore_latest(abstract_of(STATE))
    assert str(error.value) == (
        f"checkpoint {directory / '2'} is damaged (its JSON is no group of keys) and cannot be set aside: "
        "[Errno 13] Permission denied"
    )
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_an_older_damaged_copy_makes_room(tmp_path):
    directory = two_checkpoints(tmp_path)
    (directory / "2.damaged").mkdir()
    (directory / "2.damaged/old").write_text("")
    (directory / "2/meta/metadata").write_text("[]")
    with manager.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(abstract_of(STATE)).step == 1
    assert not (directory / "2.damaged/old").exists() and (directory / "2.damaged/state").is_dir()


def test_each_rule_reaches_orbax_with_its_number():
    kept = manager._preservation(3, 7, ("loss", "min")).policies
    assert [type(policy) for policy in kept] == [policies.LatestN, policies.EveryNSteps, policies.BestN]
    latest, every, best = kept
    assert (latest.n, every.interval_steps, best.n, best.keep_checkpoints_without_metrics) == (3, 7, 1, False)
    assert [best.get_metric_fn({"loss": loss}) for loss in (2.0, float("nan"))] == [-2.0, -float("inf")]
    assert best.get_metric_fn({"other": 1.0}) == -float("inf")
    for nothing in (None, 0):
        assert [type(policy) for policy in manager._preservation(1, nothing, ()).policies] == [policies.LatestN]


@pytest.mark.parametrize("there", ["old", "both", "neither"])
def test_a_replacement_that_a_kill_interrupted(tmp_path, there):
    """What was moved aside comes back where nothing took its place, and is removed where something did."""
    target, old = epath.Path(tmp_path / "model"), epath.Path(tmp_path / ".model.old")
    if there != "neither":
        old.mkdir()
        (old / "config.json").write_text("the old one")
    if there == "both":
        target.mkdir()
        (target / "config.json").write_text("the new one")
    pretrained._recover(target, old)
    assert not old.exists()
    expected = {"old": "the old one", "both": "the new one"}.get(there)
    assert target.exists() is (expected is not None)
    assert expected is None or (target / "config.json").read_text() == expected


def test_saving_after_such_a_kill_keeps_no_leftovers(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    pretrained.save_pretrained(tmp_path / "model", STATE, {"a": 1}, tmp_path / "tokenizer")
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed between the two renames
    (tmp_path / ".model.tmp").mkdir()
    pretrained.save_pretrained(tmp_path / "model", STATE, {"a": 2}, tmp_path / "tokenizer", overwrite=True)
    assert json.loads((tmp_path / "model/config.json").read_text())["model"] == {"a": 2}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".model")) == []


def test_a_step_before_the_newest_one_is_saved_too(tmp_path):
    with manager.CheckpointManager(tmp_path, keep=2) as checkpoints:
        assert [checkpoints.save(step, STATE, {}) for step in (5, 3, 5)] == [True, True, False]
        checkpoints.wait()
        assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["3", "5"]

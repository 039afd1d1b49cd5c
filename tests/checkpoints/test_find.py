"""Which model a name means, and what a run's checkpoint says of itself: by files of JSON alone, without an array."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import huggingface_hub
import pytest
from etils import epath

from flowseg_jax.checkpoints import find, hub, run_checkpoint, storage
from flowseg_jax.errors import UserError
from flowseg_jax.system import json_files


def checkpoint(
    run: Path, step: int, metrics: dict | None = None, best: tuple = (), names: tuple = ("trainable/a",), **meta
) -> Path:
    """The JSON of a checkpoint, whose arrays are not there."""
    whole = {"step": step, "extra": {"step": step}, "config": {"model": {"n": step}, "checkpoint": {"best": list(best)}}}
    whole |= {"manifest": {name: [[1], "float32"] for name in names}, "checksums": dict.fromkeys(names, 7)} | meta
    whole[json_files.ITSELF] = json_files.checksum(whole)
    path = run / "checkpoints" / str(step)
    for name, value in (("meta/metadata", whole), ("metrics/metrics", metrics)):
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text(json.dumps(value))
    return epath.Path(path)


def test_a_name_is_a_folder_before_it_is_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@2").mkdir()
    checkpoint(tmp_path / "a", 2)
    assert find.find_model("a@2", None) == tmp_path / "a@2" and find.find_model("b@x/c", None) == tmp_path / "b@x" / "c"
    assert find.find_model(None, None) == find.find_model(None, "") == find.SHIPPED_MODEL
    with pytest.raises(UserError, match="give one of them"):
        find.find_model("", "a")
    assert find.find_model("./a@latest", None).name == "2"
    assert find.model_name(tmp_path / "a/model") == "a" and find.model_name(tmp_path / "a/other") == "other"
    assert find.model_name(epath.Path(tmp_path / "a/checkpoints/2")) == "a@2"


@pytest.mark.parametrize(
    ("trained", "newest", "is_model"), [(4, 4, True), (5, 4, True), (3, 4, False), (None, 4, True), (3, None, True)]
)
def test_a_run_is_its_model_or_what_is_newer(tmp_path, monkeypatch, capsys, trained, newest, is_model):
    monkeypatch.setattr(find, "read_model_config", lambda path: {"extra": {"step": trained}})
    (tmp_path / "run/model").mkdir(parents=True)
    if newest:
        for step in (2, newest):
            checkpoint(tmp_path / "run", step)
    found = find.find_model(None, str(tmp_path / "run"))
    assert (found == tmp_path / "run/model") == is_model
    assert capsys.readouterr().out == ("" if is_model else f"run: the checkpoint of step {newest}\n")


def test_a_run_without_a_model(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no trained model yet, and no checkpoint"):
        find.find_model(None, str(tmp_path))
    for step in (4, 2):
        checkpoint(tmp_path, step)
    assert find.find_model(None, str(tmp_path)).name == "4"


def test_which_checkpoint_is_the_best(tmp_path):
    run = epath.Path(tmp_path)
    scores = {2: 5.0, 4: 9.0, 6: 7.0, 8: float("nan"), 10: "high", 12: True}
    for step, score in scores.items():
        checkpoint(tmp_path, step, {"eval/ciou": score, "loss": score})
    assert run_checkpoint.steps_of(run) == list(scores)
    assert run_checkpoint.best_step(run, list(scores)) == 4 and run_checkpoint.best_step(run, [2]) == 2
    assert run_checkpoint.best_step(run, [8, 10, 12]) is None
    for step in (3, 5):
        checkpoint(tmp_path, step, {"loss": step}, best=("loss", "min"))
    assert run_checkpoint.best_step(run, [3, 5]) == 3
    checkpoint(tmp_path, 7, {"eval/giou": 1.0})
    with pytest.raises(UserError, match=r"has no checkpoint '0004x'; it has 2, 3, 4, 5, 6, 7, 8, 10, 12, latest, best$"):
        run_checkpoint.checkpoint_of(run, "0004x")
    with pytest.raises(UserError, match="has no checkpoint '9{19}'"):
        run_checkpoint.checkpoint_of(run, "9" * 19)
    assert run_checkpoint._step("9" * 18) == int("9" * 18) and run_checkpoint.checkpoint_of(run, "004").name == "4"
    for step in scores:
        (tmp_path / f"checkpoints/{step}/metrics/metrics").write_text("{}")
    for step in (3, 5):
        (tmp_path / f"checkpoints/{step}/metrics/metrics").unlink()
    with pytest.raises(UserError, match=r"has no best checkpoint: it was not validated \(eval_every\), nor is"):
        run_checkpoint.checkpoint_of(run, "best")


def test_the_parameters_of_a_state(tmp_path):
    names = ("step", "trainable/a", "frozen/b", "ema/a", "moments/0")
    plain = {"a": "trainable/a", "b": "frozen/b"}
    averaged = plain | {"a": "ema/a"}
    for n, (ema, kept, want) in enumerate(
        (({"export": True}, names, averaged), ({"export": False}, names, plain), ({}, names, plain), (None, names, plain),
         ({"export": True}, names[:3], plain)), 1
    ):  # fmt: skip
        config = {"model": {"n": 1}} | ({} if ema is None else {"ema": ema})
        path = checkpoint(tmp_path, n, names=kept, config=config)
        assert run_checkpoint.state_names(run_checkpoint.read_meta(path)) == want
        found = run_checkpoint.read_checkpoint_config(path)
        assert found["manifest"] == {name: [[1], "float32"] for name in want} and found["checksums"] == dict.fromkeys(want, 7)
        assert found["model"] == {"n": 1} and found["extra"] == {"step": n}
        assert run_checkpoint.from_state(run_checkpoint.to_state({"a": 1, "b": 2}, path)) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": None}, "cannot be used as a model, an older flowseg_jax wrote it: continue the run first"),
        ({"config": []}, "cannot be used as a model"),
        ({"config": {"model": 3}}, "cannot be used as a model"),
        ({"base": {}}, "holds adapters without their base: use .*/run/model, which the run writes at its end"),
        ({"names": ("frozen/a/kernel", "frozen/a/kernel_scale")}, "holds int8 weights: use .*/run/model"),
        ({"manifest": 3}, "cannot be read: its JSON: manifest is 3, expected a group of keys"),
    ],
)
def test_a_checkpoint_that_is_no_model(tmp_path, changes, message):
    path = checkpoint(tmp_path / "run", 4, **changes)
    with pytest.raises(UserError, match=rf"^checkpoint {path} {message}"):
        run_checkpoint.read_checkpoint_config(path)


def test_readers_that_were_killed_hold_nothing(tmp_path):
    run, now = epath.Path(tmp_path / "run"), time.time()
    path = checkpoint(tmp_path / "run", 4)
    (tmp_path / "run/tokenizer").mkdir()
    (tmp_path / "run/tokenizer/vocab.json").write_text("{}")
    for name, age in (("1.host.7", 0.9), ("2.host.7", 1.1), ("x.host.7", 0.0)):
        (tmp_path / "run/in_use").mkdir(exist_ok=True)
        (tmp_path / "run/in_use" / name).write_text("")
        os.utime(tmp_path / "run/in_use" / name, (now - age * run_checkpoint.HELD_SECONDS,) * 2)
    for name, age in (("old.7", 1.1), ("new.7", 0.9)):
        (tmp_path / "run/in_use" / name).mkdir()
        os.utime(tmp_path / "run/in_use" / name, (now - age * run_checkpoint.HELD_SECONDS,) * 2)
    assert run_checkpoint.held_steps(run) == {1}
    held = run_checkpoint.hold(path)
    assert held != path and run_checkpoint.is_checkpoint(held) and run_checkpoint.hold(path) == held
    assert (held.parent.parent / "tokenizer/vocab.json").read_text() == "{}"
    assert run_checkpoint.held_steps(run) == {1, 4} and run_checkpoint.held_steps(epath.Path(tmp_path)) == set()
    left = {entry.name for entry in (run / "in_use").iterdir()}
    assert "old.7" not in left and {"new.7", "1.host.7", "2.host.7"} <= left


def test_a_directory_takes_the_place_of_another_when_it_is_whole(tmp_path):
    target = tmp_path / "out"
    for text in ("first", "second"):
        with storage.fresh_directory(target) as fresh:
            (fresh / text).write_text(text)
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted([fresh.name, *["out"] * (text == "second")])
    assert [path.name for path in target.iterdir()] == ["second"] and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="out could not be written: gone"):
        with storage.fresh_directory(target):
            raise OSError("gone")
    with pytest.raises(KeyError):
        with storage.fresh_directory(target):
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_uploaded_whole_and_says_how_it_is_used(monkeypatch, tmp_path):
    told = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            told["made"] = repo_id, private, exist_ok

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            told[path_in_repo] = path_or_fileobj.decode()

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            told["folder"] = repo_id, folder_path, allow_patterns
            return "the address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.upload_export(tmp_path, find.SHIPPED_MODEL, "a/b") == "the address"
    assert told["made"] == ("a/b", False, True) and told["folder"] == ("a/b", str(tmp_path), None)
    readme = told["README.md"]
    assert readme.startswith("---\nlibrary_name: transformers\npipeline_tag: image-segmentation\n---\n\n# a/b\n\n")
    assert 'sam = AutoModel.from_pretrained("a/b", subfolder="sam")\n```' in readme and "drawn shapes only" in readme
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=f"^{tmp_path} cannot be uploaded as a/b to .*: division by zero"):
        hub.upload_export(tmp_path, find.SHIPPED_MODEL, "a/b")

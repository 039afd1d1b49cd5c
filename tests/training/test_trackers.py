"""Trackers: what they are told, by stand-ins; and the libraries themselves in their offline modes, where they are installed."""

from __future__ import annotations

import importlib.util
import json
import time
import types

import numpy as np
import pytest
from etils import epath

from flowseg_jax import experiment
from flowseg_jax.errors import UserError
from flowseg_jax.training import metric_writers, trackers

PICTURE = np.zeros((4, 6, 3), np.uint8)


@pytest.fixture
def config():
    return experiment.read("shapes_tiny")


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "mine").mkdir()
    return epath.Path(tmp_path / "mine")


def use(writer) -> None:
    writer.write_scalars(10, {"loss": np.float32(0.5), "loss/mask": 0.25})
    writer.write_images(10, {"eval/1_circle": PICTURE})
    writer.write_texts(10, {"config": "not for trackers"})
    writer.close()


class Wandb:
    """A stand-in of the library; `told` is what it was told."""

    def __init__(self):
        self.told = []

    def init(self, **options):
        self.told.append(("init", options))
        log = lambda values, step: self.told.append(("log", step, values))  # noqa: E731
        return types.SimpleNamespace(id=options["id"], log=log, finish=lambda: self.told.append("finish"))

    def Image(self, array):
        return array.shape


class Mlflow:
    """A stand-in of the library; `told` is what it was told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        def call(*args, **options):
            self.told.append((name, *args, options))
            run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
            return run if name == "start_run" else self if name == "MlflowClient" else None

        return call


def test_wandb_is_told_scalars_pictures_and_config_and_a_run_goes_on(config, workdir):
    wandb = Wandb()
    use(trackers.WandbWriter(wandb, workdir, config))
    (_, options), *rest = wandb.told
    assert options["config"] == config.to_dict() and options["name"] == "mine" and options["dir"] == str(workdir)
    assert rest == [
        ("log", 10, {"loss": 0.5, "loss/mask": 0.25}), ("log", 10, {"eval/1_circle": PICTURE.shape}), "finish",
    ]  # fmt: skip
    again = Wandb()
    trackers.WandbWriter(again, workdir, config)
    assert again.told[0][1]["id"] == options["id"] and again.told[0][1]["resume"] == "allow"


def test_mlflow_is_told_scalars_pictures_and_config_and_a_run_goes_on(config, workdir):
    mlflow = Mlflow()
    use(trackers.MlflowWriter(mlflow, workdir, config))
    told = {name: (args, options) for name, *args, options in mlflow.told}
    assert told["start_run"][1] == {"run_id": None, "run_name": "mine"}
    assert told["log_params"][0][0]["optimizer.learning_rate"] == "0.001"
    assert json.loads(told["log_text"][0][0])["num_steps"] == 2000
    assert told["log_metrics"] == ([{"loss": 0.5, "loss/mask": 0.25}], {"step": 10, "run_id": "r1"})
    assert told["log_image"][1] == {"key": "eval/1_circle", "step": 10} and "end_run" in told
    again = Mlflow()
    trackers.MlflowWriter(again, workdir, config)
    assert again.told == [("start_run", {"run_id": "r1", "run_name": None})]


def test_a_tracker_is_opened_with_its_library(config, workdir, monkeypatch):
    wandb = Wandb()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(trackers.importlib, "import_module", {"wandb": wandb}.get)
    use(trackers.open_tracker("wandb", workdir, config))
    assert wandb.told[0][1]["name"] == "mine" and wandb.told[-1] == "finish"


def test_where_a_run_is_kept_there(config, workdir, monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)

    def started(library, name):
        (workdir / f"{name}_run_id.txt").unlink(missing_ok=True)
        trackers.TRACKERS[name](library, workdir, config)
        return library.told

    assert started(Wandb(), "wandb")[0][1]["project"] == "flowseg"
    assert started(Mlflow(), "mlflow")[0] == ("set_experiment", "flowseg", {})
    config.data.mixture = (("x" * 600, 1.0),)
    params = next(args for name, *args in started(Mlflow(), "mlflow") if name == "log_params")[0]
    assert len(params["data.mixture"]) == 500
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert started(Wandb(), "wandb")[0][1]["project"] == "mine"
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "mine")
            assert started(Mlflow(), "mlflow")[0][0] == "start_run"
    monkeypatch.setattr(trackers, "is_remote", lambda path: True)  # a bucket is no place for a library's own files
    assert started(Wandb(), "wandb")[0][1]["dir"] is None


def test_training_outlives_a_tracker(config, workdir, capsys):
    wandb = Wandb()
    writer = trackers.WandbWriter(wandb, workdir, config)

    def refuse(*_, **__):
        raise ConnectionError("the server\nis away")

    writer._run.log = refuse
    use(writer)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("WARNING: wandb takes no more metrics: ") and "the server" in said


def test_what_is_not_there_is_one_line(config, workdir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^trackers: wandb is not installed: pip install -e '\.\[wandb\]' in a clone, or leave"
    ):
        trackers.check_trackers(("wandb",))
    with pytest.raises(UserError, match=r"unknown tracker 'mlfow' \(did you mean 'mlflow'\?\); there are wandb, mlflow$"):
        trackers.check_trackers(("mlfow",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def refuse(name):
        raise ConnectionError(f"no server\nfor {name}")

    monkeypatch.setattr(trackers.importlib, "import_module", refuse)
    with pytest.raises(UserError, match=r"^trackers: mlflow cannot be started: .*no server") as error:
        trackers.open_tracker("mlflow", workdir, config)
    assert "\n" not in str(error.value)


def run_with(name, config, workdir) -> None:
    """A run's writers with the tracker; two steps and a picture."""
    config.trackers = (name,)
    writer = metric_writers.create_writer(workdir, config, progress=metric_writers.ProgressWriter(20), tensorboard=False)
    writer.write_scalars(10, {"loss": 0.5})
    writer.write_images(10, {"eval/1_circle": PICTURE})
    writer.write_scalars(20, {"loss": 0.25, "eval/ciou": 31.0})
    writer.close()


def test_wandb_itself_offline(config, workdir, monkeypatch):
    pytest.importorskip("wandb")
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    run_with("wandb", config, workdir)
    (log,) = (workdir / "wandb").glob("offline-run-*/*.wandb")
    wanted, deadline = (b"eval/ciou", b"eval/1_circle", b"warmup_fraction"), time.monotonic() + 60
    while not all(name in log.read_bytes() for name in wanted):  # written by a process of its own
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert list((workdir / "wandb").glob("offline-run-*/files/media/images/eval/*.png"))


def test_mlflow_itself_on_files(config, workdir, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run_with("mlflow", config, workdir)
    run_id = (workdir / "mlflow_run_id.txt").read_text().strip()
    client = mlflow.MlflowClient()
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(10, 0.5), (20, 0.25)]
    assert client.get_run(run_id).data.params["data.max_masks"] == "12"
    assert "config.json" in {artifact.path for artifact in client.list_artifacts(run_id)}
    run_with("mlflow", config, workdir)  # the same run goes on
    assert len(client.get_metric_history(run_id, "loss")) == 4

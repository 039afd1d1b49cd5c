"""Workdirs, checkpoints, model directories and metrics on gs:// paths, against a store that lives in this process."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from flowseg_jax import experiment
from flowseg_jax.checkpoints.manager import CheckpointManager
from flowseg_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from flowseg_jax.checkpoints.storage import prepare_workdir
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError
from flowseg_jax.system.paths import resolve_path
from flowseg_jax.training.metric_writers import JsonlWriter, ProgressWriter, create_writer
from tests.helpers import fake_gcs
from tests.helpers.trees import abstract_of, make_params, make_state, same


@pytest.fixture(scope="module")
def bucket():
    with fake_gcs.serve() as path:
        yield path


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_workdir(bucket):
    workdir = prepare_workdir(f"{bucket}/runs/new")
    assert str(workdir) == f"{bucket}/runs/new"
    assert not any("probe" in key for key in fake_gcs.Objects.store)
    with pytest.raises(UserError, match=r"ftp://host/run: paths are local or gs://BUCKET/NAME"):
        prepare_workdir("ftp://host/run")


def test_a_bucket_without_its_client(monkeypatch):
    def missing(_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"gs://bucket/run: buckets need the extra gcs \(pip install gcsfs"):
        flowseg(["eval", "--workdir=gs://bucket/run"])


def test_a_workdir_that_cannot_be_written(bucket, monkeypatch):
    class Refused(Exception):
        pass

    def refuse(*_, **__):
        raise Refused("Anonymous caller does not have storage.objects.create access. See more")

    monkeypatch.setattr(fake_gcs.Objects, "_open", refuse)
    with pytest.raises(UserError, match=r"workdir gs://bucket/x cannot be written: Anonymous caller .* access; choose another"):
        prepare_workdir(f"{bucket}/x")


def test_checkpoints(bucket, capsys):
    workdir, state = resolve_path(f"{bucket}/run"), make_state()
    with CheckpointManager(workdir, best=("loss", "min")) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state | {"step": jnp.asarray(step)}, {}, {"loss": step})
    assert names(workdir / "checkpoints") == ["1", "3", "4"]
    arrays = [key for key in fake_gcs.Objects.store if "/checkpoints/4/state/ocdbt.process_0/d/" in key]
    (workdir / "checkpoints" / "3" / "commit_success.txt").unlink()  # killed while it was saved
    spoilt = max(arrays, key=lambda key: len(fake_gcs.Objects.store[key].getvalue()))
    resolve_path(f"gs:/{spoilt}").write_bytes(b"spoilt")
    with CheckpointManager(workdir, best=("loss", "min")) as checkpoints:
        restored = checkpoints.restore_latest(abstract_of(state))
        assert restored.step == checkpoints.best_step == 1
        assert same(restored.state, state | {"step": jnp.asarray(1)})
        assert f"{workdir}/checkpoints/4 is damaged" in capsys.readouterr().out
        checkpoints.save(2, state, {}, {"loss": 2.0})
    assert names(workdir / "checkpoints") == ["1", "2", "4.damaged"]


def test_a_model_directory(bucket, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    params = make_params()
    for number in range(2):
        path = save_pretrained(f"{bucket}/model", params, {"n": number}, tmp_path / "tokenizer", dtype=None, overwrite=True)
    loaded = load_pretrained(path, abstract_of(params))
    assert loaded.model_config == {"n": 1}
    assert (loaded.tokenizer_dir / "tokenizer.json").read_text() == "{}"  # a local copy: tokenizers read nothing else
    assert same(loaded.params, params)
    assert not any(".model" in key for key in fake_gcs.Objects.store)


def test_metrics_are_replaced_as_a_whole(bucket, monkeypatch):
    path = resolve_path(f"{bucket}/logged/metrics.jsonl")
    steps = lambda: [json.loads(line)["step"] for line in path.read_text().splitlines()]  # noqa: E731
    writer = create_writer(path.parent, experiment.read("shapes_tiny"), progress=ProgressWriter(9), tensorboard=False)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": step / 7})
    assert not path.exists()
    writer.flush()
    assert steps() == [1, 2, 3]
    writer.write_scalars(4, {"loss": 0.0})
    writer.close()
    assert steps() == [1, 2, 3, 4]
    monkeypatch.setattr("flowseg_jax.training.metric_writers.UPLOAD_SECONDS", 0.0)
    writer = JsonlWriter(path, start_step=2)
    assert steps() == [1, 2]
    writer.write_scalars(3, {"loss": 1.0})
    assert steps() == [1, 2, 3]

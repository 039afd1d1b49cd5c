"""Experiment trackers: metrics, pictures and config also go to Weights & Biases or MLflow, where a config's `trackers` asks.

Both are optional (`pip install -e '.[wandb]'`, `[mlflow]`), are imported when a run uses them, and take their server,
project and mode from their own environment variables (`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI=...`). A run that continues
continues its run there: the id is kept in the work directory. A tracker that fails while the run goes on is reported once.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from flowseg_jax.checkpoints.storage import write_text_atomic
from flowseg_jax.errors import UserError, did_you_mean, short_reason
from flowseg_jax.experiment import flat_values, to_json
from flowseg_jax.system.console import log
from flowseg_jax.system.paths import is_remote


def check_trackers(names: Sequence[str]) -> None:
    """Raises a UserError for a tracker that there is not, or that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"trackers: unknown tracker {name!r}{did_you_mean(name, TRACKERS)}; there are {', '.join(TRACKERS)}"
            )
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed: pip install -e '.[{name}]' in a clone, or leave it out")


def open_tracker(name: str, workdir: epath.Path, config: ConfigDict) -> ScalarWriter:
    """The writer of a tracker, for the run in `workdir`. Raises a UserError where it cannot be started."""
    check_trackers([name])
    try:
        return TRACKERS[name](importlib.import_module(name), workdir, config)
    except UserError:
        raise
    except Exception as error:  # a library's own, the network's or the server's: whatever it is, the run has not begun
        raise UserError(f"trackers: {name} cannot be started: {short_reason(error)}; set it up, or leave it out") from error


class ScalarWriter:
    """A CLU `MetricWriter` of scalars: everything else that CLU can write is none of its business."""

    def write_summaries(self, step, values, metadata=None):
        pass

    def write_images(self, step, images):
        pass

    def write_videos(self, step, videos):
        pass

    def write_audios(self, step, audios, *, sample_rate):
        pass

    def write_texts(self, step, texts):
        pass

    def write_histograms(self, step, arrays, num_buckets=None):
        pass

    def write_hparams(self, hparams):
        pass

    def flush(self):
        pass

    def close(self):
        pass


class _Tracker(ScalarWriter):
    """What both trackers have in common: the run's id, and that training outlives them."""

    name = ""

    def __init__(self, workdir: epath.Path):
        self._id_file, self._failed = workdir / f"{self.name}_run_id.txt", False

    def _run_id(self) -> str | None:
        """The id that an earlier start left."""
        return self._id_file.read_text(encoding="utf-8").strip() if self._id_file.exists() else None

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the library or of its server
            if not self._failed:
                log(f"WARNING: {self.name} takes no more metrics: {short_reason(error)}; the run goes on")
            self._failed = True


class WandbWriter(_Tracker):
    """Weights & Biases."""

    name = "wandb"

    def __init__(self, wandb: Any, workdir: epath.Path, config: ConfigDict):
        super().__init__(workdir)
        self._wandb, known = wandb, self._run_id()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flowseg"),
            name=workdir.name,
            id=known or uuid.uuid4().hex,
            resume="allow",
            dir=None if is_remote(workdir) else os.fspath(workdir),
            config=config.to_dict(),
        )
        if known is None:
            write_text_atomic(self._id_file, self._run.id + "\n")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        with self._sending():
            self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        with self._sending():
            self._run.log({name: self._wandb.Image(np.asarray(image)) for name, image in images.items()}, step=step)

    def close(self) -> None:
        with self._sending():
            self._run.finish()


class MlflowWriter(_Tracker):
    """MLflow."""

    name = "mlflow"

    def __init__(self, mlflow: Any, workdir: epath.Path, config: ConfigDict):
        super().__init__(workdir)
        self._mlflow, known = mlflow, self._run_id()
        if known is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment("flowseg")
        self._id = mlflow.start_run(run_id=known, run_name=None if known else workdir.name).info.run_id
        if known is None:
            mlflow.log_params({name: str(value)[:500] for name, value in flat_values(config).items()})
            mlflow.log_text(to_json(config), "config.json")
            write_text_atomic(self._id_file, self._id + "\n")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        with self._sending():
            self._mlflow.log_metrics({name: float(value) for name, value in scalars.items()}, step=step, run_id=self._id)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        with self._sending():
            client = self._mlflow.MlflowClient()
            for name, image in images.items():
                client.log_image(self._id, np.asarray(image), key=name, step=step)

    def close(self) -> None:
        with self._sending():
            self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Any, epath.Path, ConfigDict], ScalarWriter]] = {"wandb": WandbWriter, "mlflow": MlflowWriter}

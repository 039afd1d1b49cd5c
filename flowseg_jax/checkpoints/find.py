"""Which model a command means: a model directory, or a checkpoint of a run, which may still be training."""

from __future__ import annotations

from pathlib import Path

from etils import epath

from flowseg_jax.checkpoints import hub
from flowseg_jax.checkpoints.run_checkpoint import checkpoint_of, is_checkpoint, steps_of
from flowseg_jax.checkpoints.stored_config import read_model_config
from flowseg_jax.errors import UserError
from flowseg_jax.system import paths
from flowseg_jax.system.console import log
from flowseg_jax.system.json_files import number
from flowseg_jax.system.paths import ROOT

SHIPPED_MODEL = ROOT / "checkpoints" / "shapes_tiny"  # the trained tiny model that comes with the package


def find_model(checkpoint: str | None, workdir: str | None) -> epath.Path | Path:
    """The model that `--checkpoint` or `--workdir` names, local or remote, else the shipped one.

    A checkpoint is a model directory, or RUN@STEP, RUN@best or RUN@latest: a checkpoint of a run; or `org/name` where no such
    directory is here: a model of the Hugging Face hub, which is fetched. That of a work directory is
    the newest there is: the trained model, or the newest checkpoint of a run that is not at its end.

    Raises:
        UserError: both are given, the run has no such checkpoint, or none and no trained model yet.
    """
    if checkpoint is not None and workdir:
        raise UserError("--checkpoint and --workdir both name a model: give one of them")
    if checkpoint is not None:
        if hub.is_repo_id(checkpoint):
            return hub.download(checkpoint)
        directory, (run, at, which) = paths.resolve_path(checkpoint), checkpoint.rpartition("@")
        if not at or "/" in which or directory.is_dir():
            return directory
        return _of_run(paths.resolve_path(run), which)
    if workdir:
        run = paths.resolve_path(workdir)
        model, newest = run / "model", max(steps_of(run), default=-1)
        if newest < 0 and not model.is_dir():
            raise UserError(
                f"{workdir} holds no trained model yet, and no checkpoint: start its training with `flowseg train`, or wait "
                "for the first checkpoint"
            )
        if model.is_dir():
            trained = read_model_config(model)["extra"].get("step")
            if not number(trained, whole=True) or newest <= trained:
                return model
        return _of_run(run, "latest")
    return SHIPPED_MODEL


def _of_run(run: epath.Path, which: str) -> epath.Path:
    path = checkpoint_of(run, which)
    log(f"{run.name}: the checkpoint of step {path.name}")
    return path


def model_name(directory: epath.Path | Path) -> str:
    """What a model is called: that of a run, RUN/model, by its run; a checkpoint of it, RUN@STEP."""
    if is_checkpoint(directory):
        return f"{directory.parent.parent.name}@{directory.name}"
    return directory.parent.name if directory.name == "model" else directory.name

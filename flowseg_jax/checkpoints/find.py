"""Which model directory a command means."""

from __future__ import annotations

from pathlib import Path

from etils import epath

from flowseg_jax.errors import UserError
from flowseg_jax.system import paths
from flowseg_jax.system.paths import ROOT

SHIPPED_MODEL = ROOT / "checkpoints" / "shapes_tiny"  # the trained tiny model that comes with the package


def find_model(checkpoint: str | None, workdir: str | None) -> epath.Path | Path:
    """The model that `--checkpoint` or `--workdir` names, local or remote, else the shipped one.

    Raises:
        UserError: both are given, or the run of `workdir` has no trained model yet.
    """
    if checkpoint and workdir:
        raise UserError("--checkpoint and --workdir both name a model: give one of them")
    if checkpoint:
        return paths.resolve_path(checkpoint)
    if workdir:
        directory = paths.resolve_path(workdir) / "model"
        if not directory.is_dir():
            raise UserError(f"{workdir} holds no trained model yet: finish its training with the same `flowseg train` command")
        return directory
    return SHIPPED_MODEL


def model_name(directory: epath.Path | Path) -> str:
    """What a model directory is called: that of a run, RUN/model, by its run."""
    return directory.parent.name if directory.name == "model" else directory.name

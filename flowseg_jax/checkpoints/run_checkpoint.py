"""A run's checkpoint as a model: its parameters, read where they lie, while the run goes on.

What reads a model directory reads `RUN/checkpoints/STEP` as well. The run removes old checkpoints, so a reader holds the one
that it is about to read, by an entry in `RUN/in_use` that goes when the reader ends (or after `HELD_SECONDS`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from orbax.checkpoint import path as orbax_path

from flowseg_jax.checkpoints.manifest import check_arrays, flatten_params, unflatten_params
from flowseg_jax.errors import UserError, quoted, short_reason
from flowseg_jax.system import json_files
from flowseg_jax.system.json_files import number
from flowseg_jax.system.paths import is_remote

TOKENIZER = "tokenizer"  # folder of a run: the tokenizer of all its checkpoints
IN_USE = "in_use"  # folder of a run: a file STEP.HOST.PROCESS for each reader, and a folder HOST.PROCESS with its links
HELD_SECONDS = 3600.0  # a reader that was killed leaves its file there
BEST = ("eval/ciou", "max")  # what makes a checkpoint the best one where there is validation and nothing else is said


def is_checkpoint(path: epath.Path) -> bool:
    return path.parent.name == "checkpoints" and path.name.isdecimal() and (path / "meta" / "metadata").exists()


def steps_of(run: epath.Path) -> list[int]:
    """The steps of a run's whole checkpoints, ascending."""
    folder = run / "checkpoints"
    with contextlib.suppress(FileNotFoundError):
        whole = orbax_path.step.is_checkpoint_finalized
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and whole(path))
    return []


def checkpoint_of(run: epath.Path, which: str) -> epath.Path:
    """The checkpoint that RUN@WHICH names, held for this process.

    Args:
        run: a work directory.
        which: a step, "latest", or "best": by the metric that the run keeps its best checkpoint by.

    Raises:
        UserError: there is none; the ones that there are are named.
    """
    if not run.is_dir():
        raise UserError(f"{run}@{which}: no run {run}")
    for _ in range(3):  # the run may remove one between the listing and the look at it
        steps = steps_of(run)
        step = best_step(run, steps) if which == "best" else max(steps, default=None) if which == "latest" else _step(which)
        if step in steps and is_checkpoint(path := run / "checkpoints" / str(step)):
            held = hold(path)
            if is_checkpoint(held):
                return held
    if not steps:
        raise UserError(f"{run} has no checkpoint yet: checkpoint_every says when it saves one")
    if which == "best":
        raise UserError(f"{run} has no best checkpoint: it was not validated (eval_every), nor is checkpoint.best set")
    raise UserError(f"{run} has no checkpoint {quoted(which)}; it has {', '.join([*map(str, steps), 'latest', 'best'])}")


def _step(which: str) -> int | None:
    return int(which) if which.isdecimal() and len(which) < 19 else None


def best_step(run: epath.Path, steps: list[int]) -> int | None:
    """The step with the best value of the metric that the run is judged by; None where no checkpoint has one."""
    found = {}
    for step in steps:
        path = run / "checkpoints" / str(step)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            name, direction = tuple(read_meta(path)["config"]["checkpoint"]["best"]) or BEST
            value = json_files.read(path / "metrics" / "metrics")[name]
            if number(value):
                found[step] = value if direction == "max" else -value
    return max(found, key=found.get, default=None)


def hold(path: epath.Path) -> epath.Path:
    """Keeps a checkpoint readable until this process ends, whatever its run removes; returns where to read it.

    Where the file system has hard links, that is a second name of its files: the run may remove the first at any moment, also
    while this looks at it. Elsewhere (a bucket) a mark asks the run to keep it.
    """
    run, reader = path.parent.parent, f"{socket.gethostname()}.{os.getpid()}"
    with contextlib.suppress(Exception):  # nothing can be written there, or a file system's own error
        folder = run / IN_USE
        folder.mkdir(exist_ok=True)
        for entry in folder.iterdir():  # of readers that were killed
            if entry.is_dir() and time.time() - entry.stat().mtime > HELD_SECONDS:
                entry.rmtree()
        mark = folder / f"{path.name}.{reader}"
        mark.write_text("this checkpoint is being read\n", encoding="utf-8")
        atexit.register(_release, mark)
        if is_remote(run):
            return path
        linked = folder / reader / run.name / "checkpoints" / path.name
        if linked.exists():  # this process reads it already
            return linked
        atexit.register(_release, folder / reader)
        try:
            shutil.copytree(path, linked, copy_function=os.link)
            if (run / TOKENIZER).is_dir():
                shutil.copytree(run / TOKENIZER, folder / reader / run.name / TOKENIZER, dirs_exist_ok=True)
        except OSError:
            linked.rmtree(missing_ok=True)
            raise
        return linked
    return path


def _release(entry: epath.Path) -> None:
    with contextlib.suppress(Exception):
        entry.rmtree() if entry.is_dir() else entry.unlink()


def held_steps(run: epath.Path) -> set[int]:
    """The steps that readers hold."""
    found = set()
    with contextlib.suppress(Exception):
        for mark in (run / IN_USE).iterdir():
            if time.time() - mark.stat().mtime < HELD_SECONDS and mark.name.partition(".")[0].isdecimal():
                found.add(int(mark.name.partition(".")[0]))
    return found


def read_meta(path: epath.Path) -> dict[str, Any]:
    """A checkpoint's JSON. Raises ValueError for one that is damaged; one without a checksum is not checked further."""
    meta = json_files.read(path / "meta" / "metadata")
    if not isinstance(meta, dict):
        raise ValueError("its JSON is no group of keys")
    if meta.get(json_files.ITSELF, found := json_files.checksum(meta)) != found:
        raise ValueError("its JSON has changed since it was written")
    check_arrays(meta.get("manifest"), meta.get("checksums"), "its JSON")
    return meta


def read_checkpoint_config(path: epath.Path) -> dict[str, Any]:
    """A checkpoint's JSON in the form of a model directory's `config.json`: `model`, `extra`, `manifest`, `checksums`.

    Raises:
        UserError: it cannot be read, or was written before checkpoints could be used as models.
    """
    try:
        meta = read_meta(path)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {short_reason(error)}") from None
    extra, config = meta.get("extra"), meta.get("config")
    if not isinstance(extra, dict) or not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError(f"checkpoint {path} cannot be used as a model, an older flowseg_jax wrote it: continue the run first")
    rounded = any(name.endswith("/kernel_scale") for name in meta["manifest"])
    if "base" in meta or rounded:
        model, what = path.parent.parent / "model", "int8 weights" if rounded else "adapters without their base"
        raise UserError(
            f"checkpoint {path} holds {what}: use {model}, which the run writes at its end, or validate while it trains "
            "(eval_every)"
        )
    names = state_names(meta)
    pick = lambda values: {name: values[stored] for name, stored in names.items()}  # noqa: E731
    return {
        "model": config["model"],
        "extra": extra,
        "manifest": pick(meta["manifest"]),
        "checksums": pick(meta["checksums"]),
    }


def state_names(meta: Mapping[str, Any]) -> dict[str, str]:
    """{name of a parameter: its name in the state of a run}; of a moving average's, where the run is judged by that."""
    names, ema = meta["manifest"], meta["config"].get("ema") or {}
    averaged = ema.get("export") and any(name.startswith("ema/") for name in names)
    parts = ("ema/" if averaged else "trainable/", "frozen/")
    return {name.removeprefix(part): name for name in names for part in parts if name.startswith(part)}


def to_state(params: Any, path: epath.Path) -> dict[str, Any]:
    """A tree of parameters as the part of the state that holds them in the checkpoint `path`."""
    names = state_names(read_meta(path))
    return unflatten_params({names[name]: x for name, x in flatten_params(params).items()})


def from_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_state`."""
    return unflatten_params({stored.partition("/")[2]: x for stored, x in flatten_params(state).items()})

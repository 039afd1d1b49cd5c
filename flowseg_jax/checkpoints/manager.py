"""Training checkpoints: the few calls that a run needs, on top of Orbax.

A checkpoint is one step's directory: the state, and a JSON with everything else that it takes to continue (config, position in
the data, versions, git revision, parameter manifest). Every array and the JSON itself have checksums, because Orbax notices a
truncated file but not a changed byte. `docs/checkpoints.md` says what that guarantees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from flowseg_jax.checkpoints.manifest import Tree, check_manifest, checksums, manifest, verify
from flowseg_jax.checkpoints.run_checkpoint import held_steps, read_meta
from flowseg_jax.checkpoints.storage import cast_like, provenance, read_error, with_stored_dtypes
from flowseg_jax.errors import UserError, did_you_mean, short_reason
from flowseg_jax.system import json_files
from flowseg_jax.system.console import log
from flowseg_jax.system.distributed import collective_try, is_primary
from flowseg_jax.system.paths import resolve_path
from flowseg_jax.traces import unsaid

__all__ = ["CheckpointManager", "RestoredCheckpoint", "config_diff"]

METRIC_SIGN = {"min": -1.0, "max": 1.0}  # what makes a better value of a metric a larger one


def config_diff(saved: Mapping[str, Any], new: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """The dotted names that differ between two nested configs; a key that only one of them has differs.

    Args:
        saved, new: nested dicts (or ConfigDicts); a tuple equals the list that JSON made of it.
        ignore: dotted names, of values or of whole sections, that may change.
    """
    ignore, names = tuple(ignore), []

    def walk(a: Any, b: Any, prefix: str) -> None:
        for key in dict.fromkeys([*a, *b]):
            name = f"{prefix}{key}"
            if name in ignore:
                continue
            if key not in a or key not in b:
                names.append(name)
            elif hasattr(a[key], "keys") and hasattr(b[key], "keys"):
                walk(a[key], b[key], f"{name}.")
            elif json.dumps(_listed(a[key])) != json.dumps(_listed(b[key])):
                names.append(name)

    walk(saved, new, "")
    return names


def _listed(value: Any) -> Any:
    if hasattr(value, "keys"):
        return {key: _listed(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclasses.dataclass(frozen=True)
class RestoredCheckpoint:
    """A training checkpoint: the step it was taken after, its state (as the abstract state asked for it), its JSON and where it
    was; "" for the work directory."""

    step: int
    state: Tree
    meta: dict[str, Any]
    directory: str = ""


class CheckpointManager:
    """The training checkpoints of a run, `<workdir>/checkpoints/<step>`, written by a thread while training goes on.

    Where there are several processes, all of them make one and call its methods in the same order, on a directory that all of
    them see.

    Args:
        workdir: the run's directory, local or remote.
        keep: how many of the newest are kept.
        keep_every: steps that are multiples of it are kept for good; 0 or None for none.
        best: (metric, "min" or "max"): the checkpoint with the lowest or highest value of it is kept as well; empty for none.

    Raises:
        UserError: a policy that makes no sense, or a directory that cannot be opened.
    """

    def __init__(
        self, workdir: str | os.PathLike, keep: int = 2, keep_every: int | None = None, best: Sequence[str] | None = None
    ):
        self.directory = resolve_path(workdir) / "checkpoints"
        self._best = tuple(best or ())
        self._step: int | None = None  # whose checkpoint is being written
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [_preservation(keep, keep_every, self._best), _Held(self.directory.parent)]
            ),
            best_fn=_quality(*self._best) if self._best else None,  # without it Orbax does not store the metrics
            cleanup_tmp_directories=True,  # of a run that was killed while it saved
        )
        try:
            self._set_aside_unreadable_metrics()
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except (OSError, ImportError) as error:
            raise UserError(f"checkpoints in {self.directory} cannot be opened: {short_reason(error)}") from None

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the best value of the metric that `best` names; None before there is one."""
        return self._manager.best_step() if self._best else None

    def save(self, step: int, state: Tree, meta: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> bool:
        """Starts writing the checkpoint after `step`; the arrays may be donated as soon as this returns.

        Args:
            state: pure tree of arrays.
            meta: JSON values, at least the resolved config and the position in the data. Versions, git revision, manifest and
                checksums are added.
            metrics: scalars of this step, for `best`. Without them, or if the one that counts is not finite, the checkpoint is
                never the best one.

        Returns:
            False where that step is saved already.

        Raises:
            UserError: this checkpoint, or the one before it, could not be written; or `metrics` lack the one that `best` names.
        """
        self.wait()
        if step in self._manager.all_steps():
            return False
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            if self._best and self._best[0] not in metrics:
                raise UserError(f"checkpoint.best: no metric {self._best[0]!r}{did_you_mean(self._best[0], metrics)}")
        meta = {**meta, "step": step, **provenance(), "manifest": manifest(state), "checksums": checksums(state)}
        meta[json_files.ITSELF] = json_files.checksum(meta)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._step = step
        with self._written():
            return self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore_latest(self, abstract: Tree, check: Callable[[dict], None] | None = None) -> RestoredCheckpoint | None:
        """The newest checkpoint that can be read; a damaged one is named, set aside and the one before it taken.

        Args:
            abstract: `jax.ShapeDtypeStruct`s with shardings, in the structure of the state. The mesh need not be the one that
                the checkpoint was written on.
            check: called with a checkpoint's JSON before its arrays are read; raises a UserError if another config wrote it.

        Returns:
            None where there is none.

        Raises:
            UserError: from `check`; the state has other arrays than this run's; or a step's directory was renamed, or written
                before its JSON had a checksum.
        """
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.directory / str(step)
            meta, fault = collective_try(partial(read_meta, path), read_error)
            if not fault:
                _check_whose(path, step, meta)
                if check is not None:
                    check(meta)
                check_manifest(manifest(abstract), meta["manifest"], f"checkpoint {path}")
                with unsaid() as settle:
                    state, fault = collective_try(
                        partial(_read_state, path, with_stored_dtypes(abstract, meta["manifest"])), read_error
                    )
                    settle(fault)
            if not fault:
                _, fault = collective_try(partial(verify, state, meta["checksums"]), read_error)
            if not fault:
                state, fault = collective_try(partial(cast_like, state, abstract), read_error)
            if not fault:
                return RestoredCheckpoint(step, state, meta)
            self._set_aside(step, fault)
            self._manager.reload()
            if self.latest_step is None and is_primary():
                log("there is no older checkpoint: starting from step 0")
        return None

    def wait(self) -> None:
        """Returns when everything is on disk. Raises a UserError where that failed."""
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except (ValueError, OSError) as error:
            with contextlib.suppress(OSError):
                self._manager.reload()  # older ones that were to be removed after this one are still there
            steps = [str(step) for step in self._manager.all_steps()]
            older = f"; older checkpoints are intact: {', '.join(steps)}" if steps else ""
            what = f"checkpoint of step {self._step} in {self.directory}"
            raise UserError(f"{what} could not be written: {short_reason(error)}{older}") from error

    def _set_aside(self, step: int | str, fault: str) -> None:
        """Renames the directory of a step; all processes call it, and it is done when they return."""
        path, aside = self.directory / str(step), self.directory / f"{step}.damaged"

        def rename() -> None:
            aside.rmtree(missing_ok=True)
            path.rename(aside)
            log(f"checkpoint {path} is damaged ({fault}): set aside as {aside.name}")

        _, refusal = collective_try(lambda: rename() if is_primary() else None, read_error)
        if refusal:
            raise UserError(f"checkpoint {path} is damaged ({fault}) and cannot be set aside: {refusal}")

    def _set_aside_unreadable_metrics(self) -> None:
        """Orbax reads the metrics of all steps when it opens the directory, and fails where one is no JSON."""
        for path in sorted(self.directory.glob("*/metrics/metrics")):
            step = path.parent.parent.name
            _, fault = collective_try(partial(_read_metrics, path), read_error)
            if fault and step.isdigit():
                self._set_aside(step, fault)


def _check_whose(path: epath.Path, step: int, meta: Mapping[str, Any]) -> None:
    """Raises a UserError unless a checkpoint's JSON says that it is that of `step`, and has a checksum of its own."""
    if json_files.ITSELF not in meta:
        raise UserError(
            f"checkpoint {path} has no checksum of its JSON, an older flowseg_jax wrote it: continue with that one, or start "
            "anew in another --workdir"
        )
    if meta.get("step") != step:
        found = json_files.short(meta.get("step"))
        raise UserError(f"checkpoint {path} is that of step {found}: give the directory its name back, or remove it")


def _preservation(keep: int, keep_every: int | None, best: tuple[str, ...]) -> policies.PreservationPolicy:
    """Which checkpoints stay: those that any of the three rules keeps."""
    if keep < 1:
        raise UserError(f"checkpoint.keep must be at least 1, got {keep}")
    if keep_every is not None and keep_every < 0:
        raise UserError(f"checkpoint.keep_every must be a number of steps, or 0 for none, got {keep_every}")
    if best and (len(best) != 2 or best[1] not in METRIC_SIGN):
        raise UserError(f"checkpoint.best must be a metric and 'min' or 'max', as in ('loss', 'min'), got {best}")
    kept: list[Any] = [policies.LatestN(keep)]
    if keep_every:
        kept.append(policies.EveryNSteps(keep_every))
    if best:
        kept.append(policies.BestN(get_metric_fn=_quality(*best), n=1, keep_checkpoints_without_metrics=False))
    return policies.AnyPreservationPolicy(kept)


@dataclasses.dataclass(frozen=True)
class _Held(policies.PreservationPolicy):
    """Checkpoints that another process is reading as models."""

    run: epath.Path

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        held = held_steps(self.run)
        return [checkpoint.step in held for checkpoint in checkpoints]


def _quality(name: str, direction: str) -> Callable[[Mapping[str, float]], float]:
    """What a checkpoint's metrics are worth: the more, the better; a value that is missing or not finite is worth nothing."""

    def quality(metrics: Mapping[str, float]) -> float:
        value = metrics.get(name, math.nan)
        return METRIC_SIGN[direction] * value if math.isfinite(value) else -math.inf

    return quality


# Orbax's handlers and not the manager's `restore`: that one ends in a barrier, which a process that cannot read never reaches.


def _read_metrics(path: epath.Path) -> None:
    metrics = json_files.read(path)
    if not isinstance(metrics, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError("its metrics are no numbers")


def _read_state(path: epath.Path, abstract: Tree) -> Tree:
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.restore(path / "state", args=ocp.args.StandardRestore(abstract))

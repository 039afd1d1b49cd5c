"""Checkpoints: Orbax behind the few calls that the rest of the package needs.

Two things are stored. A *training checkpoint* (`Checkpoints`) is one step's state with a JSON of what it takes to continue:
config, position in the data, versions, parameter manifest. A *model directory* (`save_model`, `load_model`) is what can be run:
model config, tokenizer, parameters. Both carry a checksum of every array: Orbax notices a truncated file, not a changed byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from flowseg_jax.errors import UserError
from flowseg_jax.manifest import Tree, check_params, checksums, compare, flatten, manifest, nest, verify
from flowseg_jax.streaming import LazyArray, write_arrays
from flowseg_jax.writers import say

__all__ = [
    "Checkpoints",
    "LoadedModel",
    "Restored",
    "changed_keys",
    "check_free",
    "check_params",
    "load_model",
    "prepare_workdir",
    "provenance",
    "read_model_config",
    "save_model",
    "stream_model",
]

FORMAT = "flowseg_jax model"
FORMAT_VERSION = 1
DAMAGE = (ValueError, OSError, KeyError, TypeError)  # what reading a damaged directory raises, see _is_damage


def prepare_workdir(path: str | os.PathLike) -> Path:
    """Creates the directory where it is missing and proves that it can be written. Returns its absolute path.

    Raises:
        UserError: it cannot be created or written.
    """
    workdir = Path(path).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as probe:
            probe.write(b"flowseg_jax")
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error.strerror}; choose another with --workdir") from None
    return workdir


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions of the packages that decide the numbers, and the git revision of this checkout, if it is one."""
    names = ("flowseg-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    root, revision = Path(__file__).resolve().parent.parent, None
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
            revision = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {"versions": versions, "revision": revision}


def changed_keys(saved: Mapping[str, Any], new: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
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
class Restored:
    """A training checkpoint: the step it was taken behind, its state (as the abstract state asked for it) and its JSON."""

    step: int
    state: Tree
    meta: dict[str, Any]


class Checkpoints:
    """The training checkpoints of a run, `<workdir>/checkpoints/<step>`, written by a thread while training goes on.

    Args:
        workdir: the run's directory.
        keep: how many of the newest are kept.
        keep_every: steps that are multiples of it are kept for good.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int | None = None):
        self.directory = Path(workdir).absolute() / "checkpoints"
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # of a run that was killed while it saved
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise UserError(f"checkpoints in {self.directory} cannot be opened: {error}") from None

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> bool:
        """Starts writing the checkpoint behind `step`; the arrays may be donated as soon as this returns.

        Args:
            state: pure tree of arrays.
            meta: JSON values, at least the resolved config and the position in the data. Versions, git revision, manifest and
                checksums are added.

        Returns:
            False where that step is saved already.
        """
        if step in self._manager.all_steps():
            return False
        meta = {**meta, "step": step, **provenance(), "manifest": manifest(state), "checksums": checksums(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._written(f"checkpoint of step {step}"):
            return self._manager.save(step, args=args, force=True)

    def restore_latest(self, abstract: Tree, check: Callable[[dict], None] | None = None) -> Restored | None:
        """The newest checkpoint that can be read; a damaged one is named, set aside and the one before it taken.

        Args:
            abstract: `jax.ShapeDtypeStruct`s with shardings, in the structure of the state.
            check: called with a checkpoint's JSON before its arrays are read; raises a UserError if another config wrote it.

        Returns:
            None where there is none.

        Raises:
            UserError: from `check`, or when the state has other arrays than this run's.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                stored, sums = meta["manifest"], meta["checksums"]
            except Exception as error:
                if not _is_damage(error):
                    raise
                self._set_aside(step, error)
                continue
            if check is not None:
                check(meta)
            compare(manifest(abstract), stored, f"checkpoint {self.directory / str(step)}")
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(_as_stored(abstract, stored)))
                state = self._manager.restore(step, args=args).state
                verify(state, sums)
            except Exception as error:
                if not _is_damage(error):
                    raise
                self._set_aside(step, error)
                continue
            return Restored(step, _cast(state, abstract), meta)
        return None

    def wait(self) -> None:
        """Returns when everything is on disk. Raises a UserError where that failed."""
        with self._written("a checkpoint"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _written(self, what: str):
        try:
            yield
        except (ValueError, OSError) as error:
            steps = self._manager.all_steps()
            older = f"; the checkpoints of steps {', '.join(map(str, steps))} are intact" if steps else ""
            raise UserError(f"{what} in {self.directory} could not be written: {_line(error)}{older}") from error

    def _set_aside(self, step: int, error: Exception) -> None:
        aside = self.directory / f"{step}.damaged"
        if jax.process_index() == 0:
            if aside.exists():
                shutil.rmtree(aside)
            (self.directory / str(step)).rename(aside)
        say(f"checkpoint {self.directory / str(step)} is damaged ({_line(error)}): set aside as {aside.name}")
        self._manager.reload()
        if self.latest_step is None:
            say("there is no older checkpoint: starting from step 0")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model directory in memory: parameters, the dict for `FlowSegConfig.from_dict`, the tokenizer's directory, the rest.

    `tower` is None for a model; for a tower it holds its `family` and `config`, `model_config` is empty, and there may be no
    tokenizer.
    """

    params: Tree
    model_config: dict[str, Any]
    tokenizer_dir: Path
    extra: dict[str, Any]
    tower: dict[str, Any] | None = None


def save_model(
    directory: str | os.PathLike,
    params: Tree,
    model_config: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike,
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = "bfloat16",
    overwrite: bool = False,
) -> Path:
    """Writes a runnable model directory: `config.json`, `tokenizer/`, `params/`. It appears complete or not at all.

    Args:
        params: pure dict of arrays.
        model_config: what `FlowSegConfig.from_dict` reads.
        tokenizer_dir: directory that `transformers.AutoTokenizer` reads; copied.
        extra: anything else worth keeping with the weights (how they were made, metrics, prompts); JSON values.
        dtype: what floating-point parameters are stored as; None keeps each one's own.
        overwrite: replace a directory that exists.

    Raises:
        UserError: the directory exists, or cannot be written.
    """
    params = _cast_floats(_string_keys(params), dtype)

    def write(path: Path) -> dict[str, int]:
        with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(params))
        return checksums(params)

    return _write_model(directory, write, manifest(params), {"model": dict(model_config)}, tokenizer_dir, extra, overwrite)


def stream_model(
    directory: str | os.PathLike,
    arrays: Mapping[str, LazyArray],
    model_config: Mapping[str, Any] | None,
    tokenizer_dir: str | os.PathLike | None,
    extra: Mapping[str, Any] | None = None,
    *,
    tower: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """`save_model` for arrays that are made one at a time, while they are written; each keeps its dtype.

    Args:
        arrays: by flat name ("llm/table").
        model_config: of a model; None for a tower.
        tokenizer_dir: as in `save_model`; a tower may have none.
        tower: of a tower, its `family` and `config`.
        progress: called with the name of each array once it is made.

    Raises:
        UserError: as `save_model`, and what making an array raises.
    """
    kind = {"model": dict(model_config)} if tower is None else {"model": {}, "tower": dict(tower)}
    kinds = {name: [list(lazy.shape), str(lazy.dtype)] for name, lazy in arrays.items()}
    return _write_model(
        directory, lambda path: write_arrays(path, arrays, progress), kinds, kind, tokenizer_dir, extra, overwrite
    )


def _write_model(
    directory: str | os.PathLike,
    write: Callable[[Path], dict[str, int]],
    kinds: Mapping[str, list],
    kind: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike | None,
    extra: Mapping[str, Any] | None,
    overwrite: bool,
) -> Path:
    """A directory with what `write` puts into `params/`; it returns the checksums of the arrays in the manifest `kinds`."""
    target = Path(directory).absolute()
    check_free(target, overwrite)
    if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
        raise UserError(f"no tokenizer directory {tokenizer_dir}")
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **kind, "extra": dict(extra or {}), **provenance()}
    json.dumps(config)  # what is no JSON value shows before anything is written
    fresh, old = (target.with_name(f".{target.name}.{what}-{os.getpid()}") for what in ("tmp", "old"))
    try:
        fresh.mkdir(parents=True)
        sums = write(fresh / "params")
        note = fresh / "params" / "commit_success.txt"
        if note.exists():
            note.write_text("complete\n")  # Orbax writes where it was saved, which is nobody's business and changes the bytes
        if tokenizer_dir is not None:
            shutil.copytree(tokenizer_dir, fresh / "tokenizer")
        text = json.dumps({**config, "manifest": kinds, "checksums": sums}, indent=1)
        (fresh / "config.json").write_text(text + "\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        full = os.strerror(errno.ENOSPC)  # TensorStore says it at the end of a long sentence
        reason = full if full in str(error) else _line(error)
        raise UserError(f"model directory {target} could not be written: {reason}") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return target


def check_free(directory: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises a UserError where a directory to be written exists already and is not empty."""
    target = Path(directory)
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists: remove it or choose another name")


def read_model_config(directory: str | os.PathLike, *, towers: bool = False) -> dict[str, Any]:
    """The whole `config.json` of a model directory, checked: `model`, `extra`, `manifest`, `checksums`, versions, revision.

    Args:
        towers: accept the directory of a tower as well, which has `tower` in place of `model`.
    """
    path = Path(directory).absolute()
    if not path.is_dir():
        raise UserError(f"no model directory {path}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a model directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {_line(error)}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path / 'config.json'} was not written by flowseg_jax; convert such weights by convert_weights")
    if config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version")
        raise UserError(f"{path} has format version {found}, this flowseg_jax reads {FORMAT_VERSION}: convert it again")
    tower = config.get("tower")
    lacking = [key for key in ("model", "extra", "manifest", "checksums") if not isinstance(config.get(key), dict)]
    needed = ("params",) if tower is not None else ("params", "tokenizer")
    lacking += [name for name in needed if not (path / name).is_dir()]
    if lacking:
        raise UserError(f"model directory {path} is incomplete: it lacks {', '.join(lacking)}")
    if tower is not None and not towers:
        raise UserError(
            f"{path} holds a tower ({tower.get('family')}), not a whole model: build one around it by "
            "python -m convert_weights flowseg llm=DIR siglip=DIR sam=DIR OUT"
        )
    return config


def load_model(
    directory: str | os.PathLike, abstract: Tree | None = None, dtype: str | None = "float32", *, towers: bool = False
) -> LoadedModel:
    """Reads a model directory and verifies every array.

    Args:
        directory: written by `save_model` or `stream_model`.
        abstract: parameters as `jax.ShapeDtypeStruct`s, with shardings where there is a mesh; they are read straight into that
            form, and compared with it first. Without it they come as NumPy arrays.
        dtype: without `abstract`, what floating-point parameters are cast to; None leaves them as they are stored.
        towers: read the directory of a tower as well.

    Raises:
        UserError: no such directory, not a model directory, damaged, or parameters that do not fit `abstract`.
    """
    path = Path(directory).absolute()
    config = read_model_config(path, towers=towers)
    stored = config["manifest"]
    if abstract is not None:
        compare(manifest(abstract), stored, f"model directory {path}")
        item = _string_keys(_as_stored(abstract, stored))
    else:
        item = nest({name: jax.ShapeDtypeStruct(tuple(shape), kind) for name, (shape, kind) in stored.items()})
    try:
        with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
            if abstract is not None:
                restore = ocp.checkpoint_utils.construct_restore_args(item)
            else:
                restore = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), item)
            params = checkpointer.restore(path / "params", args=ocp.args.PyTreeRestore(item=item, restore_args=restore))
        verify(params, config["checksums"])
    except Exception as error:
        if not _is_damage(error):
            raise
        raise UserError(f"model directory {path} is damaged: {_line(error)}") from error
    params = nest(flatten(params))
    params = _cast(params, abstract) if abstract is not None else _cast_floats(params, dtype)
    return LoadedModel(params, config["model"], path / "tokenizer", config["extra"], config.get("tower"))


def _as_stored(abstract: Tree, stored: Mapping[str, list]) -> Tree:
    """The abstract arrays with the dtypes they were written in: checksums are of those bytes."""

    def one(path: tuple, x: Any) -> Any:
        kind = stored[jax.tree_util.keystr(path, simple=True, separator="/")][1]
        if kind == str(x.dtype) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=getattr(x, "sharding", None))

    return jax.tree_util.tree_map_with_path(one, abstract)


def _cast(tree: Tree, abstract: Tree) -> Tree:
    return jax.tree.map(lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), tree, abstract)


def _cast_floats(tree: Tree, dtype: str | None) -> Tree:
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _string_keys(tree: Tree) -> Tree:
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _is_damage(error: Exception) -> bool:
    """Whether reading failed for what is on disk and not, say, for want of memory. An unreadable chunk is a bare Exception."""
    return isinstance(error, DAMAGE) or type(error) is Exception


def _line(error: BaseException) -> str:
    """The first sentence of an error's text, or its type."""
    text = str(error).strip().splitlines()
    return text[0].split(". See ")[0].split(" [")[0][:200] if text else type(error).__name__

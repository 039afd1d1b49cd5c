"""Model directories: what can be run. A model's config, its tokenizer and its parameters, or one converted component's.

Everything has a checksum: every array, because Orbax notices a truncated file and not a changed byte, every file of the
tokenizer, and the config itself. A directory is made under a temporary name beside its place and appears complete or not at
all.

    flowseg seal DIR     # accepts config.json and tokenizer as they are: new checksums
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flowseg_jax.checkpoints.manifest import (
    Tree,
    check_manifest,
    checksums,
    flatten_params,
    manifest,
    unflatten_params,
    verify,
)
from flowseg_jax.checkpoints.run_checkpoint import TOKENIZER, from_state, is_checkpoint, to_state
from flowseg_jax.checkpoints.storage import cast_like, copy_tree, local_directory, provenance, read_error, with_stored_dtypes
from flowseg_jax.checkpoints.stored_config import (
    FORMAT,
    FORMAT_VERSION,
    has_tokenizer,
    read_model_config,
    seal,
    sealed,
)
from flowseg_jax.checkpoints.streaming import LazyArray, write_arrays
from flowseg_jax.errors import UserError, not_writable, short_reason
from flowseg_jax.system.distributed import collective_try, is_primary, locked
from flowseg_jax.system.paths import resolve_path
from flowseg_jax.traces import unsaid

__all__ = [
    "PretrainedModel",
    "copy_pretrained",
    "load_pretrained",
    "read_model_config",
    "require_empty_directory",
    "save_pretrained",
    "save_pretrained_streaming",
    "seal",
]


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A model directory in memory: parameters, the dict for `FlowSegConfig.from_dict`, the tokenizer's directory, the rest.

    `component` is None for a model; for a component it holds its `family` and `config`, `model_config` is empty, and there may
    be no tokenizer.
    """

    params: Tree
    model_config: dict[str, Any]
    tokenizer_dir: Path
    extra: dict[str, Any]
    component: dict[str, Any] | None = None


def save_pretrained(
    directory: str | os.PathLike,
    params: Tree,
    model_config: Mapping[str, Any] | None,
    tokenizer_dir: str | os.PathLike | None,
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = "bfloat16",
    overwrite: bool = False,
    component: Mapping[str, Any] | None = None,
) -> epath.Path:
    """Writes a runnable model directory: `config.json`, `tokenizer/`, `params/`. It appears complete or not at all.

    Where there are several processes, all of them call it, with a directory that all of them see.

    Args:
        params: pure dict of arrays, each on this process's devices or on those of all processes.
        model_config: what `FlowSegConfig.from_dict` reads; None for a component.
        tokenizer_dir: directory that `transformers.AutoTokenizer` reads; copied. None for a model without language.
        extra: anything else worth keeping with the weights (how they were made, metrics, prompts); JSON values.
        dtype: what floating-point parameters are stored as; None keeps each one's own.
        overwrite: replace a directory that exists.
        component: of a component, its `family` and `config`.

    Raises:
        UserError: the directory exists, is being written by another process, or cannot be written.
    """
    kind = {"model": dict(model_config)} if component is None else {"model": {}, "component": dict(component)}
    params = _cast_floats(_string_keys(params), dtype)

    def write(path: epath.Path) -> dict[str, int]:
        with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(params))
        return checksums(params)

    with locked(directory, beside=True):
        return _write_model(directory, write, manifest(params), kind, tokenizer_dir, extra, overwrite)


def save_pretrained_streaming(
    directory: str | os.PathLike,
    arrays: Mapping[str, LazyArray],
    model_config: Mapping[str, Any] | None,
    tokenizer_dir: str | os.PathLike | None,
    extra: Mapping[str, Any] | None = None,
    *,
    component: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> epath.Path:
    """`save_pretrained` for arrays that are made one at a time, while they are written; each keeps its dtype.

    Args:
        arrays: by flat name ("llm/table").
        model_config: of a model; None for a component.
        tokenizer_dir: as in `save_pretrained`; a component may have none.
        component: of a component, its `family` and `config`.
        progress: called with the name of each array once it is made.

    Raises:
        UserError: as `save_pretrained`, and what making an array raises.
    """
    kind = {"model": dict(model_config)} if component is None else {"model": {}, "component": dict(component)}
    entries = {name: [list(lazy.shape), str(lazy.dtype)] for name, lazy in arrays.items()}
    with locked(directory, beside=True):
        return _write_model(
            directory, lambda path: write_arrays(path, arrays, progress), entries, kind, tokenizer_dir, extra, overwrite
        )


def copy_pretrained(source: str | os.PathLike, target: str | os.PathLike) -> epath.Path:
    """Copies a model directory, which is checked first; the copy appears complete or not at all.

    Raises:
        UserError: `source` is no model directory or a damaged one, `target` exists or cannot be written.
    """
    source, target = resolve_path(source), resolve_path(target)
    read_model_config(source)
    with locked(target, beside=True):
        require_empty_directory(target)
        fresh = target.with_name(f".{target.name}.tmp")
        try:
            fresh.rmtree(missing_ok=True)
            copy_tree(source, fresh)
            if target.exists():
                target.rmdir()  # it is empty
            fresh.rename(target)
        except Exception as error:
            if reason := _not_written(error):
                raise UserError(f"model directory {target} could not be written: {reason}") from None
            raise
    return target


def _write_model(
    directory: str | os.PathLike,
    write: Callable[[epath.Path], dict[str, int]],
    entries: Mapping[str, list],
    kind: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike | None,
    extra: Mapping[str, Any] | None,
    overwrite: bool,
) -> epath.Path:
    """A directory with what `write` puts into `params/`; it returns the checksums of the arrays in the manifest `entries`."""
    target = resolve_path(directory)
    require_empty_directory(target, overwrite)
    tokenizer = None if tokenizer_dir is None else resolve_path(tokenizer_dir)
    if tokenizer is not None and not tokenizer.is_dir():
        raise UserError(f"no tokenizer directory {tokenizer_dir}")
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **kind, "extra": dict(extra or {}), **provenance()}
    json.dumps(config)  # what is no JSON value shows before anything is written
    # The names are the same in every process, and in the run that was killed while it wrote here.
    fresh, old = (target.with_name(f".{target.name}.{what}") for what in ("tmp", "old"))

    def begin() -> None:
        _recover(target, old)
        fresh.rmtree(missing_ok=True)
        fresh.mkdir(parents=True)

    def finish(sums: Mapping[str, int]) -> None:
        # Orbax notes where it was saved, which is nobody's business and changes the bytes.
        (fresh / "params" / "commit_success.txt").write_text("complete\n", encoding="utf-8")
        if tokenizer is not None:
            copy_tree(tokenizer, fresh / "tokenizer")
        (fresh / "config.json").write_text(sealed(fresh, {**config, "manifest": entries, "checksums": sums}), encoding="utf-8")
        if target.exists():
            target.rename(old)
        fresh.rename(target)

    try:
        _, fault = collective_try(lambda: begin() if is_primary() else None, _not_written)
        if not fault:
            sums, fault = collective_try(lambda: write(fresh / "params"), _not_written)
        if not fault:
            _, fault = collective_try(lambda: finish(sums) if is_primary() else None, _not_written)
    finally:
        if is_primary():
            with contextlib.suppress(OSError):  # a leftover does no harm, the next one who writes here removes it
                _recover(target, old)
                fresh.rmtree(missing_ok=True)
    if fault:
        raise UserError(f"model directory {target} could not be written: {fault}")
    return target


def _recover(target: epath.Path, old: epath.Path) -> None:
    """Puts a directory that was to be replaced back into its place if nothing came there; otherwise it is done with."""
    if old.exists():
        if target.exists():
            old.rmtree()
        else:
            old.rename(target)


def _not_written(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return None
    return not_writable(error) or (short_reason(error) if isinstance(error, OSError | ValueError) else None)


def require_empty_directory(directory: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises a UserError where a directory to be written exists already and is not empty."""
    target = resolve_path(directory)
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists: remove it or choose another name")


def load_pretrained(
    directory: str | os.PathLike, abstract: Tree | None = None, dtype: str | None = "float32", *, allow_component: bool = False
) -> PretrainedModel:
    """Reads a model directory and verifies every array.

    Args:
        directory: written by `save_pretrained` or `save_pretrained_streaming`; or a run's checkpoint, `RUN/checkpoints/STEP`.
        abstract: parameters as `jax.ShapeDtypeStruct`s, with shardings where there is a mesh; they are read straight into that
            form, and compared with it first. Without it they come as NumPy arrays.
        dtype: without `abstract`, what floating-point parameters are cast to; None leaves them as they are stored.
        allow_component: read the directory of a component as well.

    Raises:
        UserError: no such directory, not a model directory, damaged, or parameters that do not fit `abstract`.
    """
    path = resolve_path(directory)
    config = read_model_config(path, allow_component=allow_component)
    stored = config["manifest"]
    if abstract is not None:
        check_manifest(manifest(abstract), stored, f"model directory {path}")
        item = _string_keys(with_stored_dtypes(abstract, stored))
    else:
        item = unflatten_params({name: jax.ShapeDtypeStruct(tuple(shape), kind) for name, (shape, kind) in stored.items()})

    params = read_params(path, item, config["checksums"], on_devices=abstract is not None)
    params = cast_like(params, abstract) if abstract is not None else _cast_floats(params, dtype)
    tokenizer = (path.parent.parent if is_checkpoint(path) else path) / TOKENIZER
    tokenizer = local_directory(tokenizer) if has_tokenizer(config) else Path(tokenizer)
    return PretrainedModel(params, config["model"], tokenizer, config["extra"], config.get("component"))


def read_params(path: epath.Path, item: Tree, sums: Mapping[str, int], *, on_devices: bool) -> dict[str, Any]:
    """The arrays of a model directory, verified; `item`: their names, shapes, dtypes and, on devices, shardings."""

    of_run = is_checkpoint(path)

    def read() -> Tree:
        stored = to_state(item, path) if of_run else item
        if on_devices:
            restore = ocp.checkpoint_utils.construct_restore_args(stored)
        else:
            restore = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), stored)
        # The handler and no checkpointer around it: that one ends in a barrier, which a process that cannot read never reaches.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            args = ocp.args.PyTreeRestore(item=stored, restore_args=restore, partial_restore=of_run)
            params = handler.restore(path / ("state" if of_run else "params"), args=args)
        return from_state(params) if of_run else params

    with unsaid() as settle:
        params, fault = collective_try(read, read_error)
        settle(fault)
    if not fault:
        _, fault = collective_try(lambda: verify(params, sums), read_error)
    if fault:
        raise UserError(f"{'checkpoint' if of_run else 'model directory'} {path} is damaged: {fault}")
    return unflatten_params(flatten_params(params))


def _cast_floats(tree: Tree, dtype: str | None) -> Tree:
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _string_keys(tree: Tree) -> Tree:
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree

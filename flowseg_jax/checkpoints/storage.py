"""What training checkpoints and model directories have in common: paths, where the numbers come from, and what damage is."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from safetensors import SafetensorError

from flowseg_jax.checkpoints.manifest import Tree
from flowseg_jax.errors import UserError, not_writable, short_reason
from flowseg_jax.system.paths import is_remote, resolve_path

# What reading a damaged directory raises. Orbax goes on with JSON that is not what it wrote until an attribute is missing.
DAMAGE = (ValueError, OSError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)


def prepare_workdir(path: str | os.PathLike) -> epath.Path:
    """Creates the directory where it is missing and proves that it can be written. Returns its absolute path.

    Raises:
        UserError: it cannot be created or written.
    """
    workdir = resolve_path(path)
    probe = workdir / f".probe-{uuid.uuid4().hex}"  # several processes may look at the same time
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("flowseg_jax", encoding="utf-8")
        probe.unlink()
    except Exception as error:
        if not isinstance(error, OSError | ImportError) and not is_remote(workdir):  # clients of object stores have their own
            raise
        why = getattr(error, "strerror", None) or short_reason(error)
        raise UserError(f"workdir {workdir} cannot be written: {why}; choose another with --workdir") from None
    return workdir


@contextlib.contextmanager
def fresh_directory(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` when the block ends, so that this appears complete or not at all.

    Raises:
        UserError: it cannot be written, or what the block raises.
    """
    fresh = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    except (OSError, SafetensorError) as error:
        why = not_writable(error) or getattr(error, "strerror", None) or error
        raise UserError(f"{target} could not be written: {why}") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(fresh)


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copies a directory, between file systems where need be; `target` must not exist."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            copy_tree(entry, target / entry.name)
        else:
            (target / entry.name).write_bytes(entry.read_bytes())


def write_text_atomic(path: Path | epath.Path, text: str) -> None:
    """Writes a whole file or none of it; its folder is made. UserError where that is not possible."""
    part = path if is_remote(path) else path.with_name(path.name + ".part")  # an object is written whole
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        if part is not path:
            os.replace(part, path)
    except Exception as error:
        with contextlib.suppress(Exception):
            if part is not path:
                part.unlink()
        if not isinstance(error, OSError) and not is_remote(path):  # clients of object stores have their own
            raise
        why = getattr(error, "strerror", None) or short_reason(error)
        raise UserError(f"cannot write {path}: {why}; make room, or choose a folder you can write to") from error


@functools.cache
def local_directory(directory: epath.Path) -> Path:
    """The directory itself where it is local, else a copy that lives as long as this process."""
    if not is_remote(directory):
        return Path(directory)
    root = tempfile.mkdtemp(prefix="flowseg_jax-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    copy_tree(directory, epath.Path(root) / directory.name)
    return Path(root) / directory.name


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions of the packages that decide the numbers, and the git revision of this checkout, if it is one."""
    names = ("flowseg-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    root, revision = Path(__file__).resolve().parents[2], None
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
            revision = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {"versions": versions, "revision": revision}


def with_stored_dtypes(abstract: Tree, stored: Mapping[str, list]) -> Tree:
    """The abstract arrays with the dtypes that manifest `stored` has for them: checksums are of those bytes."""

    def one(path: tuple, x: Any) -> Any:
        kind = stored[jax.tree_util.keystr(path, simple=True, separator="/")][1]
        if kind == str(x.dtype) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=getattr(x, "sharding", None))

    return jax.tree_util.tree_map_with_path(one, abstract)


def cast_like(tree: Tree, abstract: Tree) -> Tree:
    """The arrays of `tree` in the dtypes of `abstract`."""
    return jax.tree.map(lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), tree, abstract)


def read_error(error: Exception) -> str | None:
    """A line about an error that reading raised for what is on disk; None for another, say for want of memory."""
    if isinstance(error, UserError):
        return str(error)
    # An unreadable chunk is a bare Exception.
    return short_reason(error) if isinstance(error, DAMAGE) or type(error) is Exception else None

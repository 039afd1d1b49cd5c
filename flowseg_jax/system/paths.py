"""Where the package's own files are; names that files give us, before they become paths: the one place where that is decided.

Whoever wrote an annotation file or the metadata of a prepared set may be hostile. A name that is absolute, goes up with `..`
or holds a NUL must not lead to a file elsewhere, and one that no file system takes must be said in words.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from etils import epath

from flowseg_jax.errors import UserError, quoted

_PACKAGE = Path(__file__).resolve().parent.parent
# What holds `configs/` and `checkpoints/shapes_tiny/`: the repository in a checkout, the package itself where it is installed.
ROOT = _PACKAGE if (_PACKAGE / "configs" / "shapes_tiny.py").is_file() else _PACKAGE.parent

MADE = {"data/smollm2": "make smollm2", "data/stages": "make stages"}  # folder -> what makes it, in a checkout

_LONGEST = 255  # bytes of a part of a path, on all usual file systems
_LONGEST_PATH = 4095  # bytes of a whole path
_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


def check_name(name: str, where: str) -> str:
    """A name that files are named after, a split's above all. Returns it.

    Args:
        name: from a file or the command line.
        where: file and field, for the message.

    Raises:
        UserError: it is empty, longer than 64 characters, or holds anything but letters, digits, `_` and `-`.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: {quoted(name)} cannot name a file; use at most 64 letters, digits, _ and -")
    return name


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of `name` in `folder`, perhaps in folders below it.

    Args:
        folder: which `name` must not leave. Symbolic links are the owner's and are followed.
        name: a relative path with `/`, from a file.
        where: file and field, for the message.

    Raises:
        UserError: `name` is empty, absolute or no file name, or it leads out of the folder.
    """
    relative = PurePosixPath(name)
    if "\0" in name or not relative.parts or relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{where}: {quoted(name)} leads out of the folder {folder}")
    try:
        parts = [len(part.encode()) for part in relative.parts]
    except UnicodeEncodeError:
        raise UserError(f"{where}: {quoted(name)} is no file name (not UTF-8)") from None
    if max(parts) > _LONGEST or sum(parts) + len(parts) > _LONGEST_PATH:
        raise UserError(f"{where}: {quoted(name)} is no file name (too long)")
    return folder / relative


def resolve_path(path: str | os.PathLike) -> epath.Path:
    """A local path made absolute, or a remote one (`gs://bucket/name`) as it is, with the methods of `pathlib.Path`.

    Raises:
        UserError: a scheme that etils has no file system for, or a bucket without the client for it.
    """
    text = os.fspath(path)
    if "://" not in text:  # etils would take the absolute path of a remote one for a local one
        return epath.Path(Path(text).expanduser().absolute())
    if text.startswith("gs://"):
        import fsspec  # here: it takes a quarter of a second

        try:
            fsspec.get_filesystem_class("gcs")  # the name that etils opens
        except ImportError:
            raise UserError(f"{text}: buckets need the extra gcs (pip install gcsfs google-cloud-storage)") from None
    try:
        return epath.Path(text)
    except KeyError:
        raise UserError(f"{text}: paths are local or gs://BUCKET/NAME") from None


def made_by(path: str | os.PathLike) -> str:
    """How what a config of ours asks for comes to be, for the message where it is missing; "" for other places."""
    command = next((command for folder, command in MADE.items() if Path(path).is_relative_to(folder)), "")
    return f"; `{command}` makes it" if command else ""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names an object store, where files are replaced whole and directories are not renamed at one stroke."""
    return "://" in os.fspath(path)

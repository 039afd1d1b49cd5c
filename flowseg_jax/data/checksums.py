"""The SHA-256 of every file of a prepared set, in a file that `sha256sum -c SHA256SUMS` reads too.

They tell damage, not intent: whoever changes a file can change its checksum as well. What is read is therefore checked all the
same; see `serialization.deserialize` and `Prepared`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from flowseg_jax.data.serialization import AGAIN
from flowseg_jax.errors import UserError, brief, quoted
from flowseg_jax.system import paths

FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_checked: set[tuple[str, int, int, int, str]] = set()  # files that this process has found to be as they were written


def of_file(path: Path) -> str:
    """The SHA-256 of a file, read in pieces. OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(root: Path, names: Iterable[str], known: Mapping[str, str]) -> None:
    """Writes the checksums of files in `root`, given by relative names; `known` has those that need not be read again."""
    lines = [f"{known.get(name) or of_file(root / name)}  {name}\n" for name in sorted(names)]
    (root / FILE).write_text("".join(lines), encoding="utf-8")


def read(root: Path) -> dict[str, str]:
    """File name -> checksum. UserError if the list is missing or damaged."""
    path = root / FILE
    found: dict[str, str] = {}
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the checksums cannot be read ({brief(error)}); {AGAIN}") from None
    for number, line in enumerate([*lines, last] if last else lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            raise UserError(f"{path}:{number}: damaged; {AGAIN}")
        paths.inside(root, match[2], f"{path}:{number}")
        found[match[2]] = match[1]
    return found


def expected(root: Path, name: str, sums: Mapping[str, str]) -> str:
    """The checksum of a file that is about to be read. UserError if it has none."""
    if name not in sums:
        raise UserError(f"{root / FILE}: has no checksum of {quoted(name)}; {AGAIN}")
    return sums[name]


def check(root: Path, names: Iterable[str], sums: Mapping[str, str]) -> None:
    """Raises a UserError that names the first of these files that is missing or not as it was written.

    A file is read once a process, and again when its size or time has changed since.
    """
    for name in names:
        path, want = root / name, expected(root, name, sums)
        try:
            stat = os.stat(path)
            key = (os.path.realpath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, want)
            if key not in _checked:
                compare(path, of_file(path), want)
                _checked.add(key)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None


def compare(path: Path, found: str, want: str) -> None:
    """Raises a UserError unless the checksums are the same."""
    if found != want:
        raise UserError(f"{path}: has changed since it was prepared (its checksum differs from {FILE}); {AGAIN}")

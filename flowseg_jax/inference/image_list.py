"""Many images and what is asked about each, for `inference.batch`: a few bytes of memory an image, however many there are."""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Sequence
from typing import IO, Protocol

from flowseg_jax.errors import UserError
from flowseg_jax.inference.inputs import PredictionJob, image_names, parse_job
from flowseg_jax.system.paths import is_remote, resolve_path

LONGEST_LINE = 1 << 20  # bytes of a line of a JSONL


class ImageList(Protocol):
    """Images in a fixed order.

    Attributes:
        digest: of the names, where they are looked for and the texts, to tell one list from another.
    """

    digest: str

    def __len__(self) -> int: ...

    def job(self, place: int) -> PredictionJob:
        """The image at a place and what is asked about it; a UserError where the list says it in no way that can be read."""


class FolderList:
    """The image files of a folder or a bucket, by name, each asked the same texts.

    Held are the names as one string of bytes and where each of them begins.

    Args:
        folder: local, or `gs://BUCKET/NAME`.
        texts: asked about each.
        recursive: enter the folders inside of it.

    Raises:
        UserError: there is no such folder, or no image file in it.
    """

    def __init__(self, folder: str | os.PathLike[str], texts: Sequence[str], *, recursive: bool = False):
        self._folder = resolve_path(folder) if is_remote(folder) else os.fspath(folder)
        self._texts = tuple(texts)
        names = [os.fsencode(name) for name in image_names(folder, recursive=recursive)]
        self._starts = array("Q", [0])
        for name in names:
            self._starts.append(self._starts[-1] + len(name))
        self._names = b"".join(names)
        identity = repr((os.fspath(folder), self._texts)).encode("utf-8", "backslashreplace")
        self.digest = hashlib.sha256(identity + self._names).hexdigest()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def job(self, place: int) -> PredictionJob:
        name = os.fsdecode(self._names[self._starts[place] : self._starts[place + 1]])
        return PredictionJob.of(self._folder, name, self._texts, "--text")


class JsonlList:
    """The lines `{"image": path, "text": text or list of texts}` of a JSONL, which may be remote; empty ones do not count.

    Held is where each line begins and its number; a line is read when its turn comes.

    Raises:
        UserError: the file cannot be read, or has no line.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = resolve_path(path) if is_remote(path) else os.fspath(path)
        self._starts, self._numbers = array("Q"), array("Q")
        digest = hashlib.sha256(os.fsencode(path))
        try:
            self._file = _local_copy(self._path) if is_remote(path) else open(path, "rb")
            at, number, whole = 0, 1, True
            while line := self._file.readline(LONGEST_LINE):
                digest.update(line)
                if whole and line.strip():
                    self._starts.append(at)
                    self._numbers.append(number)
                whole = line.endswith(b"\n")
                number += whole
                at += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot read the JSONL ({error.strerror or error})") from None
        self.digest = digest.hexdigest()
        if not self._starts:
            raise UserError(f'{path}: has no line; write {{"image": path, "text": what to segment}}')

    def __len__(self) -> int:
        return len(self._starts)

    def job(self, place: int) -> PredictionJob:
        where = f"{self._path}:{self._numbers[place]}"
        line, _, _ = os.pread(self._file.fileno(), LONGEST_LINE, self._starts[place]).partition(b"\n")
        if len(line) == LONGEST_LINE:
            raise UserError(f"{where}: the line has more than {LONGEST_LINE} bytes")
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not text in UTF-8 ({error.reason})") from None
        return parse_job(os.path.dirname(self._path) if isinstance(self._path, str) else self._path.parent, where, text)


def open_list(path: str | os.PathLike[str], texts: Sequence[str], *, recursive: bool = False) -> ImageList:
    """The images of a JSONL (`*.jsonl`), which has texts of its own, or of a folder or a bucket, all asked `texts`.

    Raises:
        UserError: there is no such thing or nothing in it; texts beside those of a JSONL, or none for a folder.
    """
    if os.fspath(path).endswith(".jsonl"):
        if texts:
            raise UserError(f"{path} has its own texts: leave --text out")
        if recursive:
            raise UserError(f"{path} names its images: --recursive is for folders, leave it out")
        return JsonlList(path)
    if not texts:
        raise UserError('--text is missing: say what to segment, as in --text="the red circle"')
    return FolderList(path, texts, recursive=recursive)


def _local_copy(path: os.PathLike[str]) -> IO[bytes]:
    """A remote file's bytes in a nameless local one, which goes with this process."""
    copy = tempfile.TemporaryFile()
    with path.open("rb") as stream:
        while part := stream.read(1 << 22):
            copy.write(part)
    copy.seek(0)
    return copy

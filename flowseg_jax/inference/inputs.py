"""What to predict on: one image, a folder of them, or a JSONL of images with texts of their own."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from PIL import Image, ImageFile

from flowseg_jax.errors import UserError, brief, did_you_mean, quoted, short_reason
from flowseg_jax.system.paths import is_remote, resolve_path


@dataclasses.dataclass(frozen=True)
class PredictionJob:
    """An image and what is asked about it; `where` the texts come from, for errors about them."""

    image: Path | epath.Path
    texts: tuple[str, ...]
    where: str

    @classmethod
    def of(cls, folder: str | os.PathLike[str], name: str, texts: Sequence[str], where: str) -> PredictionJob:
        """The image that is called `name` seen from a folder; either may be remote."""
        if is_remote(name):
            return cls(resolve_path(name), tuple(texts), where)
        return cls((folder if is_remote(folder) else Path(folder)) / name, tuple(texts), where)


def jobs_from_images(
    path: str | os.PathLike[str], texts: Sequence[str], where: str, *, recursive: bool = False
) -> list[PredictionJob]:
    """A job for an image, or one for each of `image_names` in a folder.

    Raises:
        UserError: there is no such file or folder, or no image file in it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such image or folder")
    if not path.is_dir():
        return [PredictionJob(path, tuple(texts), where)]
    return [PredictionJob.of(path, name, texts, where) for name in image_names(path, recursive=recursive)]


def image_names(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[str]:
    """The names of the image files in a folder or a bucket, sorted, as paths from there; hidden ones are left out.

    Args:
        folder: local or remote.
        recursive: enter the folders inside of it; links to folders are not followed.

    Raises:
        UserError: there is no such folder, or no file in it has the suffix of an image format that Pillow reads.
    """
    known = {suffix for suffix, name in Image.registered_extensions().items() if _readable(name)}
    walk = _walk_remote if is_remote(folder) else _walk_local
    if not resolve_path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        names = sorted(name for name in walk(folder, recursive) if os.path.splitext(name)[1].lower() in known)
    except OSError as error:
        raise UserError(f"{folder}: cannot read the folder ({error.strerror or error})") from None
    if not names:
        inside = "" if recursive else "; --recursive enters the folders inside of it"
        raise UserError(f"{folder}: the folder holds no image file{inside}")
    return names


def _walk_local(folder: str | os.PathLike[str], recursive: bool, prefix: str = "") -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # macOS leaves `._a.jpg` beside `a.jpg`
                continue
            if entry.is_file():
                yield prefix + entry.name
            elif recursive and entry.is_dir(follow_symlinks=False):
                yield from _walk_local(entry.path, recursive, f"{prefix}{entry.name}/")


def _walk_remote(folder: str | os.PathLike[str], recursive: bool, prefix: str = "") -> Iterator[str]:
    for entry in resolve_path(folder).iterdir():
        if entry.name.startswith("."):
            continue
        if entry.suffix:  # an object store is asked once a folder, not once a file
            yield prefix + entry.name
        elif recursive and entry.is_dir():
            yield from _walk_remote(entry, recursive, f"{prefix}{entry.name}/")


def _readable(name: str) -> bool:
    """Whether Pillow reads the format itself: some it only writes (PDF), of some it knows the name alone (HDF5)."""
    opener = Image.OPEN.get(name, (None, None))[0]
    return opener is not None and not (isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile))


def jobs_from_jsonl(path: str | os.PathLike[str]) -> list[PredictionJob]:
    """The jobs of a JSONL: lines `{"image": path, "text": text or list of texts}`, paths relative to the file's folder.

    Other fields and empty lines are ignored.

    Raises:
        UserError: the file cannot be read or has no line; a line is no such object, by its number.
    """
    path = Path(path)
    try:
        written = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line ends
    except OSError as error:
        raise UserError(f"{path}: cannot read the JSONL ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    jobs = [parse_job(path.parent, f"{path}:{number}", line) for number, line in enumerate(written, 1) if line.strip()]
    if not jobs:
        raise UserError(f'{path}: has no line; write {{"image": path, "text": what to segment}}')
    return jobs


def parse_job(folder: str | os.PathLike[str], where: str, line: str) -> PredictionJob:
    """The job of a line of a JSONL, its image seen from `folder`. Raises a UserError, which says `where`, if it is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({brief(error)})") from None
    if not isinstance(entry, dict):
        raise UserError(f'{where}: expected an object {{"image": ..., "text": ...}}, got {quoted(line)}')
    image, texts = (_field(entry, name, where) for name in ("image", "text"))
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(image, str):
        raise UserError(f"{where}: image must be a path, got {quoted(image)}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: text must be a string or a list of strings, got {quoted(texts)}")
    return PredictionJob.of(folder, image, texts, where)


def failure_reason(image: str, error: Exception) -> str:
    """A line about an image that failed."""
    return str(error) if isinstance(error, UserError) else f"{image}: {type(error).__name__}: {short_reason(error)}"


def _field(entry: dict[str, Any], name: str, where: str) -> Any:
    if name not in entry:
        raise UserError(f"{where}: {name} is missing{did_you_mean(name, entry)}")
    return entry[name]

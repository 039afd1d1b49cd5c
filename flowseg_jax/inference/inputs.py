"""What to predict on: one image, a folder of them, or a JSONL of images with texts of their own."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from flowseg_jax.errors import UserError, brief, did_you_mean, quoted


@dataclasses.dataclass(frozen=True)
class PredictionJob:
    """An image and what is asked about it; `where` the texts come from, for errors about them."""

    image: Path
    texts: tuple[str, ...]
    where: str


def jobs_from_images(path: str | os.PathLike[str], texts: Sequence[str], where: str) -> list[PredictionJob]:
    """A job for an image, or one for each image in a folder, by name; folders inside of it are not entered,
    hidden files are left out.

    Raises:
        UserError: there is no such file or folder, or no file in it has the suffix of an image format that Pillow reads.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such image or folder")
    if not path.is_dir():
        return [PredictionJob(path, tuple(texts), where)]
    known = {suffix for suffix, name in Image.registered_extensions().items() if _readable(name)}
    try:
        shown = [file for file in path.iterdir() if not file.name.startswith(".")]  # macOS leaves `._a.jpg` beside `a.jpg`
        found = sorted(file for file in shown if file.suffix.lower() in known and file.is_file())
    except OSError as error:
        raise UserError(f"{path}: cannot read the folder ({error.strerror})") from None
    if not found:
        raise UserError(f"{path}: the folder holds no image file")
    return [PredictionJob(file, tuple(texts), where) for file in found]


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
    jobs = [_job(path, f"{path}:{number}", line) for number, line in enumerate(written, 1) if line.strip()]
    if not jobs:
        raise UserError(f'{path}: has no line; write {{"image": path, "text": what to segment}}')
    return jobs


def _job(path: Path, where: str, line: str) -> PredictionJob:
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
    return PredictionJob(path.parent / image, tuple(texts), where)


def _field(entry: dict[str, Any], name: str, where: str) -> Any:
    if name not in entry:
        raise UserError(f"{where}: {name} is missing{did_you_mean(name, entry)}")
    return entry[name]

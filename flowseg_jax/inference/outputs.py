"""Predictions as files: overlays, run-length codes as JSON, masks as PNG."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.inference.selection import Prediction
from flowseg_jax.reports import answers, overlay, pictures
from flowseg_jax.system import locks

OUTPUT_KINDS = ("overlay", "rle", "png", "answers", "candidates")
ONE_IMAGE, SEVERAL = "overlay,rle,answers,candidates", "overlay,rle"  # what is saved of one image, and of several
TABLE = "predictions.jsonl"
NAME_BYTES = 160  # of an image's name in the names of its files, which the file system allows 255
# What keeps every file from being written, and not only that of one image.
NOWHERE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO)


class Unwritable(UserError):
    """Nothing can be written to the folder any more."""


def kinds(names: str) -> tuple[str, ...]:
    """The kinds of files in a list like "overlay,rle"; a UserError for an unknown one."""
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in OUTPUT_KINDS:
            raise UserError(f"--save: unknown kind {name!r}{did_you_mean(name, OUTPUT_KINDS)}")
    return chosen


class PredictionWriter:
    """Writes predictions to a folder as they come. A name that this run has taken gets a number: `photo_it`, `photo_it_2`.

    `<image>_<text>.png` is the overlay and `<image>_<text>.mask.png` the mask (white on black). Its description is
    `<image>_<text>.json`, or with `table` a line of `predictions.jsonl`, which has one for every answer and every image that
    failed. The masks are in there as run-length codes if "rle" is among the kinds; without it there are no `.json` files.
    `<image>.answers.png` has all answers about an image, `<image>.candidates.png` the candidates of each.

    Between `with` and its end the folder is this process's: another one that wants it is refused. An empty one is removed.

    Args:
        out: the folder.
        kinds: of files.
        table: whether there are many images.
    """

    def __init__(self, out: str | os.PathLike[str], kinds: Sequence[str], *, table: bool):
        self._out, self._kinds, self._table = Path(out), kinds, table
        self._names: set[str] = set()
        self._lines: IO[bytes] | None = None
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> PredictionWriter:
        self._lock.enter_context(locks.held(self._out))
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()
        self._lock.close()
        with contextlib.suppress(OSError):
            self._out.rmdir()

    def write(self, prediction: Prediction) -> list[Path]:
        """Writes all files of one prediction or none, and returns them.

        Raises:
            Unwritable: there is no room, or the folder is not one to write to.
            UserError: these files cannot be written.
        """
        name = self._free_name(f"{_shortened(Path(prediction.name).stem)}_{overlay.slug(prediction.text)}")
        described = prediction.to_json(rle="rle" in self._kinds)
        paths = self._write_whole(self._files(prediction, name, described))
        if self._table:
            self._line(described | {"files": [path.name for path in paths]})
        return paths

    def write_pictures(self, predictions: Sequence[Prediction]) -> list[Path]:
        """Writes the pictures with all answers about one image, and returns them; none where no answer has a mask.

        Raises:
            Unwritable, UserError: as `write`.
        """
        shown = [prediction for prediction in predictions if prediction.score is not None]
        if not shown:
            return []
        name, image = self._free_name(_shortened(Path(shown[0].name).stem)), shown[0].image
        files: dict[Path, Callable[[Path], None]] = {}
        if "answers" in self._kinds:
            sheet = answers.with_legend(image, [(str(prediction.summary()), prediction.mask) for prediction in shown])
            files[self._out / f"{name}.answers.png"] = lambda path: sheet.save(path, format="PNG")
        if "candidates" in self._kinds:
            rows = [
                (p.text, [(f"#{rank} {one.score:.2f}", one.mask) for rank, one in enumerate(p.candidates, 1)]) for p in shown
            ]
            strip = answers.candidate_strip(image, rows)
            files[self._out / f"{name}.candidates.png"] = lambda path: strip.save(path, format="PNG")
        return self._write_whole(files) if files else []

    def fail(self, image: str, reason: str) -> None:
        """Notes an image that could not be answered."""
        if self._table:
            self._line({"image": image, "failure": reason})

    def _free_name(self, base: str) -> str:
        name, number = base, 1
        while name in self._names:
            name, number = f"{base}_{(number := number + 1)}", number
        self._names.add(name)
        return name

    def _files(self, prediction: Prediction, name: str, described: dict[str, Any]) -> dict[Path, Callable[[Path], None]]:
        """Final path -> what writes it to a given path."""

        def picture(array: np.ndarray) -> Callable[[Path], None]:
            return lambda path: Image.fromarray(array).save(path, format="PNG")

        files = {}
        if "rle" in self._kinds and not self._table:
            files[self._out / f"{name}.json"] = lambda path: path.write_bytes(_json(described, indent=1))
        if prediction.score is None:  # an answer in words alone has no pictures
            return files
        if "overlay" in self._kinds:
            drawn = overlay.overlay(prediction.image, prediction.mask, pictures.SELECTED)
            files[self._out / f"{name}.png"] = picture(drawn)
        if "png" in self._kinds:
            files[self._out / f"{name}.mask.png"] = picture(prediction.mask.astype(np.uint8) * 255)
        return files

    def _write_whole(self, files: dict[Path, Callable[[Path], None]]) -> list[Path]:
        parts = {path: path.with_name(f"{path.name}.part") for path in files}
        try:
            with self._clear_errors(next(iter(files), self._out)):
                self._out.mkdir(parents=True, exist_ok=True)
                for path, save in files.items():
                    save(parts[path])
                for path, part in parts.items():
                    os.replace(part, path)
        finally:
            for part in parts.values():
                with contextlib.suppress(OSError):
                    part.unlink()
        return list(files)

    def _line(self, described: dict[str, Any]) -> None:
        line = _json(described)
        try:
            if self._lines is None:
                self._lines = open(self._out / TABLE, "wb", buffering=0)
            before = self._lines.tell()
            try:
                if self._lines.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._lines.truncate(before)  # no half a line
                raise
        except OSError as error:
            raise Unwritable(_refusal(self._out / TABLE, error)) from error

    @contextlib.contextmanager
    def _clear_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = Unwritable if error.errno in NOWHERE else UserError
            raise kind(_refusal(path, error)) from error


def _refusal(path: Path, error: OSError) -> str:
    return f"cannot write {path}: {error.strerror or error}; make room, or choose a folder you can write to"


def _json(value: Any, indent: int | None = None) -> bytes:
    """A name that is no UTF-8 has lone surrogates, which stand there as JSON's escapes: so it reads back as it was."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _shortened(name: str) -> str:
    while len(os.fsencode(name)) > NAME_BYTES:
        name = name[:-1]
    return name

"""Predictions as files: overlays, run-length codes as JSON, masks as PNG."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from flowseg_jax.data import drawing
from flowseg_jax.errors import UserError, suggest
from flowseg_jax.evaluation import pictures
from flowseg_jax.prediction.answers import Prediction

KINDS = ("overlay", "rle", "png")
TABLE = "predictions.jsonl"


def kinds(names: str) -> tuple[str, ...]:
    """The kinds of files in a list like "overlay,rle"; a UserError for an unknown one."""
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in KINDS:
            raise UserError(f"--save: unknown kind {name!r}{suggest(name, KINDS)}")
    return chosen


class Writer:
    """Writes predictions to a folder as they come. A name that this run has taken gets a number: `photo_it`, `photo_it_2`.

    `<image>_<text>.png` is the overlay and `<image>_<text>.mask.png` the mask (white on black). Its description is
    `<image>_<text>.json`, or with `table` a line of `predictions.jsonl`, which has one for every answer and every image that
    failed. The masks are in there as run-length codes if "rle" is among the kinds; without it there are no `.json` files.

    Args:
        out: the folder, made when something is written.
        kinds: of files.
        table: whether there are many images.
    """

    def __init__(self, out: str | os.PathLike[str], kinds: Sequence[str], *, table: bool):
        self._out, self._kinds, self._table = Path(out), kinds, table
        self._names: set[str] = set()
        self._lines: IO[str] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()

    def write(self, prediction: Prediction) -> list[Path]:
        """Writes all files of one prediction or none, and returns them. Raises a UserError where it cannot."""
        base = f"{Path(prediction.name).stem}_{drawing.slug(prediction.text)}"
        name, number = base, 1
        while name in self._names:
            name, number = f"{base}_{(number := number + 1)}", number
        self._names.add(name)
        described = prediction.to_json(rle="rle" in self._kinds)
        paths = self._write_whole(self._files(prediction, name, described))
        if self._table:
            self._line(described | {"files": [path.name for path in paths]})
        return paths

    def fail(self, image: str, reason: str) -> None:
        """Notes an image that could not be answered."""
        if self._table:
            self._line({"image": image, "failure": reason})

    def _files(self, prediction: Prediction, name: str, described: dict[str, Any]) -> dict[Path, Callable[[Path], None]]:
        """Final path -> what writes it to a given path."""

        def picture(array: np.ndarray) -> Callable[[Path], None]:
            return lambda path: Image.fromarray(array).save(path, format="PNG")

        files = {}
        if "rle" in self._kinds and not self._table:
            text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
            files[self._out / f"{name}.json"] = lambda path: path.write_text(text, encoding="utf-8")
        if prediction.score is None:  # an answer in words alone has no pictures
            return files
        if "overlay" in self._kinds:
            drawn = drawing.overlay(prediction.image, prediction.mask, pictures.SELECTED)
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
        with self._clear_errors(self._out / TABLE):
            if self._lines is None:
                self._out.mkdir(parents=True, exist_ok=True)
                self._lines = open(self._out / TABLE, "w", encoding="utf-8")
            self._lines.write(json.dumps(described, ensure_ascii=False) + "\n")
            self._lines.flush()

    @contextlib.contextmanager
    def _clear_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose a folder you can write to") from error

"""The finished part of an evaluation, in a file that grows batch by batch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowseg_jax.checkpoints import storage
from flowseg_jax.errors import UserError
from flowseg_jax.system import distributed, json_files
from flowseg_jax.system.console import log
from flowseg_jax.system.json_files import number

Records = dict[int, list[dict[str, Any]]]


class ResumableRecords:
    """Records of the images that are done, the same on every process; the first process keeps them in the file.

    The file's first line says what is evaluated, every further one has an image's place in the split and its records. An image
    whose line was cut off by a kill is evaluated again.

    Attributes:
        records: place in the split -> its records.
    """

    def __init__(self, path: Path | None, records: Records, file: Any):
        self.records = records
        self._path, self._file = path, file

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path | None, settings: Mapping[str, Any]) -> Iterator[ResumableRecords]:
        """Reads what an earlier start left, if it evaluated the same thing.

        Args:
            path: the file; None: nothing is kept.
            settings: of the evaluation, JSON.

        Raises:
            UserError: the folder cannot be written.
        """
        head = json.dumps({"evaluation": settings}, sort_keys=True)
        keeps = path is not None and distributed.is_primary()

        def begin() -> tuple[Records, Any]:
            records = _read(path, head)
            storage.write_text_atomic(
                path, "".join(f"{line}\n" for line in (head, *(record_line(*item) for item in records.items())))
            )
            return records, path.open("a", encoding="utf-8")

        reason = lambda error: str(error) if isinstance(error, UserError) else None  # noqa: E731
        begun, fault = distributed.collective_try(lambda: begin() if keeps else ({}, None), reason)
        if fault:
            raise UserError(fault)
        records, file = begun
        (first, *_) = distributed.all_gather_bytes(json.dumps(list(records.items())).encode())
        partial = cls(path, dict(json.loads(first)), file)
        try:
            yield partial
        finally:
            if file is not None:
                with contextlib.suppress(OSError):  # what it still holds of a line that did not fit
                    file.close()
                if not partial.records:
                    path.unlink(missing_ok=True)

    def add(self, found: Records) -> None:
        """Adds what all processes have found for a batch. Raises a UserError where it cannot be kept."""
        for part in distributed.all_gather_bytes(json.dumps(list(found.items())).encode()):
            new: Records = dict(json.loads(part))
            if self._file is not None:
                try:
                    self._file.writelines(f"{record_line(place, records)}\n" for place, records in new.items())
                    self._file.flush()
                except OSError as error:
                    raise UserError(f"cannot write {self._path}: {error.strerror}; make room") from error
            self.records |= new

    def progress_note(self) -> str:
        """What an interrupted user needs to know."""
        if self._path is None or not self.records:
            return "nothing was written"
        return f"{len(self.records)} images are done and kept in {self._path}, the same command continues after them"

    def finish(self) -> None:
        """The results are written: the file has done its work."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)


def record_line(place: int, records: list[dict[str, Any]]) -> str:
    """A line of such a file, without its end; names that are no Unicode stand in it as JSON's escapes."""
    line = json.dumps({"place": place, "records": records}, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode()


def parse_lines(lines: Iterable[str | bytes]) -> Records:
    """What `record_line` wrote; lines that are cut off, as by a kill, no UTF-8 or something else are left out."""
    records: Records = {}
    for line in filter(None, lines):
        try:
            entry = json_files.loads(line)
            place, kept = entry["place"], entry["records"]
        except (ValueError, KeyError, TypeError):
            continue
        if number(place, whole=True, least=0) and isinstance(kept, list) and all(isinstance(each, dict) for each in kept):
            records[place] = kept
    return records


def _read(path: Path, head: str) -> Records:
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")  # a sentence may hold other line ends
    except (OSError, UnicodeDecodeError, ValueError):  # no file, no text or no line in it
        return {}
    if first != head:
        log(f"{path}: of another model, protocol or data set; it is begun anew")
        return {}
    return parse_lines(lines)

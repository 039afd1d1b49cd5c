"""The results of many images in files of a fixed number of images each, which several processes fill and a kill leaves usable.

    run.json                          what is predicted; another run is refused
    predictions-00012-of-00100.jsonl  the images of shard 12 in order, a line for each text; or .parquet
    failures-00012-of-00100.jsonl     its images that failed, only where there are any
    .partial-00012.jsonl              a shard that is not complete, image by image as they come

A shard appears under its name when it is complete. So what is done is known from the names of the files and from the few that
are not complete: continuing costs about the same after a thousand images and after a million.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jaxtyping import Int

from flowseg_jax.checkpoints.storage import write_text_atomic
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.evaluation.resumable import Records, parse_lines, record_line
from flowseg_jax.system import distributed, json_files

RUN = "run.json"
SHARD_SIZE = 1000  # images


class PredictionShards:
    """This process's shards of a run; they are written by `add`.

    Attributes:
        places: int64 [n], the images that this process has still to answer, ascending.
        total: images of the whole run. before: of them, those that are done already, as far as this process knows.
    """

    def __init__(self, out: Path, kind: str, total: int, size: int, complete: Sequence[int]):
        self.total, self._out, self._size = total, out, size
        self._kind = kind
        self._count = -(-total // size)
        self._open: dict[int, IO[bytes]] = {}
        self._left: dict[int, int] = {}
        missing = np.setdiff1d(np.arange(self._count), np.array(complete, int))
        places = [np.zeros(0, np.int64)]
        for shard in missing[jax.process_index() :: jax.process_count()].tolist():
            whole = np.arange(shard * size, min((shard + 1) * size, total))
            done = self._resume(shard)
            places.append(np.setdiff1d(whole, done) if len(done) else whole)
            self._left[shard] = len(places[-1])
        self.places: Int[np.ndarray, " n"] = np.concatenate(places)
        self.before = total - sum(min((s + 1) * size, total) - s * size for s in missing.tolist())
        for shard in [shard for shard, left in self._left.items() if not left]:  # killed between its last image and its end
            self._finish(shard)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, out: str | os.PathLike[str], settings: Mapping[str, Any], *, total: int, kind: str, size: int | None = None
    ) -> Iterator[PredictionShards]:
        """Begins a run, or continues the one that `out` holds. Every process calls it alike, and sees the same folder.

        Args:
            out: the folder, made where it is missing.
            settings: JSON, what the results depend on.
            total: images.
            kind: of the files, one of `FORMATS`.
            size: images a shard; None: those of the run that is continued, or SHARD_SIZE, fewer where there are too few images
                for all processes.

        Raises:
            UserError: the folder holds another run, cannot be written, or another command writes into it.
        """
        if kind not in FORMATS:
            raise UserError(f"--format: no format {kind!r}{did_you_mean(kind, FORMATS)}")
        if kind == "parquet":
            _pyarrow()
        out = Path(out)
        wanted = {**settings, "images": total, "format": kind}

        def begin() -> bytes:
            found = _read_run(out / RUN)
            if found is None:
                found = wanted | {"shard_size": size or min(SHARD_SIZE, -(-total // jax.process_count()))}
                write_text_atomic(out / RUN, json.dumps(found, indent=1) + "\n")
            here = found | wanted | ({} if size is None else {"shard_size": size})
            if other := [name for name in sorted({*found, *here}) if found.get(name) != here.get(name)]:
                raise UserError(
                    f"{out / RUN}: the folder holds a run with another {', '.join(other)}: choose another --out, or the same"
                )
            names = sorted(path.name for path in out.glob(f"predictions-*.{kind}"))
            complete = [int(name.split("-")[1]) for name in names]
            return json.dumps([found["shard_size"], complete]).encode()

        reason = lambda error: str(error) if isinstance(error, UserError) else None  # noqa: E731
        with distributed.locked(out):
            begun, fault = distributed.collective_try(lambda: begin() if distributed.is_primary() else b"", reason)
            if fault:
                raise UserError(fault)
            size, complete = json.loads(distributed.all_gather_bytes(begun)[0])
            shards = cls(out, kind, total, size, complete)
            try:
                yield shards
            finally:
                for file in shards._open.values():
                    file.close()

    def add(self, found: Records) -> None:
        """Keeps the records of images: what a shard file has of each, or one with `failure`.

        Raises:
            UserError: they cannot be written.
        """
        for place, records in found.items():
            shard = place // self._size
            line = record_line(place, records) + "\n"
            try:
                if shard not in self._open:
                    self._open[shard] = open(self._partial(shard), "ab", buffering=0)
                self._open[shard].write(line.encode())
            except OSError as error:
                path = self._partial(shard)
                raise UserError(f"cannot write {path}: {error.strerror}; make room, the same command continues") from error
            self._left[shard] -= 1
            if not self._left[shard]:
                self._finish(shard)

    def failures(self) -> int:
        """How many images have failed in all; for the first process, when all have ended."""
        return sum(path.read_bytes().count(b"\n") for path in self._out.glob("failures-*.jsonl"))

    def _partial(self, shard: int) -> Path:
        return self._out / f".partial-{shard:05d}.jsonl"

    def _name(self, what: str, shard: int, kind: str) -> Path:
        return self._out / f"{what}-{shard:05d}-of-{self._count:05d}.{kind}"

    def _resume(self, shard: int) -> list[int]:
        """The images of a shard that were answered before a kill; what is left of a line that it cut off is removed."""
        path = self._partial(shard)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); remove it to answer its images again") from None
        os.truncate(path, content.rfind(b"\n") + 1)
        mine = range(shard * self._size, min((shard + 1) * self._size, self.total))
        return [place for place in parse_lines(content.split(b"\n")) if place in mine]

    def _finish(self, shard: int) -> None:
        if file := self._open.pop(shard, None):
            file.close()
        found = parse_lines(self._partial(shard).read_bytes().split(b"\n"))
        records = [{"index": place} | record for place in sorted(found) for record in found[place]]
        failed = [record for record in records if "failure" in record]
        if failed:
            write_text_atomic(self._name("failures", shard, "jsonl"), _jsonl(failed))
        FORMATS[self._kind](self._name("predictions", shard, self._kind), records)
        self._partial(shard).unlink()


def _read_run(path: Path) -> dict[str, Any] | None:
    try:
        found = json_files.read(path)
    except FileNotFoundError:
        if path.parent.is_dir() and any(path.parent.glob("predictions-*")):
            raise UserError(f"{path.parent} holds predictions without their {path.name}: choose another --out") from None
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --out") from None
    ok = isinstance(found, dict) and json_files.number(found.get("shard_size"), whole=True, least=1)
    if not ok:
        raise UserError(f"{path} is not what `flowseg predict --images` wrote: choose another --out")
    return found


def _jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace").decode()


def _write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_text_atomic(path, _jsonl(records))


def _write_parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    pa, parquet = _pyarrow()
    rle = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    candidate = pa.struct([("query", pa.int32()), ("score", pa.float64()), ("area", pa.int64()), ("rle", rle)])
    columns = {"index": pa.int64(), "image": pa.string(), "height": pa.int32(), "width": pa.int32(), "text": pa.string()}
    columns |= {"found": pa.bool_(), "score": pa.float64(), "area": pa.int64(), "rle": rle}
    columns |= {"candidates": pa.list_(candidate), "unknown_words": pa.list_(pa.string()), "failure": pa.string()}
    plain = lambda value: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value  # noqa: E731
    rows = [{key: plain(value) for key, value in record.items()} for record in records]  # a name may be no Unicode
    part = path.with_name(f"{path.name}.part")
    try:
        parquet.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("--format=parquet needs the extra parquet: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


FORMATS: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], None]] = {"jsonl": _write_jsonl, "parquet": _write_parquet}

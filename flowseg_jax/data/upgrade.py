"""Prepared sets of the format before this one: the same files, and the rows of their index.

    flowseg data upgrade OLD NEW

Up to format 6 an index had its lines alone. Images are not read: shards are linked where the file system can do that, and
copied elsewhere. The digest of the set stays, so runs and results go on with it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from flowseg_jax.data import checksums
from flowseg_jax.data.array_file import write_header
from flowseg_jax.data.dataset import FORMAT, METADATA, PreparedDataset
from flowseg_jax.data.formats.reading import field, read_json
from flowseg_jax.data.index import ROW, index_file, index_row, parse_line, rows_file
from flowseg_jax.data.serialization import AGAIN
from flowseg_jax.data.shards import link
from flowseg_jax.errors import UserError, brief, quoted
from flowseg_jax.system import locks, paths

BEFORE = FORMAT - 1


def upgrade(old: str | Path, new: str | Path) -> PreparedDataset:
    """Writes the prepared set `old`, of format 6, in today's format to `new`, which appears whole.

    Raises:
        UserError: `old` is no prepared set of that format or is damaged, or `new` exists or cannot be written.
    """
    old, new = Path(old), Path(new)
    where = str(old / METADATA)
    if not (old / METADATA).exists():
        raise UserError(f"{old}: not a prepared data set (no {METADATA})")
    metadata = read_json(old / METADATA)
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != BEFORE:
        raise UserError(f"{old}: prepared in format {quoted(found)}; only sets of format {BEFORE} are upgraded")
    if new.exists():
        raise UserError(f"{new}: exists already; name another folder")
    sums = checksums.read(old)
    checksums.check(old, sorted(name for name in sums if not name.startswith("data/flowseg-")), sums)
    temporary = new.parent / f".{new.name}.partial"
    with locks.held(new, beside=True):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for name in sums:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                link(old / name, temporary / name)
            families = {
                split: _write_rows(temporary, paths.check_name(split, f"{where}.splits"), counts, metadata, where)
                for split, counts in field(metadata, "splits", dict, where).items()
            }
            metadata |= {
                "format": FORMAT,
                "families": families,
                "index": {split: sums[index_file(split)] for split in families},
            }
            (temporary / METADATA).unlink()
            (temporary / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
            del sums[METADATA]
            checksums.write(temporary, [*sums, METADATA, *map(rows_file, families)], sums)
            PreparedDataset.open(temporary)  # all else that metadata may lack
            os.rename(temporary, new)
        except OSError as error:
            raise UserError(f"{new}: cannot be written ({error.strerror})") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return PreparedDataset.open(new)


def _write_rows(root: Path, split: str, counts: Any, metadata: dict[str, Any], where: str) -> list[str]:
    """Writes the rows of a split's lines; returns the families that occur."""
    images = field(counts, "images", int, f"{where}.splits.{split}")
    categories = field(metadata, "categories", list, where)
    layout = field(field(metadata, "request", dict, where), "layout", str, f"{where}.request")
    families: set[str] = set()
    with (root / index_file(split)).open("rb") as lines, (root / rows_file(split)).open("wb") as rows:
        write_header(rows, ROW, images)
        at = samples = 0
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_line(line, len(categories), layout)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{root / index_file(split)}:{number}: damaged ({brief(error)}); {AGAIN}") from None
            rows.write(index_row(entry, line, at, samples).tobytes())
            families.update(sample.family for sample in entry.samples)
            at, samples = at + len(line), samples + len(entry.samples)
    return sorted(families)

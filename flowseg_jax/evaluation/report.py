"""`report.html` with its PNG files: a table of results and, for a person to look at, what the model did on real examples.

The report is a pure function of files: `save_pictures` leaves PNGs and an index beside a split's results, `write` reads the
folders it is given. So it can be written again whenever one more row is known, from any process. The page is static HTML
without external resources.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.errors import UserError
from flowseg_jax.evaluation.examples import KINDS, GallerySample
from flowseg_jax.evaluation.results import PICTURES, read_pictures, read_table
from flowseg_jax.reports import html as page
from flowseg_jax.reports import overlay, pictures

_HEADINGS = {"good": "Good", "random": "Random", "failed": "Failed"}
_NOTES = {
    "good": "IoU of at least 80, drawn at random.",
    "random": "Drawn at random from all samples.",
    "failed": "IoU below 50, drawn at random. A good best candidate beside a bad selection is a selection error.",
}
_COLUMNS = (
    ("n", "n", "samples"),
    ("ciou", "cIoU", "sum of intersections / sum of unions"),
    ("giou", "gIoU", "mean IoU of the samples"),
    ("oracle_ciou", "oracle", "cIoU if the better of selected and best candidate were always taken"),
    ("oracle_giou", "oracle gIoU", "gIoU of the same choices"),
    ("selection_gap", "gap", "oracle gIoU - gIoU"),
    ("0.5", "P@0.5", "share of samples with IoU of at least 0.5"),
    ("0.7", "P@0.7", "share of samples with IoU of at least 0.7"),
    ("0.9", "P@0.9", "share of samples with IoU of at least 0.9"),
)
_GRES_COLUMNS = (
    ("n_acc", "N-acc", "share of the samples to nothing for which nothing is predicted"),
    ("t_acc", "T-acc", "share of the samples to something for which something is predicted"),
)


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """One line of the table: a model, evaluated on some splits.

    Attributes:
        label: what the reader calls it.
        results: split -> the content of its `<split>.json`.
        pictures: split -> folder written by `save_pictures`.
        note: one sentence under the label.
    """

    label: str
    results: Mapping[str, Mapping[str, Any]]
    pictures: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    note: str = ""


def read_row(label: str, folder: Path | str, *, shuffled: bool = False, note: str = "") -> ReportRow:
    """The row of a folder of results: its `<split>.json` files, or those of the shuffled-text control."""
    folder = Path(folder)
    results, images = {}, {}
    for path in sorted(folder.glob("*.json")):
        table = read_table(path)
        if table["shuffled_text"] != shuffled:
            continue
        results[path.stem.removesuffix("_shuffled")] = table
        if (folder / "pictures" / path.stem / PICTURES).is_file():
            images[path.stem.removesuffix("_shuffled")] = folder / "pictures" / path.stem
    return ReportRow(label, results, images, note)


def save_pictures(folder: Path | str, name: str, examples: Mapping[str, Sequence[GallerySample]]) -> Path:
    """Writes one PNG an example and an index to `<folder>/pictures/<name>/`, replacing what was there; returns that folder."""
    target = Path(folder) / "pictures" / name
    part = target.with_name(target.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        index = []
        for kind, rows in examples.items():
            for i, example in enumerate(rows):
                record = example.record
                file = f"{kind}_{i + 1}_{overlay.slug(record['text'])}.png"
                panels = (
                    ("image", None, pictures.TRUTH),
                    ("truth", example.truth, pictures.TRUTH),
                    (f"selected: IoU {100 * record['iou']:.1f}", example.selected, pictures.SELECTED),
                    (f"best: IoU {100 * record['best_iou']:.1f}", example.best, pictures.BEST),
                )
                pictures.comparison_strip(example.image, panels).save(part / file)
                index.append({"kind": kind, "file": file, "record": dict(record)})
        (part / PICTURES).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write pictures to {target}: {error.strerror}; choose a folder you can write to") from error
    return target


def write(path: Path | str, rows: Sequence[ReportRow], *, title: str, about: Sequence[str] = ()) -> Path:
    """Writes the report.

    Args:
        path: the HTML file. Pictures are linked relative to it.
        rows: the table's rows, in reading order; splits are shown in the order in which they first occur.
        title: heading. about: sentences under it (what was trained, with which command).
    """
    path = Path(path)
    splits = list(dict.fromkeys(split for row in rows for split in row.results))
    results = [result for row in rows for result in row.results.values()]
    page.write(
        path,
        "report.html",
        title=title,
        about=about,
        protocols=", ".join(sorted({result["protocol"] for result in results})) or "none",
        columns=_columns(results),
        tables=[_table(rows, split) for split in splits],
        families=[_families(rows, split) for split in splits] if any(result["families"] for result in results) else None,
        galleries=[_gallery(row.label, split, folder, path.parent) for row in rows for split, folder in row.pictures.items()],
    )
    return path


def table(rows: Sequence[ReportRow]) -> str:
    """The table as plain text for the terminal: one line a row and split."""
    columns = _columns([result for row in rows for result in row.results.values()])
    lines = [("split", "model", *(name for _, name, _ in columns))]
    for split in dict.fromkeys(split for row in rows for split in row.results):
        lines += [(split, row.label, *_cells(row.results[split], columns)) for row in rows if split in row.results]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _columns(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str, str], ...]:
    """The columns of a table of these results: N-acc and T-acc only where one of them has it."""
    return _COLUMNS + tuple(column for column in _GRES_COLUMNS if any(column[0] in result for result in results))


def _cells(result: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]) -> list[str]:
    """The figures of a result; empty where its protocol does not have one."""
    values = [result["p_at"].get(key, result.get(key, "")) for key, _, _ in columns]
    return [_figure_text(value) for value in values]


def _figure_text(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[ReportRow], split: str) -> dict[str, Any]:
    """What the template shows of a split: its columns, and label, detail and cells of each row."""
    columns = _columns([row.results[split] for row in rows if split in row.results])
    lines = []
    for row in rows:
        if split not in row.results:
            continue
        result = row.results[split]
        step, digest = (result["checkpoint"].get(key) for key in ("step", "digest"))
        detail = [row.note, f"step {step}" if step is not None else "", f"checkpoint {digest[:12]}" if digest else ""]
        detail += [f"prompt {prompt['question']}, answer {prompt['answer']}" if (prompt := result.get("prompt")) else ""]
        detail += [f"{result['failed']} failed" if result["failed"] else ""]
        shown = ", ".join(part for part in detail if part)
        lines.append({"label": row.label, "detail": shown, "cells": _cells(result, columns)})
    return {"split": split, "columns": columns, "rows": lines}


def _families(rows: Sequence[ReportRow], split: str) -> dict[str, Any]:
    """What the template shows of a split's families: n of each, and of each row (cIoU, the oracle's) or None."""
    with_families = [row for row in rows if row.results.get(split, {}).get("families")]
    counts: dict[str, int] = {}
    for row in with_families:
        for family, figures in row.results[split]["families"].items():
            counts.setdefault(family, figures["n"])
    lines = []
    for row in with_families:
        found = [row.results[split]["families"].get(family) for family in counts]
        cells = [figures and (_figure_text(figures["ciou"]), _figure_text(figures["oracle_ciou"])) for figures in found]
        lines.append((row.label, cells))
    return {"split": split, "counts": counts, "rows": lines}


def _gallery(label: str, split: str, folder: Path, base: Path) -> dict[str, Any]:
    index, kinds = read_pictures(folder), []
    for kind in KINDS:
        figures = [_figure(record, os.path.relpath(file, base)) for of, file, record in index if of == kind]
        if figures:
            kinds.append((kind, _HEADINGS[kind], _NOTES[kind], figures))
    return {"label": label, "split": split, "kinds": kinds}


def _figure(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    scores = (
        f"score {_score(record['score'])} (query {record['query']}), best candidate {_score(record['best_score'])}"
        f" (query {record['best_query']}, rank {record['best_rank'] + 1})"
    )
    return {
        "said": record["text"],
        "family": record["family"],
        "meant": record["sentence"] if record["text"] != record["sentence"] else "",
        "source": Path(source).as_posix(),
        "notes": [scores, f"{record['file_name']}, sentence {record['sentence_id']}"],
    }


def _score(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3f}"

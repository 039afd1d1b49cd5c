"""`report.html` with its PNG files: what the numbers say, what the model did on real examples, and the tables.

The report is made of files: `save_pictures` leaves PNGs and an index beside a split's results, `write` reads the folders it is
given. So it can be written again whenever one more row is known, from any process (`flowseg report`). The page is static HTML
without external resources; with its pictures inside it is a single file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import learning_curve
from flowseg_jax.evaluation.examples import KINDS, GallerySample
from flowseg_jax.evaluation.results import PICTURES, read_pictures, read_table
from flowseg_jax.evaluation.verdict import verdict
from flowseg_jax.reports import html as page
from flowseg_jax.reports import overlay, pictures

ANALYSIS = "analysis"  # the folder of diagnoses, beside the results
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
        folder: where the results lie, with their diagnoses; None: nowhere.
        shuffled: the results are those of the shuffled-text control.
    """

    label: str
    results: Mapping[str, Mapping[str, Any]]
    pictures: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    note: str = ""
    folder: Path | None = None
    shuffled: bool = False


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
    return ReportRow(label, results, images, note, folder, shuffled)


def read_rows(folder: Path | str, label: str = "") -> list[ReportRow]:
    """The rows of a folder of results: the real sentences and, where it has been evaluated, the shuffled-text control.

    Args:
        folder: with the `<split>.json` files.
        label: what the model is called; default: as the results say, else as the folder is called.

    Raises:
        UserError: no results there.
    """
    folder = Path(folder)
    real, control = read_row(label, folder), read_row(label, folder, shuffled=True)
    if not (real.results or control.results):
        raise UserError(f"{folder}: no results of `flowseg eval` on expressions: name the folder with its <split>.json")
    names = [result.get("model") for row in (real, control) for result in row.results.values()]
    label = label or next(filter(None, names), folder.resolve().name)
    rows = [dataclasses.replace(real, label=label), dataclasses.replace(control, label=f"{label}, shuffled text")]
    return [row for row in rows if row.results]


def save_pictures(folder: Path | str, name: str, examples: Mapping[str, Sequence[GallerySample]]) -> Path:
    """Writes each example's PNGs and an index to `<folder>/pictures/<name>/`, replacing what was there; returns that folder."""
    target = Path(folder) / "pictures" / name
    part = target.with_name(target.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        index = []
        for kind, rows in examples.items():
            for i, example in enumerate(rows):
                record = example.record
                stem = f"{kind}_{i + 1}_{overlay.slug(record['text'])}"
                masks = [
                    ("truth", example.truth, pictures.TRUTH),
                    (f"selected: IoU {100 * record['iou']:.1f}", example.selected, pictures.SELECTED),
                    (f"best: IoU {100 * record['best_iou']:.1f}", example.best, pictures.BEST),
                ]
                panels = pictures.save_panels(part, stem, example.image, masks)
                panels = [{"caption": caption, "file": file} for caption, file in panels]
                index.append({"kind": kind, "panels": panels, "record": dict(record)})
        (part / PICTURES).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write pictures to {target}: {error.strerror}; choose a folder you can write to") from error
    return target


def write(
    path: Path | str,
    rows: Sequence[ReportRow],
    *,
    title: str,
    about: Sequence[str] = (),
    run: Path | str | None = None,
    self_contained: bool = False,
) -> Path:
    """Writes the report.

    Args:
        path: the HTML file. Pictures are linked relative to it.
        rows: the table's rows, in reading order; splits are shown in the order in which they first occur. The verdict is about
            the last row that is no control, on its validation set, else on its first split.
        title: heading. about: sentences under it (what was trained, with which command).
        run: the work directory of the training run, whose learning curve is shown.
        self_contained: pictures are put into the page, which needs no other file then.

    Raises:
        UserError: the place cannot be written to, or what was evaluated or trained cannot be read.
    """
    path = Path(path)
    splits = list(dict.fromkeys(split for row in rows for split in row.results))
    results = [result for row in rows for result in row.results.values()]
    metrics = None if run is None else Path(run) / learning_curve.METRICS
    subject = next((row for row in reversed(rows) if row.results and not row.shuffled), None)
    source = page.data_uri if self_contained else lambda file: Path(os.path.relpath(file, path.parent)).as_posix()
    figures = [figure for row in rows for split in row.pictures for figure in _figures(row, split, source)]
    page.write(
        path,
        "report.html",
        title=title,
        about=about,
        verdict=_verdict(rows, subject) if subject else [],
        figures=figures,
        filters=_filters(figures, subject),
        curves=learning_curve.draw(metrics) if metrics and metrics.is_file() else [],
        diagnoses=[] if self_contained else _diagnoses(rows, path.parent),
        hints=_hints(rows),
        protocols=", ".join(sorted({result["protocol"] for result in results})) or "none",
        columns=_columns(results),
        tables=[_table(rows, split) for split in splits],
        families=[_families(rows, split) for split in splits] if any(result["families"] for result in results) else None,
        origin=list(dict.fromkeys(origin(row.label, result) for row in rows for result in row.results.values())),
    )
    return path


def origin(label: str, result: Mapping[str, Any]) -> str:
    """Which model some results are of: name, checkpoint and step."""
    step, digest = (result["checkpoint"].get(key) for key in ("step", "digest"))
    name = result.get("model") or label
    parts = [f"checkpoint {digest[:16]}" if digest else "", f"step {step}" if step is not None else ""]
    return ", ".join([f"Model {name}", *filter(None, parts)])


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


def _verdict(rows: Sequence[ReportRow], subject: ReportRow) -> list[str]:
    split = _first(subject)
    result = subject.results[split]
    same = lambda row: row.results[split]["checkpoint"] == result["checkpoint"]  # noqa: E731
    beside = [row for row in rows if split in row.results and row is not subject]
    control = next((row.results[split] for row in beside if row.shuffled and same(row)), None)
    others = [(row.label, row.results[split]) for row in beside if not row.shuffled]
    return verdict(subject.label, split, result, control, others)


def _first(row: ReportRow) -> str:
    """The split that is spoken of first: the validation set, where there is one."""
    return next((split for split in row.results if split.startswith("val")), next(iter(row.results)))


def _diagnoses(rows: Sequence[ReportRow], base: Path) -> list[tuple[str, str]]:
    """(link, name) of the pages that `flowseg analyze` has left beside the results."""
    folders = dict.fromkeys(row.folder / ANALYSIS for row in rows if row.folder)
    pages = [file for folder in folders for file in sorted(folder.glob("*.html"))]
    return [(Path(os.path.relpath(file, base)).as_posix(), file.stem.replace("_", " ")) for file in pages]


def _hints(rows: Sequence[ReportRow]) -> list[dict[str, str]]:
    """How to find out where the models lose, while nobody has."""
    files = [row.folder / f"{split}.jsonl" for row in rows if row.folder and not row.shuffled for split in row.results]
    if not files or any((file.parent / ANALYSIS).is_dir() for file in files):
        return []
    return [{"text": "Selection or masks? Ask:", "command": f"flowseg analyze oracle {shlex.quote(str(files[-1]))}"}]


def _figures(row: ReportRow, split: str, source: Callable[[Path], str]) -> list[dict[str, Any]]:
    """What the template shows of the pictures of a row's split: good ones first, failures last."""
    found = sorted(
        (entry for entry in read_pictures(row.pictures[split]) if entry[0] in KINDS), key=lambda entry: KINDS.index(entry[0])
    )
    return [
        _figure(record, [(caption, source(file)) for caption, file in panels])
        | {"model": row.label, "split": split, "kind": kind}
        for kind, panels, record in found
    ]


def _filters(figures: Sequence[Mapping[str, Any]], subject: ReportRow | None) -> list[tuple[str, str, list[str], str]]:
    """(key of a figure, label, values, the one that is chosen at first) of each filter that has something to choose."""
    labels = {"model": "model", "split": "data set", "family": "expressions", "kind": "result"}
    values = {key: list(dict.fromkeys(figure[key] for figure in figures)) for key in labels}
    first = {"model": subject.label, "split": _first(subject)} if subject else {}
    return [
        (key, label, values[key], first[key] if first.get(key) in values[key] else "")
        for key, label in labels.items()
        if len(values[key]) > 1
    ]


def _figure(record: Mapping[str, Any], panels: list[tuple[str, str]]) -> dict[str, Any]:
    scores = (
        f"score {_score(record['score'])} (query {record['query']}), best candidate {_score(record['best_score'])}"
        f" (query {record['best_query']}, rank {record['best_rank'] + 1})"
    )
    return {
        "said": record["text"],
        "family": record["family"],
        "meant": record["sentence"] if record["text"] != record["sentence"] else "",
        "panels": panels,
        "notes": [scores, f"{record['file_name']}, sentence {record['sentence_id']}"],
    }


def _score(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3f}"

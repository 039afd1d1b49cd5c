"""What an evaluation says at its end: a line for each split in one table, and `report.html` with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowseg_jax.evaluation import report
from flowseg_jax.evaluation.results import PICTURES, read_table

_EXPRESSIONS = {
    "ciou": "cIoU", "giou": "gIoU", "oracle_ciou": "oracle cIoU", "oracle_giou": "oracle gIoU", "selection_gap": "gap",
    "n_acc": "N-acc", "t_acc": "T-acc",
}  # fmt: skip
_CATEGORIES = {
    "panoptic": {"pq": "PQ", "sq": "SQ", "rq": "RQ"},
    "semantic": {"miou": "mIoU"},
    "instance": {"ap": "AP", "ap50": "AP50", "ap75": "AP75"},
}


class EvaluatedSplit(NamedTuple):
    """A split that was evaluated.

    Attributes:
        data: the data set's name.
        split: which split.
        result: the content of its `<split>.json`.
        folder: where that lies.
    """

    data: str
    split: str
    result: Mapping[str, Any]
    folder: Path


def table(splits: Sequence[EvaluatedSplit]) -> str:
    """One line a split and protocol, with data set and split; figures in percent, two decimals."""
    rows = [row for one in splits for row in _rows(one)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name == "failed")  # last
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    texts = ("data set", "split", "protocol")
    align = [str.ljust if name in texts else str.rjust for name in columns]
    cells = ([place(cell, width) for place, cell, width in zip(align, line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _rows(one: EvaluatedSplit) -> Iterator[dict[str, str]]:
    result = one.result
    split = f"{one.split}, shuffled text" if result.get("shuffled_text") else one.split
    failed = {"failed": str(result["failed"])}
    if "ciou" in result:
        yield _row(one.data, split, result["protocol"], result["n"], result, _EXPRESSIONS) | failed
    for protocol, names in _CATEGORIES.items():
        if protocol in result:
            found = result[protocol]
            yield _row(one.data, split, protocol, found["n"], found.get("all", found), names) | failed


def _row(data: str, split: str, protocol: str, n: int, figures: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    about = {"data set": data, "split": split, "protocol": protocol, "n": str(n)}
    return about | {
        name: "-" if figures[key] is None else f"{figures[key]:.2f}" for key, name in names.items() if key in figures
    }


def write_report(
    path: Path, model: str, splits: Sequence[EvaluatedSplit], about: Sequence[str], run: Path | None = None
) -> Path | None:
    """Writes `report.html` of the splits of expressions among those evaluated; None where there are none.

    Beside a split stands its shuffled-text control, and beside a control its split, if its folder has that of the same model.

    Args:
        path: the HTML file.
        model: what the reader calls the model.
        splits: what was evaluated.
        about: sentences under the heading.
        run: the work directory of the training run, whose learning curve is shown.
    """
    rows: dict[str, report.ReportRow] = {}
    several = len({one.data for one in splits}) > 1
    for one in splits:
        if "ciou" not in one.result:
            continue
        for shuffled in (False, True):
            name = f"{one.split}_shuffled" if shuffled else one.split
            given = shuffled == bool(one.result["shuffled_text"])
            result = one.result if given else _earlier(one.folder / f"{name}.json", one.result)
            if result is None:
                continue
            label = model + f" on {one.data}" * several + ", shuffled text" * shuffled
            row = rows.setdefault(label, report.ReportRow(label, {}))
            folder = one.folder / "pictures" / name
            known = {one.split: folder} if (folder / PICTURES).is_file() else {}
            results, pictures = {**row.results, one.split: result}, {**row.pictures, **known}
            rows[label] = report.ReportRow(label, results, pictures, folder=one.folder, shuffled=shuffled)
    return report.write(path, list(rows.values()), title=f"{model}: evaluation", about=about, run=run) if rows else None


def _earlier(path: Path, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What an earlier evaluation of the same checkpoint left in `path`, as the other half of `result`; None: nothing."""
    found = read_table(path) if path.is_file() else None
    return found if found and found["checkpoint"] == result["checkpoint"] else None

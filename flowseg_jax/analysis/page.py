"""The two files of a diagnostic: JSON for programs, a static page with plots and thumbnails for people."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowseg_jax.checkpoints import storage
from flowseg_jax.data.records import Sample
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, report, results
from flowseg_jax.reports import html as page
from flowseg_jax.reports import overlay, pictures
from flowseg_jax.reports.html import Html
from flowseg_jax.system.console import log

REPORT = "report.html"


def write(
    out: Path,
    name: str,
    title: str,
    about: Sequence[str],
    result: Mapping[str, Any],
    body: Sequence[Html],
    *,
    conclusion: str,
    origin: Sequence[str],
) -> Path:
    """Writes `<out>/<name>.json` and `<out>/<name>.html`; says what was found and where it is, and returns the page.

    The page links to the report of the same results, where there is one.

    Args:
        title, about: heading and the sentences under it.
        result: JSON values without NaN.
        body: HTML.
        conclusion: what was found, in a sentence or two.
        origin: lines about the model, as `report.origin` writes them.

    Raises:
        UserError: the place cannot be written to.
    """
    storage.write_text_atomic(out / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    reports = [out / up / REPORT for up in ("..", "../..") if (out / up / REPORT).is_file()]
    back = [page.pieces().links([(Path(os.path.relpath(reports[0], out)).as_posix(), "The report")])] if reports else []
    head = page.pieces().head(title, about, [conclusion])
    page.write(out / f"{name}.html", "page.html", title=title, body=[head, *back, *body], origin=origin)
    log(f"{conclusion}\n{out / name}.html\n{out / name}.json")
    return out / f"{name}.html"


def origin(file: Path) -> list[str]:
    """Which model the results `<split>.jsonl` are of, from the `<split>.json` beside it; the file alone without that one.

    Raises:
        UserError: a `<split>.json` that no evaluation wrote.
    """
    table = file.with_suffix(".json")
    model = [report.origin(file.parent.name, results.read_table(table))] if table.is_file() else []
    return [*model, f"Results {file}"]


def heading(title: str, about: str = "") -> Html:
    return page.pieces().heading(title, about)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A table whose first column names its rows; figures as `shown`."""
    return page.pieces().table(head, [[first, *map(shown, rest)] for first, *rest in rows])


def shown(value: Any) -> str:
    """A figure as people read it: one digit after the point, None as a dash."""
    if value is None:
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """The pictures of one sample with their captions, its expression, and the note under them."""

    panels: results.Panels
    said: str
    note: str
    family: str = ""


def gallery(thumbnails: Iterable[Thumbnail], base: Path) -> Html:
    """The thumbnails of a page in the folder `base`, linked relative to it."""
    figures = [
        {
            "said": each.said,
            "family": each.family,
            "meant": "",
            "panels": [(caption, Path(os.path.relpath(file, base)).as_posix()) for caption, file in each.panels],
            "notes": [each.note],
            **dict.fromkeys(("model", "split", "kind"), ""),
        }
        for each in thumbnails
    ]
    return page.pieces().gallery(figures)


def picture(
    folder: Path, number: int, sample: Sample, image: np.ndarray, panels: Sequence[tuple[str, np.ndarray, bool]], note: str
) -> Thumbnail:
    """Writes the pictures of one sample's masks to `folder`.

    Args:
        folder, number: where to, and which picture of it; the first one clears those of an earlier run away.
        sample: the expression and its record.
        image: uint8 [H, W, 3].
        panels: (caption, bool [H, W], whether it is the truth).
        note: the text under the picture.

    Raises:
        UserError: the place cannot be written to.
    """
    colored = [(caption, mask, pictures.TRUTH if true else pictures.SELECTED) for caption, mask, true in panels]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.png") if number == 0 else ():
            stale.unlink()
        files = pictures.save_panels(folder, f"{number + 1}_{overlay.slug(sample.prompt)}", image, colored)
    except OSError as error:
        raise UserError(f"cannot write pictures to {folder}: {error.strerror}; choose a folder you can write to") from error
    panels = [(caption, folder / file) for caption, file in files]
    return Thumbnail(panels, sample.prompt, f"{note}; {sample.file_name}", sample.family)


def read_records(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The samples of a `<split>.jsonl`, every one of which has the fields `needed` too.

    Raises:
        UserError: not such a file, or one without these fields.
    """
    records = audit.read_records(path)
    for number, record in enumerate(records, 1):
        if missing := [key for key in needed if key not in record]:
            raise UserError(f"{path}:{number}: a sample without {', '.join(missing)}; evaluate again with eval.py")
    return records


def kept_pictures(path: Path) -> list[tuple[results.Panels, dict[str, Any]]]:
    """(pictures, record) of the samples that the evaluation of a `<split>.jsonl` kept pictures of; none if it kept none."""
    folder = path.parent / "pictures" / path.stem
    found = results.read_pictures(folder, ("file_name", "best_rank"))
    audit.samples(folder / results.PICTURES, [record for _, _, record in found])
    return [(panels, record) for _, panels, record in found]


def groups(records: Sequence[Any], family=lambda record: record["family"]) -> dict[str, list[Any]]:
    """ "all" and every expression family -> its records; families in alphabetical order."""
    found: dict[str, list[Any]] = {"all": list(records)}
    for name in sorted({family(r) for r in records} - {""}):
        found[name] = [r for r in records if family(r) == name]
    return found

"""What an evaluation has written, read back: every field has the type that its readers expect, or an error names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.errors import UserError
from flowseg_jax.system import json_files, paths
from flowseg_jax.system.json_files import expect, number

PICTURES = "index.json"  # of a folder of pictures
MOST_PANELS = 100  # of a sample
KEPT = ("image_id", "sentence_id", "file_name", "text", "sentence", "family", "score", "best_score")
KEPT += ("query", "best_query", "best_rank")  # what is said about a picture
_FIGURES = ("ciou", "giou", "oracle_ciou", "oracle_giou", "selection_gap")
_KINDS = {
    **dict.fromkeys(("text", "sentence", "family", "file_name", "failure", "text_form"), "a text"),
    **dict.fromkeys(("image_id", "ann_id", "sentence_id"), "a number or a text"),
    **dict.fromkeys(("score", "best_score", "no_target_threshold", "iou", "best_iou"), "a number or null"),
    **dict.fromkeys(("area", "count", "truth_area"), "a count"),
    **dict.fromkeys(("query", "best_query", "best_rank"), "a whole number"),
    "failed": "true or false",
}


def read_table(path: Path) -> dict[str, Any]:
    """A `<split>.json` on expressions.

    Raises:
        UserError: no JSON, not such a table, or a field that is no figure; it names the field.
    """
    table = _read(path)
    again = "evaluate again"
    if not isinstance(table, dict) or "shuffled_text" not in table or "checkpoint" not in table:
        raise UserError(f"{path} is not a result of eval.py: remove it or {again}")
    if "p_at" not in table or "families" not in table:
        raise UserError(f"{path}: no result on expressions: it has no p_at or no families")
    expect(isinstance(table["shuffled_text"], bool), table["shuffled_text"], f"{path}: shuffled_text", "true or false")
    expect(isinstance(table.get("protocol"), str), table.get("protocol"), f"{path}: protocol", "a text")
    _figures(table, str(path), (*_FIGURES, "n"))
    failed = table.get("failed")
    expect(number(failed, whole=True, least=0, most=1 << 53), failed, f"{path}: failed", "a count")
    for key in ("n_acc", "t_acc"):
        expect(key not in table or number(table[key], least=0, most=100), table.get(key), f"{path}: {key}", "a number")
    expect(isinstance(table["families"], dict), table["families"], f"{path}: families", "a group of keys")
    for family, figures in table["families"].items():
        _figures(figures, f"{path}: families.{family[:40]}", (*_FIGURES, "n"))
    expect(isinstance(table.get("model", ""), str), table.get("model"), f"{path}: model", "a text")
    for key in ("checkpoint", "prompt"):
        found = table.get(key, {})
        plain = isinstance(found, dict) and found.values()
        ok = plain is not False and all(x is None or isinstance(x, str) or number(x, whole=True) for x in plain)
        expect(ok, found, f"{path}: {key}", "a group of texts and numbers")
    digest = table["checkpoint"].get("digest")
    expect(isinstance(digest, str | None), digest, f"{path}: checkpoint.digest", "a text")
    if lacking := [key for key in ("question", "answer") if table.get("prompt") and key not in table["prompt"]]:
        raise UserError(f"{path}: prompt lacks {', '.join(lacking)}: {again}")
    return table


Panels = list[tuple[str, Path]]  # (caption, picture) of a sample: the image, and masks on it


def read_pictures(folder: Path, needed: Sequence[str] = KEPT) -> list[tuple[str, Panels, dict[str, Any]]]:
    """(kind, panels, sample) of the pictures that an evaluation kept in a folder; none where it kept none.

    Raises:
        UserError: an index that cannot be read, names a picture outside the folder, or whose samples lack a field of `needed`.
    """
    path = folder / PICTURES
    if not path.is_file():
        return []
    index = _read(path)
    try:
        expect(isinstance(index, list), index, "it", "a list of pictures")
        return [_picture(folder, f"entry {i}", entry, needed) for i, entry in enumerate(index)]
    except UserError as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate again, or remove {folder}") from None


def _picture(folder: Path, where: str, entry: Any, needed: Sequence[str]) -> tuple[str, Panels, dict[str, Any]]:
    expect(isinstance(entry, dict) and isinstance(entry.get("record"), dict), entry, where, "a picture with its record")
    panels, kind, record = entry.get("panels"), entry.get("kind"), entry["record"]
    ok = isinstance(panels, list) and 0 < len(panels) <= MOST_PANELS and all(isinstance(each, dict) for each in panels)
    expect(ok, panels, f"{where}: panels", f"a list of 1 to {MOST_PANELS} pictures")
    for each in panels:
        file, caption = each.get("file"), each.get("caption")
        ok = isinstance(file, str) and file == Path(file).name and "\0" not in file and file not in ("", "..")
        expect(ok, file, f"{where}: file", "the name of a file beside it")
        expect(isinstance(caption, str), caption, f"{where}: caption", "a text")
    expect(isinstance(kind, str), kind, f"{where}: kind", "a text")
    if lacking := [key for key in needed if key not in record]:
        raise UserError(f"{where} lacks {', '.join(lacking)}")
    if wrong := impossible(record):
        raise UserError(f"{where}: {wrong}")
    return kind, [(each["caption"], paths.inside(folder, each["file"], f"{where}: file")) for each in panels], record


def impossible(record: Mapping[str, Any]) -> str:
    """Which field of a sample has a value that no evaluation writes; "" where there is none."""
    for key, kind in _KINDS.items():
        if key in record and not _is(record[key], kind):
            return f"{key} is {json_files.short(record[key])}, expected {kind}"
    return ""


def _is(value: Any, kind: str) -> bool:
    if kind == "a text":
        return isinstance(value, str)
    if kind == "a number or a text":
        return isinstance(value, str) or number(value, whole=True)
    if kind == "a number or null":
        return value is None or number(value)
    if kind == "true or false":
        return isinstance(value, bool)
    return number(value, whole=True, least=0 if kind == "a count" else -1, most=1 << 62)


def _figures(table: Any, where: str, names: Sequence[str]) -> None:
    expect(isinstance(table, dict), table, where, "a group of figures")
    for key in names:
        value = table.get(key)
        if key == "n":
            expect(number(value, whole=True, least=0, most=1 << 53), value, f"{where}: n", "a count")
        else:
            expect(number(value, least=-1e9, most=1e9), value, f"{where}: {key}", "a number")
    thresholds = table.get("p_at", {})
    ok = isinstance(thresholds, dict) and all(number(value, least=0, most=100) for value in thresholds.values())
    expect(ok, thresholds, f"{where}: p_at", "a group of numbers")


def _read(path: Path) -> Any:
    try:
        return json_files.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it or evaluate again") from None

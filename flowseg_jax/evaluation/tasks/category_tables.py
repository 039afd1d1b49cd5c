"""The tables of a generic evaluation, of all its tasks, as functions of the records alone.

Each image leaves one record: its matched segments with their intersections and unions, its missed and its superfluous segments
(`panoptic`), its confusion of categories (`semantic`), and its objects, true and predicted (`instance`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowseg_jax.evaluation.tasks import instance, panoptic, semantic

Record = Mapping[str, Any]


def check(record: Record, categories: int) -> None:
    """Raises a ValueError unless the record's counts are counts, of categories below `categories` (predicted pixels: or -1)."""
    numbers = [(c, i, u - i) for c, i, u in record.get("matched", ())]
    numbers += [(c,) for key in ("missed", "extra") for c in record.get(key, ())]
    numbers += [(true, found + 1, pixels) for true, found, pixels in record.get("confusion", ())]
    numbers += [(category,) for category, *_ in record.get("objects", ())]
    numbers += [(category, place, len(record["masks"]) - 1 - place) for category, _, place in record.get("found", ())]
    if any(type(n) is not int or n < 0 for row in numbers for n in row) or any(row[0] >= categories for row in numbers):
        raise ValueError("a negative count or no such category")


def tables(records: Sequence[Record], categories: Sequence[str], things: Sequence[bool] | None) -> dict[str, dict[str, Any]]:
    """{protocol: its table} of every protocol whose counts the records hold: "panoptic", "semantic", "instance"."""
    n, found = {"n": len(records)}, {}
    if things is not None:
        found["panoptic"] = n | panoptic.panoptic_table(records, categories, things)
        found["semantic"] = n | semantic.semantic_table(records, categories)
    if all("found" in record for record in records):
        found["instance"] = n | instance.instance_table(records, categories, things)
    return found


def format_tables(found: Mapping[str, Any]) -> list[str]:
    """A line for each protocol of `tables`."""
    number = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
    figures = lambda table, names: ", ".join(f"{name.upper()} {number(table[name])}" for name in names)  # noqa: E731
    lines = []
    if table := found.get("panoptic"):
        parts = ", ".join(f"PQ of {part} {number(table[part]['pq'])}" for part in ("things", "stuff"))
        lines.append(f"panoptic, n {table['n']}, {figures(table['all'], ('pq', 'sq', 'rq'))}, {parts}")
    if table := found.get("semantic"):
        lines.append(f"semantic, n {table['n']}, mIoU {number(table['miou'])}")
    if table := found.get("instance"):
        lines.append(f"instance, n {table['n']}, {figures(table, ('ap', 'ap50', 'ap75'))}")
    return lines

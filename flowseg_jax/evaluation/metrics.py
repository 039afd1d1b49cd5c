"""cIoU, gIoU, P@X, oracle cIoU and selection gap from integer intersections and unions.

The unit of everything here is the record of one sample, a plain dict as it stands in a `<split>.jsonl`, so that every table can
be recomputed from the file alone. Sums are taken in integers and divided once: a result depends neither on the order of the
samples nor on how they were batched. All results are in percent.

Definitions (n samples, intersection I_i and union U_i in pixels at the original image size):

    cIoU = sum I / sum U          gIoU = mean I/U          P@X = share of samples with I/U >= X

`oracle` is what selection could have reached: for each sample the better of the best candidate and of the selected one.
`selection_gap` = oracle cIoU - cIoU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowseg_jax.evaluation.protocols import PROTOCOLS, XSAM, Protocol

Record = Mapping[str, Any]
REASONING = {"short", "long"}  # families of reasoning questions


def iou(intersection: int, union: int, both_empty: float = 1.0) -> float:
    """I / U in [0, 1]; `both_empty` where U = 0. Correctly rounded, so that 9/10 >= 0.9 holds."""
    if not 0 <= intersection <= union:
        raise ValueError(f"intersection {intersection} and union {union} are not those of two masks")
    return int(intersection) / int(union) if union else both_empty


def better(selected: tuple[int, int], candidate: tuple[int, int], protocol: Protocol = XSAM) -> tuple[int, int]:
    """(I, U) of the oracle: the candidate's if its IoU is higher, else the selected mask's."""
    return candidate if iou(*candidate, protocol.both_empty) > iou(*selected, protocol.both_empty) else selected


def _cumulative(pairs: Iterable[tuple[int, int]], both_empty: float) -> float:
    total_i = total_u = 0
    for intersection, union in pairs:
        total_i, total_u = total_i + int(intersection), total_u + int(union)
    return 100.0 * iou(total_i, total_u, both_empty)


def counts(record: Record, protocol: Protocol = XSAM, of: str = "") -> tuple[int, int]:
    """(I, U) with the truth as the protocol draws it, of the record's selected mask, or "oracle_" of the better candidate."""
    raster = "once_" if protocol.raster == "sum" else ""
    return record[f"{of}{raster}intersection"], record[f"{of}{raster}union"]


def weight(record: Record, protocol: Protocol = XSAM) -> int:
    """How many samples of the protocol the record stands for: the source's sentences that were merged into it, or one."""
    return record["count"] if protocol.unit == "sentence" else 1


def sample_iou(record: Record, protocol: Protocol = XSAM) -> float:
    """IoU in [0, 1] of the record's selected mask; a failed sample counts 0 even where nothing was to be found."""
    return 0.0 if record["failed"] else iou(*counts(record, protocol), protocol.both_empty)


def _headline(records: Sequence[Record], protocol: Protocol) -> dict[str, Any]:
    """n, cIoU, gIoU and P@X."""
    times = [weight(r, protocol) for r in records]
    values = [sample_iou(r, protocol) for r in records]
    n = sum(times)
    pairs = [counts(r, protocol) for r in records]
    return {
        "n": n,
        "ciou": _cumulative(((w * i, w * u) for w, (i, u) in zip(times, pairs, strict=True)), protocol.both_empty),
        # fsum: exact, so the order does not matter
        "giou": 100.0 * math.fsum(w * v for w, v in zip(times, values, strict=True)) / n,
        "p_at": {
            f"{x:g}": 100.0 * sum(w for w, v in zip(times, values, strict=True) if v >= x) / n for x in protocol.thresholds
        },
    }


def _figures(records: Sequence[Record], protocol: Protocol) -> dict[str, Any]:
    times = [weight(r, protocol) for r in records]
    pairs = [counts(r, protocol, "oracle_") for r in records]
    oracle = _cumulative(((w * i, w * u) for w, (i, u) in zip(times, pairs, strict=True)), protocol.both_empty)
    found = _headline(records, protocol)
    return found | {"oracle_ciou": oracle, "selection_gap": oracle - found["ciou"]}


def other_protocols(records: Sequence[Record], protocol: Protocol) -> dict[str, dict[str, Any]]:
    """{name: n, cIoU, gIoU, P@X} of the other protocols that the same predictions answer."""
    return {
        name: _headline(records, other)
        for name, other in PROTOCOLS.items()
        if other is not protocol and other.text == protocol.text
    }


def summarise(records: Iterable[Record], protocol: Protocol = XSAM) -> dict[str, Any]:
    """The table of a split.

    Args:
        records: one mapping a sample with `intersection`, `union`, `oracle_intersection`, `oracle_union` (pixels), `failed`
            (bool), `family` (str; "" = of no family), `count`, and with a summed raster `once_intersection`, `once_union`,
            `oracle_once_intersection`, `oracle_once_union`.
        protocol: gives the IoU of an empty sample and the thresholds.

    Returns:
        protocol, n, ciou, giou, oracle_ciou, selection_gap, p_at ("0.5".."0.9"), failed (count) and families: the same figures
        for each expression family. Of reasoning questions also first_text: the same for the first question of each image alone,
        as LISA scores them. Percent, full precision.

    Raises:
        ValueError: there is no record, or one whose I and U cannot be.
    """
    records = list(records)
    if not records:
        raise ValueError("no samples to summarise")
    families: dict[str, list[Record]] = {}
    for record in records:
        if record["family"]:
            families.setdefault(record["family"], []).append(record)
    table = {
        "protocol": protocol.name,
        **_figures(records, protocol),
        "failed": sum(bool(r["failed"]) for r in records),
        "families": {family: _figures(rows, protocol) for family, rows in sorted(families.items())},
    }
    if set(families) <= REASONING and families:
        first = [r for r in records if r["sentence_id"] == 0]
        rows = {family: [r for r in first if r["family"] == family] for family in sorted(families)}
        if first:
            table["first_text"] = _figures(first, protocol)
            table["first_text"]["families"] = {family: _figures(kept, protocol) for family, kept in rows.items() if kept}
    return table

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

from flowseg_jax.evaluation.protocols import XSAM, Protocol

Record = Mapping[str, Any]


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


def sample_iou(record: Record, protocol: Protocol = XSAM) -> float:
    """IoU in [0, 1] of the record's selected mask; a failed sample counts 0 even where nothing was to be found."""
    return 0.0 if record["failed"] else iou(record["intersection"], record["union"], protocol.both_empty)


def _figures(records: Sequence[Record], protocol: Protocol) -> dict[str, Any]:
    values = [sample_iou(r, protocol) for r in records]
    ciou = _cumulative(((r["intersection"], r["union"]) for r in records), protocol.both_empty)
    oracle = _cumulative(((r["oracle_intersection"], r["oracle_union"]) for r in records), protocol.both_empty)
    return {
        "n": len(records),
        "ciou": ciou,
        "giou": 100.0 * math.fsum(values) / len(values),  # fsum: exact, so the order does not matter
        "oracle_ciou": oracle,
        "selection_gap": oracle - ciou,
        "p_at": {f"{x:g}": 100.0 * sum(v >= x for v in values) / len(values) for x in protocol.thresholds},
    }


def summarise(records: Iterable[Record], protocol: Protocol = XSAM) -> dict[str, Any]:
    """The table of a split.

    Args:
        records: one mapping a sample with `intersection`, `union`, `oracle_intersection`, `oracle_union` (pixels), `failed`
            (bool) and `family` (str; "" = of no family).
        protocol: gives the IoU of an empty sample and the thresholds.

    Returns:
        protocol, n, ciou, giou, oracle_ciou, selection_gap, p_at ("0.5".."0.9"), failed (count) and families: the same figures
        for each expression family. Percent, full precision.

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
    return {
        "protocol": protocol.name,
        **_figures(records, protocol),
        "failed": sum(bool(r["failed"]) for r in records),
        "families": {family: _figures(rows, protocol) for family, rows in sorted(families.items())},
    }

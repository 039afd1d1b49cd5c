"""cIoU, gIoU, P@X, N-acc, T-acc, the oracle's cIoU and gIoU and the selection gap from integer intersections and unions.

The unit of everything here is the record of one sample, a plain dict as it stands in a `<split>.jsonl`, so that every table can
be recomputed from the file alone. Sums are taken in integers and divided once: a result depends neither on the order of the
samples nor on how they were batched. All results are in percent.

Definitions (n samples, intersection I_i and union U_i in pixels at the original image size):

    cIoU = sum I / sum U          gIoU = mIoU = mean I/U          P@X = share of samples with I/U >= X

The oracle is what selection could have reached: it takes, for each sample, the candidate with the higher IoU of two, the
selected one and the best one. `oracle_ciou` and `oracle_giou` are the cIoU and the gIoU of these choices.

    selection_gap = oracle gIoU - gIoU, never negative

The oracle's cIoU may lie below the model's: a higher IoU of a small object can cost more pixels of union than it brings of
intersection. It is therefore not what a gap is measured with.

The rule of generalised referring segmentation (ReLA), in which some samples refer to nothing. "No target" is predicted where
the selected mask is empty or its score lies below the record's `no_target_threshold`:

    sample refers to   predicted     I                     U                     IoU   counts for
    nothing            no target     0                     0                     1     N-acc (share of the samples to nothing)
    nothing            a mask        0                     its area              0
    something          a mask        |truth and mask|      |truth or mask|       I/U   T-acc (share of the others)
    something          no target     0                     |truth or mask|       0

A failed sample has I = 0 and IoU 0 by every protocol, and is right neither for N-acc nor for T-acc. The oracle may have another
candidate for it; where nothing was to be found it counts 0 for the oracle too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from flowseg_jax.errors import UserError
from flowseg_jax.evaluation.protocols import PROTOCOLS, XSAM, Protocol
from flowseg_jax.types import PAD

Record = Mapping[str, Any]
Failure = Literal["", "non-finite", "no <SEG>"]  # why a sample failed: a logit is no number, the answer asks for no mask
REASONING = {"short", "long"}  # families of reasoning questions


def iou(intersection: int, union: int, both_empty: float = 1.0) -> float:
    """I / U in [0, 1]; `both_empty` where U = 0. Correctly rounded, so that 9/10 >= 0.9 holds."""
    if not 0 <= intersection <= union:
        raise ValueError(f"intersection {intersection} and union {union} are not those of two masks")
    return int(intersection) / int(union) if union else both_empty


def best_of(selected: tuple[int, int], candidate: tuple[int, int]) -> tuple[int, int]:
    """(I, U) of the oracle by any protocol: the candidate's if its IoU is higher (of two empty masks 1), else the other's."""
    return candidate if iou(*candidate) > iou(*selected) else selected


def _cumulative(pairs: Iterable[tuple[int, int]], both_empty: float) -> float:
    total_i = total_u = 0
    for intersection, union in pairs:
        total_i, total_u = total_i + int(intersection), total_u + int(union)
    return 100.0 * iou(total_i, total_u, both_empty)


def has_no_target(record: Record) -> bool:
    """Whether the sample has no target by its source."""
    return record["ann_id"] == PAD


def predicts_no_target(record: Record) -> bool:
    """Whether "no target" is the answer: the selected mask is empty or scored below the threshold. A failure is no answer."""
    return not record["failed"] and (record["area"] == 0 or record["score"] < record["no_target_threshold"])


def intersection_union(record: Record, protocol: Protocol = XSAM, of: Literal["", "oracle_"] = "") -> tuple[int, int]:
    """(I, U) by the protocol, of the record's selected mask, or "oracle_" of the better candidate."""
    raster = "single_cover_" if protocol.raster == "sum" else ""
    i, u = record[f"{of}{raster}intersection"], record[f"{of}{raster}union"]
    if of == "" and record["failed"]:
        return 0, u
    if protocol.no_target == "gres" and predicts_no_target(record):
        if has_no_target(record):
            return 0, 0
        refused = record["score"] < record["no_target_threshold"]
        return (i, u) if of and not refused else (0, u)
    return i, u


def sample_weight(record: Record, protocol: Protocol = XSAM) -> int:
    """How many samples of the protocol the record stands for: the source's sentences that were merged into it, one or none."""
    if protocol.no_target == "left_out" and has_no_target(record):
        return 0
    return record["count"] if protocol.unit == "sentence" else 1


def counted(records: Sequence[Record], protocol: Protocol) -> list[Record]:
    """The records that the protocol counts.

    Raises:
        UserError: it counts none of them.
        ValueError: there is none.
    """
    if not records:
        raise ValueError("no samples to summarise")
    kept = [r for r in records if sample_weight(r, protocol)]
    if not kept:
        raise UserError(
            f"protocol {protocol.name} counts none of the {len(records)} samples, which refer to nothing; choose another"
        )
    return kept


def sample_iou(record: Record, protocol: Protocol = XSAM) -> float:
    """IoU in [0, 1] of the record's selected mask; a failed sample counts 0 even where nothing was to be found."""
    if record["failed"]:
        return 0.0
    if protocol.no_target == "gres" and has_no_target(record):
        return float(predicts_no_target(record))
    return iou(*intersection_union(record, protocol), protocol.both_empty)


def oracle_iou(record: Record, protocol: Protocol = XSAM) -> float:
    """IoU in [0, 1] of the oracle's choice for the record; by every protocol at least `sample_iou`."""
    i, u = intersection_union(record, protocol, "oracle_")
    if protocol.no_target == "gres" and has_no_target(record):
        return float(u == 0 and not record["failed"])
    return iou(i, u, 0.0 if record["failed"] else protocol.both_empty)


def supports_protocol(records: Sequence[Record], protocol: Protocol) -> bool:
    """Whether the records hold a table of the protocol: the model was shown its text, and it has something to add.

    Protocols with a rule for samples that refer to nothing are for data that has such samples, beside others.
    """
    if records[0]["text_form"] != protocol.text:
        return False
    return protocol.no_target == "counted" or len({has_no_target(r) for r in records}) == 2


def _share(chosen: Iterable[tuple[int, bool]]) -> float | None:
    """Weighted share of True in percent; None of nothing."""
    chosen = list(chosen)
    n = sum(w for w, _ in chosen)
    return 100.0 * sum(w for w, right in chosen if right) / n if n else None


def _headline(records: Sequence[Record], protocol: Protocol) -> dict[str, Any]:
    """n, cIoU, gIoU, P@X and, after the rule of "gres", T-acc and N-acc as far as there are such samples."""
    weighed = [(sample_weight(r, protocol), r, sample_iou(r, protocol)) for r in records]
    n = sum(w for w, _, _ in weighed)
    pairs = ((w, intersection_union(r, protocol)) for w, r, _ in weighed)
    gres = protocol.no_target == "gres"
    target = [(w, r, v) for w, r, v in weighed if not (gres and has_no_target(r))]
    figures = {
        "n": n,
        "ciou": _cumulative(((w * i, w * u) for w, (i, u) in pairs), protocol.both_empty),
        # fsum: exact, so the order does not matter
        "giou": 100.0 * math.fsum(w * v for w, _, v in weighed) / n,
        "p_at": {f"{x:g}": _share((w, v >= x) for w, _, v in target) for x in protocol.thresholds} if target else {},
    }
    if gres:
        right = {
            "n_acc": _share((w, predicts_no_target(r)) for w, r, _ in weighed if has_no_target(r)),
            "t_acc": _share((w, not (r["failed"] or predicts_no_target(r))) for w, r, _ in target),
        }
        figures |= {name: value for name, value in right.items() if value is not None}
    return figures


def _figures(records: Sequence[Record], protocol: Protocol) -> dict[str, Any]:
    weighed = ((sample_weight(r, protocol), intersection_union(r, protocol, "oracle_")) for r in records)
    found = _headline(records, protocol)
    oracle = {
        "oracle_ciou": _cumulative(((w * i, w * u) for w, (i, u) in weighed), protocol.both_empty),
        "oracle_giou": 100.0 * math.fsum(sample_weight(r, protocol) * oracle_iou(r, protocol) for r in records) / found["n"],
    }
    return found | oracle | {"selection_gap": oracle["oracle_giou"] - found["giou"]}


def first_texts(records: Sequence[Record]) -> list[Record]:
    """The first question of each image, one sample an image however often it is repeated: LISA's samples."""
    first: dict[int, Record] = {}
    for record in records:
        known = first.get(record["image_id"])
        if known is None or record["sentence_id"] < known["sentence_id"]:
            first[record["image_id"]] = record
    return [{**record, "count": 1} for record in first.values()]


def other_protocols(records: Sequence[Record], protocol: Protocol) -> dict[str, dict[str, Any]]:
    """{name: n, cIoU, gIoU, P@X, ...} of the other protocols that the same predictions answer."""
    others = (p for p in PROTOCOLS.values() if p.name != protocol.name and supports_protocol(records, p))
    return {other.name: _headline(counted(records, other), other) for other in others}


def check_between(table: Mapping[str, Any]) -> None:
    """The mean of a whole lies between the means of its parts: its gIoU between those of its families, to 1e-9.

    Raises:
        ValueError: it does not: the table's numbers are not of the same samples.
    """
    parts = [row["giou"] for row in table["families"].values()]
    if not min(parts) - 1e-9 <= table["giou"] <= max(parts) + 1e-9:
        raise ValueError(f"gIoU {table['giou']} does not lie between those of its parts, {parts}")


def summarise(records: Iterable[Record], protocol: Protocol = XSAM) -> dict[str, Any]:
    """The table of a split.

    Args:
        records: one mapping a sample with `intersection`, `union`, `oracle_intersection`, `oracle_union` (pixels), `failed`
            (bool), `failure` (`Failure`), `family` (str; "" = of no family). A protocol that counts sentences needs `count`;
            a summed raster `single_cover_intersection`, `single_cover_union` and the same with `oracle_` before; a rule for
            samples that refer to nothing `ann_id`, and "gres" also `area` (pixels of the selected mask), `score` and
            `no_target_threshold`.
        protocol: what is counted and how.

    Returns:
        protocol, n, ciou, giou, oracle_ciou, oracle_giou, selection_gap, p_at ("0.5".."0.9"; empty where no sample refers to
        something),
        failed (count), failures (reason -> count) and families: the same figures for each expression family; with "gres" also
        n_acc and t_acc where such samples exist. Of reasoning questions (which need `image_id` and `sentence_id`) also
        first_text: the same for the first question of each image alone, one sample an image, as LISA scores them. Percent, full
        precision.

    Raises:
        UserError: the protocol counts none of the records.
        ValueError: there is no record, or one whose I and U cannot be.
    """
    records = counted(list(records), protocol)
    families: dict[str, list[Record]] = {}
    for record in records:
        if record["family"]:
            families.setdefault(record["family"], []).append(record)
    table = {
        "protocol": protocol.name,
        **_figures(records, protocol),
        "failed": sum(bool(r["failed"]) for r in records),
        "failures": dict(sorted(Counter(r["failure"] for r in records if r["failed"]).items())),
        "families": {family: _figures(rows, protocol) for family, rows in sorted(families.items())},
    }
    if {r["family"] for r in records} <= REASONING:
        first = first_texts(records)
        rows = {family: [r for r in first if r["family"] == family] for family in sorted(families)}
        table["first_text"] = _figures(first, protocol)
        table["first_text"]["families"] = {family: _figures(kept, protocol) for family, kept in rows.items() if kept}
        check_between(table)
        check_between(table["first_text"])
    return table


def format_metrics(figures: Mapping[str, Any]) -> str:
    """The headline of a table as one line: n, cIoU, gIoU and, where it has them, N-acc and T-acc."""
    named = (("cIoU", "ciou"), ("gIoU", "giou"), ("N-acc", "n_acc"), ("T-acc", "t_acc"))
    return ", ".join([f"n {figures['n']}", *(f"{name} {figures[key]:.2f}" for name, key in named if key in figures)])

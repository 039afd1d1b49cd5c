"""What a better selection could reach, and which part of the model each lost sample is lost in.

The candidate with the highest score is selected; the best candidate is the one with the highest IoU. `oracle` is the better of
both (as in `evaluation.metrics`). With s = IoU of the selected mask and o = IoU of the oracle, a sample is

    good         s >= 0.8
    boundary     0.5 <= s < 0.8           the right object, its outline is off
    selection    s < 0.5 <= o             some candidate shows the object, another one was selected
    generation   s < 0.5 and o < 0.5      no candidate shows the object
    no answer    the model's output was no number

Sentences that refer to nothing have no best candidate and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.analysis import page
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, results
from flowseg_jax.evaluation.examples import FAILED, GOOD
from flowseg_jax.reports import plots
from flowseg_jax.types import PAD

KINDS = ("good", "boundary", "selection", "generation", "no answer")
TOP = (1, 2, 3, 5, 10)
_ERRORS = {
    "selection": "Some candidate shows the object (IoU of at least 50), another one was selected.",
    "generation": "No candidate shows the object.",
    "boundary": "The right object (IoU of at least 50), but its outline is off (below 80).",
    "no answer": "The model's output was no number.",
}


def ious(record: Mapping[str, Any]) -> tuple[float, float]:
    """IoU in [0, 1] of the selected mask and of the oracle."""
    return metrics.sample_iou(record), metrics.oracle_iou(record)


def kind(record: Mapping[str, Any]) -> str:
    """One of `KINDS`."""
    selected, oracle = ious(record)
    if record["failed"]:
        return "no answer"
    if selected >= FAILED:
        return "good" if selected >= GOOD else "boundary"
    return "selection" if oracle >= FAILED else "generation"


def rank(record: Mapping[str, Any]) -> int:
    """How many candidates have a higher score than the oracle's; 0 where the selected mask is as good."""
    return 0 if metrics.intersection_union(record, of="oracle_") == metrics.intersection_union(record) else record["best_rank"]


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    n, table = len(records), metrics.summarise(records)
    values = [(kind(r), *ious(r)) for r in records]
    split = {}
    for name in KINDS:
        mine = [(selected, oracle) for k, selected, oracle in values if k == name]
        split[name] = {
            "n": len(mine),
            "share": 100 * len(mine) / n,
            "lost": 100 * sum(1 - selected for selected, _ in mine) / n,
            "selectable": 100 * sum(oracle - selected for selected, oracle in mine) / n,
        }
    return {
        **{key: table[key] for key in ("n", "ciou", "oracle_ciou", "giou", "oracle_giou", "selection_gap")},
        "errors": split,
    }


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The diagnosis of a split.

    Returns:
        n, ciou, oracle_ciou, giou, oracle_giou and selection_gap; `errors`: for each kind n, its share of the samples, the
        points of gIoU `lost` in it (they add up to 100 - gIoU) and how many of these were `selectable`, which the oracle has.
        The same for each family, and for each third of the samples by the truth's area (`sizes`). `ranks`: {rank: n} of the
        best candidate among the scores, 0 for the highest, over the `found` samples whose oracle has an IoU of at least 0.5;
        `within`: {k: share of these in which it is among the k highest}. `no_target`: sentences that refer to nothing, left
        out. Percent.

    Raises:
        UserError: no sample refers to something.
    """
    with_target = [r for r in records if r["ann_id"] != PAD]
    if not with_target:
        raise UserError("no sample refers to an object: there is no best candidate to speak of")
    ranks = Counter(rank(r) for r in with_target if ious(r)[1] >= FAILED)
    found = sum(ranks.values())
    within = {k: 100 * sum(n for place, n in ranks.items() if place < k) / found for k in TOP} if found else {}
    every = page.groups(with_target)
    return {
        **_figures(every.pop("all")),
        "families": {family: _figures(rows) for family, rows in every.items()},
        "sizes": {name: _figures(rows) for name, rows in _thirds(with_target).items()},
        "ranks": dict(sorted(ranks.items())),
        "found": found,
        "within": within,
        "no_target": len(records) - len(with_target),
    }


def _thirds(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The smallest, middle and largest third of the samples by the area of the truth; objects of one size stay together."""
    areas = sorted(r["truth_area"] for r in records)
    low, high = areas[len(areas) // 3], areas[2 * len(areas) // 3]
    found = {
        f"below {low} pixels": [r for r in records if r["truth_area"] < low],
        f"{low} to {high - 1} pixels": [r for r in records if low <= r["truth_area"] < high],
        f"{high} pixels and more": [r for r in records if r["truth_area"] >= high],
    }
    return {name: rows for name, rows in found.items() if rows}


def run(file: Path, out: Path) -> Path:
    """Writes `oracle_<split>.json` and `.html` for the samples of a `<split>.jsonl`; returns the page."""
    records = page.read_records(file, ["best_rank", "truth_area"])
    result = summarise(records)
    every = {"all": result, **result["families"], **result["sizes"]}
    body = [
        page.heading("Selected and best of all candidates", "oracle: if the best candidate were always selected."),
        page.table(
            ["", "n", "cIoU", "oracle cIoU", "gIoU", "oracle gIoU", "gap"],
            [
                [name, *(row[key] for key in ("n", "ciou", "oracle_ciou", "giou", "oracle_giou", "selection_gap"))]
                for name, row in every.items()
            ],
        ),
        page.heading("Where samples are lost", "Share of the samples of each kind, percent."),
        plots.shares([(name, [row["errors"][k]["share"] for k in KINDS]) for name, row in every.items()], KINDS),
        page.table(
            ["", "n", "share", "gIoU points lost", "of which another candidate has"],
            [[k, *(result["errors"][k][key] for key in ("n", "share", "lost", "selectable"))] for k in KINDS],
        ),
    ]
    if result["found"]:
        body += [
            page.heading(
                "Rank of the best candidate by score",
                f"Over the {result['found']} samples in which it shows the object. 1: it was selected, or nothing is better.",
            ),
            plots.bars(
                [(str(place + 1), float(result["ranks"].get(place, 0))) for place in range(max(result["ranks"]) + 1)],
                x="rank",
                y="samples",
            ),
            page.table(["among the highest", *(str(k) for k in TOP)], [["share", *result["within"].values()]]),
        ]
    pictures = page.kept_pictures(file)
    for name, meaning in _ERRORS.items():
        if mine := [(panels, r) for panels, r in pictures if r["ann_id"] != PAD and kind(r) == name]:
            body += [page.heading(f"Examples: {name}", meaning), page.gallery([_thumbnail(*each) for each in mine], out)]
    about = [f"{file}: {result['n']} samples, {result['no_target']} sentences without a target left out."]
    title, found = f"Selected and best: {file.stem}", {"conclusion": finding(result), "origin": page.origin(file)}
    return page.write(out, f"oracle_{file.stem}", title, about, result, body, **found)


def finding(result: Mapping[str, Any]) -> str:
    """Which kind of error costs most, in a sentence."""
    lost = {name: result["errors"][name]["lost"] for name in KINDS[1:]}
    worst = max(lost, key=lost.get)
    if result["giou"] > 95:
        return f"gIoU is {result['giou']:.1f}: hardly anything is lost."
    missing = 100 - result["giou"]
    return (
        f"Of the {missing:.1f} points of gIoU that are missing, {lost[worst]:.1f} are lost in {worst} errors, more than in any "
        f"other kind. Always selecting the best candidate would give {result['selection_gap']:.1f} points back."
    )


def _thumbnail(panels: results.Panels, record: Mapping[str, Any]) -> page.Thumbnail:
    selected, oracle = ious(record)
    note = f"selected {100 * selected:.1f}, oracle {100 * oracle:.1f}, rank of the best {rank(record) + 1}"
    return page.Thumbnail(panels, record["text"], f"{note}; {record['file_name']}", record["family"])

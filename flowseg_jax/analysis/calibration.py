"""When to answer "there is no such object": a threshold on the score, and what the score is worth.

Two kinds of samples are held against each other: sentences that refer to something in their image, and sentences that do not:
those of the file that refer to nothing (gRefCOCO), and those of a shuffled-text control, in which every image gets another
image's sentences. Some shuffled sentences do fit their new image, so the false-alarm rate that is measured with them is too
high, and the threshold too strict; sentences that refer to nothing by their source have no such flaw.

The model refuses a sentence whose highest score is below the threshold t:

    false alarm     a mask although nothing is there        share of the absent with score >= t    (100 - N-acc)
    kept            a mask where something is there         share of the present with score >= t   (T-acc)

A score that is no number counts as refused. Choose t on validation data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from flowseg_jax.analysis import page
from flowseg_jax.checkpoints.model_card import write_no_target
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics
from flowseg_jax.evaluation.examples import FAILED
from flowseg_jax.reports import plots
from flowseg_jax.system.console import log
from flowseg_jax.types import PAD

BINS = 10  # of the reliability table
POINTS = 50  # of the ROC that are written, at most
DIGITS = 6  # of a threshold


def is_absent(record: Mapping[str, Any]) -> bool:
    """Whether nothing in the image is what the model was asked for: no target, or another image's sentence."""
    return record["ann_id"] == PAD or record["text"] != record["sentence"]


def _scores(records: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, " n"]:
    return np.array([-np.inf if r["score"] is None else r["score"] for r in records])


def threshold(absent: Float[np.ndarray, " n"], rate: float) -> float:
    """The lowest t, to `DIGITS` digits, with which at most the share `rate` in [0, 1] of the absent scores is >= t."""
    falling = np.sort(absent)[::-1]
    allowed = math.floor(rate * len(falling) + 1e-9)
    if allowed >= len(falling) or falling[allowed] == -np.inf:
        return 0.0
    scale = 10**DIGITS
    # The next but at least half a digit above a score that must be refused: above it in float32 too.
    return (math.floor(float(falling[allowed]) * scale + 0.5) + 1) / scale


def curve(present: Float[np.ndarray, " n"], absent: Float[np.ndarray, " m"]) -> list[tuple[float, float, float]]:
    """(t, false alarms, kept) at every t at which one of them changes, from refusing everything; shares in [0, 1]."""
    steps = np.unique(np.concatenate([present, absent]))[::-1]
    above = lambda scores: (len(scores) - np.searchsorted(np.sort(scores), steps)) / len(scores)  # noqa: E731
    return [(math.inf, 0.0, 0.0), *zip(steps.tolist(), above(absent).tolist(), above(present).tolist(), strict=True)]


def reliability(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of samples that refer to something, by score in `BINS` equal parts of [0, 1]: n, mean score, share with IoU >= 0.5."""
    scores = _scores(records)
    right = np.array([metrics.sample_iou(r) >= FAILED for r in records])
    place = np.clip(np.floor(np.nan_to_num(scores, neginf=-1.0) * BINS), -1, BINS - 1)
    rows = []
    for i in range(BINS):
        mine = place == i
        row: dict[str, Any] = {"low": i / BINS, "high": (i + 1) / BINS, "n": int(mine.sum())}
        row["score"] = 100 * float(scores[mine].mean()) if mine.any() else None
        row["right"] = 100 * float(right[mine].mean()) if mine.any() else None
        rows.append(row)
    return rows


def summarise(records: Sequence[Mapping[str, Any]], rate: float) -> dict[str, Any]:
    """The calibration.

    Args:
        records: samples of both kinds.
        rate: the false-alarm rate that is wanted at most, in (0, 1).

    Returns:
        present, absent and of the latter `shuffled`: counts; no_target_threshold; false_alarms and kept at it; auc:
        how often a present sample scores higher than an absent one (a tie counts half); roc: [t, false alarms, kept] (t None:
        everything is refused); reliability (see there) with calibration_error: mean distance between score and share of right
        ones over the present samples. Percent, except thresholds.

    Raises:
        UserError: a rate out of range, or one of the kinds is missing.
    """
    if not 0 < rate < 1:
        raise UserError(f"--false-alarms is {rate:g}: give a share between 0 and 1, as in 0.1")
    there, absent = ([r for r in records if is_absent(r) is kind] for kind in (False, True))
    if not there:
        raise UserError("no sentence refers to something in its image: name the results on real sentences first")
    if not absent:
        raise UserError(
            "every sentence refers to something in its image: add the shuffled-text control (eval.py --shuffle-text) as "
            "the second file, or use data with sentences that refer to nothing"
        )
    present_scores, absent_scores = _scores(there), _scores(absent)
    t = threshold(absent_scores, rate)
    roc = curve(present_scores, absent_scores)
    auc = sum((f1 - f0) * (k0 + k1) / 2 for (_, f0, k0), (_, f1, k1) in itertools.pairwise(roc))
    shown = [roc[i] for i in np.unique(np.linspace(0, len(roc) - 1, POINTS).round().astype(int))]
    bins = reliability(there)
    counted = sum(row["n"] for row in bins)
    error = sum(row["n"] * abs(row["score"] - row["right"]) for row in bins if row["n"])
    return {
        "present": len(there),
        "absent": len(absent),
        "shuffled": sum(r["text"] != r["sentence"] for r in absent),
        "wanted_false_alarms": 100 * rate,
        "no_target_threshold": t,
        "false_alarms": 100 * float((absent_scores >= t).mean()),
        "kept": 100 * float((present_scores >= t).mean()),
        "auc": 100 * auc,
        "roc": [[at if math.isfinite(at) else None, 100 * false, 100 * kept] for at, false, kept in shown],
        "reliability": bins,
        "calibration_error": error / counted if counted else None,
    }


def run(file: Path, control: Path | None, out: Path, rate: float, model: str | None = None) -> Path:
    """Writes `calibration_<split>.json` and `.html`, prints the threshold, returns the page.

    Args:
        file: `<split>.jsonl` of real sentences, sentences without a target among them or not.
        control: `<split>_shuffled.jsonl`, or None.
        out: the folder to write to.
        rate: the false-alarm rate that is wanted at most, in (0, 1).
        model: a model directory whose own threshold this becomes (`checkpoints.model_card`); None: of none.
    """
    records = page.read_records(file, ["score"])
    if any(r["text"] != r["sentence"] for r in records):
        raise UserError(f"{file} is a shuffled-text control: name the results on real sentences first")
    if control is not None:
        others = page.read_records(control, ["score"])
        others = [r for r in others if r["text"] != r["sentence"]]  # two images may share a sentence, "left" for instance
        if not others:
            raise UserError(f"{control} is no shuffled-text control: make one with eval.py --shuffle-text")
        records += others
    result = summarise(records, rate)
    if model is not None:
        names = f"{file.name} and {control.name}" if control else file.name
        write_no_target(
            model,
            threshold=result["no_target_threshold"],
            false_alarms=round(result["false_alarms"], 1),
            missed=round(100 - result["kept"], 1),
            measured_on=f"{result['present']} sentences that fit and {result['absent']} that do not, {names}",
        )
        log(f"{model}: this is the model's own threshold now")
    about = [f"{result['present']} sentences that refer to something, {result['absent']} that do not: {file}"]
    about[0] += f", {control}." if control else "."
    if result["shuffled"]:
        about.append(
            f"{result['shuffled']} of the latter are other images' sentences. Some of them do fit their new image: the true"
            " false-alarm rate is lower than the one measured here."
        )
    edges = np.linspace(0, 1, BINS + 1)
    counts = [np.histogram(_scores([r for r in records if is_absent(r) is kind]), edges)[0] for kind in (False, True)]
    middles = (edges[1:] + edges[:-1]) / 2
    body = [
        page.heading("Threshold", f"At most {100 * rate:g} % false alarms wanted."),
        page.table(
            ["", "--no-target-threshold", "false alarms", "present kept", "AUC"],
            [["", f"{result['no_target_threshold']}", result["false_alarms"], result["kept"], result["auc"]]],
        ),
        plots.lines(
            {"ROC": [(false, kept) for _, false, kept in result["roc"]]},
            x="false alarms, %",
            y="present kept, %",
            x_range=(0, 100),
            y_range=(0, 100),
            diagonal=True,
            dots=False,
        ),
        page.heading("Scores", "Share of the sentences of each kind by score, percent."),
        plots.lines(
            {
                name: list(zip(middles.tolist(), (100 * count / max(count.sum(), 1)).tolist(), strict=True))
                for name, count in zip(("present", "absent"), counts, strict=True)
            },
            x="score",
            y="share, %",
            x_range=(0, 1),
        ),
        page.heading(
            "What a score is worth",
            "Of the sentences that refer to something: how many masks have an IoU of at least 0.5. On the diagonal a score is"
            f" the chance to be right; the mean distance from it is {page.shown(result['calibration_error'])} points.",
        ),
        plots.lines(
            {"right": [(row["score"], row["right"]) for row in result["reliability"] if row["n"]]},
            x="mean score, %",
            y="right, %",
            x_range=(0, 100),
            y_range=(0, 100),
            diagonal=True,
        ),
        page.table(
            ["score", "n", "mean score", "right"],
            [[f"{r['low']:.1f}–{r['high']:.1f}", r["n"], r["score"], r["right"]] for r in result["reliability"]],
        ),
    ]
    found = {"conclusion": finding(result), "origin": page.origin(file)}
    return page.write(out, f"calibration_{file.stem}", f"No such object: {file.stem}", about, result, body, **found)


def finding(result: Mapping[str, Any]) -> str:
    """The threshold and what it costs, in a sentence."""
    return (
        f"--no-target-threshold={result['no_target_threshold']}: {result['false_alarms']:.1f} % false alarms on"
        f" {result['absent']} absent, {result['kept']:.1f} % of {result['present']} present kept, AUC {result['auc']:.1f} %"
    )

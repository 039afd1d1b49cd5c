"""What one model makes of another one's failures, and what it breaks: FlowSeg's failure rescue, with the reverse beside it.

A's failures are its samples with IoU below 0.5 (and, apart, below 0.2). The rescue rate is the share of them in which B reaches
0.5. Another model that is no better, only wrong elsewhere, rescues many of them too, so the rate alone shows nothing. Beside it
stand the reverse rate, the share of A's successes (IoU of at least 0.5) in which B is below 0.5, and `net`, what remains of
both: the change of P@0.5 over all samples. Intervals hold 95 % of the resamples; images are drawn, not sentences.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from flowseg_jax.analysis import page
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, metrics
from flowseg_jax.evaluation.examples import FAILED
from flowseg_jax.reports import plots
from flowseg_jax.reports.html import Html, html

LOW = 0.2
PARTS = {  # name -> (lowest, highest) IoU in A of the samples it is about, and the rate that says what became of them
    f"A below {FAILED:g}": (0.0, FAILED, "rescued"),
    f"A below {LOW:g}": (0.0, LOW, "rescued"),
    f"A at least {FAILED:g}": (FAILED, np.inf, "reverse"),
    "all": (0.0, np.inf, "net"),
}
_CELLS = 10  # of the table of both models' IoUs, each way


def draws(images: int, resamples: int, seed: int) -> Float[np.ndarray, "r i"]:
    """How often each image is drawn in each resample, as `audit.compare` draws them."""
    rng, often = np.random.default_rng(seed), np.empty((resamples, images))
    for row in often:
        row[:] = np.bincount(rng.integers(images, size=images), minlength=images)
    return often


def _measures(iou: Float[np.ndarray, "s 2"], low: float, high: float) -> Float[np.ndarray, "s 5"]:
    """Of each sample: whether it is in the part, and if so IoU in A, IoU in B, A at least 0.5, B at least 0.5; else zeros."""
    inside = (iou[:, 0] >= low) & (iou[:, 0] < high)
    return inside[:, None] * np.column_stack([np.ones(len(iou)), iou, iou >= FAILED])


def _figures(sums: Float[np.ndarray, "*b 5"], rate: str) -> dict[str, Float[np.ndarray, "*b"]]:
    """Percent, from sums of `_measures`; NaN of no sample."""
    with np.errstate(invalid="ignore"):
        first, second, hit_first, hit_second = 100 * np.moveaxis(sums[..., 1:] / sums[..., :1], -1, 0)
    rates = {"rescued": hit_second, "reverse": 100 - hit_second, "net": hit_second - hit_first}
    return {"first": first, "second": second, "gain": second - first, rate: rates[rate]}


def _part(sums: Float[np.ndarray, "i 5"], sampled: Float[np.ndarray, "r 5"], rate: str) -> dict[str, Any]:
    whole, spread = _figures(sums.sum(0), rate), _figures(sampled, rate)
    n = int(sums[:, 0].sum())
    result: dict[str, Any] = {"n": n, "images": int((sums[:, 0] > 0).sum())}
    for name, value in whole.items():
        result[name] = float(value) if n else None
        if name in ("gain", rate):
            known = spread[name][np.isfinite(spread[name])]  # a resample may hold none of the part's images
            result[f"{name}_interval"] = np.percentile(known, audit.INTERVAL).tolist() if n else None
    return result


def summarise(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    *,
    resamples: int = audit.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """A's failures in B, and the reverse.

    Args:
        first, second: records of A and of B, of the same samples in any order.
        resamples, seed: of the bootstrap.

    Returns:
        {"all" or family: {part: figures}} with the parts of `PARTS`. Figures: n; images; mean IoU `first` in A and `second` in
        B; `gain`, their difference; and the part's rate: `rescued`, share in which B reaches 0.5; `reverse`, share in which it
        does not; `net`, P@0.5 of B minus that of A. `*_interval` holds 95 % of the resamples in which the part occurs. Percent;
        None where there is no sample.

    Raises:
        UserError: the two do not hold the same samples.
    """
    rows = audit.pair(first, second)
    images = {image: i for i, image in enumerate(dict.fromkeys(a["image_id"] for a, _ in rows))}
    often = draws(len(images), resamples, seed)
    result = {}
    for group, members in page.groups(rows, family=lambda row: row[0]["family"]).items():
        iou = np.array([[metrics.sample_iou(record) for record in row] for row in members])
        where = np.array([images[a["image_id"]] for a, _ in members])
        result[group] = {}
        for name, (low, high, rate) in PARTS.items():
            sums = np.zeros((len(images), 5))
            np.add.at(sums, where, _measures(iou, low, high))
            result[group][name] = _part(sums, often @ sums, rate)
    return result


def run(first: Path, second: Path, out: Path) -> Path:
    """Writes `failure_comparison_<A>_<B>.json` and `.html` for two `<split>.jsonl` of the same samples; returns the page."""
    a, b = (page.read_records(path, []) for path in (first, second))
    result = summarise(a, b)
    iou = np.array([[metrics.sample_iou(record) for record in row] for row in audit.pair(a, b)])
    edges = np.linspace(0, 1, _CELLS + 1)
    grid = np.histogram2d(iou[:, 1], iou[:, 0], bins=(edges, edges))[0][::-1]  # B upwards, A to the right
    names = [f"{100 * low:.0f}–{100 * high:.0f}" for low, high in itertools.pairwise(edges)]
    body = [
        page.heading("Rescued and broken", "Mean IoU in A and B; rates with the interval that holds 95 % of the resamples."),
        _table(result["all"]),
        page.heading("Samples by IoU in A and in B", "On the diagonal both do equally well; A's failures are on the left."),
        plots.heat(grid.tolist(), names[::-1], names, x="IoU in A", y="IoU in B"),
        *(part for group, table in result.items() if group != "all" for part in (html("<h3>{}</h3>", group), _table(table))),
    ]
    body += _examples(a, second, out)
    about = [
        f"A: {first}",
        f"B: {second}",
        "A model that is only wrong elsewhere rescues many failures too: read the rate beside its reverse.",
    ]
    result = {"a": str(first), "b": str(second), "groups": result}
    name = f"failure_comparison_{first.parent.name}_{second.parent.name}_{first.stem}"
    found = {"conclusion": finding(result["groups"]["all"]), "origin": [*page.origin(first), *page.origin(second)]}
    return page.write(out, name, f"Rescue: {first.stem}", about, result, body, **found)


def finding(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """What B makes of A's failures, beside what it breaks, in a sentence."""
    failures, kept, every = (parts[name] for name in (f"A below {FAILED:g}", f"A at least {FAILED:g}", "all"))
    low, high = every["net_interval"]
    clear = "clearly better" if low > 0 else "clearly worse" if high < 0 else "no clear difference"
    rescued = (
        f"B rescues {failures['rescued']:.1f} % of A's {failures['n']:,} failures" if failures["n"] else "A has no failures"
    )
    broken = f"breaks {kept['reverse']:.1f} % of its {kept['n']:,} successes" if kept["n"] else "A has no successes to break"
    return f"{rescued} and {broken}: P@0.5 changes by {every['net']:+.1f} points [{low:+.1f}, {high:+.1f}], {clear}."


def _examples(first: Sequence[Mapping[str, Any]], second: Path, out: Path) -> list[Html]:
    """The pictures that B's evaluation kept of samples that changed sides."""
    before = {_key(r): metrics.sample_iou(r) for r in first}
    found: dict[str, list[page.Thumbnail]] = {"rescued": [], "broken": []}
    for panels, record in page.kept_pictures(second):
        if _key(record) not in before:
            raise UserError(f"{panels[0][1]}: a picture of a sample that {second} does not hold; evaluate again")
        was, now = before[_key(record)], metrics.sample_iou(record)
        note = f"IoU {100 * was:.1f} in A, {100 * now:.1f} in B; the masks are B's"
        if (was < FAILED) != (now < FAILED):
            kept = found["rescued" if was < FAILED else "broken"]
            kept.append(page.Thumbnail(panels, record["text"], note, record["family"]))
    return [
        part for name, shown in found.items() if shown for part in (page.heading(f"Examples: {name}"), page.gallery(shown, out))
    ]


def _key(record: Mapping[str, Any]) -> tuple:
    return record["image_id"], record["ann_id"], record["sentence_id"], record["text"]


def _with(value: float | None, interval: list[float] | None) -> str:
    return "–" if value is None or interval is None else f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _table(parts: Mapping[str, Mapping[str, Any]]) -> Html:
    rates = {"rescued": "rescue rate", "reverse": "reverse rate", "net": "net change of P@0.5"}
    rows = []
    for name, part in parts.items():
        intervals = [_with(part.get(key), part.get(f"{key}_interval")) for key in ("gain", *rates)]
        rows.append([name, part["n"], part["first"], part["second"], *intervals])
    return page.table(["", "n", "A", "B", "B - A", *rates.values()], rows)

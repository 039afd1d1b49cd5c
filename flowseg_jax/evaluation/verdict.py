"""What the numbers of an evaluation say, in sentences: the top of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowseg_jax.system.json_files import number

Result = Mapping[str, Any]  # the content of a `<split>.json`


def verdict(label: str, split: str, result: Result, control: Result | None, others: Sequence[tuple[str, Result]]) -> list[str]:
    """Two to four sentences about a model on a split.

    Args:
        label: what the model is called.
        split: of which set.
        result: its numbers on expressions.
        control: the same with the sentences of other images.
        others: (label, numbers) of other models on the same split.
    """
    ciou, giou, n = (_of(result, name) for name in ("ciou", "giou", "n"))
    lines = [
        f"{label}: cIoU {ciou:.1f}, gIoU {giou:.1f} on {split} ({n:,.0f} expressions).",
        _loss(result),
    ]
    if control:
        lines.append(_reads(result, control))
    if others:
        lines.append("For comparison, cIoU: " + ", ".join(f"{name} {_of(other, 'ciou'):.1f}" for name, other in others) + ".")
    if result["failed"]:
        lines.append(f"{_of(result, 'failed'):,.0f} expressions got no answer.")
    return lines


def _loss(result: Result) -> str:
    """Where the missing points of gIoU are: between selection and candidates."""
    best = _of(result, "oracle_giou")
    selection, masks = best - _of(result, "giou"), 100 - best
    if selection + masks < 5:
        return "Hardly anything is missing."
    worse = "the choice" if selection > 1.25 * masks else "the masks" if masks > 1.25 * selection else "both alike"
    return (
        f"Of the {selection + masks:.1f} points of gIoU that are missing, {selection:.1f} are lost in the choice among the "
        f"candidates and {masks:.1f} in their masks: what is left to improve is {worse}."
    )


def _reads(result: Result, control: Result) -> str:
    """Whether the model reads the sentences, from the shuffled-text control."""
    real, other = _of(result, "ciou"), _of(control, "ciou")
    share = 100 * other / real if real > 0 else 100.0
    says = "it reads what it is asked" if share < 50 else "much of the result does not come from reading" if share < 90 else ""
    says = says or "it does not read what it is asked"
    return f"Asked the sentences of other images, cIoU is {other:.1f}: {says}."


def _of(result: Result, name: str) -> float:
    """A figure; NaN where it is no number."""
    return float(result[name]) if number(result[name]) else math.nan

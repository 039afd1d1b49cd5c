"""The learning curve of a run, from its `metrics.jsonl`, as plots for the report."""

from __future__ import annotations

from pathlib import Path

from flowseg_jax.errors import UserError
from flowseg_jax.reports import plots
from flowseg_jax.reports.html import Html
from flowseg_jax.system import json_files
from flowseg_jax.system.json_files import number

METRICS = "metrics.jsonl"
POINTS = 300  # of a curve, at most
SELECTION = ("accuracy/referring_selection", "referring_selection_accuracy")  # the second: in runs of version 0.1
Curve = list[tuple[float, float | None]]


def read(file: Path) -> dict[str, Curve]:
    """Metric -> (step, value) of all lines that have it; a value that is no finite number is None, a gap.

    Raises:
        UserError: the file cannot be read, or a line but the last (which a killed run may have left unfinished) is no metrics.
    """
    found: dict[str, Curve] = {}
    try:
        with file.open("rb") as lines:
            for place, line in enumerate(lines, 1):
                try:
                    row = json_files.loads(line)
                    if not isinstance(row, dict) or not number(row.get("step"), whole=True, least=0, most=1 << 53):
                        raise ValueError("it has no step")
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        break
                    raise UserError(f"{file}:{place}: no line of metrics ({error}); leave the file out or repair it") from None
                for name, value in row.items():
                    if name != "step":
                        found.setdefault(name, []).append((row["step"], float(value) if number(value) else None))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    return found


def thinned(curve: Curve) -> Curve:
    """At most `POINTS` of a curve, its last one among them."""
    every = max(1, -(-len(curve) // POINTS))
    return curve[::-1][::every][::-1]


def draw(file: Path) -> list[tuple[str, Html]]:
    """(what it shows, plot) of a run's `metrics.jsonl`; empty where it has nothing to draw.

    Raises:
        UserError: as `read`.
    """
    found = read(file)
    steps = [step for curve in found.values() for step, _ in curve]
    if not steps or min(steps) == max(steps):
        return []
    span = float(min(steps)), float(max(steps))
    choice = {name: thinned(curve) for name, curve in found.items() if name in SELECTION}
    choice = {name: [(step, value and 100 * value) for step, value in curve] for name, curve in choice.items()}
    scores = {name: thinned(curve) for name, curve in found.items() if name.lower().endswith(("ciou", "giou"))}
    pictures = []
    if percent := scores | choice:
        about = "How often the right query is selected in training"
        about += ", and the validation scores while it trained, percent." if scores else ", percent."
        pictures.append((about, plots.lines(percent, x="step", y="percent", x_range=span, y_range=(0, 100), dots=False)))
    if "loss" in found:
        loss = {"loss": thinned(found["loss"])}
        pictures.append(("The loss that training lowers.", plots.lines(loss, x="step", y="loss", x_range=span, dots=False)))
    return pictures

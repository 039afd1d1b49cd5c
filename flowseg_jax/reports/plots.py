"""Plots as inline SVG for a static page, drawn by matplotlib.

Every function takes plain numbers and returns one `<svg>` element. Colours and sizes are fixed, so that all pages look alike.
Names may say anything: they are drawn as text, never as mathematics or markup.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowseg_jax.reports.html import Html

COLORS = ("#2f6feb", "#d6409f", "#2ea043", "#d97706", "#8250df", "#0e9488", "#cf222e", "#a16207")
WIDTH, HEIGHT = 560, 260  # points
_GREY, _GRID = "#57606a", "#eaeef2"
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "flowseg",  # the same plot, the same file
    "font.family": ["sans-serif"],
    "font.size": 9,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color", "text.color"), _GREY),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left", "axes.spines.bottom"), False),
    **dict.fromkeys(("xtick.bottom", "ytick.left"), False),
    "grid.color": _GRID,
    "axes.axisbelow": True,
}


class _Plot:
    """A figure with one pair of axes; `svg` is filled when its `with` ends."""

    def __init__(self, height: float):
        self.figure = Figure((WIDTH / 72, height / 72), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.svg = Html()

    def legend(self) -> None:
        handles, names = self.axes.get_legend_handles_labels()
        legend = self.figure.legend(handles, names, loc="outside upper left", ncols=max(1, len(names)), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)

    def labels(self, x: str, y: str) -> None:
        self.axes.set_xlabel(x, parse_math=False)
        self.axes.set_ylabel(y, parse_math=False)


@contextmanager
def _plot(height: float = HEIGHT) -> Iterator[_Plot]:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks
        plot, file = _Plot(height), io.StringIO()
        yield plot
        plot.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    style = "max-width:100%;height:auto;background:#fff;border:1px solid #d8dee4;border-radius:6px;margin:8px 0"
    plot.svg = Html(text[text.index("<svg") :].replace("<svg ", f'<svg role="img" style="{style}" ', 1).strip())


def bars(values: Sequence[tuple[str, float]], *, x: str, y: str) -> Html:
    """Vertical bars from zero: (name, value >= 0), with axis labels `x` and `y`."""
    if not values or min(value for _, value in values) < 0:
        raise ValueError("bars need at least one value, and none below zero")
    every = math.ceil(len(values) / 20)  # names that fit beside each other
    with _plot() as plot:
        places = range(len(values))
        plot.axes.bar(places, [value for _, value in values], color=COLORS[0])
        plot.axes.set_xticks(places[::every], [name for name, _ in values[::every]], parse_math=False)
        plot.axes.set_ylim(0, max(value for _, value in values) or 1)
        plot.axes.grid(axis="y")
        plot.labels(x, y)
    return plot.svg


def lines(
    series: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    x: str,
    y: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float] | None = None,
    diagonal: bool = False,
    dots: bool = True,
    whole: bool = False,
) -> Html:
    """Lines through points, one a series, with a legend.

    Args:
        series: name -> (x, y) in the order of x; a y of None leaves a gap.
        x, y: axis labels. x_range, y_range: (low, high); y_range None: from the values, zero included.
        diagonal: a dashed line from corner to corner, for what equality or chance would be.
        dots: marks every point. whole: only whole numbers of x are named.

    Raises:
        ValueError: a range that is empty or not finite.
    """
    known = [value for points in series.values() for _, value in points if value is not None]
    low, high = y_range or (min(0.0, *known, 0.0), max(0.0, *known, 0.0))
    high = high if high > low else low + 1.0
    for ends in (x_range, (low, high)):
        if not (all(map(math.isfinite, ends)) and ends[0] < ends[1]):
            raise ValueError(f"an axis needs two finite ends in order, got {ends[0]} and {ends[1]}")
    with _plot() as plot:
        if diagonal:
            plot.axes.plot(x_range, (low, high), color=_GREY, linewidth=1, linestyle=(0, (4, 4)))
        for i, (name, points) in enumerate(series.items()):
            values = [math.nan if value is None else value for _, value in points]
            line = {"color": COLORS[i % len(COLORS)], "linewidth": 2, "marker": "o" if dots else "", "markersize": 5}
            (drawn,) = plot.axes.plot([at for at, _ in points], values, clip_on=False, **line)
            drawn.set_label(f"\u2060{name}")  # a name that begins with "_" would be left out
        plot.axes.set(xlim=x_range, ylim=(low, high))
        if whole:
            plot.axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        plot.axes.grid(axis="y")
        plot.labels(x, y)
        plot.legend()
    return plot.svg


def shares(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> Html:
    """Horizontal bars that each split 100 percent into named parts: (row, one percentage a name)."""
    places = range(len(rows))
    with _plot(60 + 24 * len(rows)) as plot:
        left = [0.0] * len(rows)
        for i, name in enumerate(names):
            widths = [values[i] for _, values in rows]
            drawn = plot.axes.barh(places, widths, 0.66, left, color=COLORS[i % len(COLORS)])
            drawn.set_label(f"\u2060{name}")
            texts = [f"{width:.0f}" if width > 7 else "" for width in widths]
            plot.axes.bar_label(drawn, texts, label_type="center", color="white")
            left = [a + b for a, b in zip(left, widths, strict=True)]
        plot.axes.set_yticks(places, [row for row, _ in rows], parse_math=False)
        plot.axes.set(xlim=(0, 100), xticks=())
        plot.axes.invert_yaxis()
        plot.legend()
    return plot.svg


def heat(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, x: str, y: str, digits: int = 0
) -> Html:
    """A table of cells, darker where the value is higher; `rows` name them from top to bottom, `columns` from left to right."""
    flat = [value for line in values for value in line]
    low, high = min(flat), max(flat)
    shade = LinearSegmentedColormap.from_list("shade", ("#f6f9fe", COLORS[0]))
    with _plot(50 + 26 * len(rows)) as plot:
        cells = plot.axes.pcolormesh(values, cmap=shade, vmin=low, vmax=high if high > low else low + 1, edgecolors="white")
        cells.set_linewidth(1)
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                dark = high > low and (value - low) / (high - low) > 0.55
                place = {"ha": "center", "va": "center", "color": "white" if dark else _GREY}
                plot.axes.text(j + 0.5, i + 0.5, f"{value:.{digits}f}", **place)
        plot.axes.set_xticks([j + 0.5 for j in range(len(columns))], columns, parse_math=False)
        plot.axes.set_yticks([i + 0.5 for i in range(len(rows))], rows, parse_math=False)
        plot.axes.xaxis.tick_top()
        plot.axes.invert_yaxis()
        plot.labels(x, y)
        plot.axes.xaxis.set_label_position("bottom")
    return plot.svg

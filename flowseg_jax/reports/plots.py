"""Plots as inline SVG: strings for a static page, without a script or a library.

Every function takes plain numbers and returns one `<svg>` element. Colours and sizes are fixed, so that all sheets look alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from flowseg_jax.reports.html import Html, html, join

COLORS = ("#2f6feb", "#d6409f", "#2ea043", "#d97706", "#8250df", "#0e9488", "#cf222e", "#a16207")
WIDTH, HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 28, 44  # margins for ticks, labels and the legend
_GREY, _GRID = "#57606a", "#eaeef2"
_WHITE = html(' style="fill:#fff"')


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that span [low, high]: multiples of 1, 2 or 5 times a power of ten, about `about` of them."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"an axis needs two finite ends in order, got {low} and {high}")
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _svg(parts: Sequence[Html], height: float = HEIGHT) -> Html:
    style = "max-width:100%;height:auto;background:#fff;border:1px solid #d8dee4;border-radius:6px;margin:8px 0"
    frame = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {:g}" width="{}" role="img" style="{}"'
        ' font-family="system-ui, sans-serif" font-size="11" fill="{}">{}</svg>'
    )
    return html(frame, WIDTH, height, WIDTH, style, _GREY, join(parts))


def _label(x: float, y: float, content: object, anchor: str = "middle", extra: object = "") -> Html:
    return html('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>', x, y, anchor, extra, content)


def _legend(names: Iterable[str]) -> list[Html]:
    parts, at = [], 10.0
    for i, name in enumerate(names):
        box = '<rect x="{:.1f}" y="8" width="10" height="10" rx="2" fill="{}"/>'
        parts.append(html(box, at, COLORS[i % len(COLORS)]))
        parts.append(_label(at + 14, 17, name, "start"))
        at += 28 + 6.2 * len(name)
    return parts


class _Frame:
    """Axes of a plot: where a value lies on the picture, and the grid with its numbers."""

    def __init__(self, x: tuple[float, float] | None, y: tuple[float, float]):
        self._x, self._y = x, y

    def at_x(self, value: float) -> float:
        low, high = self._x or (0.0, 1.0)
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def grid(self, x_label: str, y_label: str, whole: bool = False) -> list[Html]:
        parts = []
        for value in ticks(*self._y):
            y = self.at_y(value)
            line = '<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" stroke="{}"/>'
            parts.append(html(line, _LEFT, WIDTH - _RIGHT, y, y, _GRID))
            parts.append(_label(_LEFT - 6, y + 4, f"{value:g}", "end"))
        for value in ticks(*self._x, about=8) if self._x else ():
            if whole and value % 1:
                continue
            parts.append(_label(self.at_x(value), HEIGHT - _BOTTOM + 16, f"{value:g}"))
        middle = (HEIGHT - _BOTTOM + _TOP) / 2
        parts.append(_label((WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 8, x_label))
        parts.append(_label(14, middle, y_label, extra=html(' transform="rotate(-90 14 {:g})"', middle)))
        return parts


def bars(values: Sequence[tuple[str, float]], *, x: str, y: str) -> Html:
    """Vertical bars from zero: (name, value >= 0), with axis labels `x` and `y`."""
    if not values or min(value for _, value in values) < 0:
        raise ValueError("bars need at least one value, and none below zero")
    frame = _Frame(None, (0.0, max(value for _, value in values) or 1.0))
    slot = (WIDTH - _LEFT - _RIGHT) / len(values)
    every = math.ceil(len(values) / 20)  # names that fit beside each other
    parts = frame.grid(x, y)
    for i, (name, value) in enumerate(values):
        left, top = _LEFT + (i + 0.1) * slot, frame.at_y(value)
        bar = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"><title>{}: {:g}</title></rect>'
        parts.append(html(bar, left, top, 0.8 * slot, HEIGHT - _BOTTOM - top, COLORS[0], name, value))
        if i % every == 0:
            parts.append(_label(left + 0.4 * slot, HEIGHT - _BOTTOM + 16, name))
    return _svg(parts)


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
    """
    known = [value for points in series.values() for _, value in points if value is not None]
    low, high = y_range or (min(0.0, *known, 0.0), max(0.0, *known, 0.0))
    frame = _Frame(x_range, (low, high if high > low else low + 1.0))
    parts = _legend(series) + frame.grid(x, y, whole)
    if diagonal:
        ends = frame.at_x(x_range[0]), frame.at_y(low), frame.at_x(x_range[1]), frame.at_y(high)
        dashes = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}" stroke-dasharray="4 4"/>'
        parts.append(html(dashes, *ends, _GREY))
    for i, (name, points) in enumerate(series.items()):
        color, pen, path = COLORS[i % len(COLORS)], "M", []
        for value_x, value in points:
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{frame.at_x(value_x):.1f} {frame.at_y(value):.1f}")
            pen = "L"
            if dots:
                dot = '<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"><title>{}: {:g}, {:g}</title></circle>'
                parts.append(html(dot, frame.at_x(value_x), frame.at_y(value), color, name, value_x, value))
        parts.append(html('<path d="{}" fill="none" stroke="{}" stroke-width="2"/>', " ".join(path), color))
    return _svg(parts)


def shares(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> Html:
    """Horizontal bars that each split 100 percent into named parts: (row, one percentage a name)."""
    left, bar, step = 130, 16, 24
    width = WIDTH - left - _RIGHT
    parts = _legend(names)
    for r, (row, values) in enumerate(rows):
        y, x = 30 + r * step, float(left)
        parts.append(_label(left - 8, y + 12, row, "end"))
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            size = width * value / 100
            part = '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill="{}"><title>{}, {}: {:.1f} %</title></rect>'
            parts.append(html(part, x, y, size, bar, COLORS[i % len(COLORS)], row, name, value))
            if size > 30:
                parts.append(_label(x + size / 2, y + 12, f"{value:.0f}", extra=_WHITE))
            x += size
    return _svg(parts, 36 + step * len(rows))


def heat(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, x: str, y: str, digits: int = 0
) -> Html:
    """A table of cells, darker where the value is higher; `rows` name them from top to bottom, `columns` from left to right."""
    flat = [value for line in values for value in line]
    low, high = min(flat), max(flat)
    cell, left, top = 26, 74, 22
    wide = (WIDTH - left - _RIGHT) / len(columns)
    bottom = top + cell * len(rows)
    parts = [_label(left + (j + 0.5) * wide, top - 7, name) for j, name in enumerate(columns)]
    parts.append(_label(left + len(columns) * wide / 2, bottom + 18, x))
    middle = (top + bottom) / 2
    parts.append(_label(14, middle, y, extra=html(' transform="rotate(-90 14 {:g})"', middle)))
    for i, (name, line) in enumerate(zip(rows, values, strict=True)):
        parts.append(_label(left - 6, top + cell * i + 17, name, "end"))
        for j, value in enumerate(line):
            strength = (value - low) / (high - low) if high > low else 0.0
            square = '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill="{}" fill-opacity="{:.3f}"/>'
            size = wide - 1, cell - 1
            parts.append(html(square, left + j * wide, top + cell * i, *size, COLORS[0], 0.04 + 0.9 * strength))
            color = _WHITE if strength > 0.55 else ""
            parts.append(_label(left + (j + 0.5) * wide, top + cell * i + 17, f"{value:.{digits}f}", extra=color))
    return _svg(parts, bottom + 28)

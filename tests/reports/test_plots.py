"""Plots are well-formed SVG that shows the numbers, escaped, inside the picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from flowseg_jax.reports import plots

NAME = "{http://www.w3.org/2000/svg}"
PLOTS = {
    "bars": lambda: plots.bars([("a<b", 3.0), ("c", 0.0)], x="rank", y="samples"),
    "lines": lambda: plots.lines(
        {"a & b": [(0, 1.0), (1, None), (2, 0.5)]}, x="x", y="y", x_range=(0, 2), diagonal=True, dots=False
    ),
    "shares": lambda: plots.shares([("all", [25.0, 75.0])], ["good", "b<ad"]),
    "heat": lambda: plots.heat([[1.0, 2.0], [3.0, 4.0]], ["r", "s"], ["c", "<d>"], x="x", y="y"),
}


def drawn(svg: str, color: str, what: str = "fill") -> list[list[tuple[float, float]]]:
    """The corners of every path of that colour."""
    paths = [p for p in ElementTree.fromstring(svg).iter(f"{NAME}path") if f"{what}: {color}" in p.get("style", "")]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", p.get("d"))] for p in paths]


def extent(corners: list[tuple[float, float]], axis: int) -> float:
    values = [corner[axis] for corner in corners]
    return max(values) - min(values)


@pytest.mark.parametrize("name", PLOTS)
def test_well_formed_and_inside(name):
    svg = PLOTS[name]()
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    for color in plots.COLORS:
        for x, y in (corner for path in drawn(svg, color) for corner in path):
            assert 0 <= x <= width and 0 <= y <= height
    assert "nan" not in svg and "http" not in re.sub(r'xmlns(:\w+)?="http', "", svg)
    assert svg == PLOTS[name](), "the same numbers, the same picture"


def test_names_are_text_and_no_mathematics():
    words = [
        "".join(t.itertext())
        for t in ElementTree.fromstring(plots.bars([("$x^2$ <b>", 1.0)], x="$", y="_")).iter(f"{NAME}text")
    ]
    assert {"$x^2$ <b>", "$", "_"} <= set(words)
    svg = plots.lines({"_hidden": [(0, 0.0), (1, 1.0)], "$a$": [(0, 1.0)]}, x="", y="", x_range=(0, 1))
    words = {"".join(t.itertext()).strip("\u2060") for t in ElementTree.fromstring(svg).iter(f"{NAME}text")}
    assert {"_hidden", "$a$"} <= words


def test_bars_are_as_high_as_their_values():
    first, second = drawn(plots.bars([("a", 4.0), ("b", 1.0)], x="", y=""), plots.COLORS[0])
    assert extent(first, 1) == pytest.approx(4 * extent(second, 1), abs=0.2) and extent(first, 1) > 100


def test_shares_are_as_wide_as_their_values():
    svg = PLOTS["shares"]()
    first, second = (max(drawn(svg, color), key=lambda path: extent(path, 0)) for color in plots.COLORS[:2])
    assert extent(second, 0) == pytest.approx(3 * extent(first, 0), abs=0.3)
    assert min(x for x, _ in second) == pytest.approx(max(x for x, _ in first), abs=0.1)


def test_a_gap_breaks_the_line():
    line = next(p for p in ElementTree.fromstring(PLOTS["lines"]()).iter(f"{NAME}path") if "#2f6feb" in p.get("style", ""))
    assert re.sub(r"[-\d.\s]", "", line.get("d")) == "MM"
    whole = plots.lines({"a": [(0, 0.0), (2, 1.0)]}, x="", y="", x_range=(0, 2), dots=False)
    (x0, y0), (x1, y1) = drawn(whole, plots.COLORS[0], "stroke")[0]
    assert x1 > x0 and y1 < y0  # a higher value stands higher


def test_an_axis_without_length_is_refused():
    with pytest.raises(ValueError, match="two finite ends"):
        plots.lines({"a": [(1, 0.0)]}, x="", y="", x_range=(1, 1))
    with pytest.raises(ValueError, match="none below zero"):
        plots.bars([("a", -1.0)], x="", y="")
    assert "NaN" not in plots.lines({"a": [(0, 0.0)]}, x="", y="", x_range=(0, 1))

"""Plots are well-formed SVG that shows the numbers, escaped, inside the picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from flowseg_jax.reports import plots

NAME = "{http://www.w3.org/2000/svg}"
PLOTS = {
    "bars": plots.bars([("a<b", 3.0), ("c", 0.0)], x="rank", y="samples"),
    "lines": plots.lines({"a & b": [(0, 1.0), (1, None), (2, 0.5)]}, x="x", y="y", x_range=(0, 2), diagonal=True),
    "shares": plots.shares([("all", [25.0, 75.0])], ["good", "b<ad"]),
    "heat": plots.heat([[1.0, 2.0], [3.0, 4.0]], ["r", "s"], ["c", "<d>"], x="x", y="y"),
}


@pytest.mark.parametrize("name", PLOTS)
def test_well_formed_and_inside(name):
    root = ElementTree.fromstring(PLOTS[name])
    _, _, width, height = map(float, root.get("viewBox").split())
    for x, y in re.findall(r'c?x="([-\d.]+)" c?y="([-\d.]+)"', PLOTS[name]):
        assert 0 <= float(x) <= width and 0 <= float(y) <= height
    assert "nan" not in PLOTS[name] and "http" not in PLOTS[name].replace('xmlns="http', "")


def test_bars_are_as_high_as_their_values():
    heights = [
        float(r.get("height"))
        for r in ElementTree.fromstring(plots.bars([("a", 4.0), ("b", 1.0)], x="", y="")).iter(f"{NAME}rect")
    ]
    assert heights[0] == pytest.approx(4 * heights[1], abs=0.2) and heights[0] > 100


def test_shares_are_as_wide_as_their_values():
    rects = [r for r in ElementTree.fromstring(PLOTS["shares"]).iter(f"{NAME}rect") if r.get("rx") is None]
    assert float(rects[1].get("width")) == pytest.approx(3 * float(rects[0].get("width")), abs=0.3)
    assert float(rects[1].get("x")) == pytest.approx(float(rects[0].get("x")) + float(rects[0].get("width")), abs=0.1)


def test_a_gap_breaks_the_line():
    paths = [p.get("d") for p in ElementTree.fromstring(PLOTS["lines"]).iter(f"{NAME}path")]
    assert [re.sub(r"[-\d. ]", "", p) for p in paths] == ["MM"]
    whole = plots.lines({"a": [(0, 0.0), (2, 1.0)]}, x="", y="", x_range=(0, 2))
    (path,) = [p.get("d") for p in ElementTree.fromstring(whole).iter(f"{NAME}path")]
    (x0, y0), (x1, y1) = [map(float, p.split()) for p in re.findall(r"[ML]([\d. ]+)", path)]
    assert x1 > x0 and y1 < y0  # a higher value stands higher


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.03, 0.05, [-0.02, 0, 0.02, 0.04])],
)
def test_ticks_are_round(low, high, expected):
    assert plots.ticks(low, high) == expected


def test_an_axis_without_length_is_refused():
    with pytest.raises(ValueError, match="two finite ends"):
        plots.ticks(1, 1)
    with pytest.raises(ValueError, match="none below zero"):
        plots.bars([("a", -1.0)], x="", y="")
    assert "NaN" not in plots.lines({"a": [(0, 0.0)]}, x="", y="", x_range=(0, 1))

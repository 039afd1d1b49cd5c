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
    svg = plots.shares([("$row$", [40.0, 60.0])], ["_first", "$b$"])
    words = {"".join(t.itertext()).strip("\u2060") for t in ElementTree.fromstring(svg).iter(f"{NAME}text")}
    assert {"$row$", "_first", "$b$"} <= words
    svg = plots.heat([[1.0, 2.0]], ["$row$"], ["$c$", "_d"], x="$x$", y="$y$")
    assert {"$row$", "$c$", "_d", "$x$", "$y$"} <= {
        "".join(t.itertext()) for t in ElementTree.fromstring(svg).iter(f"{NAME}text")
    }


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


@pytest.fixture
def axes(monkeypatch):
    """The axes of what is drawn, while they can still be asked."""
    made = []

    class Kept(plots._Plot):
        def __init__(self, height):
            super().__init__(height)
            made.append(self.axes)

    monkeypatch.setattr(plots, "_Plot", Kept)
    return made


def size(axes) -> tuple[float, float]:
    """Width and height of a plot in points."""
    return tuple(72 * axes.figure.get_size_inches())


def ticks(axis) -> list[tuple[float, str]]:
    return [(at, label.get_text()) for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)]


def test_bars_have_names_that_fit_beside_each_other(axes):
    for count, every in ((20, 1), (21, 2), (41, 3)):
        plots.bars([(str(n), float(n)) for n in range(count)], x="points", y="samples")
        assert ticks(axes[-1].xaxis) == [(n, str(n)) for n in range(0, count, every)]
    assert size(axes[0]) == (560, 260) and axes[0].get_ylim() == (0, 19)
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("points", "samples")
    plots.bars([("none", 0.0)], x="", y="")
    assert axes[-1].get_ylim() == (0, 1)


def test_lines_have_the_axes_that_are_asked_for(axes):
    many = {str(n): [(0, float(n)), (2, None), (9, 4.0)] for n in range(9)}
    plots.lines(many, x="step", y="loss", x_range=(0, 9), whole=True)
    first, last = axes[-1].get_lines()[0], axes[-1].get_lines()[-1]
    assert (first.get_color(), last.get_color()) == (plots.COLORS[0], plots.COLORS[0]) and len(axes[-1].get_lines()) == 9
    assert list(last.get_xdata()) == [0, 2, 9] and last.get_ydata()[2] == 4.0 and last.get_marker() == "o"
    assert axes[-1].get_xlim() == (0, 9) and axes[-1].get_ylim() == (0, 8) and size(axes[-1]) == (560, 260)
    assert all(at == int(at) for at, _ in ticks(axes[-1].xaxis)) and len(ticks(axes[-1].xaxis)) <= 9
    assert (axes[-1].get_xlabel(), axes[-1].get_ylabel()) == ("step", "loss")
    plots.lines({"a": [(0, -3.0), (1, -1.0)]}, x="", y="", x_range=(0, 1), diagonal=True, dots=False)
    dashes, line = axes[-1].get_lines()
    assert axes[-1].get_ylim() == (-3, 0) and line.get_marker() == "" and line.get_label() == "\u2060a"
    assert (list(dashes.get_xdata()), list(dashes.get_ydata()), dashes.get_linestyle()) == ([0, 1], [-3, 0], "--")
    plots.lines({"a": [(0, 5.0)]}, x="", y="", x_range=(0, 1), y_range=(2, 7))
    assert axes[-1].get_ylim() == (2, 7)
    plots.lines({"a": [(0, None)]}, x="", y="", x_range=(0, 1))  # nothing is known: an axis all the same
    assert axes[-1].get_ylim() == (0, 1)


def test_shares_grow_with_their_rows_and_say_what_has_room(axes):
    plots.shares([("all", [92.0, 7.0, 1.0]), ("few", [10.0, 7.6, 82.4])], ["good", "fair", "bad"])
    (drawn,) = axes
    assert size(drawn) == (560, 60 + 2 * 24) and drawn.get_xlim() == (0, 100)
    assert ticks(drawn.yaxis) == [(0, "all"), (1, "few")] and drawn.get_ylim()[0] > drawn.get_ylim()[1]  # the first on top
    assert [text.get_text() for text in drawn.texts] == ["92", "10", "", "8", "", "82"]
    assert [round(bar.get_x(), 1) for bar in drawn.patches] == [0, 0, 92, 10, 99, 17.6]
    (legend,) = drawn.figure.legends
    assert [text.get_text().strip("\u2060") for text in legend.get_texts()] == ["good", "fair", "bad"]
    assert not legend.get_frame_on() and legend._ncols == 3  # one line above the plot


def test_heat_is_darker_where_it_is_higher(axes):
    plots.heat([[0.0, 55.0], [56.0, 100.0]], ["r", "s"], ["c", "d"], x="A", y="B", digits=1)
    (drawn,) = axes
    assert size(drawn) == (560, 50 + 2 * 26) and drawn.collections[0].get_clim() == (0, 100)
    assert [text.get_text() for text in drawn.texts] == ["0.0", "55.0", "56.0", "100.0"]
    assert [text.get_position() for text in drawn.texts] == [(0.5, 0.5), (1.5, 0.5), (0.5, 1.5), (1.5, 1.5)]
    assert [text.get_color() for text in drawn.texts] == [plots._GREY, plots._GREY, "white", "white"]
    assert ticks(drawn.xaxis) == [(0.5, "c"), (1.5, "d")] and ticks(drawn.yaxis) == [(0.5, "r"), (1.5, "s")]
    assert drawn.get_ylim()[0] > drawn.get_ylim()[1] and drawn.xaxis.get_ticks_position() == "top"
    assert drawn.xaxis.get_label_position() == "bottom" and (drawn.get_xlabel(), drawn.get_ylabel()) == ("A", "B")
    plots.heat([[3.0]], ["r"], ["c"], x="", y="")
    assert axes[-1].collections[0].get_clim() == (3, 4) and axes[-1].texts[0].get_color() == plots._GREY

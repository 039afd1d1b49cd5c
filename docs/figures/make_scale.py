"""Draws `docs/figures/scale-*.svg` from `benchmarks/growth.json` and `benchmarks/checkpoint_growth.json`, and writes their
tables into `docs/scale.md`.

python docs/figures/make_scale.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
FIGURES, PAGE = ROOT / "docs" / "figures", ROOT / "docs" / "scale.md"
KINDS = {"referring": "images with six sentences", "chat": "chats"}
MIB = 1 << 20
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "flowseg", "font.size": 9, "axes.grid": True, "grid.color": "#eaeef2"}
COSTS = (
    "open",
    "mixture",
    "held-out list",
    "held-out look-up",
    "training data, checked",
    "digest",
    "shuffle, first position",
    "shuffle, 10,000 positions",
    "resume at a random position",
    "3,000 random records",
    "evaluation planning",
)
Series = Mapping[str, Sequence[tuple[float, float]]]


def draw(path: Path, series: Series, x: str, y: str, least: float) -> None:
    """Lines on logarithmic axes; values below `least` are drawn there."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((7.8, 3.9), layout="constrained")
        axes = figure.add_subplot()
        for name, points in series.items():
            style = "--" if name.startswith("arithmetic") else "-"
            axes.plot([at for at, _ in points], [max(value, least) for _, value in points], style, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows))


def put(text: str, name: str, content: str) -> str:
    """The page with what stands between two marks replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def index_tables(results: Sequence[Mapping[str, Any]], kind: str) -> tuple[str, str]:
    """(seconds, bytes an image) of each cost by the number of images."""
    mine = [row for row in results if row["kind"] == kind]
    head = [KINDS[kind], *(f"{row['images']:,}" for row in mine)]
    known = [name for name in COSTS if name in mine[0]]
    seconds = [[name, *(f"{row[name]['seconds']:.2f}" for row in mine)] for name in known]
    sizes = [[name, *(f"{row[name]['bytes'] / MIB:.1f}" for row in mine)] for name in known]
    total = [sum(max(row[name]["bytes"], 0) for name in known if name != "evaluation planning") for row in mine]
    sizes.append(
        ["all but evaluation, bytes an image", *(f"{n / row['images']:,.1f}" for n, row in zip(total, mine, strict=True))]
    )
    sizes.append(["files open at the end", *(str(row["open files"]) for row in mine)])
    return table([f"CPU seconds, {head[0]}", *head[1:]], seconds), table([f"MiB, {head[0]}", *head[1:]], sizes)


def main(figures: Path = FIGURES, page_file: Path = PAGE) -> None:
    """Writes the figures into a folder, and the tables into a page that has their marks."""
    results = json.loads((ROOT / "benchmarks" / "growth.json").read_text())["results"]
    checkpoints = json.loads((ROOT / "benchmarks" / "checkpoint_growth.json").read_text())["results"]
    page = page_file.read_text(encoding="utf-8")
    for kind in KINDS:
        mine = [row for row in results if row["kind"] == kind]
        known = [name for name in COSTS if name in mine[0]]
        for measure, unit, scale, least in (
            ("seconds", "CPU seconds", 1.0, 1e-3),
            ("bytes", "MiB of the process's own", MIB, 0.1),
        ):
            series = {name: [(row["images"], row[name][measure] / scale) for row in mine] for name in known}
            draw(figures / f"scale-{kind}-{measure}.svg", series, f"images ({KINDS[kind]})", unit, least)
        seconds, sizes = index_tables(results, kind)
        page = put(page, f"{kind} seconds", seconds)
        page = put(page, f"{kind} bytes", sizes)
    rows, series = [], {}
    for row in checkpoints:
        name = f"data={row['data']}"
        for what in ("save", "restore"):
            series.setdefault(f"{what}, {name}", []).append((row["hosts"], row[what]["bytes"] / MIB))
        series.setdefault("arithmetic: state / hosts", []).append((row["hosts"], row["mib"] / row["hosts"]))
        cells = [f"{row[what]['bytes'] / MIB:,.0f}" for what in ("save", "restore")]
        times = [f"{row[what]['cpu_seconds']:.1f}" for what in ("save", "restore")]
        rows.append(
            [str(row["hosts"]), str(row["data"]), f"{row['mib'] / row['hosts']:,.0f}", cells[0], times[0], cells[1], times[1]]
        )
    draw(figures / "scale-checkpoint.svg", series, "hosts", f"MiB a host, of a state of {checkpoints[0]['mib']} MiB", 0.1)
    head = ["hosts", "data", "state / hosts, MiB", "written, MiB", "CPU s", "read, MiB", "CPU s"]
    page_file.write_text(put(page, "checkpoint", table(head, rows)), encoding="utf-8")


if __name__ == "__main__":
    main()

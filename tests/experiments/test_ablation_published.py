"""The published tables of the ablation, from the committed files, recomputed by code that shares nothing with ours."""

from __future__ import annotations

import csv
import itertools
import json
import re
import statistics

import numpy as np
import pytest

from experiments import ablation_figure, results
from experiments.ablation_tables import MAIN, SIDE, Counts
from flowseg_jax.system.paths import ROOT

RESULTS = ROOT / "results" / "ablation"


def pages(first: str) -> list[list[str]]:
    """The rows of the table of docs/results.md whose first line begins so."""
    lines = (ROOT / "docs/results.md").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(first))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[at + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.fixture(scope="module")
def counted():
    """{(steps, variant): {seed: [(image, I, U, oracle I, oracle U), ...]}}"""
    with (RESULTS / "samples.csv").open() as file:
        images = [row["image_id"] for row in csv.DictReader(file)]
    found: dict = {}
    for path in sorted(RESULTS.glob("*/*.npz")):
        variant, seed = path.stem.rsplit("_", 1)
        rows = [(image, *map(int, row)) for image, row in zip(images, np.load(path)["counts"], strict=True)]
        found.setdefault((int(path.parent.name), variant), {})[int(seed)] = rows
    return found


def numbers(cell: str) -> list[float]:
    return list(map(float, re.findall(r"[+-]?\d+\.\d", cell)))


def steps_of(cell: str) -> int:
    return int(cell.replace(",", ""))


def complete(counted, steps: int) -> list[int]:
    """The seeds with all variants."""
    return sorted(set.intersection(*(set(counted[steps, variant]) for variant in MAIN)))


def ratio(rows, top: int) -> tuple[float, dict[str, float]]:
    """100 sum I / sum U, and how much of it each image is to blame for (Cochran, Sampling Techniques, 6.4)."""
    whole = sum(row[top + 1] for row in rows)
    value, images = 100 * sum(row[top] for row in rows) / whole, {}
    for row in rows:
        images[row[0]] = images.get(row[0], 0.0) + (100 * row[top] - value * row[top + 1]) / whole
    return value, images


def check(cell: str, sign: str, *weighted) -> list[float]:
    """Holds mean, interval and deviation of a cell against what is computed here; returns the value of each seed.

    `weighted` are (weight, [(value, by image) of each seed]) of the ratios that the figure is a sum of. The standard error of
    its mean has three parts: seeds, images, and images that do other things in other seeds.
    """
    count = len(weighted[0][1])
    seeds = [sum(weight * runs[s][0] for weight, runs in weighted) for s in range(count)]
    mean, *rest = numbers(cell)
    assert cell[0] in "+-" if sign else cell[0] not in "+-"
    assert mean == pytest.approx(statistics.mean(seeds), abs=0.051)
    if count > 1:
        assert rest[-1] == pytest.approx(statistics.stdev(seeds), abs=0.051)
    if count < 3:
        assert "[" not in cell
        return seeds
    images = [
        [sum(weight * runs[s][1][image] for weight, runs in weighted) for s in range(count)] for image in weighted[0][1][0][1]
    ]
    middle = sum(statistics.mean(parts) ** 2 for parts in images)
    apart = sum(statistics.pvariance(parts) for parts in images) / count
    spread = 1.96 * (statistics.pvariance(seeds) / count + middle + apart) ** 0.5
    assert rest[:2] == pytest.approx([mean - spread, mean + spread], abs=0.2 * spread + 0.05), cell
    return seeds


def test_the_published_figures_are_what_was_counted(counted):
    names = {name: variant for variant, name in MAIN.items()}
    rows = pages("| steps | variant | seeds | cIoU |")
    assert len(rows) >= len(MAIN) and len(rows) % len(MAIN) == 0
    for steps, name, n, ciou, oracle, gap in rows:
        runs = counted[steps_of(steps), names[name]]
        seeds = complete(counted, steps_of(steps))
        assert int(n) == len(seeds)
        selected, best = ([ratio(runs[seed], top) for seed in seeds] for top in (1, 3))
        check(ciou, "", (1, selected))
        check(oracle, "", (1, best))
        check(gap, "", (1, best), (-1, selected))


def test_the_published_differences_are_what_was_counted(counted):
    names = {name: variant for variant, name in (MAIN | SIDE).items()}
    rows = pages("| steps | difference | cIoU | seeds that agree | selection gap | the paper's")
    assert len(rows) >= 6 and len(rows) % 6 == 0
    for steps, name, ciou, agree, gap, _ in rows:
        after, _, before = name.partition(" against ")
        seeds = complete(counted, steps_of(steps))
        runs = [counted[steps_of(steps), names[which]] for which in (before, after)]
        (first, first_best), (second, second_best) = ([[ratio(run[s], top) for s in seeds] for top in (1, 3)] for run in runs)
        changes = check(ciou, "+", (1, second), (-1, first))
        check(gap, "+", (1, second_best), (-1, second), (-1, first_best), (1, first))
        assert agree == f"{sum(change * sum(changes) > 0 for change in changes)} of {len(seeds)}"


def test_the_published_rescues_are_what_was_counted(counted):
    names = {name: variant for variant, name in MAIN.items()}
    for steps, name, rescued, broken in pages("| steps | variant | failures rescued"):
        steps = steps_of(steps)
        seeds = complete(counted, steps)
        pairs = [(s, s) for s in seeds] if name in names else list(itertools.permutations(seeds, 2))
        shares: list = [[], []]
        for first, second in pairs:
            both = zip(counted[steps, "baseline"][first], counted[steps, names.get(name, "baseline")][second], strict=True)
            right = [tuple(row[1] / row[2] >= 0.5 for row in pair) for pair in both]
            shares[0].append(100 * sum(b for a, b in right if not a) / sum(not a for a, _ in right))
            shares[1].append(100 * sum(not b for a, b in right if a) / sum(a for a, _ in right))
        assert [float(rescued), float(broken)] == pytest.approx(list(map(statistics.mean, shares)), abs=0.0501), name


def test_the_committed_runs_are_named_with_their_models(counted):
    about = json.loads((RESULTS / "about.json").read_text())
    assert sorted(about["runs"]) == sorted(f"{s}/{v}_{seed}" for (s, v), runs in counted.items() for seed in runs)
    assert len(set(about["runs"].values())) == len(about["runs"])  # no run is another's copy
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 2_000_000


def test_the_published_layers_are_those_of_the_committed_runs():
    runs = json.loads((RESULTS / "about.json").read_text())["runs"]
    rows = {row[0]: row[1:] for row in pages("| variant | gate | drift of C |")}
    for variant, name in MAIN.items():
        trace = json.loads((RESULTS / "layers" / variant / "layer_trace_val.json").read_text())
        assert trace["checkpoint"] == {"digest": runs[f"500/{variant}_0"], "step": 500} and trace["images"] is None
        first, last = (trace["groups"]["all"][at] for at in (0, 3))
        gate, drift, margin, selected, best = rows[name]
        assert (gate == "") == (variant in ("baseline", "cr")) and (drift == "0.00") == (variant in ("baseline", "sr"))
        values = [last["drift"], first["margin"], last["margin"], first["iou_selected"], last["iou_selected"], last["iou_best"]]
        found = list(map(float, (drift, *margin.split(" to "), *selected.split(" to "), best)))
        assert found == pytest.approx(values, abs=0.051) and found[:3] == pytest.approx(values[:3], abs=0.0051)


def test_the_runs_are_kept_without_pages(tmp_path):
    (tmp_path / "from").mkdir()
    for name in ("samples.csv", "layer_trace_val.html"):
        (tmp_path / "from" / name).write_text("")
    results.keep(tmp_path / "from", tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["samples.csv"]


def test_the_figure_is_what_the_command_draws(tmp_path):
    ablation_figure.draw(Counts.read(RESULTS), tmp_path / "ablation.svg")
    assert (tmp_path / "ablation.svg").read_bytes() == (ROOT / "docs/figures/ablation.svg").read_bytes()

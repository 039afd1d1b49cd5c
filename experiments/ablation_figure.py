"""The ablation's figure: cIoU and selection gap against the steps of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.ablation_tables import MAIN, Bootstrap, Counts

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "flowseg", "font.size": 9, "axes.grid": True, "grid.color": "#eaeef2"}
APART = 0.035  # of two variants beside each other, in powers of ten


def draw(counts: Counts, path: Path) -> None:
    """Means over the seeds, with the intervals of the tables, as SVG."""
    rows = {budget: Bootstrap(counts, budget, MAIN) for budget in counts.budgets(MAIN)}
    with matplotlib.rc_context(STYLE):
        figure = Figure((7.8, 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, 2), ("cIoU", "selection gap"), strict=True):
            for place, (variant, label) in enumerate(MAIN.items()):
                found = [bootstrap.figure(variant)[name] for bootstrap in rows.values()]
                at = [budget * 10 ** (APART * (place - len(MAIN) // 2)) for budget in rows]
                means = np.array([e.mean for e in found])
                ends = np.array([(e.mean, e.mean) if e.low is None else (e.low, e.high) for e in found])
                bars = np.abs(ends.T - means)
                axes.errorbar(at, means, bars, marker="o", markersize=4, capsize=2, linewidth=1, label=label)
            axes.set(xscale="log", xlabel="steps of a run", ylabel=f"{name}, percent", xlim=(350, 6500))
            axes.set_xticks(list(rows), [f"{budget:,}" for budget in rows])
            axes.minorticks_off()
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(MAIN), frameon=False)
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))

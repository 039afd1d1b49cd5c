"""The ablation's tables, from what was counted in its runs (`experiments/ablation.py` writes it).

Intervals are of a bootstrap with two levels: seeds are drawn with replacement, and images are drawn with replacement, the same
images for every run, for all runs were evaluated on the same ones. Variants are paired: a draw takes the same seeds and images
of all of them. An interval holds 95 % of the means of the draws. Fewer than `LEAST_SEEDS` seeds have none.

A seed counts at a budget once all variants that are compared have finished with it.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from experiments.markdown import table
from flowseg_jax.evaluation.audit import INTERVAL, RESAMPLES

MAIN = {"baseline": "baseline", "sr": "+SR", "sr_cr": "+SR+CR", "sr_cr_bar": "+SR+CR+BAR", "cr": "CR without SR"}
SIDE = {"sr_residual": "+SR, `norm` residual", "sr_even": "+SR, gate starts even"}
SIDE_BUDGET = 500
NAMES = MAIN | SIDE
STEPS = (  # (from, to, what the paper reports for it: average cIoU over the val sets of RefCOCO, RefCOCO+ and RefCOCOg)
    ("baseline", "sr", "+0.5"),
    ("sr", "sr_cr", "+1.0"),
    ("sr_cr", "sr_cr_bar", "+0.3"),
    ("baseline", "sr_cr_bar", "+1.8"),
    ("baseline", "cr", ""),
    ("cr", "sr_cr", ""),
)
FIGURES = ("cIoU", "oracle cIoU", "selection gap")  # the gap: oracle cIoU - cIoU
LEAST_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure, or the difference of two variants in it, in percent.

    Attributes:
        seeds: the figure of each seed.
        low, high: the interval of their mean; None with fewer than `LEAST_SEEDS` seeds.
    """

    seeds: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def agree(self) -> int:
        """How many seeds have the sign of the mean."""
        return int((np.sign(self.seeds) == np.sign(self.mean)).sum())

    def cell(self, sign: str = "") -> str:
        """Mean, interval, and standard deviation over the seeds, as far as there are."""
        interval = "" if self.low is None else f" [{self.low:{sign}.1f}, {self.high:{sign}.1f}]"
        spread = f" ± {np.std(self.seeds, ddof=1):.1f}" if len(self.seeds) > 1 else ""
        return f"{self.mean:{sign}.1f}{interval}{spread}"


@dataclasses.dataclass(frozen=True)
class Counts:
    """What was counted in all runs, on the same samples.

    Attributes:
        images: [n], the place of each sample's image among the images.
        runs: {(budget, variant, seed): int64 [n, 4], I and U of the selected mask and of the oracle's}.
        controls: the same of runs that were evaluated with the sentences of other images.
    """

    images: np.ndarray
    runs: Mapping[tuple[int, str, int], np.ndarray]
    controls: Mapping[tuple[int, str, int], np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Counts:
        """All runs in `folder`."""
        with (folder / "samples.csv").open(encoding="utf-8", newline="") as file:
            _, images = np.unique([row["image_id"] for row in csv.DictReader(file)], return_inverse=True)
        runs, controls = {}, {}
        for name in json.loads((folder / "about.json").read_text())["runs"]:
            budget, _, run = name.partition("/")
            variant, _, seed = run.rpartition("_")
            with np.load(folder / f"{name}.npz") as arrays:
                runs[int(budget), variant, int(seed)] = arrays["counts"].astype(np.int64)
                if "control" in arrays:
                    controls[int(budget), variant, int(seed)] = arrays["control"].astype(np.int64)
        return cls(images, runs, controls)

    def budgets(self, variants: Iterable[str]) -> list[int]:
        """The budgets at which a seed has finished with all of `variants`."""
        return sorted({budget for budget, _, _ in self.runs if self.seeds(budget, variants)})

    def seeds(self, budget: int, variants: Iterable[str]) -> list[int]:
        """The seeds that all of `variants` have finished with."""
        found = [{seed for at, name, seed in self.runs if (at, name) == (budget, variant)} for variant in variants]
        return sorted(set.intersection(*found))

    def stack(self, budget: int, variants: Iterable[str]) -> np.ndarray:
        """int64 [variants, seeds, n, 4] of the seeds that all have."""
        seeds = self.seeds(budget, variants)
        return np.array([[self.runs[budget, variant, seed] for seed in seeds] for variant in variants])


def figures(sums: np.ndarray) -> np.ndarray:
    """[..., (cIoU, oracle cIoU, gap)] in percent from sums of counts [..., 4]."""
    ciou, oracle = np.moveaxis(100 * sums[..., ::2] / sums[..., 1::2], -1, 0)
    return np.stack([ciou, oracle, oracle - ciou], -1)


class Bootstrap:
    """Estimates of some variants at one budget, all from the same draws of seeds and images.

    Args:
        counts: the runs.
        budget: which of them; the seeds that all `variants` have finished with.
        variants: which are compared.
        resamples: how many draws.
    """

    def __init__(self, counts: Counts, budget: int, variants: Iterable[str], resamples: int = RESAMPLES):
        self._variants, stacked = list(variants), counts.stack(budget, variants)
        rng, seeds, images = np.random.default_rng(0), stacked.shape[1], counts.images.max() + 1
        sums = np.zeros((*stacked.shape[:2], images, 4))
        np.add.at(sums, (slice(None), slice(None), counts.images), stacked)
        self._whole, self._drawn = figures(sums.sum(2)), None  # [variants, seeds, figures], [variants, resamples, figures]
        if seeds >= LEAST_SEEDS:
            weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
            often = rng.multinomial(images, np.full(images, 1 / images), resamples)
            drawn = figures(np.einsum("ri,vsif->rvsf", often, sums, optimize=True))
            self._drawn = np.einsum("rs,rvsf->vrf", weights, drawn)

    def figure(self, variant: str) -> dict[str, Estimate]:
        """{figure: estimate} of a variant."""
        return self._estimates(lambda x: x[self._variants.index(variant)])

    def change(self, before: str, after: str) -> dict[str, Estimate]:
        """{figure: estimate of its difference} from one variant to another."""
        first, second = map(self._variants.index, (before, after))
        return self._estimates(lambda x: x[second] - x[first])

    def _estimates(self, of: Callable[[np.ndarray], np.ndarray]) -> dict[str, Estimate]:
        found, ends = of(self._whole), [(None, None)] * len(FIGURES)
        if self._drawn is not None:
            ends = np.percentile(of(self._drawn), INTERVAL, axis=0).T.tolist()
        return {name: Estimate(tuple(found[:, f].tolist()), *ends[f]) for f, name in enumerate(FIGURES)}


def variant_table(counts: Counts) -> str:
    """Every variant at every budget."""
    rows = []
    for budget in counts.budgets(MAIN):
        bootstrap = Bootstrap(counts, budget, MAIN)
        for variant, name in MAIN.items():
            row = bootstrap.figure(variant)
            rows.append([f"{budget:,}", name, str(len(row["cIoU"].seeds)), *(row[figure].cell() for figure in FIGURES)])
    return table(["steps", "variant", "seeds", *FIGURES], rows, text=2)


def step_table(counts: Counts) -> str:
    """What one thing more changes, beside the paper's figure."""
    rows = []
    for budget in counts.budgets(MAIN):
        bootstrap = Bootstrap(counts, budget, MAIN)
        for before, after, reported in STEPS:
            rows.append([f"{budget:,}", *_change_cells(bootstrap, before, after), reported])
    return table(["steps", "difference", "cIoU", "seeds that agree", "selection gap", "the paper's, cIoU"], rows, text=2)


def side_table(counts: Counts) -> str:
    """SR's two forms of `norm`, and its gate started even, on the seeds that all of them have."""
    variants, rows = ("baseline", "sr", *SIDE), []
    for budget in counts.budgets(variants):
        bootstrap = Bootstrap(counts, budget, variants)
        rows += [[f"{budget:,}", *_change_cells(bootstrap, before, after)] for before in variants[:2] for after in SIDE]
    return table(["steps", "difference", "cIoU", "seeds that agree", "selection gap"], rows, text=2)


def _change_cells(bootstrap: Bootstrap, before: str, after: str) -> list[str]:
    row = bootstrap.change(before, after)
    agree = f"{row['cIoU'].agree} of {len(row['cIoU'].seeds)}"
    return [f"{NAMES[after]} against {NAMES[before]}", row["cIoU"].cell("+"), agree, row["selection gap"].cell("+")]


def rescue_table(counts: Counts) -> str:
    """The share of the baseline's failures (IoU below 0.5) that a variant rescues, and of its right answers that it breaks.

    The first row is what another seed of the baseline does: no more than that shows nothing of a variant.
    """
    rows = []
    for budget in counts.budgets(MAIN):
        stacked = counts.stack(budget, MAIN)
        right = 2 * stacked[..., 0] >= stacked[..., 1]  # [variants, seeds, n]
        seeds = range(right.shape[1])
        pairs = {"baseline, another seed": [(right[0, a], right[0, b]) for a in seeds for b in seeds if a != b]}
        pairs |= {name: [(right[0, s], right[v, s]) for s in seeds] for v, name in enumerate(MAIN.values()) if v}
        for name, found in pairs.items():
            if found:
                rescued, broken = (100 * np.mean(shares) for shares in zip(*map(_rescued_broken, found), strict=True))
                rows.append([f"{budget:,}", name, f"{rescued:.1f}", f"{broken:.1f}"])
    return table(["steps", "variant", "failures rescued, %", "right answers broken, %"], rows, text=2)


def _rescued_broken(pair: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    before, after = pair
    return float(after[~before].mean()), float((~after[before]).mean())


def control_table(counts: Counts) -> str:
    """What is left without the right sentence."""
    rows = []
    for budget, variant, seed in sorted(counts.controls, key=lambda run: (run[0], list(NAMES).index(run[1]))):
        both = (counts.runs[budget, variant, seed], counts.controls[budget, variant, seed])
        rows.append([f"{budget:,}", f"{NAMES[variant]}, seed {seed}", *(f"{figures(x.sum(0))[0]:.1f}" for x in both)])
    return table(["steps", "run", "cIoU", "cIoU with the text of other images"], rows, text=2)


def layer_table(folder: Path) -> str:
    """What the layers of a run do, from `<variant>/layer_trace_val.json` (`flowseg analyze layer-trace`)."""
    rows = []
    for variant, name in MAIN.items():
        if (path := folder / variant / "layer_trace_val.json").exists():
            first, *_, last = json.loads(path.read_text())["groups"]["all"]
            gate = "" if last["gate"] is None else f"{last['gate']:.2f}"
            margin, selected = (
                f"{first[key]:{form}} to {last[key]:{form}}" for key, form in (("margin", ".3f"), ("iou_selected", ".1f"))
            )
            rows.append([name, gate, f"{last['drift']:.2f}", margin, selected, f"{last['iou_best']:.1f}"])
    return table(["variant", "gate", "drift of C", "margin", "IoU of the selected query", "of the best"], rows)


def tables(folder: Path) -> dict[str, str]:
    """{name of the block in docs/results.md: its table} of the results in a folder."""
    counts = Counts.read(folder)
    return {
        "ablation": variant_table(counts),
        "ablation_steps": step_table(counts),
        "ablation_rescue": rescue_table(counts),
        "ablation_side": side_table(counts),
        "ablation_layers": layer_table(folder / "layers"),
        "ablation_control": control_table(counts),
    }

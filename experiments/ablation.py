"""`make ablation`: what SR, CR and BAR are each worth, one after the other: the paper's ablation at tiny size.

    baseline -> +SR -> +SR+CR -> +SR+CR+BAR, each trained with several seeds, evaluated on all of `val`, compared pair by pair

Every run has the same steps, scenes, data order and learning rate (`configs/shapes_ablation.py`). From nothing, the minutes
that a run has end before selection leaves chance (docs/results.md). So every run starts from the same components, those of the
shipped model, frozen: both encoders, their projectors, the language model, the connector and the pixel decoder, everything in
front of the mask decoder, none of which has a parameter of SR, CR or BAR. Whatever reads them is new in every run: the
projector of C and S, the background row, and the mask decoder with the variant's parts. The components were trained together
with a full model; this is the same for all variants, but it may suit those that are like it.

Intervals hold 95 % of the resamples of the images, the same images for every run; they say nothing about the seeds. What the
seeds say stands beside them: the standard deviation, and for a difference how many seeds agree with its sign. A seed draws the
data order and the fresh parameters; variants have different parameters, so also those that they share are drawn differently.

Everything lands in `runs/ablation`. Started again, finished runs are kept and an interrupted one continues.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("experiments.command_line:ablation")

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints import storage
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics
from flowseg_jax.evaluation.audit import INTERVAL, RESAMPLES, read_records
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
from flowseg_jax.system import host
from flowseg_jax.system.console import log
from flowseg_jax.training import loop

SPLIT = "val"
VARIANTS = {  # argument of the config -> what the tables call it; each adds one thing to the one before
    "baseline": "baseline",
    "sr": "+SR",
    "sr_cr": "+SR+CR",
    "sr_cr_bar": "+SR+CR+BAR",
}
FIGURES = {"ciou": "cIoU", "giou": "gIoU", "oracle_ciou": "oracle cIoU", "ciou_to_oracle": "oracle cIoU - cIoU"}

Records = Sequence[Mapping[str, Any]]  # the samples of one run


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure, or the difference of two variants in it, in percent.

    Attributes:
        mean: over the seeds.
        low, high: interval of the mean that holds 95 % of the resamples of the images.
        seeds: the figure of each seed.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, whole: np.ndarray, drawn: np.ndarray) -> Estimate:
        """From the figure of each seed, on all images [seeds] and on each resample [resamples, seeds]."""
        low, high = np.percentile(drawn.mean(-1), INTERVAL)
        return cls(float(whole.mean()), float(low), float(high), tuple(map(float, whole)))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for a single one."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None

    @property
    def agree(self) -> int:
        """How many seeds have the sign of the mean."""
        return int((np.sign(self.seeds) == np.sign(self.mean)).sum())


@dataclasses.dataclass(frozen=True)
class VariantComparison:
    """Attributes:
    n: samples of the split.
    seeds: that all variants were trained with.
    figures: {variant: {figure: estimate}}, variants in the order of `VARIANTS`.
    differences: {(variant, another): {figure: estimate of another - variant}}: each step, and the last against the first.
    families: {variant: {expression family: P@0.5, mean over the seeds}}.
    """

    n: int
    seeds: tuple[int, ...]
    figures: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[tuple[str, str], Mapping[str, Estimate]]
    families: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, records: Mapping[str, Mapping[int, Records]], resamples: int = RESAMPLES) -> VariantComparison:
        """Compares {variant: {seed: samples}}; all variants have the same seeds.

        Raises:
            UserError: the runs do not hold the same samples.
        """
        variants, seeds = list(records), tuple(next(iter(records.values())))
        sums = _sums([[records[variant][seed] for seed in seeds] for variant in variants])
        images = sums.shape[2]
        often = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), resamples)
        whole, drawn = _figures(sums.sum(2)), _figures(np.einsum("ri,vsif->rvsf", often, sums, optimize=True))

        def estimates(of: Callable[[np.ndarray], np.ndarray]) -> dict[str, Estimate]:
            """`of` reduces [..., variants, seeds] to [..., seeds]."""
            return {name: Estimate.of(of(whole[..., f]), of(drawn[..., f])) for f, name in enumerate(FIGURES)}

        at = {variant: v for v, variant in enumerate(variants)}
        pairs = [*itertools.pairwise(variants), *[(variants[0], variants[-1])] * (len(variants) > 2)]
        return cls(
            n=len(records[variants[0]][seeds[0]]),
            seeds=seeds,
            figures={variant: estimates(lambda x, v=at[variant]: x[..., v, :]) for variant in variants},
            differences={(a, b): estimates(lambda x, a=at[a], b=at[b]: x[..., b, :] - x[..., a, :]) for a, b in pairs},
            families={variant: _families([records[variant][seed] for seed in seeds]) for variant in variants},
        )

    def tables(self) -> str:
        """Three Markdown tables: the variants, what each step changes, and P@0.5 by family."""
        figures = list(FIGURES.values())
        variants = [
            [VARIANTS[variant], *(_cell(e) for e in row.values()), " ".join(f"{x:.1f}" for x in row["ciou"].seeds)]
            for variant, row in self.figures.items()
        ]
        steps = [
            [
                f"{VARIANTS[b]} against {VARIANTS[a]}",
                *(f"{_cell(e, '+')}, {e.agree} of {len(e.seeds)}" for e in row.values()),
            ]
            for (a, b), row in self.differences.items()
        ]
        families = list(next(iter(self.families.values())))
        shares = [[VARIANTS[variant], *(f"{row[family]:.1f}" for family in families)] for variant, row in self.families.items()]
        return "\n\n".join(
            (
                _table([f"{SPLIT}, n {self.n}", *figures, "cIoU by seed"], variants),
                _table(["difference, seeds that agree", *figures], steps),
                _table(["P@0.5", *families], shares),
            )
        )

    def to_json(self) -> dict[str, Any]:
        def plain(row: Mapping[str, Estimate]) -> dict[str, Any]:
            return {name: dataclasses.asdict(e) | {"spread": e.spread} for name, e in row.items()}

        return {
            "split": SPLIT,
            "n": self.n,
            "seeds": self.seeds,
            "variants": {variant: plain(row) for variant, row in self.figures.items()},
            "differences": [{"from": a, "to": b} | plain(row) for (a, b), row in self.differences.items()],
            "p_at_0.5": self.families,
        }


def _sums(runs: Sequence[Sequence[Records]]) -> np.ndarray:
    """[variants, seeds, images, (I, U, oracle I, oracle U, sum of IoU, samples)] of runs on the same samples."""
    key = lambda r: (r["image_id"], r["ann_id"], r["sentence_id"])  # noqa: E731
    samples = sorted(map(key, runs[0][0]))
    images = {image: i for i, image in enumerate(sorted({k[0] for k in samples}))}
    sums = np.zeros((len(runs), len(runs[0]), len(images), 6))
    for v, variant in enumerate(runs):
        for s, records in enumerate(variant):
            if sorted(map(key, records)) != samples:
                raise UserError("the runs were evaluated on different samples: remove their folders `eval` and start again")
            for r in records:
                row = (*metrics.intersection_union(r), *metrics.intersection_union(r, of="oracle_"), metrics.sample_iou(r), 1)
                sums[v, s, images[r["image_id"]]] += row
    return sums


def _figures(sums: np.ndarray) -> np.ndarray:
    """[..., (cIoU, gIoU, oracle cIoU, oracle cIoU - cIoU)] in percent from the sums [..., 6]."""
    i, u, oracle_i, oracle_u, ious, n = np.moveaxis(sums, -1, 0)
    ciou, oracle = i / u, oracle_i / oracle_u
    return 100 * np.stack([ciou, ious / n, oracle, oracle - ciou], -1)


def _families(runs: Sequence[Records]) -> dict[str, float]:
    tables = [metrics.summarise(records)["families"] for records in runs]
    return {family: float(np.mean([table[family]["p_at"]["0.5"] for table in tables])) for family in tables[0]}


def _cell(e: Estimate, sign: str = "") -> str:
    spread = "" if e.spread is None else f" ± {e.spread:.1f}"
    return f"{e.mean:{sign}.1f} [{e.low:{sign}.1f}, {e.high:{sign}.1f}]{spread}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def finish(config: ConfigDict, workdir: Path) -> Records:
    """Trains and evaluates the run of `config` in `workdir` as far as it is not done, and returns its samples."""
    out, wanted = workdir / "eval", json.loads(configs.to_json(config))
    read = lambda path: json.loads(path.read_text()) if path.exists() else None  # noqa: E731
    evaluated = read(out / f"{SPLIT}.json")  # the last file that an evaluation writes
    if evaluated is None or evaluated["checkpoint"]["step"] != config.num_steps or read(workdir / "config.json") != wanted:
        model = loop.train(config, workdir)
        ReferringEvaluation(EvalModel.load(model), loop.load_dataset(config)).run(SPLIT, out, pictures=False)
    return read_records(out / f"{SPLIT}.jsonl")


def ablate(read: Callable[[str], ConfigDict], seeds: Sequence[int], runs: Path) -> VariantComparison:
    """Makes all runs, seed by seed, and writes `ablation.json` and `ablation.md` as soon as a seed has all variants.

    Args:
        read: the config of a variant.
        seeds: one run each of every variant.
        runs: where everything lands.
    """
    records: dict[str, dict[int, Records]] = {variant: {} for variant in VARIANTS}
    for number, seed in enumerate(seeds, 1):
        for variant in VARIANTS:
            log(f"\n== {VARIANTS[variant]}, seed {seed} ({number} of {len(seeds)})")
            config = read(variant)
            config.seed = seed
            records[variant][seed] = finish(config, runs / f"{variant}_{seed}")
        comparison = VariantComparison.of(records)
        about = (
            f"{config.num_steps} steps of {config.batch_size} images; seeds {', '.join(map(str, comparison.seeds))}. Percent."
        )
        text = f"{about} Mean over the seeds [95 % of image resamples] ± standard deviation over the seeds.\n\n"
        text += comparison.tables()
        storage.write_text_atomic(runs / "ablation.md", text + "\n")
        storage.write_text_atomic(
            runs / "ablation.json", json.dumps(comparison.to_json() | {"steps": config.num_steps}, indent=1) + "\n"
        )
        log("\n" + text)
    return comparison


def main(runs: Path, seeds: Sequence[int]) -> None:
    """All variants with these seeds, into `runs`."""
    read = lambda variant: configs.read(f"configs/shapes_ablation.py:{variant}")  # noqa: E731
    host.use_host_devices(read("baseline").batch_size)
    host.enable_compilation_cache()
    ablate(read, seeds, runs)

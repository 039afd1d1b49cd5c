"""`python -m experiments.results`: the published tables and a figure, from the result files in `results/` to the pages.

    python -m experiments.results --keep=runs/eval/shipped --as=shipped     # an evaluation becomes results/shipped
    python -m experiments.results --keep=runs/ablation/results --as=ablation
    python -m experiments.results                                           # the tables of README.md and docs/results.md

A result has two files: `<split>.json` as the evaluation wrote it, with protocol, model, step and digests, and `<split>.csv`
with a line for each sample: what was counted, by the result's protocol. Every figure in a table is computed from the lines.
Intervals hold 95 % of the resamples of the images. `experiments/ablation_tables.py` has those of the ablation.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick
    run_cli("experiments.command_line:results")

import csv
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from experiments import ablation_figure, ablation_tables
from experiments.ablation_tables import Counts
from experiments.markdown import table
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, metrics, protocols
from flowseg_jax.evaluation.results import read_table
from flowseg_jax.system.paths import ROOT

COLUMNS = ("image_id", "family", "intersection", "union", "oracle_intersection", "oracle_union", "present", "area", "score")
PAGES, FIGURE = ("README.md", "docs/results.md"), "docs/figures/ablation.svg"
SPLITS = {  # file -> what the tables call it
    "val": "val",
    "val_shuffled": "val, with the text of other images",
    "testA": "testA",
    "testB": "testB (combinations of attributes that training lacks)",
}
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Result:
    """A split that was evaluated.

    Attributes:
        about: its `<split>.json`.
        families, images: of each sample.
        counts: int64 [n, 4], I and U of the selected mask and of the oracle.
        present: bool [n], whether the expression refers to something.
        answered: bool [n], whether a mask was the answer: one with pixels, with a score of at least the threshold.
    """

    about: dict[str, Any]
    families: np.ndarray
    images: np.ndarray
    counts: np.ndarray
    present: np.ndarray
    answered: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Result:
        """From `<split>.json` and the `.csv` beside it.

        Raises:
            UserError: the `.csv` is missing, or the two differ in their number of samples.
        """
        if not path.with_suffix(".csv").is_file():
            raise UserError(f"{path.with_suffix('.csv')} is missing: keep the evaluation again with --keep")
        with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        about = read_table(path)
        if len(rows) != about["n"]:
            raise UserError(f"{path}: it says {about['n']} samples, the .csv has {len(rows)}: keep it again with --keep")
        family, image = (np.array([row[name] for row in rows]) for name in ("family", "image_id"))
        counts = np.array([[int(row[name]) for name in COLUMNS[2:6]] for row in rows])
        present, area, score = (np.array([float(row[name]) for row in rows]) for name in COLUMNS[6:])
        return cls(about, family, image, counts, present > 0, (area > 0) & (score >= about["no_target_threshold"]))

    def figures(self, family: str = "") -> dict[str, float]:
        """n, cIoU, gIoU, those of the oracle, the gap and P@X in percent; of one family, or of all."""
        counts = self.counts[self.families == family] if family else self.counts
        ious = np.where(counts[:, 1::2] > 0, counts[:, ::2] / np.maximum(counts[:, 1::2], 1), 1.0)
        ciou, oracle_ciou = 100 * counts[:, ::2].sum(0) / counts[:, 1::2].sum(0)
        giou, oracle_giou = 100 * ious.mean(0)
        named = {"ciou": ciou, "giou": giou, "oracle_ciou": oracle_ciou, "oracle_giou": oracle_giou, "gap": oracle_giou - giou}
        return {"n": len(counts), **named, **{f"p{x}": 100 * (ious[:, 0] >= x / 10).mean() for x in (5, 9)}}

    def interval(self, resamples: int = audit.RESAMPLES) -> tuple[float, float]:
        """What holds 95 % of the cIoUs of resampled images, percent."""
        _, image = np.unique(self.images, return_inverse=True)
        sums = np.stack([np.bincount(image, self.counts[:, k]) for k in (0, 1)], 1)
        rng, n = np.random.default_rng(0), len(sums)
        drawn = [100 * np.divide(*sums[rng.integers(n, size=n)].sum(0)) for _ in range(resamples)]
        low, high = np.percentile(drawn, audit.INTERVAL)
        return float(low), float(high)


def keep(source: Path, target: Path) -> None:
    """Copies the results of an evaluation on expressions into `target`, its samples as a table; or those of the ablation."""
    if (source / "samples.csv").is_file():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("layer_trace_val", "*.html"))  # pages of the traces
        return
    found = sorted(path for path in source.glob("*.json") if path.stem in SPLITS)
    if not found:
        raise UserError(
            f"{source} holds none of {', '.join(f'{name}.json' for name in SPLITS)}: name the --out of an evaluation"
        )
    target.mkdir(parents=True, exist_ok=True)
    for path in found:
        protocol = protocols.get_protocol(read_table(path)["protocol"])
        records = metrics.counted(audit.read_records(path.with_suffix(".jsonl")), protocol)
        with (target / path.name).with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(COLUMNS)
            for record in records:
                pairs = (metrics.intersection_union(record, protocol, of) for of in ("", "oracle_"))
                answer = (int(not metrics.has_no_target(record)), record["area"], record["score"])
                lines.writerow([record["image_id"], record["family"], *(number for pair in pairs for number in pair), *answer])
        shutil.copyfile(path, target / path.name)


def read(folder: Path) -> dict[str, Result]:
    """{split: its result} of a folder of `results/`, in the order of the tables.

    Raises:
        UserError: the folder has none.
    """
    found = {split: Result.read(folder / f"{split}.json") for split in SPLITS if (folder / f"{split}.json").is_file()}
    if not found:
        raise UserError(f"{folder} holds no result: keep an evaluation there with --keep=OUT --as={folder.name}")
    return found


def shipped_table(results: dict[str, Result]) -> str:
    """The README's table."""
    rows = []
    for split, result in results.items():
        found, (low, high) = result.figures(), result.interval()
        ciou = f"{found['ciou']:.1f} [{low:.1f}, {high:.1f}]"
        rows.append([SPLITS[split], str(found["n"]), ciou, f"{found['giou']:.1f}", f"{found['oracle_ciou']:.1f}"])
    return table(["split", "expressions", "cIoU [95 % of resampled images]", "gIoU", "cIoU of the best candidate"], rows)


def protocol_table(*folders: dict[str, Result]) -> str:
    """All splits of several evaluations, each by its protocol."""
    names = ("ciou", "giou", "oracle_ciou", "oracle_giou", "gap", "p5", "p9")
    rows = []
    for results in folders:
        for split, result in results.items():
            found = result.figures()
            figures = (f"{found[name]:.1f}" for name in names)
            rows.append([f"`{result.about['protocol']}`, {SPLITS[split].partition(' (')[0]}", str(found["n"]), *figures])
    head = ["protocol, split", "n", "cIoU", "gIoU", "oracle cIoU", "oracle gIoU", "selection gap", "P@0.5", "P@0.9"]
    return table(head, rows)


def family_table(result: Result) -> str:
    """One split by expression family, the best first."""
    found = {family: result.figures(family) for family in sorted(set(result.families.tolist()))}
    order = sorted(found, key=lambda family: -found[family]["ciou"])
    names = ("ciou", "giou", "oracle_ciou", "p5", "p9")
    rows = [[family, str(found[family]["n"]), *(f"{found[family][name]:.1f}" for name in names)] for family in order]
    return table(["family (val)", "n", "cIoU", "gIoU", "oracle cIoU", "P@0.5", "P@0.9"], rows)


def no_target_table(result: Result) -> str:
    """How well the model says that nothing is there: the accuracies of both kinds at its threshold."""
    absent = ~result.present
    n_acc, t_acc = 100 * (~result.answered[absent]).mean(), 100 * result.answered[result.present].mean()
    counts = (str(int(absent.sum())), str(int(result.present.sum())))
    figures = (f"{result.about['no_target_threshold']:.3f}", f"{n_acc:.1f}", f"{t_acc:.1f}")
    head = ["no-target split", "refer to nothing", "refer to something", "threshold", "N-acc", "T-acc"]
    return table(head, [["`grefcoco`, val", *counts, *figures]])


def compared_table(title: str, models: dict[str, dict[str, Result]]) -> str:
    """Models on the same samples, each with the text of other images beside it."""
    rows = []
    for name, results in models.items():
        found, (low, high) = results["val"].figures(), results["val"].interval()
        ciou, control = f"{found['ciou']:.1f} [{low:.1f}, {high:.1f}]", f"{results['val_shuffled'].figures()['ciou']:.1f}"
        rows.append([name, str(found["n"]), ciou, control, f"{found['giou']:.1f}", f"{found['oracle_ciou']:.1f}"])
    head = [title, "n", "cIoU [95 % of resampled images]", "cIoU with the text of other images", "gIoU", "oracle cIoU"]
    return table(head, rows)


def tables(folder: Path = ROOT / "results") -> dict[str, str]:
    """{name of the block in a page: its table} from the result files."""
    shipped, psalm = read(folder / "shipped"), read(folder / "shipped_psalm")
    return {
        "shipped": shipped_table(shipped),
        "protocols": protocol_table(shipped, psalm),
        "families": family_table(shipped["val"]),
        "no_target": no_target_table(read(folder / "shipped_no_target")["val"]),
        "stages": compared_table(
            "val of the small world",
            {"stage 3 after stages 1 and 2": read(folder / "stages"), "stage 3 alone": read(folder / "stages_alone")},
        ),
        "language_model": compared_table(
            "first 60 images of val",
            {"SmolLM2, frozen": read(folder / "smollm2_frozen"), "SmolLM2 with adapters": read(folder / "smollm2_lora")},
        ),
        **ablation_tables.tables(folder / "ablation"),
    }


def fill(text: str, made: dict[str, str]) -> str:
    """A page with its blocks `<!-- results: NAME --> ... <!-- end -->` written anew."""
    return _BLOCK.sub(lambda block: block[1] + made[block[2]] + block[3], text)


def main(source: Path | None, name: str) -> None:
    """Keeps the evaluation in `source` as `results/<name>`, if there is one; then writes all tables, and the figure."""
    if source:
        keep(source, ROOT / "results" / name)
    made = tables()
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text(encoding="utf-8"), made), encoding="utf-8")
    ablation_figure.draw(Counts.read(ROOT / "results" / "ablation"), ROOT / FIGURE)
    print("\n".join(made.values()))

"""`make ablation`: what SR, CR and BAR are each worth, from components that were trained without any of them.

    data -> stage 1 (masks of categories) and stage 2 (words) -> stage 3 of every variant, seed and budget -> tables

docs/results.md has the protocol: what is held equal, how many seeds and steps, and what is concluded from which outcome. The
runs come in the order in which unfinished results are worth most: all variants of a seed, then the next seed; then the side
questions; then the next budget. Every run with the same seed and budget sees the same batches.

Everything lands in `runs/ablation`. Started again, finished runs are kept and an interrupted one continues. What was counted in
a finished run is written to `runs/ablation/results`, and the tables of it, as soon as a seed is complete, to `ablation.md`.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("experiments.command_line:ablation")

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import stages
from experiments.ablation_tables import MAIN, SIDE, SIDE_BUDGET, tables
from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints import storage
from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics
from flowseg_jax.evaluation.audit import read_records
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation, params_digest
from flowseg_jax.system import host
from flowseg_jax.system.console import log
from flowseg_jax.training import loop

SPLIT, SHUFFLED = "val", "val_shuffled"
SIZE = stages.Size(shapes=4000, reasonseg=10, steps=(800, 200, 0))
CONTROL_SEED = 0  # its runs are evaluated with the sentences of other images as well
KEY = ("image_id", "ann_id", "sentence_id")  # of a sample


def plan(budgets: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, int, str]]:
    """(budget, seed, variant) of all runs of {budget: seeds}, the most useful first; side questions at one budget."""
    for budget, seeds in budgets.items():
        yield from ((budget, seed, variant) for seed in seeds for variant in MAIN)
        if budget == SIDE_BUDGET:
            yield from ((budget, seed, variant) for seed in seeds for variant in SIDE)


def train_components(data: Path, runs: Path) -> None:
    """Makes the data sets, and the models of stages 1 and 2, as far as they are missing."""
    stages.prepare_data(data, SIZE)
    first, second, _ = SIZE.steps
    stage1, stage2 = (runs / name / "model" for name in ("stage1", "stage2"))
    if not stage1.exists():
        log(f"\n== stage 1, masks of categories, no language: {first} steps")
        stages.train_stage("stage1_segmentor", stage1.parent, first, (), data)
    if not stage2.exists():
        log(f"\n== stage 2, words for images, no masks: {second} steps")
        stages.train_stage("stage2_align", stage2.parent, second, (f"sam={stage1}",), data)


def read(variant: str, data: Path, runs: Path) -> ConfigDict:
    """The config of a variant, with its data in `data` and its components in `runs`."""
    config = configs.read(f"configs/shapes_ablation.py:{variant}")
    config.init_from = tuple(str(runs / name / "model") for name in ("stage2", "stage1"))
    config.data.dir = str(data / "shapes" / "prepared")
    config.data.tokenizer = str(data / "tokenizer")
    return config


def finish(config: ConfigDict, workdir: Path) -> None:
    """Trains and evaluates the run of `config` in `workdir`, as far as it is not done."""
    out, wanted = workdir / "eval", json.loads(configs.to_json(config))
    known = lambda path: json.loads(path.read_text()) if path.exists() else None  # noqa: E731
    names = [SPLIT, *[SHUFFLED] * (config.seed == CONTROL_SEED)]
    evaluated = [known(out / f"{name}.json") for name in names]  # the last files that evaluations write
    whole = all(found and found["checkpoint"]["step"] == config.num_steps for found in evaluated)
    if whole and known(workdir / "config.json") == wanted:
        return
    evaluation = ReferringEvaluation(EvalModel.load(loop.train(config, workdir)), loop.load_dataset(config))
    for name in names:
        evaluation.run(SPLIT, out, shuffle_text=name == SHUFFLED, pictures=False)


def keep(workdir: Path, name: str, components: Mapping[str, str], target: Path) -> None:
    """Writes what was counted in a finished run into `target`: a small file of its own, and a line in `about.json`.

    Args:
        workdir: of the run.
        name: what it is called in `target`, "500/sr_0".
        components: digests of the models of stages 1 and 2.
        target: has the other runs.

    Raises:
        UserError: `target` has runs with other components or on other data.
    """
    out = workdir / "eval"
    result, records = json.loads((out / f"{SPLIT}.json").read_text()), in_order(out / f"{SPLIT}.jsonl")
    about = {"split": SPLIT, "data": result["data"], "components": dict(components), "runs": {}}
    if (target / "about.json").exists():
        before = json.loads((target / "about.json").read_text())
        if changed := [key for key in about if key != "runs" and before[key] != about[key]]:
            raise UserError(f"{target}: has runs with other {' and '.join(changed)}; remove it, or name another --runs")
        about = before
    arrays = {"counts": counts(records)}
    if (out / f"{SHUFFLED}.jsonl").exists():
        arrays["control"] = counts(in_order(out / f"{SHUFFLED}.jsonl"))
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target / f"{name}.npz", **arrays)
    with (target / "samples.csv").open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(KEY)
        lines.writerows([record[field] for field in KEY] for record in records)
    about["runs"][name] = result["checkpoint"]["digest"]
    storage.write_text_atomic(target / "about.json", json.dumps(about, indent=1, sort_keys=True) + "\n")


def in_order(path: Path) -> list[dict[str, Any]]:
    """The samples of a run, in the same order for every run."""
    return sorted(read_records(path), key=lambda record: [record[field] for field in KEY])


def counts(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """uint16 [n, 4]: I and U of the selected mask, and of the oracle's, in pixels."""
    return np.array(
        [(*metrics.intersection_union(r), *metrics.intersection_union(r, of="oracle_")) for r in records], np.uint16
    )


def main(data: Path, runs: Path, budgets: Mapping[int, Sequence[int]]) -> None:
    """Makes all runs of `plan(budgets)` into `runs`, and the tables of them."""
    host.use_host_devices(read("baseline", data, runs).batch_size)
    host.enable_compilation_cache()
    train_components(data, runs)
    components = {name: params_digest(read_model_config(runs / name / "model")) for name in ("stage1", "stage2")}
    todo = list(plan(budgets))
    for number, (budget, seed, variant) in enumerate(todo, 1):
        log(f"\n== {budget} steps, seed {seed}, {variant} ({number} of {len(todo)})")
        config, name = read(variant, data, runs), f"{budget}/{variant}_{seed}"
        config.seed, config.num_steps = seed, budget
        finish(config, runs / name)
        keep(runs / name, name, components, runs / "results")
        if variant in (list(MAIN)[-1], list(SIDE)[-1]):
            text = "\n".join(tables(runs / "results").values())
            storage.write_text_atomic(runs / "ablation.md", text)
            log(text)

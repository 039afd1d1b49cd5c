"""`make stages`: the three training stages end to end at tiny size, and what the first two are worth to the third.

    miniature data sets -> stage 1 (masks) -> stage 2 (words) -> stage 3 from both, stage 3 from nothing -> evaluation of both

The data sets are the `shapes` benchmark and the multi-task data sets, in the layouts of RefCOCO, ReasonSeg, COCO panoptic and
LLaVA, each read by its own reader. Their world is a small one, for selection is learned within minutes there: four objects a
scene, of four shapes and four colours, which expressions name by what they look like. ReasonSeg's questions need all looks.

Both models of stage 3 are evaluated on val, and again with the sentences of other images: what a model reaches without the
right sentence. Everything lands in `data/stages` and `runs/stages`; started again, it continues where it stopped.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("experiments.command_line:stages")

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.command_line import STAGES_DATA
from flowseg_jax import experiment as configs
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.prepare import prepare, tokenizer_corpus, train_dataset_tokenizer
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
from flowseg_jax.synthetic import multi_task
from flowseg_jax.synthetic.shapes import load_or_build_shapes
from flowseg_jax.system import host
from flowseg_jax.system.console import duration, log
from flowseg_jax.training import loop

LAYOUTS = {"reasonseg": "reasonseg", "coco-panoptic": "panoptic", "llava": "chat"}  # layout -> our name
FOLDERS = {"reasonseg": "reasonseg", "coco-panoptic": "coco", "llava": "llava"}  # as `make-multitask` calls them
WORLD = {"objects": (4, 4), "palette": "few"}
VALUES = ("loss/closed_vocab_mask", "loss/language", "loss/referring_mask")  # what tells whether stages 1, 2 and 3 learn


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        shapes, reasonseg, panoptic, chat: images.
        steps: of the three stages.
        evaluated: images of `val`; 0: neither evaluation nor the stage 3 that it is compared with.
    """

    shapes: int = 2400
    reasonseg: int = 200
    panoptic: int = 1600
    chat: int = 800
    steps: tuple[int, int, int] = (500, 80, 250)
    evaluated: int = 80


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    losses: {run: (loss name, mean of the first logged values, mean of the last)}.
    scores: {run: the evaluation's numbers} of stage 3 with and without stages 1 and 2.
    controls: the same with the sentences of other images.
    """

    losses: Mapping[str, tuple[str, float, float]]
    scores: Mapping[str, Mapping[str, Any]]
    controls: Mapping[str, Mapping[str, Any]]

    def table(self) -> str:
        lines = [f"{name:34s} {loss:20s} {first:8.3f} -> {last:.3f}" for name, (loss, first, last) in self.losses.items()]
        lines += [
            f"{name:34s} val n {score['n']}, gIoU {score['giou']:.1f}, cIoU {score['ciou']:.1f}, with the sentences of other"
            f" images {self.controls[name]['ciou']:.1f}, oracle cIoU {score['oracle_ciou']:.1f}"
            for name, score in self.scores.items()
        ]
        return "\n".join(lines)


def prepare_data(data: Path, size: Size) -> None:
    """Makes the miniature data sets and one tokenizer for all of them, as far as they are missing."""
    shapes = load_or_build_shapes(data / "shapes", size.shapes, 0, log=log, mix={"attribute": 1.0}, **WORLD)
    raw = data / "multi_task"
    if not raw.exists():
        counts = {name: getattr(size, name) for name in multi_task.DEFAULTS}
        multi_task.write_datasets(raw, **counts, **WORLD, report=log)
    sets = [shapes]
    for layout, name in LAYOUTS.items():
        out = data / name
        sets.append(PreparedDataset.open(out) if out.exists() else prepare(raw / FOLDERS[layout], out, layout=layout, log=log))
    if not (data / "tokenizer").exists():
        from flowseg_jax.configs.stage3_mixed import TINY_VOCAB

        texts = itertools.chain.from_iterable(tokenizer_corpus(prepared) for prepared in sets)
        train_dataset_tokenizer(texts, data / "tokenizer", TINY_VOCAB)


def train_stage(config: str, workdir: Path, steps: int, init_from: tuple[str, ...], data: Path) -> Path:
    """Trains a stage at tiny size on the data sets in `data`, as far as it is not done; returns the directory of its model."""
    cfg = configs.read(f"configs/{config}.py:tiny")
    cfg.update(num_steps=steps, init_from=init_from)
    relocate(cfg, data)
    return loop.train(cfg, workdir)


def main(data: Path, runs: Path, size: Size = Size()) -> Outcome:
    """Runs whatever is missing and returns what came out."""
    started = time.monotonic()

    def stage(text: str) -> None:
        log(f"\n== [{duration(time.monotonic() - started)}] {text}")

    host.use_host_devices(2)
    host.enable_compilation_cache()  # both runs of stage 3 are one program
    stage("miniature data sets in the layouts of RefCOCO, ReasonSeg, COCO panoptic and LLaVA")
    prepare_data(data, size)

    first, second, third = size.steps
    stage(f"stage 1, masks of categories, no language: {first} steps")
    masks = train_stage("stage1_segmentor", runs / "stage1", first, (), data)
    stage(f"stage 2, words for images, no masks: {second} steps")
    words = train_stage("stage2_align", runs / "stage2", second, (f"sam={masks}",), data)
    stage(f"stage 3, everything, from stages 1 and 2: {third} steps")
    whole = train_stage("stage3_mixed", runs / "stage3", third, (str(words), str(masks)), data)
    compared = {"stage 3 after stages 1 and 2": whole}
    if size.evaluated:
        stage(f"stage 3 alone, from nothing: {third} steps")
        compared["stage 3 alone"] = train_stage("stage3_mixed", runs / "stage3_alone", third, (), data)

    stage("what the first two stages are worth")
    scores, controls = {}, {}
    for name, model in compared.items() if size.evaluated else ():
        benchmark = ReferringEvaluation(EvalModel.load(model), PreparedDataset.open(data / "shapes" / "prepared"))
        out = runs / "eval" / model.parent.name
        for found, shuffled in ((scores, False), (controls, True)):
            benchmark.run("val", out, shuffle_text=shuffled, images=size.evaluated, pictures=False)
            found[name] = json.loads((out / ("val_shuffled.json" if shuffled else "val.json")).read_text())
    models = {"stage 1": masks, "stage 2": words} | compared
    losses = {
        name: (loss, *ends(model.parent / "metrics.jsonl", loss))
        for (name, model), loss in zip(models.items(), (*VALUES, VALUES[-1]), strict=False)
    }
    outcome = Outcome(losses, scores, controls)
    log(outcome.table())
    return outcome


def relocate(config: Any, data: Path) -> None:
    """Points a stage's data at `data` instead of the default place."""
    move = lambda path: str(data / Path(path).relative_to(STAGES_DATA)) if path else path  # noqa: E731
    config.data.dir = move(config.data.dir) if not config.data.mixture else config.data.dir
    config.data.mixture = tuple((move(directory), weight) for directory, weight in config.data.mixture)
    config.data.tokenizer = move(config.data.tokenizer)


def ends(metrics: Path, name: str) -> tuple[float, float]:
    """Means of a metric over the first and over the last tenth of what was logged, three values where there are ten."""
    values = [row[name] for row in map(json.loads, metrics.read_text().splitlines()) if name in row]
    count = min(max(3, len(values) // 10), max(1, len(values) // 3))
    return sum(values[:count]) / count, sum(values[-count:]) / count

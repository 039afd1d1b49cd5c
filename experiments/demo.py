"""`make demo`: the whole path on a laptop, with something to look at after every stage.

    benchmark -> shipped model evaluated, pictures -> untrained model evaluated -> training from scratch -> evaluation -> report

Everything lands in `runs/demo`; started again, it continues where it stopped.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that a Ctrl-C while they last is as clean as later
    from flowseg_jax.errors import run_cli

    run_cli("experiments.demo:main")

import dataclasses
import time
from pathlib import Path

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.find import SHIPPED_MODEL
from flowseg_jax.errors import run_cli
from flowseg_jax.evaluation import report
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
from flowseg_jax.models import flowseg
from flowseg_jax.system import host
from flowseg_jax.system.console import duration, heartbeat, log
from flowseg_jax.training import loop

WORKDIR = Path("runs/demo")
STEPS = 1100  # of training from scratch: at most twelve minutes on two cores
IMAGES = 60  # of each split
SPLITS = ("val", "testA", "testB")


def main() -> int:
    started = time.monotonic()

    def stage(text: str) -> None:
        log(f"\n== [{duration(time.monotonic() - started)}] {text}")

    config, _ = configs.load([f"--config.num_steps={STEPS}", "--config.checkpoint_every=100"])
    plan = loop.RunConfig.from_config(config)
    host.use_host_devices(config.batch_size // config.model.negatives_group_size)
    host.enable_compilation_cache()
    rows: list[report.ReportRow] = []
    about = [
        f"Training from scratch: {STEPS} steps of {config.batch_size} images, up to {config.data.max_phrases} expressions each "
        f"(configs/shapes_tiny.py, seed {config.seed}). All numbers are percent, over the first {IMAGES} images of each split.",
        "Shuffled-text control: every image gets the sentences of another image; what is left is what needs no reading.",
    ]

    def show(row: report.ReportRow) -> None:
        rows.append(row)
        report.write(WORKDIR / "report.html", rows, title="FlowSeg on shapes", about=about)
        log(report.table([row]))
        log(f"report so far: {WORKDIR / 'report.html'}")

    stage("the shapes benchmark: images, expressions, tokenizer")
    prepared = loop.load_dataset(config)

    stage("the shipped model: evaluated, with pictures")
    shipped = ReferringEvaluation(EvalModel.load(SHIPPED_MODEL), prepared)
    for split in SPLITS:
        shipped.run(split, WORKDIR / "eval_shipped", images=IMAGES)
    shipped.run("val", WORKDIR / "eval_shipped", shuffle_text=True, images=IMAGES)
    show(report.read_row("shipped", WORKDIR / "eval_shipped", note="configs/shapes_shipped.py"))
    show(report.read_row("shipped, shuffled text", WORKDIR / "eval_shipped", shuffled=True))

    stage("an untrained model, for comparison")
    with heartbeat("initialising parameters"):
        _, params = flowseg.init_model(plan.model, config.seed)
    untrained = dataclasses.replace(shipped.model, params=params, checkpoint={"digest": None, "step": 0})
    mine = ReferringEvaluation(untrained, prepared)
    for split in SPLITS:
        mine.run(split, WORKDIR / "eval_untrained", images=IMAGES, pictures=False)
    show(report.read_row("untrained", WORKDIR / "eval_untrained"))

    stage(f"training from scratch: {STEPS} steps")
    trained = loop.train(config, WORKDIR)

    stage("what these minutes gave")
    mine = ReferringEvaluation(EvalModel.load(trained), prepared)
    for split in SPLITS:
        mine.run(split, WORKDIR / "eval", images=IMAGES)
    mine.run("val", WORKDIR / "eval", shuffle_text=True, images=IMAGES)
    show(report.read_row("this run", WORKDIR / "eval"))
    show(report.read_row("this run, shuffled text", WORKDIR / "eval", shuffled=True))

    stage("done")
    log(report.table(rows))
    log(f"open {WORKDIR / 'report.html'}")
    log(f'ask it something: python predict.py --image IMAGE --text "the red circle"   (or --workdir {WORKDIR})')
    return 0

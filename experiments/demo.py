"""`make demo`: the whole path on a laptop, with something to look at after every part.

    a first picture -> benchmark -> shipped model evaluated -> untrained model evaluated -> training -> evaluation -> report

The training is the last stage alone (configs/shapes_demo.py): a mask decoder from nothing, all else from the shipped model.

Everything lands in `runs/demo`; started again, it continues where it stopped.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("experiments.command_line:demo")

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path

from flowseg_jax import experiment as configs
from flowseg_jax.analysis import oracle
from flowseg_jax.checkpoints.find import SHIPPED_MODEL
from flowseg_jax.evaluation import report
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
from flowseg_jax.inference.loading import load
from flowseg_jax.models import flowseg
from flowseg_jax.reports import answers
from flowseg_jax.system import host
from flowseg_jax.system.console import ProgressHeartbeat, duration, heartbeat, log
from flowseg_jax.system.paths import ROOT
from flowseg_jax.training import loop

SPLITS, SCENE = ("val", "testA", "testB"), "06.png"


def main(out: Path, steps: int, images: int, beat: ProgressHeartbeat) -> str:
    """The demo; returns what is to be said at its end.

    Args:
        out: where everything but the benchmark lands.
        steps: of training.
        images: of each split that are evaluated.
        beat: says what is being done, where nothing else is said for a while.
    """
    started = time.monotonic()

    def part(number: int, text: str) -> None:
        log(f"\n== {number} of 6, after {duration(time.monotonic() - started)}: {text}")
        beat.message = text

    config, _ = configs.load([f"--config.num_steps={steps}"], default="shapes_demo")
    host.use_host_devices(config.batch_size // config.model.negatives_group_size)
    host.enable_compilation_cache()
    rows: list[report.ReportRow] = []
    about = [
        f"This run: {steps:,} steps of {config.batch_size} images with up to {config.data.max_phrases} expressions each "
        f"(configs/shapes_demo.py, seed {config.seed}). Its mask decoder began with nothing; its encoders, pixel decoder and "
        f"language model are the shipped model's. Evaluated: the first {images} images of each split.",
        "Shuffled text is a control: every image gets the sentences of another image. A model that reads does badly in it.",
    ]

    def show(row: report.ReportRow) -> None:
        rows.append(row)
        report.write(out / "report.html", rows, title="FlowSeg on shapes", about=about, run=out)
        log(report.table([row]))
        log(f"the report so far: {out / 'report.html'}")

    part(1, "a first look")
    log(f"open {first_look(out)}")

    part(2, "the data")
    prepared = loop.load_dataset(configs.load([])[0])

    part(3, "the model that comes with the repository")
    shipped = ReferringEvaluation(EvalModel.load(SHIPPED_MODEL), prepared)
    for split in SPLITS:
        shipped.run(split, out / "eval_shipped", images=images)
    shipped.run("val", out / "eval_shipped", shuffle_text=True, images=images)
    show(report.read_row("shipped", out / "eval_shipped", note="configs/shapes_shipped.py"))
    show(report.read_row("shipped, shuffled text", out / "eval_shipped", shuffled=True))

    part(4, "the same model with a mask decoder that has learned nothing")
    with heartbeat("initialising parameters"):
        _, fresh = flowseg.init_model(shipped.model.cfg, config.seed)
    given = [entry.partition("=")[0] for entry in config.init_from]
    params = fresh | {name: shipped.model.params[name] for name in given}
    nothing = {"digest": None, "step": 0}
    untrained = ReferringEvaluation(
        dataclasses.replace(shipped.model, params=params, checkpoint=nothing, name="untrained"), prepared
    )
    for split in SPLITS:
        untrained.run(split, out / "eval_untrained", images=images, pictures=False)
    show(report.read_row("untrained", out / "eval_untrained"))

    part(5, f"training the mask decoder, {steps:,} steps")
    trained = loop.train(config, out)

    part(6, "what this training gave")
    mine = ReferringEvaluation(EvalModel.load(trained), prepared)
    for split in SPLITS:
        mine.run(split, out / "eval", images=images)
    mine.run("val", out / "eval", shuffle_text=True, images=images)
    oracle.run(out / "eval" / "val.jsonl", out / "eval" / "analysis")
    show(report.read_row("this run", out / "eval"))
    show(report.read_row("this run, shuffled text", out / "eval", shuffled=True))

    beat.message = "the demo"
    done = f"\n== done in {duration(time.monotonic() - started)}\n{report.table(rows)}"
    return "\n\n".join((done, explain(*rows), what_next(out)))


def first_look(out: Path) -> Path:
    """What the shipped model answers about an example scene: the picture, in the first minute."""
    path, texts = scene()
    answered = load(SHIPPED_MODEL).segment(path, texts)
    sheet = answers.with_legend(answered[0].image, [(str(one.summary()), one.mask) for one in answered])
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "first_look.png")
    return out / "first_look.png"


def explain(
    shipped: report.ReportRow,
    shuffled_shipped: report.ReportRow,
    untrained: report.ReportRow,
    mine: report.ReportRow,
    shuffled: report.ReportRow,
) -> str:
    """What the numbers on `val` say, for somebody who sees them for the first time."""
    theirs, before, after = (row.results["val"] for row in (shipped, untrained, mine))
    steps, more = after["checkpoint"]["step"], theirs["checkpoint"]["step"]
    lines = [
        "How to read it. cIoU says how well the masks fit what the sentences name: 100 is perfect.",
        f"- This run: {after['ciou']:.1f} on val after {steps:,} steps; {before['ciou']:.1f} without training.",
        "  Its mask decoder, which chooses by the sentence, began with nothing. Its encoders, pixel decoder and language model "
        "are the shipped model's, as the last of the paper's three stages begins where the first two ended.",
        f"- The shipped model: {theirs['ciou']:.1f}. Its mask decoder has twice as many layers, and all of it was "
        f"trained, for {more:,} steps, {more / steps:.0f} times as many, on more scenes.",
        f"- The best of all candidates would give this run {after['oracle_ciou']:.1f}: the masks are there early, choosing "
        "the right one by the sentence comes later, and is what more steps improve.",
        f"- With the sentences of other images: {shuffled.results['val']['ciou']:.1f} for this run, "
        f"{shuffled_shipped.results['val']['ciou']:.1f} for the shipped model. The further below the real number, "
        "the more the model reads.",
    ]
    return "\n".join(lines)


def what_next(out: Path) -> str:
    """Commands that work as they stand: this interpreter, a picture that is there, a sentence about it."""
    python = shlex.quote(str(Path(sys.executable).relative_to(Path.cwd()) if _inside(Path(sys.executable)) else sys.executable))
    image, texts = scene()
    predict = f"{python} -m flowseg_jax predict --image={shlex.quote(image)} --text={shlex.quote(texts[0])}"
    return "\n".join(
        [
            f"The report, with pictures: open {out / 'report.html'} in a browser.",
            f"Ask the shipped model:     {predict}",
            f"Ask this run's model:      {predict} --workdir={shlex.quote(str(out))}",
            "Ask in the browser:        make app",
        ]
    )


def scene() -> tuple[str, list[str]]:
    """(path from here, sentences about different objects) of the example scene that the README shows."""
    folder = ROOT / "examples" / "scenes"
    lines = [json.loads(line) for line in (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    image = folder / SCENE
    texts = [line["expressions"][0] for line in lines if line["image"] == image.name]
    return str(image.relative_to(Path.cwd()) if _inside(image) else image), texts


def _inside(path: Path) -> bool:
    return path.is_relative_to(Path.cwd())

"""The flags of the programs in this folder. A program is imported once its flags are read, so `--help` needs no JAX."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flowseg_jax.cli.parser import Parser, positive
from flowseg_jax.errors import UserError
from flowseg_jax.system.console import heartbeat, log
from flowseg_jax.system.memory import keep_freed_memory

ABLATION_DATA, ABLATION = Path("data/ablation"), Path("runs/ablation")
BUDGETS = {500: 8, 1500: 8, 4500: 4}  # steps -> seeds, of the ablation
DEMO, STEPS, IMAGES = Path("runs/demo"), 1200, 60
STAGES_DATA, STAGES = Path("data/stages"), Path("runs/stages")

DEMO_PARTS = {  # part -> minutes on two cores that do nothing else, with the default flags
    "asks the model that comes with the repository, for a first picture": 1,
    "makes the data, 6,000 small scenes with look-alike objects": 1,
    "evaluates the model that comes with the repository": 1,
    "evaluates a model that has learned nothing, to compare with": 1,
    "trains a mask decoder from nothing, {steps:,} steps": 5,
    "evaluates it and explains the numbers": 1,
}


def demo_plan(out: Path, steps: int) -> str:
    """What the demo says before it begins."""
    parts = [(text.format(steps=steps), minutes) for text, minutes in DEMO_PARTS.items()]
    whole = sum(DEMO_PARTS.values())
    lines = [f"  {i}. {text:66} {minutes:2} min" for i, (text, minutes) in enumerate(parts, 1)]
    return "\n".join(
        [
            f"The demo shows the whole path on synthetic scenes, in about {whole} minutes on two CPU cores:\n",
            *lines,
            f"\nEverything lands in {out}. Ctrl-C stops it; the same command goes on where it stopped.",
        ]
    )


def demo(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m experiments.demo",
        description="Makes the shapes benchmark, evaluates the shipped model, trains a mask decoder from nothing, and reports.",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=DEMO, help="where it lands, default %(default)s")
    parser.add_argument("--steps", metavar="N", type=positive, default=STEPS, help="of training, default %(default)s")
    parser.add_argument("--max-images", metavar="N", type=positive, default=IMAGES, help="of each split, default %(default)s")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    log(demo_plan(arguments.out, arguments.steps))
    with heartbeat("getting ready") as beat:
        keep_freed_memory()
        from experiments import demo

        closing = demo.main(arguments.out, arguments.steps, arguments.max_images, beat)
    log(closing)
    return 0


def stages(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m experiments.stages",
        description="The three training stages end to end at tiny size, and what the first two are worth to the third.",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, default=STAGES_DATA, help="data sets, default %(default)s")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=STAGES, help="where it lands, default %(default)s")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    from experiments import stages

    stages.main(arguments.data, arguments.runs)
    return 0


def ablation(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.ablation", description="The paper's ablation at tiny size.")
    budgets = ", ".join(f"{budget:,} steps with {seeds} seeds" for budget, seeds in BUDGETS.items())
    parser.add_argument("--budget", metavar="N", type=int, choices=BUDGETS, help=f"steps of a run; default: all, {budgets}")
    parser.add_argument("--seeds", metavar="N,N", help="default: 0,1,... as many as the budget has")
    parser.add_argument("--data", metavar="DIR", type=Path, default=ABLATION_DATA, help="data sets, default %(default)s")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=ABLATION, help="where it lands, default %(default)s")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else None
    except ValueError:
        raise UserError(f"--seeds takes integers, 0,1,2, got {arguments.seeds!r}") from None
    chosen = [arguments.budget] if arguments.budget else list(BUDGETS)
    keep_freed_memory()
    from experiments import ablation

    budgets = {budget: seeds or list(range(BUDGETS[budget])) for budget in chosen}
    ablation.main(arguments.data, arguments.runs, budgets)
    return 0


def results(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.results", description="The published tables, made of the files in results/.")
    parser.add_argument(
        "--keep",
        metavar="DIR",
        type=Path,
        help="the --out of an evaluation, or the results of the ablation: they become results/NAME",
    )
    parser.add_argument("--as", dest="name", metavar="NAME", help="what it is called in results/: shipped, shipped_psalm")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if bool(arguments.keep) != bool(arguments.name):
        raise UserError("--keep=DIR and --as=NAME belong together")
    if arguments.name and arguments.name != Path(arguments.name).name:
        raise UserError(f"--as={arguments.name}: a name, not a path")
    from experiments import results

    results.main(arguments.keep, arguments.name or "")
    return 0

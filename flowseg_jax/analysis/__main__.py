"""`python -m flowseg_jax.analysis COMMAND`: where a model loses, written as JSON and as a static page."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that a Ctrl-C while they last is as clean as later
    from flowseg_jax.errors import run_cli

    run_cli("flowseg_jax.analysis.__main__:main")

import argparse
from pathlib import Path

from flowseg_jax import cli
from flowseg_jax.analysis import calibration, failure_comparison, oracle
from flowseg_jax.system import host

IMAGES = 100


def _beside(args: argparse.Namespace, file: str) -> Path:
    """The folder to write to: `--out`, else `diagnose` beside the results."""
    return Path(args.out) if args.out else Path(file).parent / "diagnose"


def _oracle(args: argparse.Namespace) -> None:
    oracle.run(Path(args.file), _beside(args, args.file))


def _rescue(args: argparse.Namespace) -> None:
    failure_comparison.run(Path(args.first), Path(args.second), _beside(args, args.second))


def _negatives(args: argparse.Namespace) -> None:
    control = Path(args.control) if args.control else None
    calibration.run(Path(args.file), control, _beside(args, args.file), args.false_alarms)


def _model(args: argparse.Namespace) -> None:
    from flowseg_jax import experiment
    from flowseg_jax.analysis import boundary, embedding_swap, layer_trace, prompt_sensitivity
    from flowseg_jax.analysis.runner import AnalysisRunner
    from flowseg_jax.checkpoints.pretrained import read_model_config
    from flowseg_jax.data.dataset import PreparedDataset
    from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
    from flowseg_jax.training import loop

    directory, data = cli.model_directory(args), args.data
    out = Path(args.out) if args.out else Path("runs") / "diagnose" / cli.model_name(directory)
    if data is None:
        read_model_config(directory)  # a mistyped name is told at once, not after the benchmark is made
        data = loop.load_dataset(experiment.load([])[0]).directory
    command = {
        "layers": layer_trace.run,
        "bar": boundary.run,
        "carriers": embedding_swap.run,
        "prompts": prompt_sensitivity.run,
    }[args.command]
    benchmark = ReferringEvaluation(EvalModel.load(directory), PreparedDataset.open(data), args.batch_size)
    command(AnalysisRunner(benchmark, args.split, args.images or None), out)


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    parser = cli.Parser(prog="python -m flowseg_jax.analysis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command", parser_class=cli.Parser)

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--out", metavar="DIR", help="default: diagnose/ beside the results, runs/diagnose/MODEL of a model"
        )
        command.set_defaults(run=run)
        return command

    one = add("oracle", _oracle, "selected and best candidate: selection, generation and boundary errors")
    one.add_argument("file", metavar="FILE", help="<split>.jsonl of an evaluation")
    two = add("rescue", _rescue, "what model B makes of model A's failures, and what it breaks")
    two.add_argument("first", metavar="A")
    two.add_argument("second", metavar="B")
    three = add("negatives", _negatives, "a threshold for 'no such object', and what a score is worth")
    three.add_argument("file", metavar="FILE", help="<split>.jsonl of an evaluation")
    three.add_argument("control", metavar="CONTROL", nargs="?", help="<split>_shuffled.jsonl (eval.py --shuffle-text)")
    three.add_argument("--false-alarms", type=float, default=0.1, metavar="SHARE", help="wanted at most, default 0.1")
    for name, text in (
        ("layers", "what each decoder layer does with the condition and with the choice"),
        ("bar", "masks before and after boundary refinement"),
        ("carriers", "which of C and S carries the answer"),
        ("prompts", "the spread over all wordings of question and answer"),
    ):
        command = add(name, _model, text)
        cli.add_model_flags(command)
        command.add_argument("--data", metavar="DIR", help="prepared data set; default: the shapes benchmark, made if missing")
        command.add_argument("--split", default="val")
        command.add_argument(
            "--images", type=int, default=IMAGES, help=f"the first images of the split, 0 for all; default {IMAGES}"
        )
        command.add_argument("--batch-size", type=cli.positive, default=8, help="images at a time")
    args = parser.parse_args(argv)
    host.enable_compilation_cache()
    args.run(args)
    return 0

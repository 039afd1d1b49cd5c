"""`flowseg analyze COMMAND`: where a model loses, as JSON and as a static page.

Some read the results of an evaluation, `<split>.jsonl`; the others run a model.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flowseg_jax.cli.parser import Command, Parser, add_model_flags, positive, run_command
from flowseg_jax.errors import UserError

COMMANDS = {
    "audit": Command("flowseg_jax.cli.analyze:audit", "recompute the tables of all protocols from the samples of a .jsonl"),
    "compare": Command("flowseg_jax.cli.analyze:compare", "two models on the same samples, with bootstrap intervals by image"),
    "oracle": Command(
        "flowseg_jax.cli.analyze:oracle", "selected and best candidate: selection, generation and boundary errors"
    ),
    "compare-failures": Command(
        "flowseg_jax.cli.analyze:compare_failures", "what model B makes of model A's failures, and what it breaks"
    ),
    "calibrate-no-target": Command(
        "flowseg_jax.cli.analyze:calibrate_no_target", "a threshold for 'no such object', and what a score is worth"
    ),
    "layer-trace": Command(
        "flowseg_jax.cli.analyze:layer_trace", "what each decoder layer does with the condition and with the choice"
    ),
    "boundary": Command("flowseg_jax.cli.analyze:boundary", "masks before and after boundary refinement"),
    "swap-embeddings": Command("flowseg_jax.cli.analyze:swap_embeddings", "which of C and S carries the answer"),
    "mask-grid": Command("flowseg_jax.cli.analyze:mask_grid", "what the grid of the masks itself costs: perfect masks on it"),
    "prompt-sensitivity": Command(
        "flowseg_jax.cli.analyze:prompt_sensitivity", "the spread over all prompt templates of question and answer"
    ),
}
RENAMED = {
    "rescue": "compare-failures",
    "negatives": "calibrate-no-target",
    "layers": "layer-trace",
    "bar": "boundary",
    "carriers": "swap-embeddings",
    "prompts": "prompt-sensitivity",
}
MAX_IMAGES = 100


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    about = "Where a model loses: from the results of an evaluation, or by running the model."
    return run_command("flowseg analyze", about, COMMANDS, argv, RENAMED)


def _parser(command: str, *, out: str = "analysis/ beside the results") -> Parser:
    parser = Parser(prog=f"flowseg analyze {command}", description=COMMANDS[command].help)
    if out:
        parser.add_argument("--out", metavar="DIR", help=f"default: {out}")
    return parser


def _beside(out: str | None, file: str) -> Path:
    """The folder to write to: `--out`, else `analysis` beside the results."""
    return Path(out) if out else Path(file).parent / "analysis"


def audit(argv: Sequence[str]) -> int:
    parser = _parser("audit", out="")
    parser.add_argument("file", metavar="FILE", help="<split>.jsonl of an evaluation")
    parser.add_argument("--json", action="store_true", help="print JSON")
    other = 'another threshold for "no target" than the evaluation\'s'
    parser.add_argument("--no-target-threshold", type=float, metavar="SCORE", help=other)
    arguments = parser.parse_args(argv)
    from flowseg_jax.evaluation import audit
    from flowseg_jax.evaluation.tasks import category_tables

    threshold = arguments.no_target_threshold
    records = audit.read_lines(arguments.file)
    if audit.on_categories(records):
        if threshold is not None:
            raise UserError(f"{arguments.file}: results on categories, without expressions: leave --no-target-threshold out")
        found, render = (
            audit.category_tables(arguments.file, records),
            lambda found: "\n".join(category_tables.format_tables(found)),
        )
    else:
        records = audit.samples(arguments.file, records)
        if threshold is not None:
            records = [record | {"no_target_threshold": threshold} for record in records]
        found, render = audit.tables(records), audit.render
    print(json.dumps(found, indent=1) if arguments.json else render(found))
    return 0


def compare(argv: Sequence[str]) -> int:
    from flowseg_jax.evaluation import protocols

    parser = _parser("compare", out="")
    parser.add_argument("first", metavar="A", help="<split>.jsonl of one model")
    parser.add_argument("second", metavar="B", help="and of another one")
    parser.add_argument("--protocol", default="xsam", help=f"one of {', '.join(protocols.PROTOCOLS)} (default: xsam)")
    arguments = parser.parse_args(argv)
    from flowseg_jax.evaluation import audit

    first, second = (audit.read_records(path) for path in (arguments.first, arguments.second))
    for name, difference in audit.compare(first, second, protocols.get_protocol(arguments.protocol)).items():
        print(f"{name}: {difference}")
    return 0


def oracle(argv: Sequence[str]) -> int:
    parser = _parser("oracle")
    parser.add_argument("file", metavar="FILE", help="<split>.jsonl of an evaluation")
    arguments = parser.parse_args(argv)
    from flowseg_jax.analysis import oracle

    oracle.run(Path(arguments.file), _beside(arguments.out, arguments.file))
    return 0


def compare_failures(argv: Sequence[str]) -> int:
    parser = _parser("compare-failures")
    parser.add_argument("first", metavar="A", help="<split>.jsonl of model A")
    parser.add_argument("second", metavar="B", help="and of model B")
    arguments = parser.parse_args(argv)
    from flowseg_jax.analysis import failure_comparison

    out = _beside(arguments.out, arguments.second)
    failure_comparison.run(Path(arguments.first), Path(arguments.second), out)
    return 0


def calibrate_no_target(argv: Sequence[str]) -> int:
    parser = _parser("calibrate-no-target")
    parser.add_argument("file", metavar="FILE", help="<split>.jsonl of an evaluation")
    parser.add_argument("control", metavar="CONTROL", nargs="?", help="<split>_shuffled.jsonl (flowseg eval --shuffle-text)")
    parser.add_argument("--false-alarms", type=float, default=0.1, metavar="SHARE", help="wanted at most, default 0.1")
    parser.add_argument("--model", metavar="DIR", help="a model directory whose own threshold this becomes")
    arguments = parser.parse_args(argv)
    from flowseg_jax.analysis import calibration

    control = Path(arguments.control) if arguments.control else None
    out = _beside(arguments.out, arguments.file)
    calibration.run(Path(arguments.file), control, out, arguments.false_alarms, arguments.model)
    return 0


def _run_model(command: str, module: str, argv: Sequence[str]) -> int:
    """An analysis that runs a model: `module.run` on the first images of a split."""
    parser = _parser(command, out="runs/analysis/<name of the model>")
    add_model_flags(parser)
    parser.add_argument("--data", metavar="DIR", help="prepared data set; default: the shapes benchmark, made if missing")
    parser.add_argument("--split", default="val", help="default val")
    first = f"only the first N images of the split, 0 for all; default {MAX_IMAGES}"
    parser.add_argument("--max-images", metavar="N", type=int, default=MAX_IMAGES, help=first)
    parser.add_argument("--batch-size", metavar="N", type=positive, default=8, help="images at a time, default 8")
    arguments = parser.parse_args(argv)
    from flowseg_jax import experiment
    from flowseg_jax.analysis.runner import AnalysisRunner
    from flowseg_jax.checkpoints.find import find_model, model_name
    from flowseg_jax.checkpoints.pretrained import read_model_config
    from flowseg_jax.data.dataset import PreparedDataset
    from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
    from flowseg_jax.system import host
    from flowseg_jax.training import loop

    host.enable_compilation_cache()
    directory, data = find_model(arguments.checkpoint, arguments.workdir), arguments.data
    out = Path(arguments.out) if arguments.out else Path("runs") / "analysis" / model_name(directory)
    if data is None:
        read_model_config(directory)  # a mistyped name is an error at once, not after the benchmark is made
        data = loop.load_dataset(experiment.load([])[0]).directory
    evaluation = ReferringEvaluation(EvalModel.load(directory), PreparedDataset.open(data), arguments.batch_size)
    run = importlib.import_module(f"flowseg_jax.analysis.{module}").run
    run(AnalysisRunner(evaluation, arguments.split, arguments.max_images or None), out)
    return 0


layer_trace = functools.partial(_run_model, "layer-trace", "layer_trace")
boundary = functools.partial(_run_model, "boundary", "boundary")
swap_embeddings = functools.partial(_run_model, "swap-embeddings", "embedding_swap")
mask_grid = functools.partial(_run_model, "mask-grid", "mask_grid")
prompt_sensitivity = functools.partial(_run_model, "prompt-sensitivity", "prompt_sensitivity")

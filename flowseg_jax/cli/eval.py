"""`flowseg eval`: evaluates a model; results go to <out>/<split>.json, <split>.jsonl and report.html."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from flowseg_jax.cli.parser import Parser, add_model_flags, add_process_flags, add_quantize_flag, positive, process_group, share
from flowseg_jax.errors import UserError
from flowseg_jax.system import paths

ANSWER_TOKENS = 64  # of an answer that a model writes in an evaluation


def main(argv: Sequence[str] | None = None) -> int:
    results = "<split>.json, <split>.jsonl and report.html"
    parser = Parser(prog="flowseg eval", description=f"Evaluates a model; <out> gets {results}.")
    add_model_flags(parser)
    parser.add_argument("--data", metavar="DIR", help="prepared data set; default: the shapes benchmark, made if missing")
    parser.add_argument("--split", default="val", help="one split or several, val,testA,testB; default val")
    parser.add_argument(
        "--benchmark", metavar="LIST", help="instead of --data and --split: refcoco/val,refcoco/testA,... in <data-root>"
    )
    where = "where the prepared data sets of --benchmark lie, default data"
    parser.add_argument("--data-root", metavar="DIR", default="data", help=where)
    parser.add_argument("--out", metavar="DIR", help="default: <workdir>/eval, or runs/eval/<name of the checkpoint>")
    parser.add_argument("--protocol", help="xsam (default), lisa, psalm, grefcoco, grefcoco-target-only: docs/protocols.md")
    parser.add_argument("--max-images", metavar="N", type=positive, help="only the first N images of each split")
    parser.add_argument("--batch-size", metavar="N", type=positive, default=8, help="images at a time, default 8")
    parser.add_argument("--shuffle-text", action="store_true", help="control: every image gets another image's sentences")
    parser.add_argument(
        "--save-masks", action="store_true", help="add the selected and the best mask to <split>.jsonl, as COCO RLE"
    )
    parser.add_argument(
        "--no-target-threshold",
        type=share,
        default=0.0,
        metavar="SCORE",
        help='a selected score below it means "no target", default 0.0: none does',
    )
    parser.add_argument("--generate", action="store_true", help="the model writes its answers itself; one without <SEG> fails")
    parser.add_argument("--fsdp", type=positive, default=1, metavar="N", help="N devices share one copy, default 1")
    add_quantize_flag(parser)
    add_process_flags(parser)
    arguments = parser.parse_args(argv)
    from flowseg_jax.system import host

    host.use_host_devices(arguments.batch_size)
    host.enable_compilation_cache()
    with process_group(arguments):
        return _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from flowseg_jax import experiment
    from flowseg_jax.checkpoints.find import find_model, model_name
    from flowseg_jax.checkpoints.pretrained import read_model_config
    from flowseg_jax.data.dataset import PreparedDataset
    from flowseg_jax.evaluation import benchmark, protocols, summary
    from flowseg_jax.system import distributed
    from flowseg_jax.system.console import log
    from flowseg_jax.training import loop

    protocol = arguments.protocol or "xsam"
    protocols.get_protocol(protocol)
    directory = find_model(arguments.checkpoint, arguments.workdir)
    out = _results_directory(arguments, model_name(directory))
    read_model_config(directory)  # a mistyped name is an error at once, not after the benchmark is made
    if arguments.benchmark:
        if arguments.data:
            raise UserError("--benchmark and --data both name data sets: give one of them")
        chosen = benchmark.parse_benchmarks(arguments.benchmark, Path(arguments.data_root))
    else:
        data = arguments.data or loop.load_dataset(experiment.load([])[0]).directory
        chosen = [("", PreparedDataset.open(data), split) for split in arguments.split.split(",")]
    for _, prepared, split in chosen:
        prepared.check_split(split)
        if prepared.task == "generic":
            _check_generic(prepared.directory, arguments)

    expressions = any(prepared.task != "generic" for _, prepared, _ in chosen)

    @functools.cache
    def model() -> benchmark.EvalModel:
        tokens = ANSWER_TOKENS if arguments.generate else 0
        return benchmark.EvalModel.load(
            directory,
            fsdp=arguments.fsdp,
            answer_tokens=tokens,
            expressions=expressions,
            quantize=arguments.quantize,
        )

    options = {"images": arguments.max_images, "save_masks": arguments.save_masks}
    splits = []
    with distributed.locked(out):
        for place, prepared, split in chosen:
            if prepared.task == "generic":
                evaluation = benchmark.GenericEvaluation(model(), prepared, arguments.batch_size)
                found = evaluation.run(split, out / place, **options)
            else:
                evaluation = benchmark.ReferringEvaluation(
                    model(), prepared, arguments.batch_size, protocol, arguments.no_target_threshold
                )
                found = evaluation.run(split, out / place, shuffle_text=arguments.shuffle_text, **options)
            data = place or str(prepared.directory)
            splits.append(summary.EvaluatedSplit(data, split, found.result, out / place))
        log("\n" + summary.table(splits))
        log(f"results: {out}")
        if distributed.is_primary():
            run = Path(arguments.workdir) if arguments.workdir and not paths.is_remote(arguments.workdir) else None
            about = [f"Model: {model_name(directory)}."]
            if written := summary.write_report(out / "report.html", model_name(directory), splits, about, run):
                log(f"open {written}")
    return 0


def _check_generic(directory: Path, arguments: argparse.Namespace) -> None:
    """Raises a UserError for flags that say nothing about a data set without expressions."""
    given = {
        "--protocol": arguments.protocol,
        "--shuffle-text": arguments.shuffle_text,
        "--no-target-threshold": arguments.no_target_threshold,
        "--generate": arguments.generate,
    }
    if wrong := [flag for flag, value in given.items() if value]:
        raise UserError(
            f"{directory}: has categories and no expressions: its protocols are panoptic, semantic and instance; "
            f"leave out {', '.join(wrong)}"
        )


def _results_directory(arguments: argparse.Namespace, name: str) -> Path:
    """Where an evaluation's results go: `--out`, or beside the run, or under `runs/` by the model's name."""
    kind = f"-{arguments.quantize}" if arguments.quantize else ""
    if arguments.out:
        return Path(arguments.out)
    if arguments.workdir and paths.is_remote(arguments.workdir):
        raise UserError(f"results are written to a local directory: name one with --out beside --workdir={arguments.workdir}")
    if arguments.workdir:
        return Path(arguments.workdir) / f"eval{kind}"
    return Path("runs") / "eval" / f"{name}{kind}"

"""The commands behind train.py, eval.py and predict.py: flags -> config -> one call into the package."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from etils import epath
from ml_collections import ConfigDict

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints import storage
from flowseg_jax.errors import UserError
from flowseg_jax.system import host

if TYPE_CHECKING:
    from flowseg_jax.inference.inputs import PredictionJob

ROOT = Path(__file__).resolve().parent.parent
ANSWER_TOKENS = 64  # of an answer that a model writes in an evaluation
SHIPPED = ROOT / "checkpoints" / "shapes_tiny"  # the trained tiny model that comes with the repository


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UserError`s."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def share(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def use_host_devices(batch: int) -> None:
    """Without an accelerator, splits the batch over the CPU's cores: one host device a core, as many as divide the batch."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX runs already: whoever started it has chosen
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if batch % n == 0))


def train(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="train.py", description="Trains FlowSeg; the same command resumes.")
    parser.add_argument(
        "--config", metavar="FILE", help="experiment, default configs/shapes_tiny.py; --config.KEY=VALUE overrides"
    )
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives, default runs/<name of the config>; may be gs://")
    parser.add_argument("--profile", metavar="START:STEPS", help="trace STEPS steps behind step START into <workdir>/profile")
    add_process_flags(parser)
    add_plan_flags(parser)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    config, rest = configs.load(argv)
    arguments = parser.parse_args(rest)
    if arguments.plan:
        return plan(config, arguments)
    if arguments.topology or arguments.effort or arguments.json or arguments.parts:
        raise UserError("--topology, --effort, --parts and --json belong to --plan: add it, or leave them out to train")
    chosen = next(
        (a.partition("=")[2] or b for a, b in zip(argv, [*argv[1:], ""], strict=True) if a.split("=")[0] == "--config"), None
    )
    use_host_devices(config.batch_size // max(1, config.model.negatives_group * config.optimizer.accumulate))
    host.enable_compilation_cache()
    with joined_processes(arguments):
        from flowseg_jax.training.loop import train as run
        from flowseg_jax.training.profiling import Profile

        profile = None if arguments.profile is None else Profile.parse(arguments.profile)
        run(config, arguments.workdir or Path("runs") / Path((chosen or "configs/shapes_tiny.py").split(":")[0]).stem, profile)
    return 0


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--distributed", action="store_true", help="one of several processes (TPU pod, GKE, SLURM, Open MPI)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 listens, the same for all")
    parser.add_argument("--processes", metavar="N", type=int, help="how many there are")
    parser.add_argument("--process", metavar="I", type=int, help="which this one is, from 0")


@contextlib.contextmanager
def joined_processes(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the processes that the flags name; all but the first fall silent."""
    explicit = (arguments.coordinator, arguments.processes, arguments.process)
    if not arguments.distributed and explicit == (None, None, None):
        yield
        return
    from flowseg_jax.system import console, distributed

    with distributed.joined(*explicit):
        if not distributed.is_primary():
            console.mute_console()
        yield


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", action="store_true", help="compile the step for a topology and report; nothing runs")
    parser.add_argument("--topology", metavar="NAME", help="with --plan: v5e:4x4, v5p:2x2x2, v6e:4x4, h100:8; default cpu:1")
    parser.add_argument("--effort", metavar="LEVEL", help="with --plan: how hard XLA optimises, O0 to O3, default; O0")
    parser.add_argument("--parts", action="store_true", help="with --plan: compile each part by itself instead of the step")
    parser.add_argument("--json", action="store_true", help="with --plan: the last line is one JSON object")


def plan(config: ConfigDict, arguments: argparse.Namespace) -> int:
    """Prints what a run would need; 1 if it does not fit."""
    from flowseg_jax.aot.plan import plan as make
    from flowseg_jax.system.console import log

    topology, effort = arguments.topology or "cpu:1", arguments.effort or "O0"
    if arguments.parts:
        from flowseg_jax.aot import components

        reports = components.parts(config, topology, effort=effort)
        log(components.table(reports))
        if arguments.json:
            log(json.dumps([dataclasses.asdict(report) for report in reports]))
        return int(any(report.refusal is not None for report in reports))
    report = make(config, topology, effort=effort)
    log(report.text())
    if arguments.json:
        log(json.dumps(report.to_json()))
    return 0 if report.fits else 1


def model_directory(arguments: argparse.Namespace) -> epath.Path | Path:
    """The model that `--checkpoint` or `--workdir` names, local or remote, else the shipped one."""
    if arguments.checkpoint and arguments.workdir:
        raise UserError("--checkpoint and --workdir both name a model: give one of them")
    if arguments.checkpoint:
        return storage.resolve_path(arguments.checkpoint)
    if arguments.workdir:
        directory = storage.resolve_path(arguments.workdir) / "model"
        if not directory.is_dir():
            raise UserError(f"{arguments.workdir} holds no trained model yet: finish its training with the train.py command")
        return directory
    return SHIPPED


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="model directory; default: the shipped tiny model")
    parser.add_argument("--workdir", metavar="DIR", help="a training run, whose trained model is used")


def evaluate(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="eval.py", description="Evaluates a model; results go to <out>/<split>.json and <split>.jsonl.")
    add_model_flags(parser)
    parser.add_argument("--data", metavar="DIR", help="prepared data set; default: the shapes benchmark, made if missing")
    parser.add_argument("--split", default="val", help="one split or several: val,testA,testB")
    parser.add_argument(
        "--benchmark", metavar="LIST", help="instead of --data and --split: refcoco/val,refcoco/testA,... in <data-root>"
    )
    parser.add_argument("--data-root", metavar="DIR", default="data", help="where the prepared data sets of --benchmark lie")
    parser.add_argument("--out", metavar="DIR", help="default: <workdir>/eval, or runs/eval/<name of the checkpoint>")
    parser.add_argument("--protocol", help="xsam (default), lisa, psalm, grefcoco, grefcoco-target-only: docs/protocols.md")
    parser.add_argument("--images", type=positive, help="only the first images of each split")
    parser.add_argument("--batch-size", type=positive, default=8, help="images at a time")
    parser.add_argument("--shuffle-text", action="store_true", help="control: every image is asked another image's sentences")
    parser.add_argument(
        "--save-masks", action="store_true", help="add the selected and the best mask to <split>.jsonl, as COCO RLE"
    )
    parser.add_argument(
        "--no-target-below", type=share, default=0.0, metavar="SCORE", help='a selected score below it means "no target"'
    )
    parser.add_argument("--generate", action="store_true", help="the model writes its answers itself; one without <SEG> fails")
    parser.add_argument("--fsdp", type=positive, default=1, metavar="N", help="N devices share one copy of the parameters")
    add_process_flags(parser)
    arguments = parser.parse_args(argv)
    use_host_devices(arguments.batch_size)
    host.enable_compilation_cache()
    with joined_processes(arguments):
        return evaluate_splits(arguments)


def evaluate_splits(arguments: argparse.Namespace) -> int:
    """`evaluate` behind its flags."""
    from flowseg_jax.checkpoints.pretrained import read_model_config
    from flowseg_jax.data.dataset import PreparedDataset
    from flowseg_jax.evaluation import benchmark, generic, protocols
    from flowseg_jax.system import distributed
    from flowseg_jax.training import loop

    protocol = arguments.protocol or "xsam"
    protocols.get_protocol(protocol)
    directory = model_directory(arguments)
    out = results_directory(arguments, model_name(directory))
    read_model_config(directory)  # a mistyped name is told at once, not after the benchmark is made
    if arguments.benchmark:
        if arguments.data:
            raise UserError("--benchmark and --data both name data sets: give one of them")
        chosen = benchmark.parse_benchmarks(arguments.benchmark, Path(arguments.data_root))
    else:
        data = arguments.data or loop.load_dataset(configs.load([])[0]).directory
        chosen = [("", PreparedDataset.open(data), split) for split in arguments.split.split(",")]
    for _, prepared, split in chosen:
        prepared.check_split(split)
        if prepared.task == "generic":
            check_generic(prepared.directory, arguments)

    @functools.cache
    def subject() -> benchmark.EvalModel:
        tokens = ANSWER_TOKENS if arguments.generate else 0
        return benchmark.EvalModel.load(directory, fsdp=arguments.fsdp, answer_tokens=tokens)

    @functools.cache
    def asks_for_categories(data: Path) -> generic.GenericEvaluation:
        return generic.GenericEvaluation.of_model(directory, data, batch=arguments.batch_size)

    with distributed.locked(out):
        for place, prepared, split in chosen:
            if prepared.task == "generic":
                asked = asks_for_categories(prepared.directory)
                asked.run(split, out / place, images=arguments.images, save_masks=arguments.save_masks)
                continue
            asked = benchmark.ReferringEvaluation(
                subject(), prepared, arguments.batch_size, protocol, arguments.no_target_below
            )
            options = {"shuffle_text": arguments.shuffle_text, "images": arguments.images, "save_masks": arguments.save_masks}
            asked.run(split, out / place, **options)
    return 0


def check_generic(directory: Path, arguments: argparse.Namespace) -> None:
    """Raises a UserError for flags that say nothing about a data set without expressions."""
    given = {
        "--protocol": arguments.protocol,
        "--shuffle-text": arguments.shuffle_text,
        "--no-target-below": arguments.no_target_below,
        "--generate": arguments.generate,
        "--fsdp": arguments.fsdp != 1,
        "--processes": arguments.processes or arguments.distributed,
    }
    if wrong := [flag for flag, value in given.items() if value]:
        raise UserError(
            f"{directory}: has categories and no expressions: its protocols are panoptic, semantic and instance, on one "
            f"process; leave out {', '.join(wrong)}"
        )


def results_directory(arguments: argparse.Namespace, name: str) -> Path:
    """Where an evaluation's results go: `--out`, or beside the run, or under `runs/` by the model's name."""
    if arguments.out:
        return Path(arguments.out)
    if arguments.workdir and storage.is_remote(arguments.workdir):
        raise UserError(f"results are written to a local directory: name one with --out beside --workdir={arguments.workdir}")
    if arguments.workdir:
        return Path(arguments.workdir) / "eval"
    return Path("runs") / "eval" / name


def model_name(directory: Path) -> str:
    """What a model directory is called: that of a run, RUN/model, by its run."""
    return directory.parent.name if directory.name == "model" else directory.name


def predict(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="predict.py", description="Segments what sentences name, in an image, a folder of them or a JSONL.")
    add_model_flags(parser)
    parser.add_argument("--image", metavar="FILE|DIR", help="an image, or a folder of them")
    parser.add_argument("--input", metavar="JSONL", help='instead: lines {"image": path, "text": one or a list}')
    parser.add_argument("--text", action="append", metavar="TEXT", help="what to segment; may be repeated")
    parser.add_argument(
        "--generate", action="store_true", help="the model writes its answers, with any number of masks, itself"
    )
    parser.add_argument(
        "--chat", action="append", metavar="QUESTION", help="instead of --text: a free question; may be repeated"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="with --generate or --chat: length of an answer, default 128"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="candidates in the JSON, default 5")
    parser.add_argument("--all-above", type=float, metavar="SCORE", help="instead: all with this score, their union the answer")
    parser.add_argument(
        "--no-target-below", type=float, metavar="SCORE", help="best scores below mean that there is no such thing"
    )
    parser.add_argument("--save", default="overlay,rle", metavar="KINDS", help="of overlay,rle,png; default overlay,rle")
    parser.add_argument("--out", metavar="DIR", default="runs/predictions")
    arguments = parser.parse_args(argv)
    host.enable_compilation_cache()
    from flowseg_jax.checkpoints.pretrained import read_model_config
    from flowseg_jax.inference import batch as run
    from flowseg_jax.inference import outputs
    from flowseg_jax.inference import segmentor as prediction
    from flowseg_jax.system.console import heartbeat, log

    directory = model_directory(arguments)
    read_model_config(directory)  # mistakes are told at once, not after loading
    jobs = prediction_jobs(arguments)
    if arguments.top_k is not None and arguments.all_above is not None:
        raise UserError("--top-k and --all-above both say which candidates are kept: give one of them")
    options = {key: getattr(arguments, key) for key in ("top_k", "all_above", "no_target_below")}
    options = {key: value for key, value in options.items() if value is not None}
    prediction.SelectionConfig(**options)
    writes = arguments.generate or bool(arguments.chat)
    if arguments.max_tokens is not None:
        if not writes:
            raise UserError("--max-tokens belongs to --generate and --chat: add one of them, or leave it out")
        options["max_new_tokens"] = arguments.max_tokens
    many = bool(arguments.input) or Path(arguments.image).is_dir()
    writer = outputs.PredictionWriter(arguments.out, outputs.kinds(arguments.save), table=many)
    with writer:
        with heartbeat("loading"):
            segmentor = prediction.load(directory)
        method = segmentor.chat if arguments.chat else segmentor.generate if writes else segmentor.predict
        respond = functools.partial(method, **options)
        done = run.run(segmentor, jobs, respond, writer, strict=not many)
    log("\n".join(map(str, done.paths)) if not many else f"{Path(arguments.out) / outputs.TABLE}")
    if done.last and not writes:
        log(run.latency(segmentor, *done.last, respond))
    return 1 if done.failed else 0


def prediction_jobs(arguments: argparse.Namespace) -> list[PredictionJob]:
    """What `--image` or `--input` and `--text` or `--chat` ask for."""
    from flowseg_jax.inference import inputs

    texts = arguments.chat or arguments.text
    if bool(arguments.image) == bool(arguments.input):
        raise UserError("give --image=FILE, --image=DIR or --input=FILE.jsonl, one of them")
    if arguments.chat and (arguments.text or arguments.generate):
        raise UserError("--chat asks free questions, --text and --generate segment: give one of them")
    if arguments.input:
        if texts:
            raise UserError("--input has its own texts: leave --text and --chat out")
        return inputs.jobs_from_jsonl(arguments.input)
    if not texts:
        raise UserError('--text is missing: say what to segment, as in --text="the red circle"')
    return inputs.jobs_from_images(arguments.image, texts, "--chat" if arguments.chat else "--text")

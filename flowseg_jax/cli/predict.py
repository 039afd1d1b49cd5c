"""`flowseg predict`: segments what sentences name, in an image, a folder of them or a JSONL; many images in batches."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowseg_jax.cli.parser import Parser, add_model_flags, add_process_flags, add_quantize_flag, positive, process_group
from flowseg_jax.errors import UserError
from flowseg_jax.system.paths import is_remote

if TYPE_CHECKING:
    from flowseg_jax.inference.inputs import PredictionJob

BATCH_SIZE = 8
SAVED = "overlay,rle,png,answers,candidates"
BATCH_FLAGS = ("--batch-size", "--format", "--shard-size", "--fsdp")
OTHER_FLAGS = ("--image", "--input", "--generate", "--chat", "--max-tokens", "--save")
BATCH_FLAGS += ("--distributed", "--coordinator", "--num-processes", "--process-id")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="flowseg predict", description="Segments what sentences name, in an image, a folder of them or a JSONL."
    )
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
    parser.add_argument(
        "--score-threshold", type=float, metavar="SCORE", help="instead: all with this score, their union the answer"
    )
    parser.add_argument(
        "--no-target-threshold", type=float, metavar="SCORE", help="best scores below mean that there is no such thing"
    )
    parser.add_argument(
        "--save", metavar="KINDS", help=f"of {SAVED}; default of one image: all but png, of several: overlay,rle"
    )
    parser.add_argument("--out", metavar="DIR", default="runs/predictions", help="default runs/predictions")
    parser.add_argument("--recursive", action="store_true", help="enter the folders inside of a folder")
    add_quantize_flag(parser)
    batches = parser.add_argument_group(
        "many images", "In batches on all devices, into shards of results; goes on after a kill."
    )
    batches.add_argument("--images", metavar="DIR|JSONL|gs://...", help="instead of --image and --input")
    batches.add_argument("--batch-size", type=positive, metavar="N", help="images at a time, default 8")
    batches.add_argument("--format", metavar="NAME", help="jsonl (default) or parquet (extra parquet)")
    batches.add_argument("--shard-size", type=positive, metavar="N", help="images a file of results, default 1000")
    batches.add_argument("--fsdp", type=positive, metavar="N", help="N devices of a process share one copy of the parameters")
    add_process_flags(batches)
    arguments = parser.parse_args(argv)
    from flowseg_jax.system import host

    if arguments.images:
        _check_batch(arguments)
        host.use_host_devices(arguments.batch_size or BATCH_SIZE)
    host.enable_compilation_cache()
    if arguments.images:
        with process_group(arguments):
            return _predict_batches(arguments)
    if extra := _given(arguments, BATCH_FLAGS):
        raise UserError(f"{extra} belongs to --images, which answers many images in batches: add it, or leave {extra} out")
    from flowseg_jax.checkpoints.find import find_model
    from flowseg_jax.checkpoints.pretrained import read_model_config
    from flowseg_jax.inference import loading, one_by_one, outputs, segmentor
    from flowseg_jax.system.console import heartbeat, log

    directory = find_model(arguments.checkpoint, arguments.workdir)
    read_model_config(directory)  # mistakes are told at once, not after loading
    jobs = _jobs(arguments)
    options = _options(arguments)
    segmentor.SelectionConfig(**options)
    writes = arguments.generate or bool(arguments.chat)
    if arguments.max_tokens is not None:
        if not writes:
            raise UserError("--max-tokens belongs to --generate and --chat: add one of them, or leave it out")
        options["max_new_tokens"] = arguments.max_tokens
    many = bool(arguments.input) or Path(arguments.image).is_dir()
    writer = outputs.PredictionWriter(
        arguments.out, outputs.kinds(arguments.save or (outputs.SEVERAL if many else outputs.ONE_IMAGE)), table=many
    )
    with writer:
        with heartbeat("loading"):
            model = loading.load(directory, quantize=arguments.quantize)
        method = model.chat if arguments.chat else model.generate if writes else model.predict
        respond = functools.partial(method, **options)
        done = one_by_one.run(model, jobs, respond, writer, strict=not many)
    if many:
        log(f"{Path(arguments.out) / outputs.TABLE}")
    if done.last and not writes:
        log(one_by_one.latency(model, *done.last, respond))
    return 1 if done.failed else 0


def _given(arguments: argparse.Namespace, flags: Sequence[str]) -> str:
    """The first of these flags that is given, or ""."""
    values = {flag: getattr(arguments, flag[2:].replace("-", "_")) for flag in flags}
    return next((flag for flag, value in values.items() if value is not None and value is not False), "")  # 0 is given


def _check_batch(arguments: argparse.Namespace) -> None:
    """Raises a UserError for flags that say nothing beside `--images`."""
    if wrong := _given(arguments, OTHER_FLAGS):
        raise UserError(f"--images writes masks as run-length codes and asks what --text says: leave {wrong} out")
    if is_remote(arguments.out):
        raise UserError(f"--out={arguments.out}: results grow image by image; name a folder, one that all processes see")


def _predict_batches(arguments: argparse.Namespace) -> int:
    import jax

    from flowseg_jax.checkpoints.find import find_model
    from flowseg_jax.checkpoints.model_card import ModelCard
    from flowseg_jax.checkpoints.pretrained import read_model_config
    from flowseg_jax.data.prompts import check_expressions
    from flowseg_jax.evaluation.benchmark import EvalModel
    from flowseg_jax.inference import batch, image_list

    directory = find_model(arguments.checkpoint, arguments.workdir)
    extra = read_model_config(directory)["extra"]  # mistakes are told at once, not after loading
    selection = batch.selection(extra, directory, **_options(arguments))
    listed = image_list.open_list(arguments.images, arguments.text or (), recursive=arguments.recursive)
    model = EvalModel.load(directory, fsdp=arguments.fsdp or 1, devices=jax.local_devices(), quantize=arguments.quantize)
    if arguments.text:
        check_expressions(arguments.text, model.tokenizer, "--text")
    card = ModelCard.of_model(extra, directory)
    card.tell(directory)
    predictor = batch.BatchPredictor(model, selection, card, arguments.batch_size or BATCH_SIZE)
    done = predictor.run(listed, arguments.out, kind=arguments.format or "jsonl", shard_size=arguments.shard_size)
    return 1 if done.failed else 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SelectionConfig` that are given."""
    if arguments.top_k is not None and arguments.score_threshold is not None:
        raise UserError("--top-k and --score-threshold both say which candidates are kept: give one of them")
    options = {key: getattr(arguments, key) for key in ("top_k", "score_threshold", "no_target_threshold")}
    return {key: value for key, value in options.items() if value is not None}


def _jobs(arguments: argparse.Namespace) -> list[PredictionJob]:
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
    where = "--chat" if arguments.chat else "--text"
    return inputs.jobs_from_images(arguments.image, texts, where, recursive=arguments.recursive)

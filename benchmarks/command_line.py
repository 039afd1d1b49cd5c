"""The flags of the programs in this folder. A program is imported once its flags are known, so `--help` needs no JAX."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from flowseg_jax.cli.parser import Parser, positive


def add_ratio_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that prints one ratio."""
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each candidate; more while the machine is busy")
    parser.add_argument("--gate", action="store_true", help="exit 3 when the machine was too busy for a verdict (quality C)")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="the result as JSON; without FILE as the last line of stdout"
    )


def components_parser() -> Parser:
    parser = _parser("python -m benchmarks", "__main__")
    parser.add_argument("components", nargs="*", metavar="component", help="default: all; see --list")
    parser.add_argument("--list", action="store_true", help="the components, their bars and aims")
    parser.add_argument("--peer", choices=("torch", "torch-eager"), default="torch", help="torch tries torch.compile too")
    parser.add_argument("--dtype", default="float32", metavar="D[,D]", help="float32, bfloat16 or both")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="which seconds count; CPU's on a busy machine")
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each side; more while the machine is busy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results, written after each component")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fails where a ratio is clearly above the committed one")
    what.add_argument("--write-docs", action="store_true", help="replaces the committed ratios by these")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny tries the harness itself out")
    return parser


def startup_parser() -> Parser:
    parser = _parser("python -m benchmarks startup", "startup")
    parser.add_argument("size", nargs="?", choices=("tiny", "full"), help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes everything that was measured")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    return parser


def train_step_parser() -> Parser:
    parser = _parser("python -m benchmarks.train_step", "train_step")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against", metavar="REVISION", help="beside the step of this commit")
    what.add_argument("--overhead", choices=("accumulate", "checkpoint"), help="what it costs")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of --against: which seconds count")
    parser.add_argument("--parts", type=positive, default=4, help="of --overhead=accumulate")
    parser.add_argument("--steps", type=positive, default=20, help="of --overhead=checkpoint, in all")
    parser.add_argument("--every", type=positive, default=10, help="of --overhead=checkpoint, steps a checkpoint")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the first step's loss and gradient norm, relative")
    add_ratio_flags(parser)
    return parser


def input_parser() -> Parser:
    parser = _parser("python -m benchmarks.input", "input")
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes everything that was measured")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    return parser


def batch_prediction_parser() -> Parser:
    parser = _parser("python -m benchmarks.batch_prediction", "batch_prediction")
    parser.add_argument("--images", type=positive, default=256, metavar="N", help="default 256")
    parser.add_argument("--texts", type=positive, default=1, metavar="N", help="expressions an image, at most 3; default 1")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--turns", type=positive, default=3, metavar="N", help="of each side, default 3")
    parser.add_argument("--longest", type=positive, default=6, metavar="N", help="lists of up to 10^N lines, default 6")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    return parser


def quantization_parser() -> Parser:
    parser = _parser("python -m benchmarks.quantization", "quantization")
    parser.add_argument("--checkpoint", metavar="DIR", help="model directory; default: the shipped tiny model")
    parser.add_argument("--turns", type=positive, default=5, metavar="N", help="of each model, default 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    return parser


def growth_parser() -> Parser:
    parser = _parser("python -m benchmarks.growth", "growth")
    parser.add_argument(
        "--largest", type=int, choices=range(4, 9), default=7, metavar="N", help="sets of up to 10^N images, default 7"
    )
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="folder for the sets: 3 GB; default: the system's temporary one"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=Path(__file__).with_name("growth.json"),
        help="default: benchmarks/growth.json",
    )
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    return parser


def checkpoint_growth_parser() -> Parser:
    parser = _parser("python -m benchmarks.checkpoint_growth", "checkpoint_growth")
    parser.add_argument("--mib", type=positive, default=256, metavar="N", help="MiB of the state, default 256")
    parser.add_argument("--hosts", type=positive, nargs="+", default=[1, 2, 4], metavar="N", help="default: 1 2 4")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=Path(__file__).with_name("checkpoint_growth.json"),
        help="default: benchmarks/checkpoint_growth.json",
    )
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    return parser


def fine_tuning_parser() -> Parser:
    parser = _parser("python -m benchmarks.fine_tuning", "fine_tuning")
    parser.add_argument("models", nargs="*", metavar="model", help="language models; default: those of docs/finetune.md")
    return parser


def on_device_parser() -> Parser:
    parser = _parser("python -m benchmarks.on_device", "on_device")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="steps that are timed, default 20")
    parser.add_argument("--checkpoint", metavar="DIR", help="model whose answers are timed; default: the shipped tiny one")
    parser.add_argument("--turns", type=positive, default=20, metavar="N", help="answers that are timed, default 20")
    parser.add_argument("--out", type=Path, default=Path("runs/on_device"), metavar="DIR", help="default runs/on_device")
    return parser


def measure_parser() -> Parser:
    parser = _parser("python -m benchmarks.measure", "measure")
    parser.add_argument("component")
    parser.add_argument("dtype", nargs="?", default="float32")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--eager", action="store_true", help="does not try torch.compile")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: stdout")
    return parser


def _parser(prog: str, module: str) -> Parser:
    """A parser whose help begins as the module's file does."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(source))
    return Parser(prog=prog, description=about, formatter_class=argparse.RawTextHelpFormatter)


def _run(parser: Callable[[], Parser], module: str) -> int:
    """Shows the help, or imports the program and runs it."""
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        parser().parse_args(["--help"])
    return importlib.import_module(f"benchmarks.{module}").main(argv)


def components() -> int:
    startup_is_meant = sys.argv[1:2] == ["startup"]
    return _run(startup_parser if startup_is_meant else components_parser, "__main__")


startup = functools.partial(_run, startup_parser, "startup")
train_step = functools.partial(_run, train_step_parser, "train_step")
input_pipeline = functools.partial(_run, input_parser, "input")
batch_prediction = functools.partial(_run, batch_prediction_parser, "batch_prediction")
quantization = functools.partial(_run, quantization_parser, "quantization")
growth = functools.partial(_run, growth_parser, "growth")
checkpoint_growth = functools.partial(_run, checkpoint_growth_parser, "checkpoint_growth")
fine_tuning = functools.partial(_run, fine_tuning_parser, "fine_tuning")
measure = functools.partial(_run, measure_parser, "measure")
on_device = functools.partial(_run, on_device_parser, "on_device")

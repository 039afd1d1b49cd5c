"""What the commands share: a parser whose mistakes are `UserError`s, groups of commands, types of flags, common flags."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowseg_jax.errors import UserError, did_you_mean

# Flags as they were called -> as they are called. A command that uses an old name otherwise simply has that flag.
RENAMED_FLAGS = {
    "--all-above": "--score-threshold",
    "--no-target-below": "--no-target-threshold",
    "--processes": "--num-processes",
    "--process": "--process-id",
    "--effort": "--xla-opt-level",
    "--parts": "--by-component",
    "--images": "--max-images",
}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UserError`s, with the nearest name of a mistyped flag and the new name of an old one.

    Flags are written out: `--work=DIR` is not `--workdir=DIR`.

    Args:
        renamed: old flag -> new flag, beside those of `RENAMED_FLAGS`.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **options: Any):
        super().__init__(*args, allow_abbrev=False, **options)
        self._renamed = RENAMED_FLAGS | dict(renamed or {})

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        for argument in args or ():
            if argument == "--":
                break
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                self._refuse(flag)
        return super().parse_known_args(args, namespace)

    def _refuse(self, flag: str) -> None:
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        new = self._renamed.get(flag)
        self.error(f"{flag} is called {new}" if new in flags else f"there is no flag {flag}{did_you_mean(flag, flags)}")


@dataclasses.dataclass(frozen=True)
class Command:
    """One of a group of commands.

    Attributes:
        function: "package.module:function", imported when the command runs; called with the arguments that follow its name.
        help: one line about it.
    """

    function: str
    help: str

    def run(self, argv: Sequence[str]) -> int:
        module, _, function = self.function.partition(":")
        return getattr(importlib.import_module(module), function)(argv)


def run_command(
    prog: str, about: str, commands: Mapping[str, Command], argv: Sequence[str], renamed: Mapping[str, str] | None = None
) -> int:
    """Runs the command that the first argument names; returns its exit code.

    Args:
        prog: how the group is called, `flowseg data`.
        about: one line about the group, for its help.
        commands: name -> command.
        argv: the command's name and its arguments; `--help` prints the list of commands.
        renamed: old name -> new name of commands.

    Raises:
        UserError: no command, or an unknown one.
    """
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        lines = [f"  {one:{width}}  {command.help}" for one, command in commands.items()]
        print(f"usage: {prog} COMMAND ...\n\n{about}\n\ncommands:\n" + "\n".join(lines))
        print(f"\n`{prog} COMMAND --help` lists the flags of one.")
        return 0
    if not name:
        raise UserError(f"{prog}: which command? {', '.join(commands)}; see {prog} --help")
    if name not in commands:
        new = (renamed or {}).get(name)
        raise UserError(
            f"{prog} {name} is called {prog} {new}" if new else f"{prog}: no command {name!r}{did_you_mean(name, commands)}"
        )
    return commands[name].run(rest)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def without_flag(argv: Sequence[str], flag: str) -> list[str]:
    """The arguments without a flag and its value, `--flag=VALUE` or `--flag VALUE`."""
    before = ["", *argv[:-1]]
    return [one for one, last in zip(argv, before, strict=True) if flag not in (one, last, one.partition("=")[0])]


def share(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def mesh_sizes(text: str) -> dict[str, int]:
    """An argparse type: axes of a mesh and their sizes, `fsdp=8,tensor=2`."""
    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if bad := [f"{axis}={size}" for axis, size in sizes.items() if not (size.isdecimal() and int(size))]:
        raise argparse.ArgumentTypeError(f"axes of a mesh and their sizes are written as fsdp=8,tensor=2; got {bad[0]!r}")
    return {axis: int(size) for axis, size in sizes.items()}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint` and `--workdir`, which `checkpoints.find.find_model` reads."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="model directory, or RUN@STEP, RUN@best, RUN@latest; default: the shipped tiny model",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="a training run: its trained model, or its newest checkpoint while it trains"
    )


def add_quantize_flag(parser: argparse.ArgumentParser) -> None:
    """`--quantize`, which loading a model for inference takes."""
    parser.add_argument(
        "--quantize",
        choices=("int8", "bfloat16"),
        help="int8 rounds the matrices of the language model's and SAM's layers, bfloat16 all matrices: docs/prediction.md",
    )


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """What `process_group` reads."""
    parser.add_argument("--distributed", action="store_true", help="one of several processes (TPU pod, GKE, SLURM, Open MPI)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 listens, the same for all")
    parser.add_argument("--num-processes", metavar="N", type=int, help="how many there are")
    parser.add_argument("--process-id", metavar="I", type=int, help="which this one is, from 0")


def process_group(arguments: argparse.Namespace) -> Any:
    """The context that joins the processes which the flags of `add_process_flags` name."""
    from flowseg_jax.system import distributed

    explicit = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    return distributed.joined_if(arguments.distributed or explicit != (None, None, None), *explicit)

"""`flowseg train`: trains a model; the same command resumes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flowseg_jax.cli.parser import Parser, add_process_flags, positive, process_group, without_flag

DEFAULT_CONFIG = "shapes_tiny"
RESTART = "--restart-on-failure"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--plan" in argv:
        from flowseg_jax.cli import plan

        return plan.main([argument for argument in argv if argument != "--plan"])
    parser = Parser(prog="flowseg train", description="Trains FlowSeg; the same command resumes.")
    add_config_flag(parser)
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives, default runs/<name of the config>; may be gs://")
    parser.add_argument("--profile", metavar="START:STEPS", help="trace STEPS steps after step START into <workdir>/profile")
    parser.add_argument("--plan", action="store_true", help="do not train: the same as `flowseg plan` with the other flags")
    parser.add_argument("--print-config", action="store_true", help="do not train: print the whole config, as a .json")
    parser.add_argument("--list-keys", action="store_true", help="do not train: list every key with type, value and help")
    parser.add_argument(RESTART, metavar="N", type=positive, help="start a run that fails again, at most N times")
    add_process_flags(parser)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    from flowseg_jax.system.memory import keep_freed_memory

    keep_freed_memory()
    from flowseg_jax import experiment

    config, rest = experiment.load(argv)
    arguments = parser.parse_args(rest)
    if arguments.print_config or arguments.list_keys:
        from flowseg_jax.config_help import list_keys

        print(list_keys(config) if arguments.list_keys else experiment.to_json(config))
        return 0
    if arguments.restart_on_failure:
        from flowseg_jax.system.restarts import supervise

        return supervise(
            [sys.executable, *sys.orig_argv[1 : -len(argv)], *without_flag(argv, RESTART)], arguments.restart_on_failure
        )
    from flowseg_jax.system import host

    host.use_host_devices(config.batch_size // max(1, config.model.negatives_group_size * config.optimizer.grad_accum_steps))
    host.enable_compilation_cache()
    with process_group(arguments):
        from flowseg_jax.evaluation.validation import Validation
        from flowseg_jax.training.loop import train
        from flowseg_jax.training.profiling import Profile

        profile = None if arguments.profile is None else Profile.parse(arguments.profile)
        train(config, arguments.workdir or Path("runs") / config_name(argv), profile, Validation)
    return 0


def add_config_flag(parser: Parser) -> None:
    """`--config`, for the help; `experiment.load` reads it and takes it out of the arguments."""
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help=f"experiment, by name or by path, default {DEFAULT_CONFIG}; --config.KEY=VALUE overrides",
    )


def config_name(argv: Sequence[str]) -> str:
    """What a run is called: the name of its config, without folder, ending and argument."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)  # of no argument there is none
    chosen = [one.partition("=")[2] or following for one, following in pairs if one.partition("=")[0] == "--config"]
    return Path((chosen or [DEFAULT_CONFIG])[0].split(":")[0]).stem

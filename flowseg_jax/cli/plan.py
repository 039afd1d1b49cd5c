"""`flowseg plan`: what a training run would need, from its compiled step, without its hardware."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from flowseg_jax.cli.parser import Parser, mesh_sizes
from flowseg_jax.cli.train import add_config_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan; 1 if the run does not fit."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="flowseg plan", description="Compiles a training step for a topology and reports; nothing runs.")
    add_config_flag(parser)
    parser.add_argument(
        "--topology", metavar="NAME", default="cpu:1", help="v5e:4x4, v5p:2x2x2, h100:8, 2xv5e:4x4 (two slices); default cpu:1"
    )
    parser.add_argument("--xla-opt-level", metavar="LEVEL", default="O0", help="how hard XLA optimises: O0 to O3, default O0")
    parser.add_argument("--by-component", action="store_true", help="compile each component by itself instead of the step")
    parser.add_argument("--eval", action="store_true", help="what answering expressions costs instead: an image and a round")
    parser.add_argument(
        "--shardings", metavar="MESH", type=mesh_sizes, help="only print which parameter a mesh, fsdp=16, shards"
    )
    parser.add_argument("--state-only", action="store_true", help="compile nothing: only what parameters and moments take")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--workdir", metavar="DIR", help="not used: a training command is planned with the flags that it has")
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    from flowseg_jax import experiment

    config, rest = experiment.load(argv)
    arguments = parser.parse_args(rest)
    from flowseg_jax.system.console import log

    if arguments.shardings:
        from flowseg_jax.aot import shardings

        log(shardings.text(config, arguments.shardings))
        return 0
    if arguments.by_component:
        from flowseg_jax.aot import components

        reports = components.compile_components(config, arguments.topology, effort=arguments.xla_opt_level)
        log(components.table(reports))
        if arguments.json:
            log(json.dumps([dataclasses.asdict(report) for report in reports]))
        return int(any(report.refusal is not None for report in reports))
    if arguments.eval:
        from flowseg_jax.aot import eval_plan

        found = eval_plan.plan_eval(config, arguments.topology, effort=arguments.xla_opt_level)
        log(found.text())
        if arguments.json:
            log(json.dumps(found.to_json()))
        return 0 if found.fits else 1
    from flowseg_jax.aot import plan

    if arguments.state_only:
        log(plan.state_text(config, arguments.topology))
        return 0
    report = plan.plan(config, arguments.topology, effort=arguments.xla_opt_level)
    log(report.text())
    if arguments.json:
        log(json.dumps(report.to_json()))
    return 0 if report.fits else 1

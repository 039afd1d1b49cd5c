"""Our operations beside PyTorch's (and SciPy's), one component after the other.

    python -m benchmarks --list                        # what there is
    python -m benchmarks                               # everything
    python -m benchmarks msda siglip --dtype=float32,bfloat16
    python -m benchmarks --clock=cpu                   # CPU seconds of all threads: also on a busy machine
    python -m benchmarks --check                       # beside benchmarks/ratios.json
    python -m benchmarks --write-docs                  # into benchmarks/ratios.json and docs/performance.md
    python -m benchmarks startup                       # time to the first step; see benchmarks/startup.py

A component runs in a process of its own. Its outputs are compared first: without the same numbers there is no ratio. Then both
sides take turns, warmed up, and the median of those samples counts during which the machine was otherwise idle. Quality A is at
least three such samples of each side, B fewer, C none; a C has no verdict.

Exit code 0: measured. 1: --check found a component slower than committed. 2: a component has no ratio. 3: the machine was too
busy for a verdict.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:components")

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import components, ratio, table
from benchmarks.command_line import components_parser
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.system.console import heartbeat, log

REGRESSED, FAILED = 1, 2  # exit codes; the third is `ratio.TOO_BUSY`
# OpenMP's threads, PyTorch's, spin after their work and would take the cores from our next call.
PEACEFUL = {"GOMP_SPINCOUNT": "20000"}


def run_component(component: components.TimedComponent, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One component in its own process.

    Raises:
        UserError: it gave no result; with the last thing it said.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.measure",
            component.name,
            dtype,
            f"--size={arguments.size}",
            f"--out={out}",
        ]
        command += [
            f"--rounds={arguments.rounds}",
            f"--clock={arguments.clock}",
            *(["--eager"] if arguments.peer == "torch-eager" else []),
        ]
        done = subprocess.run(
            command, cwd=table.ROOT, env=PEACEFUL | dict(os.environ), stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode < 0:
            raise UserError(f"killed by signal {-done.returncode}; if it was 9, there was not enough memory")
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
            raise UserError(last.removeprefix("error: "))
        return json.loads(out.read_text(encoding="utf-8"))


def exit_code(failures: Iterable[str], verdicts: Iterable[str]) -> int:
    """Of the whole command: what is wrong comes before what is slow, and that before what is not known."""
    verdicts = set(verdicts)
    if set(failures):
        return FAILED
    return REGRESSED if table.REGRESSED in verdicts else ratio.TOO_BUSY if table.BUSY in verdicts else 0


def work_list(arguments: argparse.Namespace) -> list[tuple[components.TimedComponent, str]]:
    """(component, dtype) in the table's order.

    Raises:
        UserError: an unknown component or dtype, or none that is measured in the wanted dtypes.
    """
    known = (components.FLOAT32, components.BFLOAT16)
    dtypes = arguments.dtype.split(",")
    for dtype in dtypes:
        if dtype not in known:
            raise UserError(f"--dtype={arguments.dtype}: no dtype {dtype!r}{did_you_mean(dtype, known)}")
    chosen = components.choose(arguments.components)
    work = [(component, dtype) for component in chosen for dtype in dtypes if dtype in component.dtypes]
    if not work:
        raise UserError(f"none of {', '.join(c.name for c in chosen)} is measured in {arguments.dtype}; see --list")
    return work


def show_components() -> None:
    for component in components.COMPONENTS.values():
        wanted = ", ".join(f"{dtype} {table.bars(component, dtype)}" for dtype in component.bars) or "-"
        measured = f"{', '.join(component.dtypes)}; beside {component.peer}"
        log(f"{component.name:20} {component.text} ({measured}). Bar / aim: {wanted}")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["startup"]:
        from benchmarks import startup

        return startup.main(argv[1:])
    arguments = components_parser().parse_args(argv)
    if arguments.list:
        show_components()
        return 0
    work = work_list(arguments)
    if arguments.size == "tiny" and (arguments.check or arguments.write_docs):
        raise UserError("--size=tiny has no place in the committed table: leave out --check and --write-docs")
    if arguments.peer == "torch-eager" and (arguments.check or arguments.write_docs):
        raise UserError("the committed table holds the peer's faster mode: leave out --peer=torch-eager")
    committed = table.read() if arguments.check else {}
    results, failures, verdicts = [], {}, []
    log(table.HEAD)
    for component, dtype in work:
        try:
            with heartbeat(f"{component.name} {dtype}"):
                result = run_component(component, dtype, arguments)
        except UserError as error:
            failures[f"{component.name} {dtype}"] = str(error)
            log(f"{component.name:20} {dtype:8}  {error}")
        else:
            results.append(result)
            found = table.compared(result, committed) if arguments.check else table.verdict(result)
            verdicts.append(table.BUSY if result["quality"] == "C" else found)
            log(table.line(result) + (f": {found}" if arguments.check else ""))
        if arguments.json:
            ratio.write_json(arguments.json, {"results": results, "failures": failures})
    if arguments.write_docs and results:
        table.write(result for result in results if result["quality"] != "C")
        log(f"written: {table.RATIOS} and {table.DOCS}")
    return exit_code(failures, verdicts)

"""How long it takes until a training run has made its first step, and what memory that needs on the host.

    python -m benchmarks startup                 # tiny, and full width with two layers a component
    python -m benchmarks startup tiny --json=FILE

Three runs of each size, each a process of its own: without the persistent compilation cache, with an empty one, and with a full
one, where the state comes from a checkpoint. Seconds of a machine that does nothing else; elsewhere they are worth little.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:startup")

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import load, ratio
from benchmarks.command_line import startup_parser
from benchmarks.table import ROOT
from flowseg_jax.errors import UserError
from flowseg_jax.system import host
from flowseg_jax.system.console import heartbeat, log
from flowseg_jax.system.hardware import GIB

EXPRESSIONS = 4
STAGES = ("import", "trace", "compile", "state", "first step")
RUNS = {"no cache": "fresh state", "empty cache": "fresh state", "full cache": "restored"}


def start(size: str, began: float, checkpoint: Path | None, restore: bool) -> dict[str, Any]:
    """Makes a run's first step in this process.

    Args:
        size: "tiny" or "full".
        began: when this process was started, by `time.time()`.
        checkpoint: where the state is written to after the step, or read from; None for neither.
        restore: read it.

    Returns:
        Seconds of each of STAGES, their sum as "total", and "peak_gib" up to the step.
    """
    import jax

    from benchmarks.components.sizes import SIZES, dummy_batch, experiment
    from flowseg_jax.checkpoints.manager import CheckpointManager
    from flowseg_jax.training.program import TrainProgram

    seconds = {"import": time.time() - began}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started

    sizes = SIZES[size]
    batch = dummy_batch(sizes.whole, EXPRESSIONS, sizes.words)
    config = experiment(sizes.whole, batch, sizes.points)
    with stage("trace"):
        program = TrainProgram.build(config, jax.devices()[:1])
        lowered = program.step.lower(program.state, program.batch)
    with stage("compile"):
        step = lowered.compile()
    numbered = lambda state: {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}  # noqa: E731
    with stage("state"):
        if restore:
            with CheckpointManager(checkpoint) as checkpoints:
                found = checkpoints.restore_latest(numbered(program.state)).state
            leaves = [found[str(i)] for i in range(len(found))]
            state = jax.tree.unflatten(jax.tree.structure(program.state), leaves)
        else:
            state, _ = program.initial_state(config)
        jax.block_until_ready(state)
    with stage("first step"):
        state, _ = step(state, program.to_device(batch))
        jax.block_until_ready(state)
    peak = host.peak_memory() / GIB
    if checkpoint and not restore:
        with CheckpointManager(checkpoint) as checkpoints:
            checkpoints.save(1, numbered(state), {})
    return seconds | {"total": sum(seconds.values()), "peak_gib": peak}


def measure(size: str) -> dict[str, dict[str, Any]]:
    """The three runs of one size, by their names in RUNS; each with "foreign", the cores that others kept busy meanwhile."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in RUNS:
            env = dict(os.environ) | {"JAX_COMPILATION_CACHE_DIR": f"{directory}/cache"}
            env["JAX_ENABLE_COMPILATION_CACHE"] = str(name != "no cache")
            command = [sys.executable, "-m", "benchmarks.startup", size, "--serve", repr(time.time())]
            command += [] if name == "no cache" else [f"{directory}/state"]
            command += ["restore"] if name == "full cache" else []
            before = load.read([os.getpid()])
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]
                raise UserError(f"startup {size}, {name}: {last}")
            # The process has been waited for: its work is this one's.
            found[name] = json.loads(done.stdout.splitlines()[-1]) | {
                "foreign": load.foreign_cores(before, load.read([os.getpid()]))
            }
    return found


def markdown(sizes: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The runs as a table."""
    rows = [f"| run | {' | '.join(f'{stage} s' for stage in STAGES)} | total s | peak GiB | others' cores |"]
    rows.append("|---|" + "--:|" * (len(STAGES) + 3))
    for size, runs in sizes.items():
        for name, run in runs.items():
            cells = [f"{run[stage]:.1f}" for stage in (*STAGES, "total")]
            rows.append(
                f"| {size}, {name}, {RUNS[name]} | {' | '.join(cells)} | {run['peak_gib']:.1f} | {run['foreign']:.2f} |"
            )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = startup_parser().parse_args(argv)
    if arguments.serve:
        began, *rest = arguments.serve
        result = start(arguments.size, float(began), Path(rest[0]) if rest else None, restore=len(rest) > 1)
        print(json.dumps(result))
        return 0
    found = {}
    for size in [arguments.size] if arguments.size else ["tiny", "full"]:
        with heartbeat(f"starting up, {size}"):
            found[size] = measure(size)
    log(markdown(found))
    if arguments.json:
        ratio.write_json(arguments.json, {"startup": found, "environment": ratio.environment()})
    busy = any(run["foreign"] > ratio.CONTENDED for runs in found.values() for run in runs.values())
    return ratio.TOO_BUSY if busy else 0

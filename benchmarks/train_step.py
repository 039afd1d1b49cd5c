"""How long a train step takes: beside another revision's, beside itself in parts, beside itself with checkpoints.

    python -m benchmarks.train_step --against=REVISION      # this working tree's step and that of a commit, on one device
    python -m benchmarks.train_step --against=REVISION --clock=cpu   # CPU seconds of all threads: also on a busy machine
    python -m benchmarks.train_step --overhead=accumulate   # optimizer.grad_accum_steps=1 and =4, the same batch
    python -m benchmarks.train_step --overhead=checkpoint   # 20 steps, without and with a checkpoint written after every 10th

`--config=FILE` and `--config.KEY=VALUE` choose the step, as for train.py; the batch is random, so no data set is needed.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:train_step")

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import ratio
from benchmarks.command_line import train_step_parser
from benchmarks.step import TrainStep
from benchmarks.worker import Worker
from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.manager import CheckpointManager
from flowseg_jax.errors import UserError
from flowseg_jax.system.console import heartbeat

ROOT = Path(__file__).resolve().parent.parent


class Window:
    """So many steps as one call, with a checkpoint after some of them; the last write is waited for.

    Args:
        train_step: whose state goes on; two windows may share it.
        steps: steps a call.
        every: steps from one checkpoint to the next, None for no checkpoints. The first is written after half as many, so
            that training goes on beside every write.
        checkpoints: where to.
    """

    def __init__(
        self, train_step: TrainStep, steps: int, every: int | None = None, checkpoints: CheckpointManager | None = None
    ):
        self._train_step, self._steps, self._every, self._checkpoints = train_step, steps, every, checkpoints
        self._names = itertools.count(1)
        self.pid = os.getpid()

    def run(self, calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            for step in range(1, self._steps + 1):
                self._train_step.advance()
                if self._every and step % self._every == self._every // 2:
                    state = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(self._train_step.state))}
                    self._checkpoints.save(next(self._names), state, {})
            jax.block_until_ready(self._train_step.state)
            if self._every:
                self._checkpoints.wait()
        return time.perf_counter() - started

    def output(self) -> dict[str, np.ndarray]:
        return self._train_step.output()


def against(revision: str, flags: Sequence[str], tolerance: float, rounds: int, clock: str = "wall") -> ratio.TimingComparison:
    """Step time of this working tree / step time of a commit."""
    with checkout(revision) as tree, contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "benchmarks.step", f"--clock={clock}", *flags]
        workers = {name: stack.enter_context(Worker(command, cwd=where)) for name, where in ((revision, tree), ("now", ROOT))}
        return ratio.compare(workers, revision, tolerance, rounds=rounds, cpu_time=clock == "cpu")


def accumulate(config: ConfigDict, parts: int, tolerance: float, rounds: int) -> ratio.TimingComparison:
    """Step time with the batch in parts / step time with the batch whole.

    Raises:
        UserError: the batch cannot be divided so.
    """
    if config.batch_size % (parts * config.model.negatives_group_size):
        raise UserError(
            f"--parts={parts}: batch_size {config.batch_size} is no multiple of {parts} x model.negatives_group_size "
            f"{config.model.negatives_group_size}"
        )
    candidates = {}
    for count in (1, parts):
        config.optimizer.grad_accum_steps = count
        candidates[f"accumulate={count}"] = TrainStep(config)
    return ratio.compare(candidates, "accumulate=1", tolerance, rounds=rounds)


def checkpoint(config: ConfigDict, steps: int, every: int, tolerance: float, rounds: int) -> ratio.TimingComparison:
    """Time of some steps with asynchronous checkpoints / time of as many without."""
    train_step = TrainStep(config)
    with tempfile.TemporaryDirectory() as directory, CheckpointManager(directory) as checkpoints:
        candidates = {
            "no checkpoints": Window(train_step, steps),
            f"every {every} steps": Window(train_step, steps, every, checkpoints),
        }
        return ratio.compare(candidates, "no checkpoints", tolerance, rounds=rounds)


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A working tree of a commit, with this revision's benchmarks in it, in a temporary directory that is gone afterwards.

    Raises:
        UserError: git knows no such commit, or cannot check it out.
    """
    if not git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", check=False):
        raise UserError(f"--against={revision}: git knows no such commit in {ROOT}")
    with tempfile.TemporaryDirectory(prefix="flowseg-") as directory:
        tree = Path(directory) / "tree"
        git("worktree", "add", "--detach", str(tree), revision)
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            (tree / "benchmarks").symlink_to(ROOT / "benchmarks")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def config_flags(argv: Sequence[str]) -> list[str]:
    """The flags that choose the config: each revision reads its own file and applies the same overrides.

    Raises:
        UserError: one of them has its value in the next argument.
    """
    flags = [flag for flag in argv if re.match(r"--config(\.|=|$)", flag)]
    if apart := [flag for flag in flags if "=" not in flag]:
        raise UserError(f"--against passes {apart[0]} on to another process: write {apart[0]}=VALUE")
    return flags


def git(*arguments: str, check: bool = True) -> str:
    """What git prints, "" where it fails and that is allowed."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"git cannot be run: {error.strerror}") from None
    if done.returncode and check:
        raise UserError(f"git {arguments[0]} failed: {done.stderr.strip().splitlines()[-1]}")
    return "" if done.returncode else done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    config, rest = configs.load(argv)
    arguments = train_step_parser().parse_args(rest)
    if arguments.every > arguments.steps:
        raise UserError(f"--every={arguments.every} is more than --steps={arguments.steps}: no checkpoint would be written")
    with heartbeat("measuring"):
        if arguments.against:
            flags = config_flags(argv)
            comparison = against(arguments.against, flags, arguments.tolerance, arguments.rounds, arguments.clock)
        elif arguments.overhead == "accumulate":
            comparison = accumulate(config, arguments.parts, arguments.tolerance, arguments.rounds)
        else:
            comparison = checkpoint(config, arguments.steps, arguments.every, arguments.tolerance, arguments.rounds)
    return ratio.report(comparison, arguments)

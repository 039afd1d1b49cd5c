"""The interleaved ratio: candidates timed in turn, under the same load, after their outputs were found to be the same.

Other work on the machine slows a candidate down by an unknown factor, but the same work slows its neighbour in time down as
well. So candidates take turns, and of each one only the samples count during which the machine was otherwise idle.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks import load
from flowseg_jax.checkpoints.storage import provenance
from flowseg_jax.errors import UserError
from flowseg_jax.system.console import log

CONTENDED = 0.2  # cores of foreign load, above which a sample is not clean
ENOUGH = 3  # clean samples that make a median
SAMPLE_SECONDS = 0.5  # a sample's least length: the kernel counts in hundredths, and one of those must not look like load
TOO_BUSY = 3  # exit code

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second one counts all threads of the process

# Variables that change how fast JAX or a PyTorch peer runs.
VARIABLES = (
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "JAX_NUM_CPU_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
)


class TimedProgram(Protocol):
    """What can be timed. `worker.Worker` is one that lives in another process."""

    @property
    def pid(self) -> int:
        """The process that does the work; all other processes' work is foreign load."""

    def run(self, calls: int) -> float:
        """Makes so many calls one after the other and returns the seconds until the last result was there."""

    def output(self) -> Mapping[str, np.ndarray]:
        """What a call computes, by name."""


class Local:
    """A function of this process: `call()` returns arrays in any structure, JAX's may still be on their way.

    `clock` says what a second is.
    """

    def __init__(self, call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter):
        self._call, self._clock = call, clock
        self.pid = os.getpid()

    def run(self, calls: int) -> float:
        started = self._clock()
        for _ in range(calls):
            jax.block_until_ready(self._call())
        return self._clock() - started

    def output(self) -> dict[str, np.ndarray]:
        leaves = jax.tree_util.tree_leaves_with_path(self._call())
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@dataclasses.dataclass(frozen=True)
class TimingSample:
    """One turn of a candidate: seconds a call, and how many cores were busy with foreign work meanwhile."""

    seconds: float
    foreign: float

    @property
    def clean(self) -> bool:
        return self.foreign <= CONTENDED


@dataclasses.dataclass(frozen=True)
class Timing:
    """All samples of a candidate, each of `calls` calls."""

    calls: int
    samples: tuple[TimingSample, ...]

    @property
    def clean(self) -> tuple[TimingSample, ...]:
        return tuple(sample for sample in self.samples if sample.clean)

    @property
    def used(self) -> tuple[TimingSample, ...]:
        """The clean samples; where they are too few, those with the least foreign load."""
        if len(self.clean) >= ENOUGH:
            return self.clean
        return tuple(sorted(self.samples, key=lambda sample: sample.foreign)[:ENOUGH])

    @property
    def seconds(self) -> float:
        """The median of the used samples, seconds a call."""
        return statistics.median(sample.seconds for sample in self.used)


@dataclasses.dataclass(frozen=True)
class TimingComparison:
    """What was measured.

    Attributes:
        baseline: the candidate that the others are held against.
        timings: by candidate, in the order in which they took turns.
        difference: largest difference between outputs, as a share of the baseline's largest value.
        tolerance: what it may be.
        environment: machine, versions and flags.
    """

    baseline: str
    timings: Mapping[str, Timing]
    difference: float
    tolerance: float
    environment: Mapping[str, Any]

    def ratio(self, name: str) -> float:
        """Time of a candidate / time of the baseline: below 1 the candidate is faster."""
        return self.timings[name].seconds / self.timings[self.baseline].seconds

    @property
    def quality(self) -> str:
        """A: enough clean samples of every candidate. C: a candidate without any, so that only "which is faster, and roughly
        by how much" can be trusted. B: in between."""
        clean = [len(timing.clean) for timing in self.timings.values()]
        return "A" if min(clean) >= ENOUGH else "B" if min(clean) else "C"

    def to_json(self) -> dict[str, Any]:
        candidates = {
            name: {
                "seconds": timing.seconds,
                "ratio": self.ratio(name),
                "calls_a_sample": timing.calls,
                "clean_samples": len(timing.clean),
                "samples": [dataclasses.asdict(sample) for sample in timing.samples],
            }
            for name, timing in self.timings.items()
        }
        return {
            "baseline": self.baseline,
            "quality": self.quality,
            "candidates": candidates,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "environment": dict(self.environment),
        }

    def table(self) -> str:
        """The result for the terminal."""
        width = max(len("candidate"), *(len(name) for name in self.timings))
        lines = [f"{'candidate':{width}}  ms a call    fastest - slowest   ratio  clean  foreign load"]
        for name, timing in self.timings.items():
            times = [1e3 * sample.seconds for sample in timing.used]
            spread = f"{min(times):.4g} - {max(times):.4g}"
            clean = f"{len(timing.clean)}/{len(timing.samples)}"
            foreign = statistics.median(sample.foreign for sample in timing.used)
            row = f"{name:{width}}  {1e3 * timing.seconds:9.4g}  {spread:>19}  {self.ratio(name):6.3f}  {clean:>5}"
            lines.append(f"{row}  {foreign:.2f} cores")
        here = self.environment
        lines.append(f"quality {self.quality}; outputs differ by {self.difference:.1e}, tolerance {self.tolerance:.0e}")
        lines.append(f"{here['cpu']}, {here['cores']} cores, jax {here['versions']['jax']}, {here['date']}")
        return "\n".join(lines)


def compare(
    candidates: Mapping[str, TimedProgram],
    baseline: str,
    tolerance: float,
    *,
    rounds: int = 7,
    sample_seconds: float = SAMPLE_SECONDS,
    read: Callable[[Sequence[int]], load.Reading] = load.read,
    cpu_time: bool = False,
) -> TimingComparison:
    """Times the candidates in turn, once each has been called (compiled) and their outputs were found to agree.

    Args:
        candidates: by name, at least two.
        baseline: the name of the one that the others are held against.
        tolerance: how far outputs may be apart, as a share of the baseline's largest value.
        rounds: turns of each candidate; there are up to three times as many while a candidate lacks clean samples.
        sample_seconds: a turn makes so many calls that it takes at least this long.
        read: the clocks, for processes.
        cpu_time: the candidates count CPU seconds of their own: whatever else runs, a sample is clean.

    Raises:
        UserError: the outputs differ; nothing is timed then.
    """
    for candidate in candidates.values():
        candidate.run(1)
    difference = largest_difference({name: candidate.output() for name, candidate in candidates.items()}, baseline, tolerance)
    calls = {name: max(1, math.ceil(sample_seconds / candidate.run(1))) for name, candidate in candidates.items()}
    samples: dict[str, list[TimingSample]] = {name: [] for name in candidates}
    for turn in range(1, 3 * rounds + 1):
        for name, candidate in candidates.items():
            samples[name].append(take_sample(candidate, calls[name], None if cpu_time else read))
        timings = {name: Timing(calls[name], tuple(taken)) for name, taken in samples.items()}
        if turn >= rounds and all(len(timing.clean) >= ENOUGH for timing in timings.values()):
            break
    return TimingComparison(baseline, timings, difference, tolerance, environment())


def take_sample(
    candidate: TimedProgram, calls: int, read: Callable[[Sequence[int]], load.Reading] | None = load.read
) -> TimingSample:
    if read is None:
        return TimingSample(candidate.run(calls) / calls, 0.0)
    # This process waits for a worker and polls nothing, but what it does do is not foreign.
    pids = sorted({os.getpid(), candidate.pid})
    before = read(pids)
    seconds = candidate.run(calls)
    return TimingSample(seconds / calls, load.foreign_cores(before, read(pids)))


def largest_difference(outputs: Mapping[str, Mapping[str, np.ndarray]], baseline: str, tolerance: float) -> float:
    """The largest |x - y| / max |y| over all outputs y of the baseline and x of the others.

    Raises:
        UserError: it is above the tolerance or not a number, or candidates put out other arrays.
    """
    expected, worst = outputs[baseline], 0.0
    for name, output in outputs.items():
        shapes = [{key: np.shape(value) for key, value in arrays.items()} for arrays in (output, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(f"no ratio: {name} puts out {shapes[0]}, {baseline} {shapes[1]}")
        for key, value in output.items():
            x, y = np.asarray(value, np.float64), np.asarray(expected[key], np.float64)
            if not x.size:
                continue
            difference = float(np.abs(x - y).max() / (np.abs(y).max() or 1.0))
            if not difference <= tolerance:
                raise UserError(
                    f"no ratio: {key or 'the output'} of {name} differs from {baseline}'s by {difference:.2g} of its largest "
                    f"value, the tolerance is {tolerance:g}"
                )
            worst = max(worst, difference)
    return worst


def environment() -> dict[str, Any]:
    """Machine, versions and flags: what a ratio depends on besides the candidates."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = ""
    model, flags = (re.search(rf"^{field}\s*:\s*(.*)$", cpu, re.MULTILINE) for field in ("model name", "flags"))
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpu_flags": [f for f in flags[1].split() if f.startswith(("avx", "amx", "fma", "f16c"))] if flags else [],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **provenance(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def write_json(path: str | Path, value: Any) -> None:
    """What `--json=FILE` asks for. UserError where the file cannot be written."""
    try:
        Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}") from None


def report(comparison: TimingComparison, arguments: argparse.Namespace) -> int:
    """Prints what `add_ratio_flags` asked for. Returns the command's exit code."""
    log(comparison.table())
    if arguments.json == "-":
        log(json.dumps(comparison.to_json()))
    elif arguments.json:
        write_json(arguments.json, comparison.to_json())
    if arguments.gate and comparison.quality == "C":
        return TOO_BUSY
    return 0

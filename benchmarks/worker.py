"""Candidates in processes of their own: another git revision, or a framework whose threads must not share ours.

The protocol is lines of text. The worker reads `run N` and answers the seconds that N calls took; it reads `output FILE`,
writes what a call computes to FILE (npz) and answers `written`; it ends when its stdin does. Between two requests it waits and
must not compute. OpenMP's threads (PyTorch's) go on spinning for a while after their work: start such a worker with
`env={"GOMP_SPINCOUNT": "20000"}`, or they are foreign load to the next candidate.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from flowseg_jax.errors import UserError

WRITTEN = "written"


class Worker:
    """The side that asks: a candidate for `ratio.compare`. It starts at once, so that several get ready side by side.

    Args:
        argv: the command, which ends in a call of `serve`.
        cwd: where it runs.
        env: variables on top of this process's.
    """

    def __init__(self, argv: Sequence[str], cwd: str | os.PathLike | None = None, env: Mapping[str, str] | None = None):
        self._name = " ".join(map(str, argv))
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, calls: int) -> float:
        """Raises a UserError with the last line that the worker wrote, if it has died."""
        return float(self._request(f"run {calls}"))

    def output(self) -> dict[str, np.ndarray]:
        """Raises a UserError as `run` does."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "output.npz"
            self._request(f"output {path}")
            with np.load(path) as arrays:
                return dict(arrays)

    def close(self) -> None:
        """Ends the process and waits for that."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(self, request: str) -> str:
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            answer = ""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            last = next((line.strip() for line in reversed(self._errors.readlines()) if line.strip()), "it said nothing")
            raise UserError(f"the worker `{self._name}` ended with code {code}: {last}")
        return answer.strip()


def serve(make: Callable[[], object]) -> None:
    """The side that answers, until stdin ends. What else is printed goes to stderr.

    Args:
        make: makes the candidate, an object with `run` and `output`.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    candidate = make()
    for line in sys.stdin:
        request, _, argument = line.strip().partition(" ")
        if request == "run":
            answer = repr(candidate.run(int(argument)))
        elif request == "output":
            np.savez(argument, **candidate.output())
            answer = WRITTEN
        else:
            raise ValueError(f"unknown request {line!r}")
        print(answer, file=answers, flush=True)

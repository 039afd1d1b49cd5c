"""`COMMAND | head`: work on files goes on in silence, and a command that only prints does not claim that it succeeded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowseg_jax.errors import CLOSED_PIPE

ROOT = Path(__file__).resolve().parents[2]

WORKS = """
import sys, pathlib
from flowseg_jax import errors
from flowseg_jax.system import console
def main():
    for step in range(200):
        console.log(f"step {step} " + "x" * 1000)
    pathlib.Path(sys.argv[1]).write_text(str(step))
    return int(sys.argv[2])
errors.run_cli(main)
"""
PRINTS = """
import sys, pathlib
from flowseg_jax import errors
def main():
    for step in range(200):
        print("x" * 1000)
    pathlib.Path(sys.argv[1]).write_text("end")
errors.run_cli(main)
"""
SHORT = """
from flowseg_jax import errors
errors.run_cli(lambda: print("x"))
"""


def piped(program: str, *arguments: object, merge: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a program whose output nobody reads; with `merge` nobody reads its errors either."""
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    stderr = write if merge else subprocess.PIPE
    with os.fdopen(write, "w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=stderr, env=environment, text=True, timeout=250, check=False)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("merge, code", [(False, 0), pytest.param(True, 3, marks=pytest.mark.slow)])
def test_work_goes_on_to_its_end(tmp_path, merge, code):
    found, said = piped(WORKS, tmp_path / "end", code, merge=merge)
    assert found == code
    assert (tmp_path / "end").read_text() == "199"
    if not merge:
        assert said == "nobody reads what is printed any more: going on in silence\n"


@pytest.mark.parametrize("program", [PRINTS, SHORT])
def test_what_only_prints_has_not_succeeded(tmp_path, program):
    assert piped(program, tmp_path / "end") == (CLOSED_PIPE, "")
    assert not (tmp_path / "end").exists()

"""Runs a file of `tests/multidevice` in a process that has eight host devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "multidevice"
EVALUATION = ("test_evaluation_devices.py",)
OTHERS = tuple(sorted({path.name for path in FOLDER.glob("test_*.py")} - set(EVALUATION)))


def run(name: str, request: pytest.FixtureRequest) -> None:
    """With the marks that the surrounding run chose."""
    marks = ["-m", request.config.getoption("-m")] if request.config.getoption("-m") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *marks, str(FOLDER / name)]
    environment = os.environ | {"FLOWSEG_DEVICES": "8"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), f"{ran.stdout}\n{ran.stderr}"

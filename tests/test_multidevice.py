"""Runs each file of `tests/multidevice` in a process that has eight host devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "multidevice").glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_on_eight_devices(name, request):
    marks = ["-m", request.config.getoption("-m")] if request.config.getoption("-m") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *marks]
    environment = os.environ | {"FLOWSEG_DEVICES": "8"}
    run = subprocess.run(
        [*command, str(HERE / "multidevice" / name)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"

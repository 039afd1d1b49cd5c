"""Runs `tests/multidevice` in a process that has eight host devices: in one, because starting JAX takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "multidevice"


@pytest.mark.timeout(900)
def test_on_eight_devices(request):
    marks = ["-m", request.config.getoption("-m")] if request.config.getoption("-m") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *marks, str(FOLDER)]
    environment = os.environ | {"FLOWSEG_DEVICES": "8"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880, check=False)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"

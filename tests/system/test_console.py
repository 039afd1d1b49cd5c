"""What a command prints while it runs."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from flowseg_jax.system import console


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (185, "3:05"), (7384, "2:03:04"), (266584, "3d 2:03:04"), (np.inf, "?")]
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text


def test_heartbeat_breaks_the_silence_and_only_the_silence(capsys):
    with console.heartbeat("compiling", every=0.1) as beat:
        time.sleep(0.15)
        beat.message = "still compiling"
        time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"compiling \.\.\. \d s", lines[0])
    assert re.fullmatch(r"still compiling \.\.\. \d s", lines[1])
    assert re.fullmatch(r"still compiling: done in \d s", lines[-1])
    with console.heartbeat("quick", every=0.2):
        pass
    with console.heartbeat("talking", every=0.4):
        for _ in range(8):
            time.sleep(0.08)
            console.log("step")
    assert set(capsys.readouterr().out.splitlines()) == {"step"}


def test_heartbeat_ends_with_an_error(capsys):
    with pytest.raises(ZeroDivisionError), console.heartbeat("failing", every=0.05):
        time.sleep(0.08)
        raise ZeroDivisionError
    before = capsys.readouterr().out
    time.sleep(0.12)
    assert "done" not in before
    assert capsys.readouterr().out == ""

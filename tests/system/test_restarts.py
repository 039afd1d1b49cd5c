"""A command that fails is started again: how often, after what, and what signals do. The command is a fake one."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from flowseg_jax.cli import train
from flowseg_jax.cli.parser import without_flag
from flowseg_jax.errors import UserError
from flowseg_jax.system import restarts

# Notes that it was started, and ends as the next of the codes says; a negative one is the signal that kills it.
CHILD = """
import os, sys
file, *codes = sys.argv[1:]
with open(file, "a") as notes:
    notes.write("x")
code = int(codes[os.path.getsize(file) - 1])
os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
"""

WAITING = """
import signal, sys, time
signal.signal(int(sys.argv[1]), lambda *_: sys.exit(int(sys.argv[2])))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("codes", "allowed", "starts", "last", "said"),
    [
        ((0,), 3, 1, 0, ""),
        ((1, -9, 0), 2, 3, 0, "the run was ended by SIGKILL; it is started again in 0 s, 2 of 2"),
        ((1, 1, 1), 1, 2, 1, "the run ended with exit code 1; it was started again 1 time(s) and is not started any more"),
        ((-9, 0), 0, 1, 137, "the run was ended by SIGKILL; it was started again 0 time(s)"),
        ((2, 0), 3, 1, 2, ""),  # a mistake of the user is still there the next time
        ((1, 130, 0), 3, 2, 130, "1 of 3"),
    ],
)
def test_what_is_started_again(tmp_path, capfd, codes, allowed, starts, last, said):
    command = [sys.executable, "-S", "-c", CHILD, str(tmp_path / "notes"), *map(str, codes)]
    assert restarts.supervise(command, allowed, pause=0) == last
    assert (tmp_path / "notes").read_text() == "x" * starts
    assert said in capfd.readouterr().err


def supervised(command: list[str], pause: float) -> subprocess.Popen:
    script = f"import sys; from flowseg_jax.system.restarts import supervise; sys.exit(supervise({command!r}, 5, {pause}))"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_a_signal_is_handed_on_and_nothing_is_started_after_it(number, code):
    with supervised([sys.executable, "-c", WAITING, str(int(number)), str(code)], 0) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(number)
        assert job.communicate(timeout=60) == ("", "") and job.returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_between_two_starts_ends_it(number, code):
    with supervised([sys.executable, "-c", "raise SystemExit(1)"], 600) as job:
        assert "started again in 600 s" in job.stderr.readline()
        job.send_signal(number)
        assert job.communicate(timeout=60) == ("", "") and job.returncode == code


def test_the_command_starts_itself_without_the_flag(monkeypatch):
    asked = []
    monkeypatch.setattr(restarts, "supervise", lambda command, times: asked.append((command, times)) or 7)
    arguments = ["--config=shapes_tiny", "--restart-on-failure", "3", "--workdir=runs/a", "--config.seed", "1"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train.py", *arguments])
    assert train.main(arguments) == 7
    rest = ["--config=shapes_tiny", "--workdir=runs/a", "--config.seed", "1"]
    assert asked == [([sys.executable, "-X", "dev", "train.py", *rest], 3)]
    assert without_flag(["--restart-on-failure=3", "a"], train.RESTART) == ["a"]
    with pytest.raises(UserError, match="restart-on-failure: '0' is not a whole number from 1"):
        train.main(["--restart-on-failure=0"])


def test_the_supervisor_needs_no_jax():
    script = "import sys, flowseg_jax.experiment, flowseg_jax.system.restarts; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"

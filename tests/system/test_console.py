"""What a command prints while it runs."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from flowseg_jax.system import console


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (185, "3:05"), (7384, "2:03:04"), (266584, "3d 2:03:04"), (np.inf, "?")]
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text


def test_a_duration_reads_back_as_the_seconds():
    for seconds in {
        n for unit in (60, 3600, 86400) for times in range(1, 30) for n in range(unit * times - 61, unit * times + 61)
    }:
        if seconds >= 60:
            days, _, clock = console.duration(seconds).rpartition("d ")
            parts = [int(part) for part in clock.split(":")]
            whole = sum(part * 60**n for n, part in enumerate(reversed(parts)))
            assert (86400 * int(days or 0) + whole, max(parts[1:]) < 60, parts[0] < 60) == (seconds, True, True)


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_in(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", Terminal())
    return sys.stdout


def test_a_bar_on_a_terminal_below_the_lines(monkeypatch):
    terminal = terminal_in(monkeypatch)
    with console.progress("train", 20, "steps", done=5) as outer:
        outer.update(10, "loss 3.142  selection 0.41")
        with console.progress("evaluate val", 64, "samples", doing="compiling") as inner:
            console.log("a line with [brackets]")
            inner.update(32, "computing")
            time.sleep(0.6)  # drawn four times a second
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"train .*10/20 steps .*left +loss 3.142  selection 0.41", shown)
    assert re.search(r"evaluate val .*32/64 samples .*left +computing", shown)
    assert "a line with [brackets]\n" in shown
    assert sys.stdout is terminal  # as it was
    console.log("afterwards")
    assert terminal.getvalue().endswith("afterwards\n")


def test_elsewhere_a_line_with_the_count_and_the_time_left(capsys):
    with console.progress("prepare", 40, "images", done=10, every=0.05) as bar:
        time.sleep(0.08)
        bar.update(20, "computing")
        time.sleep(0.12)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("prepare: 10/40 images ... 0 s")
    assert any(re.fullmatch(r"prepare: 20/40 images, computing, \d s left \.\.\. 0 s", line) for line in lines)
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("term, silent", [("dumb", False), ("xterm", True)])
def test_no_bar_where_none_can_be_drawn_or_another_process_speaks(monkeypatch, term, silent):
    terminal = terminal_in(monkeypatch)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(console, "_silent", silent)
    with console.progress("train", 20, "steps") as bar:
        bar.update(10)
    assert terminal.getvalue() == ""


def test_help_is_quick_and_imports_no_rich():
    code = (
        "import sys, time; import flowseg_jax; from flowseg_jax.cli.main import main\n"
        "for command in ('train', 'eval', 'predict'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "print(sorted({'rich', 'jax', 'wandb', 'mlflow'} & {*sys.modules}), time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, seconds = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert names == "[]" and float(seconds) < 1.5  # 0.5 s each, the interpreter's start included


def test_a_heartbeat_may_speak_elsewhere(capsys):
    lines: list[str] = []
    with console.heartbeat("loading", every=0.01, say=lines.append):
        while not lines:
            time.sleep(0.01)
    assert lines[0].startswith("loading ... ") and lines[-1].startswith("loading: done in ")
    assert capsys.readouterr().out == ""

"""What a command prints while it runs: lines, bars on a terminal, signs of life while nothing is said, durations."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flowseg_jax.errors import mute, tell

HEARTBEAT_SECONDS = 10.0

_print_lock = threading.Lock()
_silent = False
_last_print = time.monotonic()
_bars: Any = None  # rich's display of the bars that are running; None where there is none


def log(text: str) -> None:
    """Prints a line at once. Everything that a command reports while it runs goes through here, so that `heartbeat` knows."""
    global _last_print
    text = text.encode("utf-8", "backslashreplace").decode()  # the name of a file may be no text
    with _print_lock:
        if not _silent:
            try:
                print(text, flush=True)
            except BrokenPipeError:  # `train.py | head`: the work is what is written to disk, and goes on
                mute_console()
                mute(sys.stdout)
                tell("nobody reads what is printed any more: going on in silence")
        _last_print = time.monotonic()


def note(text: str) -> None:
    """Prints a line to stderr: what a library has to say, beside what its caller prints."""
    if not _silent:
        tell(text.encode("utf-8", "backslashreplace").decode())


def mute_console() -> None:
    """Lets `log` print nothing from now on, for a process whose output another one prints."""
    global _silent
    _silent = True


class ProgressHeartbeat:
    """What a heartbeat prints; assign `message` to keep it true."""

    def __init__(self, message: str):
        self.message = message


@contextlib.contextmanager
def heartbeat(message: str, every: float = HEARTBEAT_SECONDS, say: Callable[[str], None] = log) -> Iterator[ProgressHeartbeat]:
    """Prints `message` with the elapsed time from a daemon thread whenever nothing was said for `every` seconds.

    Heartbeats nest: the inner one's line keeps the outer one quiet. Work that takes less than `every` prints nothing, longer
    work ends with a line that says how long it took. `say` prints a line: `log` to stdout, `note` to stderr.
    """
    beat, stop, printed, started = ProgressHeartbeat(message), threading.Event(), threading.Event(), time.monotonic()

    def run() -> None:
        wake = started + every
        while not stop.wait(max(wake - time.monotonic(), 0.0)):
            now = time.monotonic()
            silent_since = max(_last_print, started)
            if now - silent_since >= every:
                printed.set()
                say(f"{beat.message} ... {duration(now - started)}")
                silent_since = now
            wake = silent_since + every

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        stop.set()
        thread.join()
    if printed.is_set():
        say(f"{beat.message}: done in {duration(time.monotonic() - started)}")


class Progress:
    """Work that is counted: a bar on a terminal, the line of a heartbeat elsewhere.

    Attributes:
        message: what is done. total, unit: of how much.
    """

    def __init__(self, message: str, total: int, unit: str, show: Callable[[int, str], None]):
        self.message, self.total, self.unit = message, total, unit
        self._show = show

    def update(self, done: int, doing: str = "") -> None:
        """So much of `total` is done; `doing` is a word on what is being done, or figures."""
        self._show(done, doing)


@contextlib.contextmanager
def progress(
    message: str, total: int, unit: str, *, done: int = 0, doing: str = "", every: float = HEARTBEAT_SECONDS
) -> Iterator[Progress]:
    """Shows how far work is: a bar on a terminal; elsewhere a line with the count when nothing was said for `every` seconds."""
    began, first = time.monotonic(), done

    def line(done: int, doing: str) -> str:
        spent, made = time.monotonic() - began, done - first
        left = f", {duration(spent * (total - done) / made)} left" if made and done < total else ""
        return f"{message}: {done}/{total} {unit}{', ' * bool(doing)}{doing}{left}"

    if is_terminal():
        with _bar(message, total, unit, done, doing) as show:
            yield Progress(message, total, unit, show)
        return
    with heartbeat(line(done, doing), every) as beat:
        yield Progress(message, total, unit, lambda done, doing: setattr(beat, "message", line(done, doing)))
        beat.message = message


def is_terminal() -> bool:
    """Whether somebody watches what this process prints, on a screen that can draw a bar."""
    return not _silent and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def _bar(message: str, total: int, unit: str, done: int, doing: str) -> Iterator[Callable[[int, str], None]]:
    """A bar below those that are running; lines of `log` scroll above them. It goes when the work is done."""
    global _bars
    from rich import progress as rich  # here: it takes a while, and only terminals need it
    from rich.console import Console
    from rich.table import Column

    outermost = _bars is None
    if outermost:
        text = lambda form, **column: rich.TextColumn(form, markup=False, table_column=Column(no_wrap=True, **column))  # noqa: E731
        columns = (
            text("{task.description}"),
            rich.BarColumn(12),
            text("{task.completed}/{task.total} {task.fields[unit]}"),
            rich.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            text("left"),
            text("{task.fields[doing]}", overflow="ellipsis", ratio=1),  # what a narrow screen has no room for
        )
        _bars = rich.Progress(*columns, console=Console(file=sys.stdout), transient=True, expand=True, refresh_per_second=4)
        _bars.start()
    task = _bars.add_task(message, total=total, completed=done, unit=unit, doing=doing)
    try:
        yield lambda done, doing: _bars.update(task, completed=done, doing=doing)
    finally:
        _bars.remove_task(task)
        if outermost:
            _bars.stop()
            _bars = None


def duration(seconds: float) -> str:
    """`12 s`, `3:05`, `2:03:04`, `3d 2:03:04`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
    text = f"{minutes}:{whole % 60:02d}" if whole < 3600 else f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{days}d {text}" if days else text

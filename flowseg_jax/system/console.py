"""What a command prints while it runs: lines, signs of life while nothing is said, durations."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator

from flowseg_jax.errors import mute, tell

HEARTBEAT_SECONDS = 10.0

_print_lock = threading.Lock()
_silent = False
_last_print = time.monotonic()


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


def mute_console() -> None:
    """Lets `log` print nothing from now on, for a process that another one speaks for."""
    global _silent
    _silent = True


class ProgressHeartbeat:
    """What a heartbeat prints; assign `message` to keep it true."""

    def __init__(self, message: str):
        self.message = message


@contextlib.contextmanager
def heartbeat(message: str, every: float = HEARTBEAT_SECONDS) -> Iterator[ProgressHeartbeat]:
    """Prints `message` with the elapsed time from a daemon thread whenever nothing was said for `every` seconds.

    Heartbeats nest: the inner one's line keeps the outer one quiet. Work that takes less than `every` prints nothing, longer
    work ends with a line that says how long it took.
    """
    beat, stop, printed, started = ProgressHeartbeat(message), threading.Event(), threading.Event(), time.monotonic()

    def run() -> None:
        wake = started + every
        while not stop.wait(max(wake - time.monotonic(), 0.0)):
            now = time.monotonic()
            silent_since = max(_last_print, started)
            if now - silent_since >= every:
                printed.set()
                log(f"{beat.message} ... {duration(now - started)}")
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
        log(f"{beat.message}: done in {duration(time.monotonic() - started)}")


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

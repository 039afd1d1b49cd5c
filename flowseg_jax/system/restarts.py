"""A command that is started again when it fails: `flowseg train --restart-on-failure=N`, where no scheduler does that.

The command runs in a process of its own, which a crash, the kernel or a lost device may end. What a restart cannot put right is
not tried again: a mistake of the user (exit code 2) and a wish to stop (a signal).
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Sequence
from types import FrameType

from flowseg_jax.errors import tell

FINAL = (0, 2, 130)  # exit codes: success, a mistake of the user, Ctrl-C
# Seconds before a restart: the processes of the job that are left end 5 s after the first, the job's port is free after 10 s.
PAUSE = 15.0
FORWARDED = (signal.SIGINT, signal.SIGTERM)


def supervise(command: Sequence[str], restarts: int, pause: float = PAUSE) -> int:
    """Runs a command until it succeeds, or has been started again `restarts` times.

    SIGTERM and SIGINT are handed on to it, and it is not started again after one.

    Args:
        command: a program and its arguments.
        restarts: how often it may be started again.
        pause: seconds before it is.

    Returns:
        The last exit code; 128 + its number where a signal ended the process, as shells count it.
    """
    stopped, numbers, child = threading.Event(), [], None

    def hand_on(number: int, _: FrameType | None) -> None:
        numbers.append(number)
        stopped.set()
        if child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in FORWARDED}
    try:
        for restart in range(restarts + 1):
            child = subprocess.Popen(command, process_group=0)  # of its own: Ctrl-C reaches it once, from here
            if stopped.is_set():
                child.send_signal(numbers[-1])
            code = child.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            code = 128 - code if code < 0 else code
            if code in FINAL or stopped.is_set():
                return code
            if restart == restarts:
                tell(f"the run {how}; it was started again {restarts} time(s) and is not started any more")
                return code
            tell(f"the run {how}; it is started again in {pause:g} s, {restart + 1} of {restarts}")
            if stopped.wait(pause):
                return 130 if numbers[-1] == signal.SIGINT else 0  # nothing runs: the last checkpoint is the state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

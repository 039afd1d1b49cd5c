"""How busy the machine was with other people's work while something was timed, from Linux's `/proc`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from flowseg_jax.errors import UserError

# Columns of the `cpu` line of /proc/stat: user nice system idle iowait irq softirq steal. Guests are part of user; what a
# hypervisor steals is load that somebody else makes.
BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Clocks at one moment, all in seconds: the wall's, of all processors' work, of the watched processes' work."""

    wall: float
    busy: float
    own: float


def read(pids: Sequence[int]) -> Reading:
    """The clocks now; `own` is the work of the processes `pids`, their threads and the children they have waited for.

    Raises:
        UserError: there is no `/proc`, or one of the processes is gone.
    """
    try:
        busy = busy_ticks(Path("/proc/stat").read_text())
        own = sum(process_ticks(Path(f"/proc/{pid}/stat").read_text()) for pid in pids)
    except (OSError, ValueError) as error:
        raise UserError(f"benchmarks read the machine's load from Linux's /proc: {error}") from None
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return Reading(time.perf_counter(), busy * tick, own * tick)


def foreign_cores(before: Reading, after: Reading) -> float:
    """How many cores were busy, on average between two readings, with work that is not the watched processes'."""
    foreign = (after.busy - before.busy) - (after.own - before.own)
    return max(foreign / (after.wall - before.wall), 0.0)


def busy_ticks(stat: str) -> int:
    """Ticks that all processors have worked since the machine started, from the text of `/proc/stat`."""
    columns = next(line for line in stat.splitlines() if line.startswith("cpu ")).split()[1:]
    return sum(int(columns[i]) for i in BUSY_COLUMNS)


def process_ticks(stat: str) -> int:
    """Ticks that a process and the children it has waited for have worked, from the text of `/proc/PID/stat`."""
    fields = stat.rpartition(")")[2].split()  # the command's name, in brackets, may hold anything
    return sum(int(field) for field in fields[11:15])  # utime stime cutime cstime

"""What every worker process that makes or reads data begins with. Imports nothing large: each worker pays for it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Iterator

from flowseg_jax.traces import Traces


def init_worker(*signals: signal.Signals) -> None:
    """Leaves these signals to the parent, and ends with the parent even when that is killed.

    A signal to a whole job reaches all its processes, but only the parent knows what is still needed.
    """
    Traces(print_first=True).install()
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), name="end-with-parent", daemon=True).start()


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes that this thread starts meanwhile do not hear Ctrl-C: it would hit them in their imports, before `start`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process(multiprocessing.context.SpawnProcess):
    def start(self) -> None:
        with deaf():
            super().start()


class Spawn(multiprocessing.context.SpawnContext):
    """How processes are started: spawned, because the caller may run JAX, whose threads do not survive a fork, and `deaf`."""

    Process = _Process


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    # Waits for the end of a pipe that closes with the parent, however that ends. Not PR_SET_PDEATHSIG: it kills when the
    # *thread* ends that started the worker, which Grain ends first when it closes; and other systems than Linux lack it.
    parent.join()
    os._exit(1)

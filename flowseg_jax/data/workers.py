"""What every worker process that makes or reads data begins with. Imports nothing large: each worker pays for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def start(*signals: signal.Signals) -> None:
    """Leaves these signals to the parent, and ends with the parent even when that is killed.

    A signal to a whole job reaches all its processes, but only the parent knows what is still needed.
    """
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), name="end-with-parent", daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    # Waits for the end of a pipe that closes with the parent, however that ends. Not PR_SET_PDEATHSIG: it kills when the
    # *thread* ends that started the worker, which Grain ends first when it closes; and other systems than Linux lack it.
    parent.join()
    os._exit(1)

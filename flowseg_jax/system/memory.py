"""How the C library keeps memory. Nothing of JAX is imported here."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # devices of TPUs and GPUs, in /dev


def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees, if it trains on a CPU and has glibc; returns whether it does.

    XLA:CPU allocates the temporaries of a program anew for every run, as one large block. glibc has the system map so large a
    block, and the system fills all its pages with zeros again in every step: a quarter of the tiny train step's time. Now all
    blocks come from one heap that never shrinks.

    Nothing is done once JAX is imported: threads that were started before have heaps of their own.
    """
    if sys.platform != "linux" or "jax" in sys.modules or any(any(Path("/dev").glob(name)) for name in ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    return mallopt is not None and all(mallopt(option, value) for option, value in settings.items())

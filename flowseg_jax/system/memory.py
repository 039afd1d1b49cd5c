"""How the C library keeps memory. Nothing of JAX is imported here."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h
MADV_HUGEPAGE = 14  # Linux's mman.h
HEAP = 2**30  # bytes of the heap that are asked to lie in large pages; only what is written to takes memory
PAGE = 2**21
ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # devices of TPUs and GPUs, in /dev


def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees, if it trains on a CPU and has glibc; returns whether it does.

    XLA:CPU allocates the temporaries of a program anew for every run, as one large block. glibc has the system map so large a
    block, and the system fills all its pages with zeros again in every step: a quarter of the tiny train step's time. Now all
    blocks come from one heap that never shrinks, and its first part lies in pages of 2 MiB.

    Nothing is done once JAX is imported: threads that were started before have heaps of their own.
    """
    if (
        sys.platform != "linux"
        or "jax" in sys.modules
        or any(found for name in ACCELERATORS for found in Path("/dev").glob(name))
    ):
        return False
    libc = ctypes.CDLL(None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1, M_TOP_PAD: HEAP}
    if not hasattr(libc, "mallopt") or not all(libc.mallopt(option, value) for option, value in settings.items()):
        return False
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(PAGE)))  # the heap grows by HEAP with it
    start, end = -(-block.value // PAGE) * PAGE, libc.sbrk(ctypes.c_ssize_t(0))
    libc.free(block)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
    return True

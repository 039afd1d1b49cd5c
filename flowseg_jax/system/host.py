"""The machine that a process runs on: the memory that it has taken, and the compiled programs that it leaves for the next."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import sys
from pathlib import Path

import jax
import jaxlib

from flowseg_jax.system.hardware import GIB

CACHE_BYTES = 10 * GIB  # of compiled programs; those that were not used for longest go first


def peak_memory() -> int:
    """The most memory that this process has had in use so far, bytes. What its data workers use is not in it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_line() -> str:
    """`peak_memory` for the console."""
    return f"peak host memory {peak_memory() / GIB:.1f} GiB"


def use_host_devices(batch: int) -> None:
    """Without an accelerator, splits the batch over the CPU's cores: one host device a core, as many as divide the batch."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX runs already: whoever started it has chosen
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if batch % n == 0))


def enable_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache on, in a folder of the user's own, unless the environment says where or not to.

    `JAX_COMPILATION_CACHE_DIR` names another folder or bucket, `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off, and
    `JAX_COMPILATION_CACHE_MAX_SIZE` replaces `CACHE_BYTES`. Call it before anything is compiled. Where no folder can be made,
    no program is kept.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "flowseg_jax" / f"programs-{_kind()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever writes into it makes this process run their code
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def _kind() -> str:
    """Names what programs can be exchanged between: the compiler's version and, for those of the CPU, its instructions.

    A home directory may be shared by machines of several types, and a program for one CPU ends with an illegal instruction on
    another.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "".join(lines[:1]))
    return f"{jaxlib.__version__}-{platform.machine()}-{hashlib.sha256(instructions.encode()).hexdigest()[:8]}"

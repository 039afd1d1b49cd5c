"""For which platforms a program is traced.

Where an operation has a kernel for a platform, "auto" chooses it there. A stored program (`jax.export`) must not contain
one: only XLA's own operations are promised to load in later versions. And a program that only a CPU will run need not be traced
with the kernels of other platforms, which takes as long as the rest of it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_kernels: contextvars.ContextVar[bool] = contextvars.ContextVar("flowseg_kernels", default=True)
_cpu_only: contextvars.ContextVar[bool] = contextvars.ContextVar("flowseg_cpu_only", default=False)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """What is traced inside chooses no kernel. A function that was traced before keeps what it has."""
    token = _kernels.set(False)
    try:
        yield
    finally:
        _kernels.reset(token)


def kernels_allowed() -> bool:
    """Whether a kernel may be chosen here."""
    return _kernels.get() and not _cpu_only.get()


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced inside runs on this platform alone; also a decorator of what is given to `jax.jit`. Only "cpu" matters."""
    token = _cpu_only.set(platform == "cpu")
    try:
        yield
    finally:
        _cpu_only.reset(token)


def cpu_only() -> bool:
    """Whether the program that is being traced runs on CPUs alone."""
    return _cpu_only.get()

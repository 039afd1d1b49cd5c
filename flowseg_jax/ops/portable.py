"""Programs that must run wherever XLA does: without our own kernels and without a vendor's.

Where an operation has a kernel for a platform, "auto" chooses it there. A stored program (`jax.export`) must not contain
one: only XLA's own operations are promised to load in later versions.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_kernels: contextvars.ContextVar[bool] = contextvars.ContextVar("flowseg_kernels", default=True)


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
    return _kernels.get()

"""Being asked to stop: Ctrl-C and SIGTERM end a run at a step's end, with its state saved.

With several processes all must stop after the same step. JAX's preemption service, which takes SIGTERM over, tells the other
processes of it and agrees with them on a step that none has reached yet.
"""

from __future__ import annotations

import signal
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class GracefulStop:
    """Listens for as long as it is entered.

    Attributes:
        interrupted: whether it was Ctrl-C.
    """

    def __init__(self):
        self._alone = jax.process_count() == 1
        self._signals: list[int] = []
        self._handlers: dict[int, object] = {}

    @property
    def interrupted(self) -> bool:
        return signal.SIGINT in self._signals

    def __enter__(self) -> GracefulStop:
        if self._alone:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, lambda number, _: self._signals.append(number))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def should_stop(self, step: int) -> bool:
        """Whether the run is to end after this step. Every process must ask at every step."""
        return bool(self._signals) if self._alone else multihost_utils.reached_preemption_sync_point(step)

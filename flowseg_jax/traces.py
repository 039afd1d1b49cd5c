"""Stack traces are kept in a file: what a user reads is one line that names it.

Traces come from more places than an exception that ends a command: threads, destructors, and libraries that log the errors of
their own threads and event loops, often a hundred times what is then raised once. `install` catches all of these. Only commands
call it (`errors.run_cli`, and the workers that they start); importing this package changes nothing.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

LOGGERS = ("absl", "asyncio", "concurrent.futures", "grain", "jax", "orbax")  # libraries that log what their threads raise


class Traces:
    """The stack traces of one process.

    Attributes:
        path: the file; None before there is a trace, "" where none can be written.
        first: what the first trace is of, in one line.
        ending: Ctrl-C has ended the command; another one ends the process at once.
    """

    def __init__(self, *, print_first: bool = False):
        self.path: str | None = None
        self.first = ""
        self.ending = False
        self._print_first, self._lock = print_first, threading.Lock()

    def add(self, what: str, trace: str) -> None:
        """Keeps a trace; `FLOWSEG_TRACEBACK=1` prints it too."""
        with self._lock:
            begins, self.first = self.path is None, self.first or what
            if begins:
                self.path = _new_file()
            if self.path:
                with contextlib.suppress(OSError), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{what}\n{trace.rstrip()}\n\n")
        if shown():
            print(trace.rstrip(), file=sys.stderr)
        if begins and self._print_first:
            print(f"note: {self.first}; {self.place()}", file=sys.stderr)

    def place(self) -> str:
        """Where the traces are, for a user."""
        kept = f"the stack trace is in {self.path}" if self.path else "its stack trace could not be kept"
        return f"{kept}, FLOWSEG_TRACEBACK=1 prints it"

    def drop(self) -> None:
        """Removes the file: what went wrong is known and told."""
        if self.path and not shown():
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def install(self) -> None:
        """Catches what threads, destructors and the loggers of libraries would print."""
        threading.excepthook, sys.unraisablehook = self._of_thread, self._unraisable
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self._logged)

    def _of_thread(self, args: Any) -> None:
        if not issubclass(args.exc_type, SystemExit):
            name = args.thread.name if args.thread else "?"
            self.add(f"thread {name}: {one_line(args.exc_value, args.exc_type)}", formatted(args.exc_value))

    def _unraisable(self, args: Any) -> None:
        if issubclass(args.exc_type, KeyboardInterrupt):
            if self.ending:
                os._exit(130)
            again = signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
            threading.Timer(0.05, *again).start()  # it hit a destructor, which cannot raise it
        elif not (args.exc_type is RuntimeError and str(args.exc_value) == "Event loop is closed"):  # threads of a failed save
            self.add(f"{args.err_msg or 'ignored'}: {one_line(args.exc_value, args.exc_type)}", formatted(args.exc_value))

    def _logged(self, record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else sys.exception()
        trace = formatted(error) if error is not None else ""
        self.add(f"{record.name}: {one_line(error) if error is not None else record.getMessage()}", trace)
        return False


@contextlib.contextmanager
def unsaid() -> Iterator[Callable[[object], None]]:
    """Around a read that may fail: drops what libraries say, often a hundred times, of the one error that it is reported by.

    To be called, before the end, with whether it failed: what tasks left over is printed when they are collected.
    """

    def settle(failed: object) -> None:
        if failed:
            gc.collect()

    untraced = lambda record: not record.exc_info  # noqa: E731
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        for logger in loggers:
            logger.addFilter(untraced)
        try:
            yield settle
        finally:
            for logger in loggers:
                logger.removeFilter(untraced)


def shown() -> bool:
    """Whether the user wants to see stack traces."""
    return os.environ.get("FLOWSEG_TRACEBACK", "0") not in ("", "0")


def one_line(error: BaseException | None, kind: type[BaseException] | None = None) -> str:
    """An exception's type and the first line of its text, at most 300 characters."""
    lines = str(error).strip().splitlines() if error is not None else []
    name = (kind or type(error)).__name__
    return printable(f"{name}: {lines[0]}" if lines else name)[:300]


def printable(text: str) -> str:
    """`text` as one line: what moves the cursor or ends a line is written as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def formatted(error: BaseException) -> str:
    """The stack trace of an exception and of what led to it."""
    return "".join(traceback.format_exception(error))


def _new_file() -> str:
    import platform
    import tempfile

    try:
        number, path = tempfile.mkstemp(prefix="flowseg_jax-", suffix=".log")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{' '.join(sys.argv)}\nPython {platform.python_version()} on {platform.platform()}\n\n")
    except OSError:
        return ""
    return path

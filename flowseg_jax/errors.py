"""One error type for everything a user can put right, and how a command ends whatever happens.

A `UserError` carries one clear line: what is wrong, where (file, field, parameter, shape) and the remedy. `run_cli` prints that
line and ends the process with exit code 2. Any other exception is a mistake of ours: it is one line too, with exit code 1, and
its stack trace is kept in a file that the line names. `FLOWSEG_TRACEBACK=1` prints stack traces.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import itertools
import os
import re
import reprlib
import signal
import sys
import types
from collections.abc import Callable, Collection, Iterable
from typing import IO, Any

from flowseg_jax.traces import Traces, formatted, one_line, printable, shown

# What the system says where nothing can be written. A file that is not there, or that is a folder, is another matter.
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO)
CLOSED_PIPE = 141  # the exit code of a command that SIGPIPE ends, as shells count it
SHOWN = 60  # characters of a value in a message
MANY = 1000  # names that `did_you_mean` compares at most


class UserError(ValueError):
    """A mistake in what the user gave us: a file, a flag, a config key, a checkpoint."""


def not_writable(error: BaseException) -> str | None:
    """Why a file could not be written (no room, no right, a file system that is only read), or None for another error.

    Libraries in other languages have types of their own for it, with the system's words in their texts.
    """
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        return f"{error.strerror}: {plain(os.fsdecode(error.filename))}" if error.filename else error.strerror
    if isinstance(error, UserError):
        return None
    return next((os.strerror(code) for code in NOT_WRITABLE if os.strerror(code) in str(error)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the nearest known name, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name[:SHOWN], [one for one in known[:MANY] if len(one) <= SHOWN], n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {listed(known, 30)})"


class _Short(reprlib.Repr):
    """`repr` that looks at a few items and characters of a value alone, so that it costs the same for any value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 3, SHOWN

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()  # writing a number out takes time that grows with the square of its length
        return repr(x) if bits < 128 else f"<a number of {bits} bits>"

    def repr_dict(self, x: dict, level: int) -> str:
        if level <= 0:
            return "{...}"
        first = itertools.islice(x.items(), self.maxdict)
        items = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in first]
        return "{" + ", ".join(items + ["..."] * (len(x) > self.maxdict)) + "}"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: self.maxstring]) + "..." * (len(x) > self.maxstring)


_short = _Short()


def quoted(value: Any, limit: int = SHOWN) -> str:
    """A value from a file for a message: its `repr`, of `limit` characters of it, cut before anything longer is made.

    Whoever wrote the file may be hostile: `str(value)[:40]` writes the whole value out first, and a few bytes of a pickle can
    hold a list whose text fills any memory.
    """
    if isinstance(value, (str, bytes)):
        return repr(value[:limit]) + "..." * (len(value) > limit)
    text = _short.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def brief(error: BaseException) -> str:
    """What an error of another library says, on one line of at most 200 characters; its type if it says nothing."""
    return " ".join(str(error)[:200].split()) or type(error).__name__


def plain(text: object, limit: int = 200) -> str:
    """A name or message of someone else on one line: control characters escaped, no more than `limit` characters."""
    text = text if isinstance(text, str) else f"a {type(text).__name__}"  # str() of a hostile value may never end
    kept = printable(text[: limit + 1])
    return kept if len(text) <= limit else f"{kept[: limit - 1]}…"


def listed(items: Collection[object], limit: int = 10, between: str = ", ") -> str:
    """`a, b, c`, or the first `limit` of them `and 12 more`."""
    first = between.join(plain(item) for item in itertools.islice(items, limit))
    return first if len(items) <= limit else f"{first} and {len(items) - limit} more"


def run_cli(main: Callable[[], int | None] | str) -> None:
    """Runs a command and ends the process with its exit code.

    A `UserError` becomes one line on stderr and exit code 2, Ctrl-C becomes 130, any other exception one line and 1. No stack
    trace is printed, whichever thread or library it comes from (`traces`).

    Args:
        main: the command, or the name of one, "package.module:function", which is imported here: so a Ctrl-C while libraries
            are imported is as clean as later. A file that is started calls this before it imports anything else.
    """
    traces, handler = Traces(), signal.getsignal(signal.SIGINT)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names and texts that the terminal's encoding lacks
    try:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        traces.install()
        command = _find(main) if isinstance(main, str) else main
        code = command() or 0
        if traces.first:
            tell(f"note: {traces.first}; {traces.place()}")
    except UserError as error:
        tell(f"{formatted(error) if shown() else ''}error: {printable(str(error))}")
        traces.drop()
        code = 2
    except BrokenPipeError:  # `... | head` closed the pipe of a command whose work is what it prints
        code = CLOSED_PIPE
    except KeyboardInterrupt:
        code = _interrupted(traces)
    except Exception as error:
        if _from_interrupt(error):
            code = _interrupted(traces)
        elif why := not_writable(error):
            tell(f"{formatted(error) if shown() else ''}error: cannot write: {why}; make room, or choose another place")
            traces.drop()
            code = 2
        else:
            traces.add(one_line(error), formatted(error))
            tell(f"error: unexpected {one_line(error)}; {traces.place()}")
            code = 1
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        sys.stdout.flush()
    except OSError:
        mute(sys.stdout)
        code = code or CLOSED_PIPE
    sys.exit(code)


def _find(name: str) -> Callable[[], int | None]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _from_interrupt(error: BaseException | None) -> bool:
    """Whether a Ctrl-C caused an exception: libraries wrap it, for example while they are imported."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        if isinstance(error, KeyboardInterrupt):
            return True
        visited.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Ctrl-C. During an import it ends the process: extensions print traces or crash where their import is interrupted."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _interrupted(traces: Traces) -> int:
    tell("interrupted")
    traces.drop()
    traces.ending = True
    return 130


def tell(line: str) -> None:
    """Writes a line to stderr, if anybody reads that."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        mute(sys.stderr)


def mute(stream: IO[str]) -> None:
    """Lets everything that is written to stdout or stderr vanish, for a pipe that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(line: str, code: int) -> None:
    """Ends the process at once, from any thread, with a line on stderr: for when going on does harm or is not possible."""
    tell(line)
    os._exit(code)


def short_reason(error: BaseException) -> str:
    """The first sentence of an error's text, or its type."""
    text = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's, at the end of a long sentence
        return os.strerror(int(code[1]))
    return text.splitlines()[0].split(". See ")[0].split(" [")[0][:200] if text else type(error).__name__

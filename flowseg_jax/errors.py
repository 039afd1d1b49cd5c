"""One error type for everything a user can put right.

A `UserError` carries one clear line: what is wrong, where (file, field, parameter, shape) and the remedy. The command line
entry points print that line and exit with code 2; a stack trace is reserved for our own mistakes.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in what the user gave us: a file, a flag, a config key, a checkpoint."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the nearest known name, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"


def run(main: Callable[[], int | None]) -> None:
    """Runs a command: a `UserError` becomes one line on stderr and exit code 2, Ctrl-C becomes 130."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `... | head` closed the pipe: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)

"""Static HTML pages without external resources, from the Jinja2 templates beside this file, which escape what they show.

Every page ends with where it comes from: what its caller says (model, checkpoint), the date, the version and the command.
"""

from __future__ import annotations

import base64
import datetime
import functools
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup as Html

import flowseg_jax
from flowseg_jax.checkpoints import storage
from flowseg_jax.errors import UserError

__all__ = ["Html", "data_uri", "html", "join", "pieces", "render", "write"]

PROGRAMS = ("flowseg_jax", "experiments", "benchmarks")  # what `python -m` runs of ours
SCRIPTS = ("train.py", "eval.py", "predict.py")
INLINE_BYTES = 8 << 20  # of a picture that is put into a page


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("flowseg_jax.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html(template: str, *values: Any) -> Html:
    """Fills the `{}` of a template, which is written in our code; a value that is no HTML becomes escaped text."""
    return Html(template).format(*values)


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Pieces one after the other; those that are no HTML are escaped."""
    return Html(between).join(parts)


def pieces() -> Any:
    """The macros of `pieces.html`, as functions that return HTML."""
    return _templates().get_template("pieces.html").module


def render(template: str, *, origin: Sequence[str] = (), **values: Any) -> Html:
    """A template of this package, filled; `origin`: lines at its end about what it shows, model and checkpoint above all."""
    now = datetime.datetime.now(datetime.UTC)
    written = {"date": f"{now:%Y-%m-%d %H:%M} UTC", "version": flowseg_jax.__version__, "command": command(sys.orig_argv)}
    return Html(_templates().get_template(template).render(values, origin=origin, written=written))


def command(argv: Sequence[str]) -> str:
    """What `sys.orig_argv` says as one would type it; "" for a program that is not of this project."""
    words = list(argv[1:])
    if words[:1] == ["-m"] and words[1:] and words[1].partition(".")[0] in PROGRAMS:
        return shlex.join(["python", *words])
    if words and Path(words[0]).name == "flowseg":
        return shlex.join(["flowseg", *words[1:]])
    return shlex.join(["python", *words]) if words and words[0] in SCRIPTS else ""


def data_uri(file: Path) -> str:
    """A PNG as the source of an `<img>` that needs no other file.

    Raises:
        UserError: it cannot be read, is no PNG, or is larger than `INLINE_BYTES`.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(INLINE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): evaluate again") from None
    if len(content) > INLINE_BYTES or not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{file} is not a picture that an evaluation kept (a PNG of at most {INLINE_BYTES >> 20} MiB)")
    return "data:image/png;base64," + base64.b64encode(content).decode()


def write(path: Path, template: str, **values: Any) -> None:
    """Writes a page at once.

    Args:
        path: the HTML file; its folder is made.
        template: which one; "page.html" takes `title` and `body`, a list of pieces (one that is no HTML is shown as text).
        values: what it is filled with.

    Raises:
        UserError: the place cannot be written to.
    """
    text = render(template, **values)
    storage.write_text_atomic(path, text.encode("utf-8", "backslashreplace").decode())  # half a character may stand in a text

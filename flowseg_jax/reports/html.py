"""Static HTML pages without external resources, from the Jinja2 templates beside this file, which escape what they show."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup as Html

from flowseg_jax.checkpoints import storage

__all__ = ["Html", "html", "join", "pieces", "render", "write"]


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


def render(template: str, **values: Any) -> Html:
    """A template of this package, filled."""
    return Html(_templates().get_template(template).render(values))


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

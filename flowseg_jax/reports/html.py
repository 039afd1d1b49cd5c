"""Static HTML pages without external resources: the frame and the look that all of the project's pages share."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowseg_jax.checkpoints import storage


class Html(str):
    """A piece of a page or a picture: what came from outside is escaped in it. Only `html` and `join` make one."""

    __slots__ = ()


def html(template: str, *values: Any) -> Html:
    """Fills the `{}` of a template, which is written in our code, with values, which may say anything.

    Args:
        template: HTML or SVG; attributes stand in double quotes.
        values: a piece of HTML stays as it is, a number may have a format (`{:.1f}`), everything else becomes escaped text.
    """
    return Html(template.format(*map(_safe, values)))


def join(pieces: Iterable[Any], between: str = "") -> Html:
    """Pieces one behind the other; those that are no HTML are escaped."""
    return Html(between.join(str(_safe(piece)) for piece in pieces))


def _safe(value: Any) -> Any:
    if isinstance(value, Html) or (isinstance(value, numbers.Real) and not isinstance(value, bool)):
        return value
    return Html(escape(str(value), quote=True))


def write(path: Path, title: str, body: Sequence[Html]) -> None:
    """Writes a page at once.

    Args:
        path: the HTML file; its folder is made.
        title: of the document.
        body: HTML; a piece that is none is shown as text.

    Raises:
        UserError: the place cannot be written to.
    """
    frame = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<style>{}</style></head>\n<body><main>\n{}\n</main></body></html>\n"
    )
    text = html(frame, title, Html(_STYLE), join(body, "\n"))
    storage.write_text_atomic(path, text.encode("utf-8", "backslashreplace").decode())  # half a character may stand in a text


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1f2328; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0 0 4px; font-size: 28px; }
h2 { margin: 40px 0 4px; font-size: 20px; }
h3 { margin: 24px 0 0; font-size: 16px; }
h3.good { color: #1a7f37; } h3.failed { color: #cf222e; } h3.random { color: #57606a; }
.about { margin: 0 0 10px; color: #57606a; max-width: 90ch; }
table { border-collapse: collapse; width: 100%; margin: 12px 0 20px; background: #fff; border: 1px solid #d8dee4; }
th, td { padding: 6px 10px; text-align: right; font-variant-numeric: tabular-nums; }
th, td { border-top: 1px solid #eaeef2; vertical-align: top; }
thead th { background: #eef1f4; border-top: 0; font-weight: 600; white-space: nowrap; }
tr > th:first-child { text-align: left; }
tbody th { font-weight: 500; }
.note { color: #6e7781; font-size: 12.5px; font-weight: 400; }
.of { color: #8c959f; font-size: 12.5px; }
.gallery { display: grid; gap: 14px; margin-top: 8px; }
figure { margin: 0; padding: 12px; background: #fff; border: 1px solid #d8dee4; border-radius: 6px; }
figure img { max-width: 100%; height: auto; display: block; margin: 8px 0 6px; }
.said { font-weight: 600; }
.family { float: right; margin-left: 8px; padding: 0 8px; border-radius: 10px; background: #eef1f4; }
.family { color: #57606a; font-size: 12.5px; font-weight: 500; }
.swatch { display: inline-block; width: 10px; height: 10px; margin: 0 4px 0 10px; border-radius: 2px; }
.error { color: #cf222e; }
@media (max-width: 700px) { table { display: block; overflow-x: auto; } }
"""

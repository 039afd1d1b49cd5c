"""Static HTML pages without external resources: the frame and the look that all of the project's pages share."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from flowseg_jax import storage


def text(value: object) -> str:
    """A value as text of a page or of an attribute, escaped."""
    return html.escape(str(value), quote=True)


def write(path: Path, title: str, body: Sequence[str]) -> None:
    """Writes a page at once.

    Args:
        path: the HTML file; its folder is made.
        title: not escaped yet.
        body: HTML.

    Raises:
        UserError: the place cannot be written to.
    """
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
    page += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    page += f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    storage.replace_text(path, page)


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

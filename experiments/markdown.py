"""Tables of the pages."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """A table in Markdown; the first `text` columns are words, the others numbers."""
    lines = [head, ["---"] * text + ["--:"] * (len(head) - text), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

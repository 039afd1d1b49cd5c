"""The numbers that the package decides by: how much is read, kept, shown and waited for.

They stand in the code, each with its unit, and once more in `tests/golden/limits.txt`. Like a flag, such a number is an
interface: that it is another one is seen here, and told in the changelog where a user meets it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def numbers(path: Path) -> Iterator[str]:
    """`NAME = value` of the constants of a module that are written as numbers, or as tuples of them."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not ast.unparse(node.targets[0]).replace(", ", "").strip("()_").isupper():
            continue
        parts = list(ast.walk(node.value))
        if any(isinstance(part, ast.Name | ast.Call) for part in parts):
            continue
        if all(isinstance(part.value, int | float) for part in parts if isinstance(part, ast.Constant)):
            value = eval(compile(ast.Expression(node.value), str(path), "eval"))
            if value:
                yield f"{ast.unparse(node.targets[0])} = {value!r}"


def test_the_numbers_that_are_decided_by():
    found = [
        f"{path.relative_to(ROOT).as_posix()}: {line}"
        for package in ("flowseg_jax", "convert_weights")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in numbers(path)
    ]
    assert found == (ROOT / "tests" / "golden" / "limits.txt").read_text(encoding="utf-8").splitlines()

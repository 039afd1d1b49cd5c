"""The numbers that the package decides by, and what a caller gets who says nothing.

They stand in the code, and once more in `tests/golden/limits.txt`: constants of modules, defaults of public functions and of
the fields of public dataclasses. Like a flag, such a number is an interface: that it is another one is seen here, and told in
the changelog where a user meets it. `python -m tests.test_limits` writes the file anew.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ROOT / "tests" / "golden" / "limits.txt"


def number(node: ast.expr | None) -> str:
    """The value of what is written as a number, true or false, or as a tuple of them; "" for anything else."""
    parts = list(ast.walk(node)) if node else []
    wrong = (ast.Name, ast.Call, ast.Lambda, ast.Dict, ast.List, ast.Set, ast.JoinedStr)
    constants = [part.value for part in parts if isinstance(part, ast.Constant)]
    if (
        not constants
        or any(isinstance(part, wrong) for part in parts)
        or not all(isinstance(x, int | float) for x in constants)
    ):
        return ""
    return repr(eval(compile(ast.Expression(node), "", "eval")))


def numbers(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """`NAME = value` of constants and fields, `function(argument=value)` of defaults, in the order in which they stand."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and (value := number(node.value)):
            yield f"{prefix}{ast.unparse(node.targets[0])} = {value}"
        elif isinstance(node, ast.AnnAssign) and (value := number(node.value)):
            yield f"{prefix}{ast.unparse(node.target)} = {value}"
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from numbers(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            given = node.args
            plain = list(zip(reversed(given.posonlyargs + given.args), reversed(given.defaults), strict=False))[::-1]
            pairs = [*plain, *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
            if shown := [f"{one.arg}={value}" for one, default in pairs if (value := number(default))]:
                yield f"{prefix}{node.name}({', '.join(shown)})"


def found() -> list[str]:
    return [
        f"{path.relative_to(ROOT).as_posix()}: {line}"
        for package in ("flowseg_jax", "convert_weights")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in numbers(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_numbers_and_defaults_are_those_that_are_written_down():
    assert found() == WRITTEN.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    WRITTEN.write_text("".join(f"{line}\n" for line in found()), encoding="utf-8")

"""No generator outlives the loop whose variables it reads: it would see their last values in every round.

`[(f(x, y) for x in xs) for y in ys]` makes generators that all read the last y when they are run. Ruff's B023 finds functions
that do so, but neither generator expressions nor the functions that a lazy `map` or `filter` keeps; this finds them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("flowseg_jax", "convert_weights", "configs", "tests", "benchmarks", "examples")
CALL_LATER = {"map", "filter", "starmap", "takewhile", "dropwhile", "accumulate", "groupby"}  # keep a function
# Called with an iterator, these keep it instead of running it to its end.
KEEP = CALL_LATER | {"zip", "enumerate", "iter", "chain", "from_iterable", "islice", "pairwise"}
KEEP |= {"append", "appendleft", "add", "insert", "setdefault", "put", "partial"}
COMPREHENSIONS = (ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)
FUNCTIONS = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef)


def names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def bound(comprehension: ast.AST) -> set[str]:
    return set().union(*(names(part.target, ast.Store) for part in comprehension.generators))


def called(call: ast.Call) -> str:
    """The name of what is called; of a method called `map` or `filter` nothing is known."""
    if isinstance(call.func, ast.Attribute):
        return "" if call.func.attr in ("map", "filter") else call.func.attr
    return getattr(call.func, "id", "")


def read_later(node: ast.AST) -> set[str]:
    """The names from outside that a generator expression, or the functions given to a lazy call, read when they are run."""
    if isinstance(node, ast.GeneratorExp):
        first, *others = node.generators  # what the first one goes through is evaluated at once
        later = [node.elt, *first.ifs, *others]
        return set().union(*(names(part, ast.Load) for part in later)) - bound(node)
    kept = [a for a in node.args if isinstance(a, ast.Lambda)] if called(node) in CALL_LATER else []
    return set().union(*(names(f.body, ast.Load) - {a.arg for a in f.args.args} for f in kept))


def late(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, name) of each loop variable that a generator may read after its loop has gone on."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.GeneratorExp) or (isinstance(node, ast.Call) and called(node) in KEEP)):
            continue
        wanted, child, parent = read_later(node), node, parents.get(node)
        while parent is not None and wanted and not isinstance(parent, FUNCTIONS):
            if isinstance(parent, ast.Call) and child is not parent.func and called(parent) not in KEEP:
                break  # run to its end, or looked at for as long as it is wanted, by what is called
            if isinstance(parent, ast.For | ast.AsyncFor) and child is parent.iter:
                break  # run by the loop
            if isinstance(parent, ast.Starred | ast.YieldFrom | ast.Compare):
                break
            if isinstance(parent, ast.Assign) and child is parent.value and isinstance(parent.targets[0], ast.Tuple | ast.List):
                break  # taken apart
            if isinstance(parent, ast.comprehension) and child is parent.iter:
                child, parent = parents[parent], parents[parents[parent]]  # run when what it is in is run
                if not isinstance(child, ast.GeneratorExp):
                    break
                continue
            loops = bound(parent) if isinstance(parent, COMPREHENSIONS) else set()
            if isinstance(parent, ast.For | ast.AsyncFor):
                loops = names(parent.target, ast.Store)
            found += [(node.lineno, name) for name in sorted(wanted & loops)]
            wanted -= loops
            child, parent = parent, parents.get(parent)
    return found


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("(a, b), (c, d) = (((i[n], u[n]) for n in (0, 1)) for i, u in pairs)", ["i", "u"]),
        ("x = [(f(a, b) for a in xs) for b in ys]", ["b"]),
        ("x = {b: (f(a) for a in xs if a > b) for b in ys}", ["b"]),
        ("x = [map(lambda a: a + b, xs) for b in ys]", ["b"]),
        ("x = [enumerate(f(a, b) for a in xs) for b in ys]", ["b"]),
        ("x = [(a for a in (f(c, b) for c in xs)) for b in ys]", ["b"]),
        ("for b in ys:\n    kept.append(f(a, b) for a in xs)", ["b"]),
        ("for b in ys:\n    if b:\n        kept[b] = (f(a, b) for a in xs)", ["b"]),
        # The same, run in time, or without the loop's variable.
        ("x = [sum(f(a, b) for a in xs) for b in ys]", []),
        ("x = [[f(a, b) for a in xs] for b in ys]", []),
        ("x = [(a for a in b) for b in ys]", []),
        ("x = [a + b for b in ys for a in (f(a, b) for a in xs)]", []),
        ("x = [sum(map(lambda a: a + b, xs)) for b in ys]", []),
        ("for b in ys:\n    for c in (f(a, b) for a in xs):\n        print(c)", []),
        ("for b in ys:\n    c, d = (f(a, b) for a in xs)", []),
        ("for b in ys:\n    kept.append(lambda: (f(a, b) for a in xs))", []),  # a function: B023 finds it
    ],
)
def test_it_finds_them(code, names):
    assert [name for _, name in late(ast.parse(code))] == names


@pytest.mark.parametrize("folder", SOURCES)
def test_no_generator_outlives_its_loop(folder):
    found = {
        f"{path.relative_to(ROOT)}:{line}": name
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in late(ast.parse(path.read_text()))
    }
    assert not found

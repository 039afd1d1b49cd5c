"""What may import what: read from the source, imports inside functions included, those for type checkers left out."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("flowseg_jax", "convert_weights", "experiments", "benchmarks", "configs")


def room(module: str) -> str:
    """The room of a module: `flowseg_jax.data.masks` -> "data", `flowseg_jax.types` -> "types", else the top-level package."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] or first if first == "flowseg_jax" else first


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not is_for_type_checkers(child):
            yield from statements(child)


def modules() -> dict[str, ast.Module]:
    """{dotted name: source tree} of every module of ours."""
    files = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return dict(zip(names, (ast.parse(path.read_text()) for path in files), strict=True))


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a tree imports."""
    for node in statements(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:  # relative imports are forbidden by ruff
            # What is imported from a package may be a module in it.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inside]
        yield from (name for name in names if name.partition(".")[0] in OURS)


IMPORTS = {name: sorted({*imported(tree)}) for name, tree in MODULES.items()}
EDGES = {(room(name), room(other)) for name, others in IMPORTS.items() for other in others} - {
    (r, r) for r in map(room, MODULES)
}


def users(pair: tuple[str, str]) -> list[str]:
    """The modules to change, as lines of the message."""
    return [f"{name} imports {o}" for name, others in IMPORTS.items() for o in others if (room(name), room(o)) == pair]


def allowed(importer: str, other: str) -> bool:
    """The rules of CONTRIBUTING.md for a pair of different rooms."""
    only = {  # these import nothing else of ours
        "types": set(),
        "ops": set(),
        "models": {"ops", "types", "errors", "fields"},  # fields: reads a config dataclass from plain values
        "losses": {"ops", "types", "errors", "models"},
    }
    never = {"data": {"models"}, "training": {"evaluation"}, "evaluation": {"training"}}
    if importer in only:
        return other in only[importer]
    if other == "cli":  # `python -m flowseg_jax` is the command line
        return importer in ("experiments", "benchmarks", "__main__")
    if other in ("experiments", "benchmarks"):  # programs over the package, no part of it
        return False
    return other not in never.get(importer, set())


@pytest.mark.parametrize("importer", sorted({importer for importer, _ in EDGES}))
def test_rooms_import_what_they_may(importer):
    broken = [pair for pair in sorted(EDGES) if pair[0] == importer and not allowed(*pair)]
    assert not broken, [line for pair in broken for line in users(pair)]


def circles() -> set[tuple[str, ...]]:
    """The largest sets of rooms of which each reaches each."""
    rooms = {r for pair in EDGES for r in pair}
    reach = {r: {b for a, b in EDGES if a == r} for r in rooms}
    for middle in rooms:
        for r in rooms:
            if middle in reach[r]:
                reach[r] |= reach[middle]
    return {tuple(sorted(b for b in reach[r] if r in reach[b])) for r in rooms if r in reach[r]}


def test_no_circle_between_rooms():
    found = circles()
    assert not found, [line for circle in found for pair in sorted(EDGES) if {*pair} <= {*circle} for line in users(pair)]


def test_the_rules_are_read_from_real_imports():
    assert ("data", "types") in EDGES and ("models", "ops") in EDGES and len(MODULES) > 150
    assert "flowseg_jax.data.images" in IMPORTS["flowseg_jax.data.collate"]  # `from a.package import a_module`
    tree = ast.parse("if TYPE_CHECKING:\n    import flowseg_jax.data\ndef f():\n    from flowseg_jax import types, cli")
    assert [*imported(tree)] == ["flowseg_jax.types", "flowseg_jax.cli"]

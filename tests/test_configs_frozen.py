"""A config cannot be changed after it was read."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_all_config_dataclasses_are_frozen():
    """Every dataclass named ...Config, ...Options or Profile, wherever it is defined."""
    found = {}
    for folder in ("flowseg_jax", "convert_weights"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Options", "Profile")):
                    decorators = [
                        d for d in node.decorator_list if "dataclass" in ast.unparse(d) and "register" not in ast.unparse(d)
                    ]
                    if decorators:
                        found[f"{file.relative_to(ROOT)}:{node.name}"] = "frozen=True" in ast.unparse(decorators[0])
    assert len(found) >= 15
    assert [name for name, frozen in found.items() if not frozen] == []

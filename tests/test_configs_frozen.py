"""A config, and everything else that is passed on, cannot be changed after it was made."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNTERS = {"Statistics", "SplitReport", "SetReport", "ValidationReport"}  # filled while a data set is gone through


def test_all_dataclasses_but_those_that_count_are_frozen():
    frozen = {}
    for folder in ("flowseg_jax", "convert_weights"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef):
                    decorators = [
                        d for d in node.decorator_list if "dataclass" in ast.unparse(d) and "register" not in ast.unparse(d)
                    ]
                    if decorators:
                        frozen[f"{file.relative_to(ROOT)}:{node.name}"] = "frozen=True" in ast.unparse(decorators[0])
    assert sum(name.endswith(("Config", "Options", "Profile")) for name in frozen) >= 15
    assert {name.partition(":")[2] for name, fixed in frozen.items() if not fixed} == COUNTERS

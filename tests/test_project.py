from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("tensorflow", "torch")


def requirements():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def test_requirements_parse_and_name_neither_tensorflow_nor_torch():
    names = [requirement.name for requirement in requirements()]
    assert len(names) == len(set(names))
    assert not set(names) & {"tensorflow", "tensorflow-cpu", "torch"}
    assert all(requirement.specifier for requirement in requirements())


def test_this_environment_satisfies_them():
    from importlib.metadata import version

    wrong = [str(r) for r in requirements() if not r.specifier.contains(version(r.name), prereleases=True)]
    assert wrong == []


def test_project_file_reads_requirements_and_has_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["metadata"]["hooks"]["requirements_txt"] == {"files": ["requirements.txt"]}
    extras = {"test", "dev", "docs", "app", "wandb", "mlflow", "parquet", "smollm2", "gcs", "tpu", "cuda12"}
    assert set(project["project"]["optional-dependencies"]) == extras


def modules(package: str):
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_importing_everything_needs_neither_tensorflow_nor_torch(tmp_path):
    """Every module of the package is imported where both packages are present but fail, and say so, when they are imported."""
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"print('imported {name}')\nraise ImportError('{name} is out of bounds')\n"
        )
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    names = [name for package in ("flowseg_jax", "convert_weights") for name in modules(package)]
    names += [f"flowseg_jax.{name}" for name in modules("configs")]
    if importlib.util.find_spec("gradio") is None:  # the extra `app` alone brings it
        names.remove("flowseg_jax.app.page")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def without_encoding(tree: ast.AST) -> list[int]:
    """The lines that open, read or write a text file in whatever encoding the machine has."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(isinstance(value, ast.Starred) for value in node.args):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = {"open": 0 if isinstance(node.func, ast.Attribute) else 1, "read_text": 0, "write_text": 1}.get(name)
        given = [ast.unparse(value) for value in node.args[first:]] if first is not None else []
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "open":
            mode = given[0] if given else named.get("mode", "'r'")
            if not re.fullmatch(r"'[rwaxt+]+'", mode):  # bytes, or something else that can be opened
                continue
            given = given[2:]
        if first is not None and "utf-8" not in named.get("encoding", given[0] if given else ""):
            found.append(node.lineno)
    return found


def test_text_files_are_utf_8_on_every_machine():
    code = "open(x)\nopen(x, 'w')\np.read_text()\np.write_text(t)\np.open('a')\n"
    assert without_encoding(ast.parse(code)) == [1, 2, 3, 4, 5]
    code = "open(x, 'rb')\nopen(x, 'w', encoding='utf-8')\np.read_text('utf-8-sig')\np.write_text(t, encoding='utf-8')\n"
    assert without_encoding(ast.parse(code + "s.open(p)\nopen(x, 'r', -1, 'utf-8')\n")) == []
    paths = [path for package in ("flowseg_jax", "convert_weights") for path in (ROOT / package).rglob("*.py")]
    found = {path.relative_to(ROOT): without_encoding(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    assert {str(path): lines for path, lines in found.items() if lines} == {}


def test_json_that_people_read_has_a_space_a_level_and_two_where_hugging_face_has():
    found = {
        (package, keyword.value.value)
        for package in ("flowseg_jax", "convert_weights")
        for path in (ROOT / package).rglob("*.py")
        for keyword in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(keyword, ast.keyword) and keyword.arg == "indent" and isinstance(keyword.value, ast.Constant)
    }
    assert {one for one in found if one[1] is not None} == {("flowseg_jax", 1), ("convert_weights", 2)}

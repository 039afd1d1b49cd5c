"""The package as a product: a wheel that works in an empty folder, and a public API that is cheap to import."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flowseg_jax

ROOT = Path(__file__).resolve().parent.parent


def test_the_public_api_is_imported_when_it_is_used():
    code = (
        "import sys, flowseg_jax\n"
        "assert flowseg_jax.__version__\n"
        "print(sorted({'jax', 'flax', 'numpy', 'transformers'} & set(sys.modules)))\n"
        "print(flowseg_jax.load.__module__, flowseg_jax.Segmentor.__name__, flowseg_jax.FlowSegConfig.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "flowseg_jax.inference.loading Segmentor FlowSegConfig"]


def test_the_public_api_has_nothing_else():
    assert {"FlowSegConfig", "Segmentor", "__version__", "load"} == set(flowseg_jax.__all__) <= set(dir(flowseg_jax))
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = flowseg_jax.laod


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # With what the extra `test` installs the build needs no network; without it, pip fetches the build's requirements.
    offline = importlib.util.find_spec("hatchling") and importlib.util.find_spec("hatch_requirements_txt")
    options = ["--quiet", "--no-deps", *["--no-build-isolation"] * bool(offline)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ROOT], check=True)
    (file,) = folder.iterdir()
    return file


@pytest.mark.slow
def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = file.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    information = f"flowseg_jax-{flowseg_jax.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"flowseg_jax", "convert_weights", information}
    assert {"flowseg_jax/py.typed", "convert_weights/py.typed", "flowseg_jax/configs/__init__.py"} <= set(names)
    for folder in ("configs", "checkpoints/shapes_tiny"):
        files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert {f"flowseg_jax/{file}" for file in files if "__pycache__" not in file} <= set(names)
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = {str(canonical(Requirement(line))) for line in lines if line}
    required = map(Requirement, re.findall(r"^Requires-Dist: (.*)$", metadata, re.M))
    assert {str(canonical(requirement)) for requirement in required if requirement.marker is None} == wanted


def canonical(requirement: Requirement) -> Requirement:
    requirement.name = canonicalize_name(requirement.name)
    return requirement


@pytest.mark.slow
def test_the_wheel_predicts_in_an_empty_folder(wheel, tmp_path):
    """Installed into a fresh environment that finds the dependencies of this one, and none of this one's flowseg_jax."""
    place = tmp_path / "environment"
    venv.create(place)
    python = place / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    code = "import site; print(site.getsitepackages()[0])"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))  # after its own packages

    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "examples/scenes/06.png", folder / "image.png")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

    def flowseg(*arguments: str) -> str:
        command = [place / "bin" / "flowseg", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert flowseg("--version") == f"flowseg-jax {flowseg_jax.__version__}\n"
    where = "import flowseg_jax, convert_weights; print(flowseg_jax.__file__); print(convert_weights.__file__)"
    done = subprocess.run([python, "-c", where], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert all(Path(line).is_relative_to(packages) for line in done.stdout.splitlines())
    flowseg("predict", "--image=image.png", "--text=green triangle")
    (found,) = (folder / "runs/predictions").glob("*.json")
    answer = json.loads(found.read_text())
    assert answer["found"] and answer["area"] > 0 and answer["score"] > 0.5
    assert json.loads(flowseg("plan", "--config=stage3_mixed", "--shardings=fsdp=16"))

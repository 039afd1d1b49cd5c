"""The README's first example, the figures, the example scenes, and what the documentation names: paths, links, flags, keys."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowseg_jax import experiment

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MADE = ("runs/", "data/", "site/", "weights/", "converted/", "dataset/", "my_", "images/", "photos/", "masks/", "stage1/")


def run(*arguments: str | Path, **environment: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_first_example_of_the_readme_prints_what_the_readme_says():
    text = (ROOT / "README.md").read_text()
    code, said = (re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1] for language in ("python", "text"))
    form = re.compile(r"(.*): score (\d\.\d\d), (\d+) pixels")
    printed, expected = ([form.fullmatch(line).groups() for line in lines.splitlines()] for lines in (run("-c", code), said))
    assert len(printed) == len(expected) > 0
    for (name, score, area), (expected_name, expected_score, expected_area) in zip(printed, expected, strict=True):
        assert name == expected_name
        assert float(score) == pytest.approx(float(expected_score), abs=0.011)
        assert int(area) == pytest.approx(int(expected_area), abs=2)  # a logit near 0 may round to the other side elsewhere


def test_the_figure_of_the_architecture_is_what_its_script_draws(tmp_path):
    script(ROOT / "docs/figures/make_architecture.py").draw(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == (ROOT / "docs/figures/architecture.svg").read_bytes()


def test_figures_and_tables_of_what_grows_are_those_of_the_committed_results(tmp_path):
    page = tmp_path / "scale.md"
    page.write_text((ROOT / "docs/scale.md").read_text())
    script(ROOT / "docs/figures/make_scale.py").main(tmp_path, page)
    assert page.read_text() == (ROOT / "docs/scale.md").read_text()
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn == sorted(path.name for path in (ROOT / "docs/figures").glob("scale-*.svg")) and len(drawn) == 5
    for name in drawn:
        assert (tmp_path / name).read_bytes() == (ROOT / "docs/figures" / name).read_bytes()


@pytest.mark.slow
def test_the_figure_of_an_answer_is_what_its_script_draws(tmp_path):
    run(ROOT / "docs/figures/make_example.py", tmp_path / "figure.png")
    drawn, shown = (Image.open(path).convert("RGB") for path in (tmp_path / "figure.png", ROOT / "docs/figures/example.png"))
    assert drawn.size == shown.size
    assert np.abs(np.subtract(drawn, shown, dtype=np.int16)).mean() < 1


@pytest.mark.slow
def test_the_example_scenes_are_what_their_script_makes(tmp_path):
    scenes = ROOT / "examples" / "scenes"
    script(ROOT / "examples/make_scenes.py").write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in scenes.iterdir())
    made, committed = ([json.loads(line) for line in (d / "scenes.jsonl").read_text().splitlines()] for d in (tmp_path, scenes))
    assert made == committed
    for path in tmp_path.glob("*.png"):
        assert np.abs(np.subtract(Image.open(path), Image.open(scenes / path.name), dtype=np.int16)).max() <= 8  # JPEG decoders


def test_the_example_scenes_are_a_valid_data_set():
    assert "clean" in run("-m", "flowseg_jax", "data", "validate", "jsonl", "examples/scenes")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_and_links_lead_somewhere(page):
    text = page.read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", link)}
    missing = [link for link in links if not (page.parent / link).exists()]
    roots = (
        "flowseg_jax",
        "convert_weights",
        "configs",
        "tests",
        "docs",
        "examples",
        "experiments",
        "benchmarks",
        "notebooks",
        "checkpoints",
    )
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(roots)})/[\w./+-]*\w(?:/|\b))", text)
    missing += [path for path in named if not (ROOT / path).exists() and not path.startswith(MADE)]
    assert missing == []


def commands(text: str):
    """The command lines of a page that start flowseg or one of its three scripts, each as a list of words."""
    text = re.sub(r"\\\n\s*", " ", text)
    for found in re.finditer(r"(?:flowseg|python -m flowseg_jax|python (train|eval|predict)\.py)((?: [^\s`|&;#>]+)+)", text):
        words = found[2].split()
        yield [found[1], *words] if found[1] else words


@functools.cache
def usage(*command: str) -> str:
    return run("-m", "flowseg_jax", *command, "--help")


GROUPS = ("data", "analyze")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_of_commands_exist(page):
    known = re.findall(r"^  (\S+) ", usage().partition("commands:")[2], re.MULTILINE)
    wrong = []
    for words in commands(page.read_text()):
        if words[0] not in known:
            continue  # prose
        plan = words[0] == "train" and "--plan" in words
        name = words[: 2 if words[0] in GROUPS and len(words) > 1 and words[1].islower() else 1]
        about = usage(*name) + (usage("plan") if plan else "")
        flags = {word.partition("=")[0].rstrip(")(.,:\"'") for word in words if word.startswith("--")}
        wrong += [
            f"{' '.join(name)} {flag}"
            for flag in flags
            if not flag.startswith("--config.") and not re.search(rf"{flag}\b", about)
        ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_config_keys_exist(page):
    keys = set(experiment.dotted_keys(experiment.load([])[0]))
    named = {key.rstrip(".") for key in re.findall(r"--config\.([a-z_0-9.]+)", page.read_text())}
    assert named - keys - {"key", "a.b", "mesh"} == set()


def test_every_page_is_in_the_navigation_of_the_site():
    named = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md", "contributing.md", "changelog.md"}


def test_the_citation_names_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert "FlowSeg: Dynamic Semantic Guidance for LLM-Conditioned Segmentation" in text
    assert "2605.29461" in text

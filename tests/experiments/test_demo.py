"""What the demo says at its beginning and at its end."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from experiments import command_line, demo
from flowseg_jax.evaluation.report import ReportRow
from flowseg_jax.system.paths import ROOT


def row(label: str, ciou: float, step: int, oracle: float = 80.0) -> ReportRow:
    return ReportRow(label, {"val": {"ciou": ciou, "oracle_ciou": oracle, "checkpoint": {"step": step, "digest": None}}})


def test_the_plan_names_every_part_with_its_minutes():
    text = command_line.demo_plan(Path("runs/demo"), 1200)
    assert "in about 10 minutes" in text and "5. trains a mask decoder from nothing, 1,200 steps" in text
    lines = [line for line in text.splitlines() if line.endswith(" min")]
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1
    assert "10 minutes on two CPU cores" in (ROOT / "README.md").read_text()


def test_the_numbers_are_explained_beside_the_shipped_ones():
    rows = (
        row("shipped", 65.8, 9000),
        row("shuffled", 9.2, 9000),
        row("untrained", 3.1, 0),
        row("this run", 21.4, 1000),
        row("s", 11.0, 1000),
    )
    text = demo.explain(*rows)
    for words in (
        "This run: 21.4 on val after 1,000 steps; 3.1 without",
        "Its mask decoder, which chooses by the sentence, began with nothing.",
        "65.8",
        "9 times as many",
        "80.0",
        "11.0 for this run, 9.2",
    ):
        assert words in text


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_last_commands_work_as_pasted(elsewhere, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path if elsewhere else ROOT)
    lines = demo.what_next(Path("runs/demo")).splitlines()
    commands = [shlex.split(line.partition(":  ")[2]) for line in lines if "predict" in line]
    assert len(commands) == 2 and commands[1][-1] == "--workdir=runs/demo"
    for words in commands:
        assert Path(words[0]).is_file() and words[1:4] == ["-m", "flowseg_jax", "predict"]
        (image,) = [word.partition("=")[2] for word in words if word.startswith("--image=")]
        (text,) = [word.partition("=")[2] for word in words if word.startswith("--text=")]
        assert Path(image).is_file() and text in (ROOT / "examples" / "scenes" / "scenes.jsonl").read_text()
        assert not [word for word in words if word.isupper()]  # a word to be replaced

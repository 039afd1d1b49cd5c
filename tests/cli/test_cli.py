"""The commands as a user runs them: one clear line and exit code 2 for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowseg_jax import cli
from flowseg_jax.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[2]


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "train.py", "--config.model.decoder.queres=3", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "model.decoder.queries" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (cli.train, ["--workdir=/proc/nowhere"], "workdir /proc/nowhere cannot be written"),
        (cli.train, ["--wrkdir=x"], "unrecognized arguments"),
        (cli.train, ["--config=configs/none.py"], "configs/none.py"),
        (cli.evaluate, ["--data=nowhere"], "nowhere: not a prepared data set"),
        (cli.evaluate, ["--checkpoint=a", "--workdir=b"], "give one of them"),
        (cli.evaluate, ["--workdir=nowhere"], "holds no trained model"),
        (cli.evaluate, ["--checkpoint=nowhere"], "no model directory .*nowhere"),
        (cli.evaluate, ["--batch-size=0"], "--batch-size: '0' is not a whole number from 1"),
        (cli.evaluate, ["--images=-2"], "--images: '-2' is not a whole number from 1"),
        (cli.evaluate, ["--fsdp=0"], "--fsdp: '0' is not"),
        (cli.evaluate, ["--no-target-below=nan"], "--no-target-below: 'nan' is not a number between 0 and 1"),
        (cli.predict, ["--text=x"], "--image"),
        (cli.predict, ["--image=x.png", "--text=x", "--checkpoint=nowhere"], "no model directory"),
    ],
)
def test_what_each_mistake_says(command, argv, message):
    with pytest.raises(UserError, match=message):
        command(argv)


def test_exit_codes():
    def interrupted():
        raise KeyboardInterrupt

    for main, code in ((lambda: None, 0), (lambda: 3, 3), (interrupted, 130)):
        with pytest.raises(SystemExit) as stopped:
            run_cli(main)
        assert stopped.value.code == code


def test_results_of_two_runs_lie_apart():
    assert cli.model_name(Path("runs/mine/model")) == "mine" and cli.model_name(cli.SHIPPED) == "shapes_tiny"

"""The commands as a user runs them: one clear line and exit code 2 for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowseg_jax.checkpoints.find import SHIPPED_MODEL, model_name
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[2]


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "train.py", "--config.model.mask_decoder.num_queres=3", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "model.mask_decoder.num_queries" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--workdir=/proc/nowhere"], "workdir /proc/nowhere cannot be written"),
        (["train", "--wrkdir=x"], "there is no flag --wrkdir \\(did you mean '--workdir'\\?\\); see flowseg train --help"),
        (["train", "--config=configs/none.py"], "configs/none.py"),
        (["eval", "--data=nowhere"], "nowhere: not a prepared data set"),
        (["eval", "--checkpoint=a", "--workdir=b"], "give one of them"),
        (["eval", "--workdir=nowhere"], "holds no trained model"),
        (["eval", "--checkpoint=nowhere"], "no model directory .*nowhere"),
        (["eval", "--batch-size=0"], "--batch-size: '0' is not a whole number from 1"),
        (["eval", "--max-images=-2"], "--max-images: '-2' is not a whole number from 1"),
        (["eval", "--fsdp=0"], "--fsdp: '0' is not"),
        (["eval", "--no-target-threshold=nan"], "--no-target-threshold: 'nan' is not a number between 0 and 1"),
        (["predict", "--text=x"], "--image"),
        (["predict", "--image=x.png", "--text=x", "--checkpoint=nowhere"], "no model directory"),
    ],
)
def test_what_each_mistake_says(argv, message):
    with pytest.raises(UserError, match=message):
        flowseg(argv)


def test_exit_codes():
    def interrupted():
        raise KeyboardInterrupt

    for main, code in ((lambda: None, 0), (lambda: 3, 3), (interrupted, 130)):
        with pytest.raises(SystemExit) as stopped:
            run_cli(main)
        assert stopped.value.code == code


def test_results_of_two_runs_lie_apart():
    assert model_name(Path("runs/mine/model")) == "mine" and model_name(SHIPPED_MODEL) == "shapes_tiny"

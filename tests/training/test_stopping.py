"""A signal saves and ends a run, in this process; a run that has ended goes on to more steps and writes its model anew."""

from __future__ import annotations

import json
import os
import signal

import pytest
from test_loop import config, lines, prepared  # noqa: F401

from flowseg_jax import config as configs
from flowseg_jax.training import loop
from flowseg_jax.training.stopping import Stop

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers():
    """Handlers of these signals that are nobody else's, put back at the end."""
    mine = {number: signal.signal(number, lambda *_: None) for number in NUMBERS}
    yield {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in mine.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_told_behind_the_step_and_the_handlers_come_back(handlers, number):
    with pytest.raises(RuntimeError), Stop() as stop:
        assert not stop.behind(1) and not stop.interrupted
        assert all(signal.getsignal(n) is not handlers[n] for n in NUMBERS)
        os.kill(os.getpid(), number)
        assert stop.behind(1) and stop.behind(2)
        assert stop.interrupted == (number == signal.SIGINT)
        raise RuntimeError
    assert {n: signal.getsignal(n) for n in NUMBERS} == handlers


def test_stopped_continued_and_extended(config, tmp_path, monkeypatch, capsys, handlers):  # noqa: F811
    config = configs.from_json(configs.to_json(config))
    config.update(steps=4, checkpoint_every=100)

    class Signalled(loop.Report):
        def log(self, step, metrics):
            super().log(step, metrics)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Report", Signalled)
        with pytest.raises(SystemExit) as stopped:
            loop.train(config, tmp_path)
    assert stopped.value.code == 0
    assert f"stopped: the state of step 2 is saved in {tmp_path}; the same command continues" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert [row["step"] for row in lines(tmp_path)] == [1, 2] and not (tmp_path / "model").exists()
    assert {n: signal.getsignal(n) for n in NUMBERS} == handlers

    models = {}
    for start, steps in ((2, 4), (4, 5)):
        config.steps = steps
        loop.train(config, tmp_path)
        assert f"continuing from the checkpoint of step {start}" in capsys.readouterr().out
        models[steps] = json.loads((tmp_path / "model" / "config.json").read_text())
        assert models[steps]["extra"]["step"] == steps
    assert models[4]["checksums"] != models[5]["checksums"]
    assert not (tmp_path / ".lock").exists() and not (tmp_path / ".model.lock").exists()

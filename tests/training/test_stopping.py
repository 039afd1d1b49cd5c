"""A signal saves and ends a run, in this process; a run that has ended goes on to more steps and writes its model anew."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.training import loop, program
from flowseg_jax.training.preemption import GracefulStop
from tests.helpers import small
from tests.training.test_loop import config, lines, prepared  # noqa: F401

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers():
    """Handlers of these signals that are nobody else's, put back at the end."""
    mine = {number: signal.signal(number, lambda *_: None) for number in NUMBERS}
    yield {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in mine.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_told_after_the_step_and_the_handlers_come_back(handlers, number):
    with pytest.raises(RuntimeError), GracefulStop() as stop:
        assert not stop.should_stop(1) and not stop.interrupted
        assert all(signal.getsignal(n) is not handlers[n] for n in NUMBERS)
        os.kill(os.getpid(), number)
        assert stop.should_stop(1) and stop.should_stop(2)
        assert stop.interrupted == (number == signal.SIGINT)
        raise RuntimeError
    assert {n: signal.getsignal(n) for n in NUMBERS} == handlers


def plain_step(*_):
    """A train step that adds one to everything that learns, in place of one that takes half a minute to compile."""

    def step(state, batch):
        trainable = jax.tree.map(lambda x: x + 1, state.trainable)
        metrics = {name: jnp.float32(0) for name in ("loss", "optimizer/learning_rate", "optimizer/skipped_in_a_row")}
        return dataclasses.replace(state, step=state.step + 1, trainable=trainable), metrics

    return step


def test_stopped_continued_and_extended(config, prepared, tmp_path, monkeypatch, capsys, handlers):  # noqa: F811
    config = configs.from_json(configs.to_json(config))
    cfg = FlowSegConfig.from_dict(config.model.to_dict())
    save_pretrained(tmp_path / "start", small.params(cfg), cfg.to_dict(), prepared.tokenizer_directory, dtype=None)
    config.update(num_steps=4, checkpoint_every=100, init_from=(str(tmp_path / "start"),))
    workdir = tmp_path / "run"
    monkeypatch.setattr(program, "make_train_step", plain_step)

    class Signalled(loop.MetricReporter):
        def log(self, step, metrics):
            super().log(step, metrics)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "MetricReporter", Signalled)
        with pytest.raises(SystemExit) as stopped:
            loop.train(config, workdir)
    assert stopped.value.code == 0
    assert f"stopped: the state of step 2 is saved in {workdir}; the same command continues" in capsys.readouterr().out
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    assert [row["step"] for row in lines(workdir)] == [1, 2] and not (workdir / "model").exists()
    assert {n: signal.getsignal(n) for n in NUMBERS} == handlers

    models = {}
    for start, steps in ((2, 4), (4, 5)):
        config.num_steps = steps
        loop.train(config, workdir)
        assert f"continuing from the checkpoint of step {start}" in capsys.readouterr().out
        models[steps] = json.loads((workdir / "model" / "config.json").read_text())
        assert models[steps]["extra"]["step"] == steps
    assert models[4]["checksums"] != models[5]["checksums"]
    assert not (workdir / ".lock").exists() and not (workdir / ".model.lock").exists()

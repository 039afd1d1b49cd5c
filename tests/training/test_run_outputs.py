"""What a run says and writes: metrics, skipped updates, what is trained, the model."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from flowseg_jax.errors import UserError
from flowseg_jax.training import loop, metric_reporter
from flowseg_jax.training.ema import EmaConfig
from flowseg_jax.training.lora import LoraConfig
from flowseg_jax.training.profiling import Profile
from tests.training.test_run import DIGEST, OPTIMIZER, card_of, config_of, state_of


class Clock:
    def __init__(self, speed):
        self._speed = speed

    def __call__(self, step):
        return self._speed(step)

    def waiting_for(self, what):
        return contextlib.nullcontext()

    def seconds_in_steps(self):
        return 0.0


@pytest.fixture
def reporting(monkeypatch):
    """(Report, what it wrote) of a run whose devices know their peak."""
    written = []
    program = SimpleNamespace(
        run_config=SimpleNamespace(model="m", losses="l", optimizer=OPTIMIZER, shape=SimpleNamespace(batch=8)),
        mesh=SimpleNamespace(devices=np.array([["d0", "d1"]])),
        state=SimpleNamespace(trainable="t", frozen="f"),
    )
    asked = []
    monkeypatch.setattr(metric_reporter.flops, "step_flops", lambda *args: asked.append(args) or {"x": 30.0, "y": 70.0})
    monkeypatch.setattr(metric_reporter.hardware, "mfu", lambda *args: asked.append(args) or 0.25)
    monkeypatch.setattr(metric_reporter.hardware, "memory_in_use", lambda ds: {"in_use": 1, "peak": 3 * 2**30, "limit": 7})
    speed = lambda start, batch: lambda step: {"speed/steps_per_second": 4.0, "seen": start + batch}  # noqa: E731
    monkeypatch.setattr(metric_reporter, "Throughput", lambda start, batch, began, spent: Clock(speed(start, batch)))
    writer = SimpleNamespace(write_scalars=lambda *args: written.append(args))
    data = SimpleNamespace(batch=lambda i: SimpleNamespace(example_id=np.array([i])))
    return metric_reporter.MetricReporter(program, data, writer, 20, 0.0, 0.0), written, asked


def test_metrics_are_written_once_with_speed_and_devices(reporting):
    report, written, asked = reporting
    report.flush()
    assert not written
    report.log(21, {"loss": np.float32(1.5), "optimizer/skipped_in_a_row": np.int32(4)})
    assert not written  # a step later
    report.flush()
    report.flush()
    known = {
        "loss": 1.5,
        "optimizer/skipped_in_a_row": 4.0,
        "speed/steps_per_second": 4.0,
        "seen": 28,
        "speed/mfu": 0.25,
        "device/memory_gib": 3.0,
    }
    assert written == [(21, known)]
    assert asked == [("m", SimpleNamespace(batch=8), "l", "t", "f"), (100.0, 0.25, ["d0", "d1"])]
    report.log(22, {"optimizer/skipped_in_a_row": 5})
    with pytest.raises(UserError, match=r"the last 5 updates up to step 22 .*max_skipped_updates is 4; .*batches: 19; 20; 21$"):
        report.flush()
    assert written[1][0] == 22  # what is wrong stands in the metrics


def test_what_devices_do_not_tell_is_left_out(reporting, monkeypatch):
    report, written, _ = reporting
    monkeypatch.setattr(metric_reporter.hardware, "mfu", lambda *_: None)
    monkeypatch.setattr(metric_reporter.hardware, "memory_in_use", lambda _: {"peak": None})
    report.log(1, {"optimizer/skipped_in_a_row": 0})
    report.flush()
    assert written[0][1].keys() == {"optimizer/skipped_in_a_row", "speed/steps_per_second", "seen"}


def test_two_skipped_updates_in_a_row_name_two_batches():
    data = SimpleNamespace(batch=lambda i: SimpleNamespace(example_id=np.array([i, -1])))
    with pytest.raises(UserError, match=r"the last 2 updates .*: 5, -1; 6, -1$"):
        metric_reporter.check_skipped({"optimizer/skipped_in_a_row": 2.0}, 7, data, limit=1)
    with pytest.raises(UserError, match="the last 1 updates"):
        metric_reporter.check_skipped({"optimizer/skipped_in_a_row": 1.0}, 7, data, limit=0)


def test_what_is_trained_is_said(capsys):
    state = SimpleNamespace(trainable={"a": np.zeros(1200)}, frozen={"b": np.zeros((2, 20))})
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 3})
    loop.log_run_summary(SimpleNamespace(state=state, mesh=mesh))
    assert capsys.readouterr().out == "1,240 parameters, 1,200 of them trained; mesh: data 2, fsdp 3\n"


def test_the_model_is_written_with_what_it_was_made_from(monkeypatch, tmp_path, capsys):
    saved = {}
    monkeypatch.setattr(loop, "save_pretrained", lambda *args, **options: saved.update(args=args, options=options) or args[0])
    state = state_of(4)
    run_config = SimpleNamespace(
        model=SimpleNamespace(to_dict=lambda: {"the": "model"}), prompts=Profile(1, 2), lora=LoraConfig(), ema=EmaConfig()
    )
    data = SimpleNamespace(digest=DIGEST, description="7 images of it", tokenizer=SimpleNamespace(name="its directory"))
    assert loop.save_final_model(run_config, state, config_of(), data, tmp_path, {}) == tmp_path / "model"
    extra = {"step": 4, "seed": 9, "prompts": {"start": 1, "steps": 2}, "data": DIGEST, "model_card": card_of(4)}
    assert saved["args"] == (tmp_path / "model", {"a": 4, "b": 5}, {"the": "model"}, "its directory", extra)
    assert saved["options"] == {"dtype": None, "overwrite": True}
    assert f"the model of step 4 is in {tmp_path}/model; " in capsys.readouterr().out
    data.tokenizer = None
    loop.save_final_model(run_config, state, config_of(), data, tmp_path, {})
    assert saved["args"][3] is None

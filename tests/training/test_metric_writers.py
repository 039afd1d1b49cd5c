from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from unittest.mock import Mock, call

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from flowseg_jax import experiment
from flowseg_jax.errors import UserError
from flowseg_jax.training import metric_writers


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_keeps_every_digit_and_is_flushed_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metric_writers.JsonlWriter(path)
    loss = np.float32(0.1) + np.float32(1e-7)
    writer.write_scalars(10, {"loss": loss, "learning_rate": 1 / 3, "skipped": 2})
    (row,) = rows(path)  # the writer is still open
    assert list(row) == ["step", "loss", "learning_rate", "skipped"]
    assert np.float32(row["loss"]).tobytes() == loss.tobytes()
    assert row["learning_rate"] == 1 / 3
    assert row["skipped"] == 2
    assert isinstance(row["skipped"], int)
    writer.write_scalars(20, {"loss": float("nan")})
    assert np.isnan(rows(path)[1]["loss"])
    with pytest.raises(ValueError, match="step 20 was already logged"):
        writer.write_scalars(20, {"loss": 1.0})
    writer.close()


def test_jsonl_resume_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metric_writers.JsonlWriter(path)
    for step in (10, 20, 30, 40):
        writer.write_scalars(step, {"loss": step / 7})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 50, "lo')  # killed while it wrote
    resumed = metric_writers.JsonlWriter(path, start_step=25)
    assert [row["step"] for row in rows(path)] == [10, 20]
    resumed.write_scalars(30, {"loss": 1.0})
    resumed.close()
    assert [row["step"] for row in rows(path)] == [10, 20, 30]
    assert rows(path)[0]["loss"] == 10 / 7
    with pytest.raises(ValueError, match="already logged"):
        metric_writers.JsonlWriter(path, start_step=30).write_scalars(30, {"loss": 1.0})
    metric_writers.JsonlWriter(path).close()  # a run that starts over
    assert rows(path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_object_is_replaced_now_and_then_and_when_it_matters(tmp_path, monkeypatch):
    """At once where lines were dropped, then every half minute, and by `flush` and `close`."""
    now, path = [100.0], epath.Path(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(metric_writers.time, "monotonic", lambda: now[0])
    path.write_text("1\n2\n")
    lines = metric_writers._ReplacedLines(path, ["1\n"], True)
    assert path.read_text() == "1\n"
    for seconds, kept in ((29.9, "1\n"), (30.0, "1\n2\n3\n"), (59.9, "1\n2\n3\n")):
        now[0] = 100.0 + seconds
        lines.write(f"{2 + int(seconds >= 30) + int(seconds > 31)}\n")
        assert path.read_text() == kept
    lines.flush()
    assert path.read_text() == "1\n2\n3\n4\n"
    lines.write("5\n")
    lines.close()
    assert path.read_text() == "1\n2\n3\n4\n5\n"
    metric_writers._ReplacedLines(path, ["other\n"], False)
    assert path.read_text() == "1\n2\n3\n4\n5\n"


def test_jsonl_in_an_impossible_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl"):
        metric_writers.JsonlWriter(tmp_path / "file" / "metrics.jsonl")


def test_progress_line(capsys):
    scalars = {
        "loss/mask": 0.5,
        "optimizer/learning_rate": 1e-4,
        "loss": 3.14159,
        "accuracy/referring_selection": 0.414,
        "speed/steps_per_second": 2.0,
        "speed/examples_per_second": np.float32(16.0),
    }
    writer = metric_writers.ProgressWriter(2000)
    writer.on_step(20)
    writer.write_scalars(20, scalars)
    line = "step   20/2000  loss 3.142  selection 0.41  lr 1.00e-04  2 steps/s  16:30 left\n"
    assert capsys.readouterr().out == line
    scores = {"eval/ciou": 12.345, "eval/giou": 20.0, "eval/oracle_ciou": 55.0, "eval/selection_gap": 31.2, "eval/other": 1.0}
    writer.write_scalars(20, scalars | scores)
    said = "validation at step 20: cIoU 12.35, gIoU 20.00, oracle cIoU 55.00, gap 31.20\n"
    assert capsys.readouterr().out == line + said


def test_throughput_counts_since_it_was_last_asked(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metric_writers.time, "perf_counter", lambda: now[0])
    rate = metric_writers.Throughput(step=10, batch_size=8, began=90.0)
    now[0] = 105.0
    assert rate(20) == {
        "speed/steps_per_second": 2.0, "speed/examples_per_second": 16.0, "input/wait": 0.0, "goodput": pytest.approx(1 / 3),
    }  # fmt: skip
    now[0] = 106.0
    assert rate(21)["speed/steps_per_second"] == 1.0


def test_what_is_no_step_does_not_count_as_one(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metric_writers.time, "perf_counter", lambda: now[0])
    rate = metric_writers.Throughput(step=0, batch_size=1)

    def wait(what, seconds):
        with rate.waiting_for(what):
            now[0] += seconds

    wait("input", 1.0)
    wait("validation", 5.0)
    wait("checkpoint", 2.0)
    now[0] = 110.0
    found = rate(4)
    assert found["input/wait"] == 0.25 and found["speed/steps_per_second"] == 4 / 3 and found["goodput"] == pytest.approx(0.3)
    now[0] = 120.0
    found = rate(14)
    assert (found["input/wait"], found["speed/steps_per_second"]) == (0.0, 1.0) and found["goodput"] == pytest.approx(13 / 20)


def test_goodput_counts_from_the_first_start_and_only_what_was_kept(monkeypatch):
    """First started at 0; its checkpoint has 30 s of steps; started again, the clock starts at 100."""
    now = [100.0]
    monkeypatch.setattr(metric_writers.time, "perf_counter", lambda: now[0])
    rate = metric_writers.Throughput(step=10, batch_size=1, began=0.0, spent=30.0)
    assert rate.seconds_in_steps() == 30.0
    now[0] = 120.0
    assert rate(20)["goodput"] == pytest.approx(50 / 120)
    with rate.waiting_for("checkpoint"):
        now[0] = 130.0
    assert rate.seconds_in_steps() == 50.0
    now[0] = 140.0
    assert rate.seconds_in_steps() == 60.0 and rate(30)["goodput"] == pytest.approx(60 / 140)


def events(directory):
    """The events of the one TensorBoard file in `directory`, read by the record format: length, crc, data, crc."""
    (file,) = directory.iterdir()
    data, position = file.read_bytes(), 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 8], "little")
        yield event_pb2.Event.FromString(data[position + 12 : position + 12 + size])
        position += 16 + size


def test_all_writers_together(tmp_path, capsys):
    config = experiment.read("shapes_tiny")
    progress = metric_writers.ProgressWriter(4)
    writer = metric_writers.create_writer(tmp_path, config, progress=progress)
    assert capsys.readouterr().out == f"watch it: tensorboard --logdir={tmp_path}/tensorboard\n"
    assert isinstance(writer, metric_writers.clu_metric_writers().MetricWriter)
    for step in (1, 2):
        writer.write_scalars(step, {"loss": 1.0 / step})
    writer.write_images(2, {"picture": np.zeros((4, 5, 3), np.uint8)})
    writer.write_texts(2, {"note": "hello"})
    writer.write_histograms(2, {"weights": np.arange(10.0)})
    writer.write_hparams({"seed": 0})
    writer.close()
    assert [row["loss"] for row in rows(tmp_path / "metrics.jsonl")] == [1.0, 0.5]
    assert capsys.readouterr().out.count("step ") == 2
    found = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert (1, "loss", 1.0) in found
    assert (2, "loss", 0.5) in found
    tags = {tag for _, tag, _ in found}
    assert any("picture" in tag for tag in tags)
    assert any("note" in tag for tag in tags)
    assert any("weights" in tag for tag in tags)
    assert any("hparams" in tag for tag in tags)
    texts = [value.tensor.string_val for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    assert any(b'"num_steps": 2000' in text for found in texts for text in found)  # the config


def test_what_tensorboard_is_given(tmp_path, monkeypatch):
    """Every kind that CLU can write, with its axes in the order in which tensorboardX takes them."""
    told = []
    board = Mock()
    for name in ("images", "video", "audio", "text", "histogram", "scalar"):
        record = lambda tag, value, *rest, name=name, **more: told.append((name, tag, value, *rest, more))  # noqa: E731
        setattr(board, f"add_{name}", record)
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda directory, flush_secs: board if flush_secs == 10 else None)
    writer = metric_writers.TensorBoardWriter(tmp_path)
    shape = lambda *sides: np.zeros(sides, np.uint8)  # noqa: E731
    writer.write_scalars(1, {"a": np.float32(0.5)})
    writer.write_images(2, {"one": shape(4, 5, 3), "two": shape(2, 4, 5, 3)})
    writer.write_videos(3, {"one": shape(6, 4, 5, 3), "two": shape(2, 6, 4, 5, 3)})
    writer.write_audios(4, {"a": shape(2, 9, 1)}, sample_rate=16)
    writer.write_texts(5, {"a": "text"})
    writer.write_histograms(6, {"a": shape(7), "b": shape(7)}, {"b": 12})
    writer.write_hparams({"seed": 3, "lr": 0.5})
    found = [(name, tag, getattr(value, "shape", value), *rest) for name, tag, value, *rest in told]
    assert found == [
        ("scalar", "a", 0.5, 1, {}),
        ("images", "one", (1, 4, 5, 3), 2, {"dataformats": "NHWC"}),
        ("images", "two", (2, 4, 5, 3), 2, {"dataformats": "NHWC"}),
        ("video", "one", (1, 6, 3, 4, 5), 3, {}),
        ("video", "two", (2, 6, 3, 4, 5), 3, {}),
        ("audio", "a/0", (9, 1), 4, 16, {}),
        ("audio", "a/1", (9, 1), 4, 16, {}),
        ("text", "a", "text", 5, {}),
        ("histogram", "a", (7,), 6, {"bins": 30}),
        ("histogram", "b", (7,), 6, {"bins": 12}),
        ("text", "hparams", "| name | value |\n|---|---|\n| seed | 3 |\n| lr | 0.5 |\n", 0, {}),
    ]
    writer.flush()
    writer.close()
    assert board.flush.call_count == board.close.call_count == 1
    with pytest.raises(ValueError, match="no generic summaries"):
        writer.write_summaries(7, {})


def test_a_bar_on_a_terminal_moves_with_every_step_and_keeps_the_last_figures(monkeypatch, capsys):
    bar, opened = Mock(), []

    @contextlib.contextmanager
    def progress(*what, **options):
        opened.append((what, options))
        yield bar
        bar.ended()

    monkeypatch.setattr(metric_writers, "is_terminal", lambda: True)
    monkeypatch.setattr(metric_writers, "progress", progress)
    writer = metric_writers.ProgressWriter(20, start=4)
    writer.on_step(5)
    writer.write_scalars(5, {"loss": 0.5, "speed/steps_per_second": 2.0, "eval/giou": 31.0})
    writer.on_step(6)
    figures = "loss 0.5  2 steps/s"
    assert opened == [(("train", 20, "steps"), {"done": 4})]
    assert bar.mock_calls == [call.update(5, ""), call.update(5, figures), call.update(6, figures)]
    assert capsys.readouterr().out == "validation at step 5: gIoU 31.00\n"
    writer.close()
    assert bar.mock_calls[-1] == call.ended()


def test_a_line_without_a_speed_says_no_time(capsys):
    metric_writers.ProgressWriter(20).write_scalars(5, {"loss": 0.5, "speed/steps_per_second": 0.0})
    metric_writers.ProgressWriter(20).write_scalars(5, {"loss": 0.5})
    assert capsys.readouterr().out == "step  5/20  loss 0.5  0 steps/s\nstep  5/20  loss 0.5\n"


def test_only_the_primary_process_writes(tmp_path):
    config = experiment.read("shapes_tiny")
    config.trackers = ("wandb",)
    writer = metric_writers.create_writer(tmp_path, config, progress=metric_writers.ProgressWriter(4), primary=False)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_clu_default_writer_is_free_of_tensorflow(tmp_path):
    writer = metric_writers.clu_metric_writers().create_default_writer(tmp_path)
    metric_writers.clu_metric_writers().write_values(writer, 3, {"loss": 0.25})
    writer.close()
    assert (3, "loss") in [(event.step, value.tag) for event in events(tmp_path) for value in event.summary.value]


def test_importing_the_package_changes_nothing_in_clu_and_imports_none_of_it():
    code = "import sys, flowseg_jax.training.loop; print([name for name in sys.modules if name.split('.')[0] == 'clu'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_nothing_stands_in_for_a_module_of_clu_afterwards():
    code = """
import sys
from flowseg_jax.training.metric_writers import TensorBoardWriter, clu_metric_writers
assert clu_metric_writers().SummaryWriter is TensorBoardWriter
print("clu.metric_writers.summary_writer" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

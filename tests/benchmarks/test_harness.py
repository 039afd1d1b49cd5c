"""The ratio: candidates take turns, contended samples do not count, different outputs have no ratio; and its two commands."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import load, ratio, step, train_step
from benchmarks.command_line import add_ratio_flags
from benchmarks.ratio import Timing, TimingSample
from benchmarks.step import random_batch
from benchmarks.worker import Worker
from flowseg_jax import experiment as configs
from flowseg_jax.errors import UserError
from flowseg_jax.types import IMAGE_TOKEN_INDEX, BatchShape
from tests.helpers import small


class Pending:
    """A number that has to be waited for, as a JAX array has; `waited` are those that were."""

    def __init__(self, number, waited):
        self.number, self.waited = number, waited

    def __add__(self, other):
        return Pending(self.number + other, self.waited)

    def block_until_ready(self):
        self.waited.append(self.number)
        return self


class Fake:
    """A candidate whose calls take a given time by its own account."""

    def __init__(self, name, seconds, log, output=1.0):
        self.name, self.seconds, self.log, self.value = name, seconds, log, output
        self.pid = 1

    def run(self, calls):
        self.log.append((self.name, calls))
        return calls * self.seconds

    def output(self):
        self.log.append((self.name, "output"))
        return {"y": np.array([0.0, self.value])}


def clocks(foreign):
    """A `read` under which sample i has foreign[i] cores of foreign load; the last entry holds from then on."""
    state = {"reading": load.Reading(0.0, 0.0, 0.0), "samples": 0, "open": False}

    def read(pids):
        if state["open"]:
            share = foreign[min(state["samples"], len(foreign) - 1)]
            was = state["reading"]
            state["reading"] = load.Reading(was.wall + 2, was.busy + 2 * share + 1.5, was.own + 1.5)
            state["samples"] += 1
        state["open"] = not state["open"]
        return state["reading"]

    return read


def compared(foreign=(0.0,), rounds=3, **seconds):
    log = []
    candidates = {name: Fake(name, each, log) for name, each in seconds.items()}
    return ratio.compare(candidates, next(iter(seconds)), 1e-3, rounds=rounds, read=clocks(foreign)), log


def test_ticks_are_read_from_proc():
    assert load.busy_ticks("cpu  1 20 300 9999 8888 4000 50000 600000 77 88\ncpu0 1 1 1 1 1 1 1 1 0 0\n") == 654321
    fields = ["R", *map(str, range(1, 11)), "1000", "200", "30", "4", "99"]
    assert load.process_ticks("12 (a ) b) " + " ".join(fields)) == 1234


def test_foreign_load_is_what_the_watched_processes_did_not_do():
    before, after = load.Reading(10.0, 100.0, 50.0), load.Reading(12.0, 103.0, 52.0)
    assert load.foreign_cores(before, after) == pytest.approx(0.5)
    assert load.foreign_cores(before, load.Reading(12.0, 101.0, 52.0)) == 0  # the two clocks tick apart
    with pytest.raises(UserError, match="/proc"):
        load.read([2**30])


def test_candidates_take_turns_once_they_are_warm_and_agree():
    comparison, log = compared(a=0.2, b=0.05)
    warm, turns = log[:6], log[6:]
    assert warm == [("a", 1), ("b", 1), ("a", "output"), ("b", "output"), ("a", 1), ("b", 1)]
    assert turns == [("a", 3), ("b", 10)] * 3  # half a second each
    assert comparison.ratio("b") == pytest.approx(0.25)
    assert comparison.ratio("a") == 1
    assert comparison.quality == "A"


def test_a_busy_machine_is_sampled_longer_and_the_quality_says_how_it_went():
    _, log = compared((0.5, 0.5, 0.0), a=1, b=1)
    assert len(log) == 6 + 2 * 4  # the first turn of both was contended
    comparison, log = compared((0.5,), a=1, b=1)
    assert len(log) == 6 + 2 * 9
    assert comparison.quality == "C"
    comparison, _ = compared((0.0, 0.0, 0.0, 0.5), a=1, b=1)
    assert comparison.quality == "B"


def test_cpu_seconds_count_however_busy_the_machine_is():
    log = []
    candidates = {name: Fake(name, 1, log) for name in ("a", "b")}
    comparison = ratio.compare(candidates, "a", 1e-3, rounds=3, read=clocks((0.5,)), cpu_time=True)
    assert len(log) == 6 + 2 * 3
    assert comparison.quality == "A"


def test_the_median_is_of_clean_samples_or_of_the_least_contended():
    clean = [TimingSample(seconds, 0.1) for seconds in (1.0, 2.0, 4.0)]
    busy = [TimingSample(9.0, 0.3), TimingSample(5.0, 0.25), TimingSample(8.0, 1.0)]
    assert Timing(1, (*busy, *clean)).seconds == 2.0
    assert Timing(1, (*busy, *clean[1:])).seconds == 4.0  # 2, 4 and the 5 of the least contended one
    assert Timing(1, (TimingSample(1.0, 1.9), *busy)).seconds == 8.0  # the fastest was the most contended
    assert not TimingSample(1.0, 0.21).clean


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (1.01, r"no ratio: y of b differs from a's by 0.01 of its largest value, the tolerance is 0.001"),
        (float("nan"), "no ratio: y of b differs from a's by nan"),
        ([1.0, 2.0], "no ratio: b puts out"),
    ],
)
def test_different_outputs_have_no_ratio(other, message):
    log = []
    candidates = {"a": Fake("a", 1, log), "b": Fake("b", 1, log)}
    candidates["b"].output = lambda: {"y": np.array([0.0, 1.0]) * other if np.ndim(other) == 0 else np.ones(3)}
    with pytest.raises(UserError, match=message):
        ratio.compare(candidates, "a", 1e-3, read=clocks((0.0,)))
    assert [entry for entry in log if entry[0] == "a"] == [("a", 1), ("a", "output")]


def test_a_function_is_a_candidate():
    calls = []

    def call():
        calls.append(1)
        return {"x": np.ones(2)}, np.zeros(())

    local = ratio.Local(call)
    assert local.run(3) > 0
    assert len(calls) == 3
    waited = []
    ratio.Local(lambda: Pending(5, waited)).run(2)
    assert waited == [5, 5]
    assert {name: value.shape for name, value in local.output().items()} == {"0/x": (2,), "1": ()}


def test_the_report_has_the_figures_and_the_gate_its_exit_code(capsys, tmp_path):
    parser = argparse.ArgumentParser()
    add_ratio_flags(parser)
    quiet, busy = compared(before=0.4, now=0.3)[0], compared((1.0,), before=0.4, now=0.3)[0]
    assert ratio.report(quiet, parser.parse_args(["--gate", "--json"])) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:3]] == ["candidate", "before", "now"]
    assert "0.750" in table[2]
    assert "quality A" in table[3]
    found = json.loads(last)
    assert found["quality"] == "A"
    assert found["candidates"]["now"]["ratio"] == pytest.approx(0.75)
    assert len(found["candidates"]["now"]["samples"]) == found["candidates"]["now"]["clean_samples"] == 3
    assert found["environment"]["versions"]["jax"]
    assert found["environment"]["cores"] >= 1
    assert ratio.report(busy, parser.parse_args(["--gate", f"--json={tmp_path / 'r.json'}"])) == 3
    assert json.loads((tmp_path / "r.json").read_text())["quality"] == "C"
    assert ratio.report(busy, parser.parse_args([])) == 0
    with pytest.raises(UserError, match=r"--json=.* cannot be written"):
        ratio.report(quiet, parser.parse_args([f"--json={tmp_path}"]))
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds=0"])


WORKER = """
import numpy as np
from benchmarks.worker import serve
class Candidate:
    def run(self, calls):
        print("not an answer")
        if calls == 13:
            raise RuntimeError("bad luck")
        return calls / 4
    def output(self):
        return {"a/b": np.arange(3)}
serve(Candidate)
"""


def test_a_worker_answers_from_its_own_process_and_its_death_is_explained():
    worker = Worker([sys.executable, "-c", WORKER], cwd=train_step.ROOT)
    with worker:
        assert worker.run(2) == 0.5
        np.testing.assert_equal(worker.output(), {"a/b": np.arange(3)})
        load.read([worker.pid])
        with pytest.raises(UserError, match="ended with code 1: RuntimeError: bad luck"):
            worker.run(13)
        with pytest.raises(UserError, match="bad luck"):
            worker.run(1)
    with Worker([sys.executable, "-c", WORKER], cwd=train_step.ROOT) as idle:
        pass
    assert idle._process.returncode == 0


def test_another_revision_is_checked_out_with_these_benchmarks_and_removed(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    (repository / "benchmarks").mkdir(parents=True)

    def commit(text):
        (repository / "package.py").write_text(text)
        (repository / "benchmarks" / "step.py").write_text(text)
        train_step.git("add", ".")
        train_step.git("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false", "commit", "-qm", text)

    monkeypatch.setattr(train_step, "ROOT", repository)
    subprocess.run(["git", "init", "-q", repository], check=True)
    commit("old")
    commit("new")
    with train_step.checkout("HEAD~1") as tree:
        assert (tree / "package.py").read_text() == "old"
        assert (tree / "benchmarks" / "step.py").read_text() == "new"
    assert not tree.exists()
    assert len(train_step.git("worktree", "list").splitlines()) == 1
    assert train_step.git("status", "--porcelain") == ""
    with (
        pytest.raises(UserError, match="--against=HEAD~9: git knows no such commit"),
        train_step.checkout("HEAD~9"),
    ):
        pass


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--against --overhead is required"),
        (["--against=x", "--overhead=accumulate"], "not allowed with"),
        (["--against=x", "--config", "configs/shapes_tiny.py"], "write --config=VALUE"),
        (["--overhead=accumulate", "--parts=3"], "--parts=3: batch_size 8 is no multiple of 3"),
        (["--overhead=checkpoint", "--every=30"], "--every=30 is more than --steps=20"),
        (["--overhead=checkpoint", "--every=0"], "'0' is not a whole number"),
    ],
)
def test_flags_that_make_no_sense_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        train_step.main(argv)


def test_the_random_batch_is_whole():
    cfg = small.config()
    shape = BatchShape(4, 1 + cfg.num_visual_tokens + 3 * 6 + 2, 2, 3, cfg.sam.image_size, cfg.siglip.image_size)
    batch, again = random_batch(shape, cfg), random_batch(shape, cfg)
    assert ((batch.input_ids == IMAGE_TOKEN_INDEX).sum(1) == cfg.num_visual_tokens).all()
    text = batch.input_ids[batch.input_ids != IMAGE_TOKEN_INDEX]
    assert text.min() >= 0
    assert text.max() < cfg.llm.vocab_size
    for row in range(4):
        assert set(batch.phrase_ids[row]) == {-1, 0, 1, 2, 3, 4}  # two phrases and the names of three masks
        assert set(batch.seg_ids[row]) == {-1, 0, 1, 2}  # one output a conversation
    assert set(batch.segment_ids[0]) == {-1, 0, 1, 2, 3}  # the end is padding
    assert batch.mask_valid.all()
    assert 0 < np.unpackbits(batch.packed_masks).mean() < 1
    np.testing.assert_array_equal(batch.input_ids, again.input_ids)
    with pytest.raises(UserError, match="data.text_length=20 has no room"):
        random_batch(BatchShape(4, 20, 2, 3, 32, 16), cfg)


def small_config() -> ConfigDict:
    config = configs.read("configs/shapes_tiny.py")
    model = small.config()
    config.model = ConfigDict(model.to_dict())
    config.batch_size = 4
    config.data.update(text_length=1 + model.num_visual_tokens + 3 * 6, max_phrases=2, max_masks=3)
    config.optimizer.losses.update(num_points=24, logits_chunk_size=64)
    return config


def test_a_step_goes_on_from_its_state_and_a_window_saves_beside_the_steps(monkeypatch):
    """With a step that only counts: each call dispatches one step, and checkpoints lie between the steps of a window."""

    waited = []

    class Saves(list):
        def save(self, name, state, meta):
            self.append((name, state["0"].number))

        def wait(self):
            self.append("wait")

    def build(config):
        plan = types.SimpleNamespace(shape=None, model=None)
        count = lambda state, batch: (state + 1, {"loss": 7.0, "optimizer/gradient_norm": 2.0, "other": 0.0})  # noqa: E731
        return step.Built(plan, tuple, count, Pending(0, waited))

    monkeypatch.setattr(step, "build", build)
    monkeypatch.setattr(step, "random_batch", lambda shape, model: ())
    counting = step.TrainStep(None)
    assert counting.output() == {"loss": 7.0, "optimizer/gradient_norm": 2.0}
    assert counting.run(3) > 0
    assert waited == [4]
    saves = Saves()
    window = train_step.Window(counting, 8, 4, saves)
    assert window.run(2) > 0
    assert saves == [(1, 6), (2, 10), "wait", (3, 14), (4, 18), "wait"]
    train_step.Window(counting, 8).run(1)
    assert len(saves) == 6
    assert waited == [4, 12, 20, 28]


@pytest.mark.slow
def test_the_step_in_parts_beside_the_step_as_a_whole():
    comparison = train_step.accumulate(small_config(), 2, 1e-3, rounds=3)
    assert comparison.difference < 1e-4
    assert list(comparison.timings) == ["accumulate=1", "accumulate=2"]
    assert comparison.ratio("accumulate=2") > 0


@pytest.mark.slow
def test_steps_with_checkpoints_beside_steps_without():
    comparison = train_step.checkpoint(small_config(), 4, 2, 1e-3, rounds=3)
    assert comparison.difference == 0
    assert comparison.ratio("every 2 steps") > 0


@pytest.mark.slow
def test_this_revision_beside_itself(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(small_config()))
    comparison = train_step.against("HEAD", [f"--config={path}"], 1e-3, rounds=3)
    assert comparison.difference < 1e-4
    assert set(comparison.timings) == {"HEAD", "now"}

"""The loop between its parts: what is called in which order with what, by parts that only write it down."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.manager import RestoredCheckpoint
from flowseg_jax.errors import UserError
from flowseg_jax.training import loop
from flowseg_jax.training.optimizer import OptimizerConfig
from flowseg_jax.training.profiling import Profile
from flowseg_jax.training.step import TrainState

DIGEST = "digest of the data"
OPTIMIZER = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1, max_skipped_updates=4)


def state_of(step: int) -> TrainState:
    """A state whose fields are all different."""
    moments = optax.ScaleByAdamState(np.int32(100 + step), {"a": np.float32(1)}, {"a": np.float32(2)})
    return TrainState(np.int32(step), {"a": np.float32(step)}, {"b": np.float32(5)}, moments, np.array([7, 8]))


def config_of(**changes):
    config = configs.read("configs/shapes_tiny.py")
    config.update(num_steps=5, log_every=2, checkpoint_every=3, seed=9)
    config.checkpoint.update(keep=3, keep_every=7, best=("loss", "min"))
    config.update(changes)
    return config


def card_of(step: int) -> dict:
    return {"trained_on": f"7 images of it, {step} steps."}


def extra_of(step: int) -> dict:
    """What a checkpoint has for its use as a model."""
    return {"step": step, "seed": 9, "prompts": {"start": 1, "steps": 2}, "data": DIGEST, "model_card": card_of(step)}


class Metrics(str):
    """Metrics of a step; with those of a validation, a pair."""

    def __or__(self, scores):
        return str(self), scores


class Run:
    """A run's parts; `events` is what they were asked, in order.

    Args:
        restored: what the checkpoints hold.
        stop: after which step the run is asked to stop.
        interrupted: by Ctrl-C.
    """

    def __init__(self, monkeypatch, restored: RestoredCheckpoint | None = None, stop: int = 0, interrupted: bool = False):
        self.events: list = []
        self.waits: list[str] = []
        self.restored, self.local = restored, None
        write = self.events.append
        batch = SimpleNamespace()
        self.program = SimpleNamespace(
            run_config=SimpleNamespace(optimizer=OPTIMIZER, prompts=Profile(1, 2)),
            state=state_of(-1),
            batch=batch,
            to_device=lambda batch: f"placed {batch}",
            initial_state=lambda config: (write(("initial", config.seed)) or state_of(0), {}),
            compile=self.compile,
        )
        self.data = SimpleNamespace(digest=DIGEST, description="7 images of it", iterate=self.iterate, tokenizer=None)
        run = self

        class CheckpointManager(contextlib.AbstractContextManager):
            def __init__(self, workdir, **policy):
                write(("checkpoints", Path(workdir).name, policy))

            def restore_latest(self, abstract, check):
                assert abstract == loop.state_to_tree(run.program.state)
                if run.restored:
                    check(run.restored.meta)
                return run.restored

            latest_step = 3

            def save(self, step, tree, meta, metrics):
                assert meta["config"] == json.loads(configs.to_json(run.config))
                assert (tree["step"], tree["moments"]) == (step, [100 + step, 1, 2])
                write(("save", step, {k: v for k, v in meta.items() if k != "config"}, metrics))

            def wait(self):
                write("wait")

            def __exit__(self, *_):
                write("checkpoints closed")

        class GracefulStop(contextlib.AbstractContextManager):
            def should_stop(self, step):
                write(("stop?", step))
                return step == stop

            def __exit__(self, *_):
                write("handlers back")

        GracefulStop.interrupted = interrupted

        class MetricReporter:
            def __init__(self, program, data, writer, start, began, spent):
                assert (program, data) == (run.program, run.data) and 50 <= time.perf_counter() - began < 1000
                write(("report", start, spent))

            def seconds_in_steps(self):
                return 1.5

            def log(self, step, metrics):
                write(("log", step, metrics))

            def flush(self):
                write("flush metrics")

            def waiting_for(self, what):
                run.waits.append(what)
                return contextlib.nullcontext()

        class Profiler:
            def __init__(self, profile, directory):
                write(("profiler", profile, Path(directory).name))

            def on_step_start(self, step):
                write(("step starts", step))

            def on_step_end(self, step, metrics):
                write(("step ends", step, metrics))

            def close(self):
                write("profiler closed")

        writer = SimpleNamespace(
            flush=lambda: write("flush"),
            close=lambda: write("writer closed"),
            write_images=lambda *images: write(("images", *images)),
        )

        class LocalCheckpoints(contextlib.AbstractContextManager):
            def __init__(self, *policy):
                self.every = policy[1]
                assert policy == (run.config.checkpoint.local_dir, self.every, "an id")

            def restore(self, abstract, check, newer_than):
                assert newer_than == 3 and abstract == loop.state_to_tree(run.program.state)
                return run.local

            def due(self, step):
                return self.every and step % self.every == 0

            def save(self, step, tree, meta):
                write(("local save", step, meta["data_position"], meta["seconds_in_steps"]))

            def remove(self):
                write("local ones removed")

            def __exit__(self, *_):
                pass

        first = SimpleNamespace(seconds_ago=lambda: 50.0, run_id="an id")
        for name, part in {
            "CheckpointManager": CheckpointManager,
            "LocalCheckpoints": LocalCheckpoints,
            "FirstStart": SimpleNamespace(of=lambda workdir: first),
            "GracefulStop": GracefulStop,
            "MetricReporter": MetricReporter,
            "Profiler": Profiler,
            "open_train_data": lambda config, program: self.data,
            "log_run_summary": lambda program: write("summary"),
            "ProgressWriter": lambda steps, start: SimpleNamespace(
                on_step=lambda step: None, close=lambda: None, shown=(steps, start)
            ),
            "create_writer": lambda workdir, config, *, progress, **options: (
                write(("writer", Path(workdir).name, {"steps": config.num_steps, **options})) or writer
            ),
            "save_final_model": lambda run_config, state, *_: write(("model", int(state.step))) or "the model",
        }.items():
            monkeypatch.setattr(loop, name, part)

    def compile(self):
        self.events.append("compile")
        return self.step

    def step(self, state, batch):
        step = int(state.step) + 1
        self.events.append(("step", step, batch))
        return state_of(step), Metrics(f"metrics {step}")

    def iterate(self, start):
        try:
            for step in range(start, 100):
                yield f"batch {step}"
        finally:
            self.events.append("batches closed")

    def __call__(self, config, workdir, profile=None, validation=None):
        self.config = config
        return loop.run(config, self.program, workdir, profile, validation)

    def of(self, *kinds: str) -> list:
        return [event for event in self.events if (event if isinstance(event, str) else event[0]) in kinds]


def test_a_whole_run_in_order(monkeypatch, tmp_path):
    run, profile = Run(monkeypatch), Profile(1, 2)
    config = config_of()
    assert run(config, tmp_path / "run", profile) == "the model"
    position = lambda step: {"data_position": step, "data": DIGEST, "extra": extra_of(step), "seconds_in_steps": 1.5}  # noqa: E731

    def step(n, *between, last=False):
        log = [("log", n, f"metrics {n}")] if n % 2 == 0 or last else []
        begin = [("step starts", n), ("step", n, f"placed batch {n - 1}"), "flush metrics"]
        return [*begin, *log, ("step ends", n, f"metrics {n}"), ("stop?", n), *between]

    save = lambda n: ["flush metrics", "flush", ("save", n, position(n), f"metrics {n}")]  # noqa: E731
    compiled = run.events.index("compile")  # between the restored checkpoint and the first step
    assert run.events.index(("checkpoints", "run", {"keep": 3, "keep_every": 7, "best": ("loss", "min")})) < compiled
    assert compiled < run.events.index(("report", 0, 0.0))
    del run.events[compiled]
    assert run.events == [
        "summary",
        ("checkpoints", "run", {"keep": 3, "keep_every": 7, "best": ("loss", "min")}),
        ("initial", 9),
        ("writer", "run", {"steps": 5, "start_step": 0, "primary": True}),
        ("profiler", profile, "profile"),
        ("report", 0, 0.0),
        *step(1),
        *step(2),
        *step(3, *save(3)),
        *step(4),
        *step(5, *save(5), last=True),
        "profiler closed",
        "writer closed",
        "batches closed",
        "handlers back",
        "checkpoints closed",
        "local ones removed",
        ("model", 5),
    ]
    assert (tmp_path / "run/config.json").read_text() == configs.to_json(config) + "\n"
    trained, frozen = (tmp_path / "run/parameters.txt").read_text().split("frozen\n")
    assert trained.startswith("trained\n") and "| a    | ()    | float32 | 1    |" in trained and "| b    |" in frozen


@pytest.fixture
def validation(monkeypatch):
    """A validation that scores ten points a step."""
    monkeypatch.setattr(loop, "model_params", lambda run_config, state: int(state.step))
    monkeypatch.setattr(loop, "open_validation", lambda config, program, data, make: make if config.eval_every else None)
    return lambda step: ({"eval/ciou": 10 * step}, {"a picture": step})


def test_validations_are_logged_with_their_pictures_and_rank_the_checkpoints(monkeypatch, tmp_path, validation):
    run, config = Run(monkeypatch), config_of(eval_every=2)
    config.checkpoint.best = ()
    run(config, tmp_path, None, validation)
    assert run.of("checkpoints")[0][2]["best"] == ("eval/ciou", "max")
    both = lambda step: (f"metrics {step}", {"eval/ciou": 10 * step})  # noqa: E731
    seen = [(event[0], event[1], event[-1]) for event in run.of("log", "images", "save")]
    validated = lambda n: [  # noqa: E731
        ("log", n, f"metrics {n}"), ("log", n, both(n)), ("images", n, {"a picture": n}), ("save", n, both(n))
    ]  # fmt: skip
    assert seen == [*validated(2), ("save", 3, None), *validated(4), *validated(5)]  # a loss does not rank them
    assert run.waits == [
        "input", "input", "validation", "checkpoint", "input", "checkpoint", "input", "validation", "checkpoint",
        "validation", "checkpoint",
    ]  # fmt: skip


def test_a_run_that_is_stopped_does_not_validate_first(monkeypatch, tmp_path, validation):
    run, config = Run(monkeypatch, stop=2), config_of(eval_every=2)
    with pytest.raises(SystemExit):
        run(config, tmp_path, None, validation)
    assert not run.of("images") and run.of("save")[0][1::2] == (2, "metrics 2")  # ranked by its loss, as the config says


def restored(step: int, **meta) -> RestoredCheckpoint:
    """A checkpoint of the run of `config_of()`; `meta` is what differs, None for what it lacks."""
    written = {"config": json.loads(configs.to_json(config_of())), "data": DIGEST, "seconds_in_steps": 20.0} | meta
    return RestoredCheckpoint(step, loop.state_to_tree(state_of(step)), {k: v for k, v in written.items() if v is not None})


def test_a_run_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    run = Run(monkeypatch, restored(3))
    run(config_of(), tmp_path)
    assert run.of("step") == [("step", 4, "placed batch 3"), ("step", 5, "placed batch 4")]
    assert run.of("initial") == [] and run.of("report", "save")[0] == ("report", 3, 20.0)
    assert run.of("writer") == [("writer", tmp_path.name, {"steps": 5, "start_step": 3, "primary": True})]
    assert capsys.readouterr().out == f"continuing from the checkpoint of step 3 in {tmp_path}\n"


def test_local_checkpoints_come_between_the_others_and_are_continued_from(monkeypatch, tmp_path, capsys):
    run, config = Run(monkeypatch, restored(3)), config_of(num_steps=8)
    config.checkpoint.update(local_dir="/dev/shm/flowseg", local_every=1)
    run.local = dataclasses.replace(restored(4), directory="/dev/shm/flowseg/x")
    run(config, tmp_path)
    assert "continuing from the checkpoint of step 4 in /dev/shm/flowseg/x\n" in capsys.readouterr().out
    assert [event[:2] for event in run.of("save", "local save")] == [
        ("local save", 5), ("save", 6), ("local save", 7), ("save", 8),
    ]  # fmt: skip
    at = run.events.index(("local save", 5, 5, 1.5))
    assert run.events[at - 2 : at] == ["flush metrics", "flush"]  # no line of metrics is lost


def test_a_finished_run_compiles_nothing_and_writes_its_model(monkeypatch, tmp_path):
    run = Run(monkeypatch, restored(5))
    assert run(config_of(), tmp_path) == "the model"
    assert not run.of("compile", "step", "save") and run.of("model") == [("model", 5)]


def test_more_steps_are_said_with_the_learning_rates(monkeypatch, tmp_path, capsys):
    Run(monkeypatch, restored(3))(config_of(num_steps=10), tmp_path)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(
        "num_steps is 10 and was 5: the schedule is that of 10 steps from here on; the learning rate of step 4 is "
    )


def test_what_another_number_of_steps_does_to_the_learning_rate():
    rate = lambda steps, at: f"{0.5 * (1 + math.cos(math.pi * (at - 1) / (steps - 1))):.2e}"  # noqa: E731
    cfg = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.0)
    assert loop.moved_rate(cfg, 10, 20, 5) == (
        "num_steps is 20 and was 10: the schedule is that of 20 steps from here on; the learning rate of step 6 is "
        f"{rate(20, 5)}, it would have been {rate(10, 5)}"
    )
    assert loop.moved_rate(cfg, 20, 10, 9).startswith("num_steps is 10 and was 20: ")
    for before, steps, start in (
        (10, 10, 5),
        (20, 10, 10),
        (20, 10, 11),
        (None, 10, 5),
        ("9", 10, 5),
        (-1, 10, 5),
        (9.5, 10, 5),
    ):
        assert loop.moved_rate(cfg, before, steps, start) == ""
    assert loop.moved_rate(cfg, 0, 10, 5)
    assert f"step 101 is {rate(200, 100)}, it would have been " in loop.moved_rate(cfg, 100, 200, 100)  # a finished run


@pytest.mark.parametrize(
    ("interrupted", "raised", "code"), [(False, SystemExit, (0,)), (True, KeyboardInterrupt, ())], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_stop_saves_waits_and_ends(monkeypatch, tmp_path, capsys, interrupted, raised, code):
    run = Run(monkeypatch, stop=2, interrupted=interrupted)
    with pytest.raises(raised) as stopped:
        run(config_of(), tmp_path)
    assert stopped.value.args == code
    tail = run.events[run.events.index(("stop?", 2)) :]
    saved = ("save", 2, {"data_position": 2, "data": DIGEST, "extra": extra_of(2), "seconds_in_steps": 1.5}, "metrics 2")
    assert tail[:5] == [("stop?", 2), "flush metrics", "flush", saved, "wait"]
    assert set(tail[5:]) == {"profiler closed", "writer closed", "batches closed", "handlers back", "checkpoints closed"}
    said = capsys.readouterr().out
    assert said == f"stopped: the state of step 2 is saved in {tmp_path}; the same command continues\n"


def test_a_stop_after_the_last_step_is_the_end_as_usual(monkeypatch, tmp_path):
    run = Run(monkeypatch, stop=5)
    assert run(config_of(), tmp_path) == "the model" and not run.of("wait")


def test_only_the_first_process_writes_the_config(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "is_primary", lambda: False)
    run = Run(monkeypatch)
    run(config_of(), tmp_path)
    assert list(tmp_path.iterdir()) == [] and run.of("writer")[0][2]["primary"] is False


@pytest.mark.parametrize(
    ("changes", "meta", "message"),
    [
        ({"seed": 1}, {}, "holds a run with other values of seed; use another --workdir or its config"),
        ({}, {"data": "another"}, "holds a run on other training data: a data set, or what is held out of it, has changed"),
        ({}, {"config": 3}, "the config of its checkpoint is 3, expected a config"),
        ({}, {"config": {"steps": 5}}, "the config of its checkpoint: steps is called num_steps$"),
    ],
)
def test_another_run_is_refused_and_its_config_stays(monkeypatch, tmp_path, changes, meta, message):
    (tmp_path / "config.json").write_text("as it was")
    run = Run(monkeypatch, restored(3, **meta))
    with pytest.raises(UserError, match=message):
        run(config_of(**changes), tmp_path)
    assert (tmp_path / "config.json").read_text() == "as it was" and not run.of("writer", "step", "model")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trackers", ("wandbb",), r"trackers: unknown tracker 'wandbb' \(did you mean 'wandb'"),
        ("checkpoint.best", ("eval/giou", "max"), "checkpoint.best is .*, and there is no validation: set eval_every"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_anything_is_made(monkeypatch, tmp_path, key, value, message):
    run, config = Run(monkeypatch), config_of()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        run(config, tmp_path)
    assert run.events == []


def test_what_may_change_does_and_an_older_checkpoint_without_a_digest_goes_on(monkeypatch, tmp_path):
    config = config_of(num_steps=6, log_every=1, checkpoint_every=1, init_from=("x",))
    config.checkpoint.keep = 1
    config.data.update(dir="elsewhere", num_threads=3, num_workers=1, held_out=("a",), mixture=(("b", 1.0),))
    config.mesh.update(data=1, fsdp=-1)
    config.optimizer.update(grad_accum_steps=2, max_skipped_updates=3)
    run = Run(monkeypatch, restored(5, data=None))
    assert run(config, tmp_path) == "the model" and len(run.of("step")) == 1
    assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 6


def test_a_state_goes_into_a_tree_and_back():
    state = state_of(3)
    tree = loop.state_to_tree(state)
    assert {name: str(value) for name, value in tree.items()} == {
        "step": "3", "trainable": "{'a': np.float32(3.0)}", "frozen": "{'b': np.float32(5.0)}",
        "moments": "[np.int32(103), np.float32(1.0), np.float32(2.0)]", "skipped": "[7 8]",
    }  # fmt: skip
    again = loop.state_from_tree(state_of(1), tree)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, state))


def test_the_run_is_locked_while_it_lasts(monkeypatch, tmp_path):
    seen = []

    @contextlib.contextmanager
    def locked(workdir):
        seen.append(("in", str(workdir)))
        yield
        seen.append("out")

    monkeypatch.setattr(loop, "locked", locked)
    monkeypatch.setattr(loop.TrainProgram, "build", lambda config: f"program of {config}")
    monkeypatch.setattr(loop, "run", lambda *args: seen.append(tuple(map(str, args))) or "the model")
    assert loop.train("config", tmp_path / "a", "profile") == "the model"
    run = ("config", "program of config", f"{tmp_path}/a", "profile", "None")
    assert seen == [("in", f"{tmp_path}/a"), run, "out"] and (tmp_path / "a").is_dir()

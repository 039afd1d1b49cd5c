"""Worker processes: the same batches, the same errors, and no worker outlives the run that started it."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flowseg_jax.data import prepare, serialization
from flowseg_jax.data.mixture import build_mixture
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.train_dataset import TrainDataset, open_tokenizer
from flowseg_jax.data.train_examples import TrainOptions
from flowseg_jax.errors import UserError
from flowseg_jax.types import BatchShape
from tests.helpers import minirefcoco as mini

SHAPE = BatchShape(batch=2, text_length=260, max_phrases=4, max_masks=3, sam_size=32, siglip_size=16, max_names=3)
SHARED_MEMORY = Path("/dev/shm")
DEADLINE = 120.0  # seconds; only a failing test, or a machine with more to do than cores, waits so long

# A trainer that was sent its data as a worker is, which shows what that imports. It is killed, or waits for ever.
TRAINER = """
import pickle, sys
from pathlib import Path

if __name__ == "__main__":
    from jax._src import xla_bridge

    data = pickle.loads(Path(sys.argv[1]).read_bytes())
    data.batch(0)
    print("transformers" in sys.modules, xla_bridge.backends_are_initialized(), flush=True)
    batches = data.iterate()
    next(batches)
    print("reading", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return prepare.prepare(mini.write(root / "layout"), root / "prepared", tokenizer_vocab=300, log=lambda _: None)


@pytest.fixture(scope="module")
def train(prepared):
    def make(prepared=prepared, **options):
        tokenizer = open_tokenizer(prepared, PromptTemplates())
        members = build_mixture([(prepared, 0.0)])
        return TrainDataset(
            members, SHAPE, PromptTemplates(), 0, visual_tokens=6, tokenizer=tokenizer, options=TrainOptions(**options)
        )

    return make


def eventually(condition) -> bool:
    """Whether the condition becomes true before the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def status(pid: int) -> tuple[str, int] | None:
    """State and parent of a process, None when there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return state, int(parent)


def alive(pid: int) -> bool:
    found = status(pid)
    return found is not None and found[0] not in "ZX"


def children(pid: int) -> list[int]:
    everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [one for one in everyone if (found := status(one)) and found[1] == pid]


def shared_memory() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def assert_same(got, want):
    for field in dataclasses.fields(want):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name), err_msg=field.name)


def test_workers_build_the_same_batches_and_end_when_closed(train):
    data, before = train(num_workers=2, num_threads=2), shared_memory()
    with contextlib.closing(data.iterate(3)) as batches:
        for step in (3, 4):  # one from each worker: both are past their imports
            assert_same(next(batches), data.batch(step))
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:  # as a terminal or a scheduler signals all of a job: only the trainer answers
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        for step in range(5, 16):
            assert_same(next(batches), data.batch(step))
        assert all(worker.is_alive() for worker in workers)
    assert not any(worker.is_alive() for worker in workers)
    del batches
    assert eventually(lambda: not shared_memory() - before)


def test_what_fails_in_a_worker_is_raised_as_without_one(train, tmp_path, monkeypatch):
    record = serialization.to_record
    monkeypatch.setattr(serialization, "to_record", lambda example: record(example) | {"image": example.image[:-200]})
    broken = prepare.prepare(mini.write(tmp_path / "l"), tmp_path / "p", tokenizer_vocab=300, log=lambda _: None)
    said = []
    for workers in (0, 1):
        with contextlib.closing(train(broken, num_workers=workers).iterate()) as batches, pytest.raises(UserError) as error:
            next(batches)
        said.append(str(error.value))
    assert said[0] == said[1] and "truncated or damaged image" in said[0]
    assert not multiprocessing.active_children()


def test_a_worker_that_was_killed_is_an_error(train):
    data = train(num_workers=1)
    data.batch = lambda step: os.kill(os.getpid(), signal.SIGKILL)
    with (
        contextlib.closing(data.iterate()) as batches,
        pytest.raises(UserError, match=r"a data worker died with exit code -9; if it ran out of memory \(-9\)"),
    ):
        next(batches)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("moment", ["starting", "reading"])
def test_workers_die_with_a_trainer_that_is_killed(train, tmp_path, moment):
    (tmp_path / "data").write_bytes(pickle.dumps(train(num_workers=2)))
    (tmp_path / "trainer.py").write_text(TRAINER)
    before = shared_memory()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "trainer.py", "data"], cwd=tmp_path, env=environment, **pipes) as trainer:
        try:
            assert trainer.stdout.readline() == "False False\n"
            if moment == "reading":
                assert trainer.stdout.readline() == "reading\n"
            assert eventually(lambda: len(children(trainer.pid)) == 3)  # the workers and multiprocessing's resource tracker
            family = children(trainer.pid)
            left = shared_memory() - before
            assert left  # there is something to clean up
        finally:
            trainer.kill()
    try:
        assert eventually(lambda: not any(map(alive, family)))
    finally:
        for orphan in filter(alive, family):
            os.kill(orphan, signal.SIGKILL)
    assert eventually(lambda: not left & shared_memory())

"""One command at a time in a directory: who is refused, by whom, and when a lock that was left over counts for nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.data import prepare
from flowseg_jax.errors import UserError
from flowseg_jax.inference.outputs import PredictionWriter
from flowseg_jax.system import distributed, locks
from tests.helpers import fake_gcs
from tests.helpers import minirefcoco as mini


@pytest.fixture(params=["local", "bucket"])
def directory(request, tmp_path):
    """A directory on disk, and one in a store."""
    if request.param == "local":
        yield str(tmp_path / "run")
    else:
        with fake_gcs.serve() as bucket:
            yield f"{bucket}/run"


def hold(directory: Path, pipe) -> None:
    with locks.held(directory):
        pipe.send("held")
        with contextlib.suppress(EOFError):
            pipe.recv()


@contextlib.contextmanager
def elsewhere(directory: Path):
    """Another process of this machine that holds the lock."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(directory, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(60) and ours.recv() == "held"
        yield process
    finally:
        ours.close()
        process.join(60)
        assert process.exitcode is not None


def leave_behind(directory, **changes) -> locks.Owner:
    """Writes the lock of another owner."""
    owner = dataclasses.replace(locks.Owner.me(), **changes)
    path, text = locks.resolve_path(directory) / ".lock", json.dumps(dataclasses.asdict(owner))
    if locks.is_remote(directory):
        fake_gcs.Client().bucket("bucket").blob("run/.lock").upload_from_string(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return owner


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "LOOK", 0.01)
    monkeypatch.setattr(locks, "SILENT", 0.1)


def test_the_second_process_is_refused_and_told_of_the_first(tmp_path):
    run = tmp_path / "run"
    with elsewhere(run) as process:
        message = rf"{run} is in use by process {process.pid} on host {socket.gethostname()} \(.*, since 20"
        with pytest.raises(UserError, match=message), locks.held(run):
            pass
        with pytest.raises(UserError, match=message), distributed.locked(run):  # a job of several
            pass
        with pytest.raises(UserError, match=message), PredictionWriter(run, ("rle",), table=True):
            pass
        assert (run / ".lock").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert (run / ".lock").exists()
        with locks.held(run):  # at once: the kernel knows
            pass
    assert list(run.iterdir()) == []


def test_a_preparation_is_refused_while_another_one_runs(tmp_path):
    layout, lines = mini.write(tmp_path / "layout"), []
    prepared = tmp_path / "prepared"
    with pytest.raises(UserError, match=f"{prepared} is in use by process {os.getpid()}"):

        def second(line: str) -> None:
            lines.append(line)
            if len(lines) == 2:
                locks._held.clear()  # as a process of its own sees it
                prepare.prepare(layout, prepared, log=lambda _: None)

        prepare.prepare(layout, prepared, log=second)
    prepare.prepare(layout, prepared, log=lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layout", "prepared"]


def test_every_command_that_writes_is_refused(tmp_path, monkeypatch):
    """Before it reads or computes anything: what they are given does not exist."""
    from convert_weights.export import export_directory
    from flowseg_jax.checkpoints.pretrained import save_pretrained, save_pretrained_streaming
    from flowseg_jax.cli.main import main as flowseg
    from flowseg_jax.inference import export
    from flowseg_jax.training import loop

    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "x.png")
    prepared = prepare.prepare(mini.write(tmp_path / "layout"), tmp_path / "prepared", log=lambda _: None).directory
    monkeypatch.setattr(loop.TrainProgram, "build", lambda config: None)
    out = tmp_path / "out"
    inside = {
        "train": lambda: loop.train(None, out),
        "eval": lambda: flowseg(["eval", f"--data={prepared}", f"--out={out}"]),
        "predict": lambda: flowseg(["predict", f"--image={tmp_path / 'x.png'}", "--text=it", f"--out={out}"]),
    }
    beside = {
        "export": lambda: export.export("nowhere", out),
        "convert": lambda: save_pretrained_streaming(out, {}, {}, "nowhere"),
        "convert back": lambda: export_directory(None, "nowhere", out),
        "the model of a run": lambda: save_pretrained(out, {}, {}, "nowhere"),
    }
    for commands, options in ((inside, {}), (beside, {"beside": True})):
        with locks.held(out, **options):
            names = dict(locks._held)
            for name, command in commands.items():
                locks._held.clear()  # as a process of its own sees it
                with pytest.raises(UserError) as refused:
                    command()
                assert f"{out} is in use by process {os.getpid()} on host" in str(refused.value), name
            locks._held.update(names)


def test_it_is_held_once_however_often_it_is_entered_and_then_gone(directory):
    path = locks.resolve_path(directory)
    with locks.held(directory):
        with locks.held(directory):
            pass
        owner = locks.Owner.read((path / ".lock").read_bytes())
        assert (owner.pid, owner.host) == (os.getpid(), socket.gethostname())
    assert not (path / ".lock").exists()
    with locks.held(directory, beside=True):
        assert (path.parent / ".run.lock").exists()
    assert not (path.parent / ".run.lock").exists()


def test_a_process_of_this_machine_that_is_gone_leaves_nothing_to_wait_for(directory, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SILENT", 1e9)
    ended = multiprocessing.get_context("spawn").Process(target=int)
    ended.start()
    ended.join()
    leave_behind(directory, pid=ended.pid, started="1", token="a")
    with locks.held(directory):
        pass
    leave_behind(directory, started="1", token="a")  # the number belongs to another process now
    with locks.held(directory):
        pass
    assert capsys.readouterr().out == ""


def test_a_living_process_of_this_machine_is_respected_on_a_store(tmp_path):
    with fake_gcs.serve() as bucket:
        owner = leave_behind(f"{bucket}/run", token="a")
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on host"), locks.held(f"{bucket}/run"):
            pass
        assert locks.Owner.read((locks.resolve_path(f"{bucket}/run") / ".lock").read_bytes()) == owner


def test_another_host_is_given_time_to_show_that_it_lives(directory, quick, capsys):
    leave_behind(directory, host="far", machine="b", token="a")
    with locks.held(directory):
        pass
    assert "was last used by process" in (said := capsys.readouterr().out) and "on host far" in said

    leave_behind(directory, host="far", machine="b", token="a")
    look = locks.time.sleep

    def renewed(seconds: float) -> None:
        leave_behind(directory, host="far", machine="b", token="a")
        look(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "SILENT", 1e9)
        patch.setattr(locks.time, "sleep", renewed)
        with pytest.raises(UserError, match="is in use by process .* on host far"), locks.held(directory):
            pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}', "[" * 100_000])
def test_a_lock_that_cannot_be_read_is_no_reason_to_stop_for_ever(directory, quick, text):
    path = locks.resolve_path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / ".lock").write_text(text)
    with locks.held(directory):
        assert locks.Owner.read((path / ".lock").read_bytes()).pid == os.getpid()


def test_a_file_system_without_locks(tmp_path, monkeypatch, quick):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    run = tmp_path / "run"
    leave_behind(run, token="a")
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"), locks.held(run):
        pass
    leave_behind(run, started="1", token="a")
    with locks.held(run):
        pass


def test_an_owner_that_was_taken_for_dead_writes_no_more(directory, monkeypatch):
    ended = threading.Event()
    said = []

    def leave(line: str, code: int) -> None:
        said.append((line, code))
        ended.set()

    monkeypatch.setattr(locks, "RENEWED", 0.02)
    monkeypatch.setattr(locks, "leave", leave)
    with locks.held(directory):
        leave_behind(directory, pid=77, host="far", token="b")
        assert ended.wait(60)
    (line, code) = said[0]
    assert "was taken over by process 77 on host far" in line and code == 2
    assert locks.Owner.read((locks.resolve_path(directory) / ".lock").read_bytes()).token == "b"  # it is the other's


def test_a_lock_that_was_removed_by_hand_comes_back(directory, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED", 0.02)
    path = locks.resolve_path(directory) / ".lock"
    with locks.held(directory):
        path.unlink()
        for _ in range(1000):
            if path.exists():
                break
            locks.time.sleep(0.01)
        assert locks.Owner.read(path.read_bytes()).pid == os.getpid()
    assert not path.exists()


def test_of_two_that_come_at_once_one_is_refused(directory):
    with locks.held(directory):
        locks._held.clear()  # as a process of its own sees it
        with pytest.raises(UserError, match="is in use by process"), locks.held(directory):
            pass
        locks._held[(locks.resolve_path(directory) / ".lock").as_posix()] = 1


def test_a_store_where_another_is_quicker(monkeypatch):
    """Both saw no lock; the store lets one create it."""
    with fake_gcs.serve() as bucket:
        write = locks._Object.write

        def later(lock, mine, version):
            if version is None:
                leave_behind(f"{bucket}/run", token="a")
            write(lock, mine, version)

        monkeypatch.setattr(locks._Object, "write", later)
        with pytest.raises(UserError, match="is in use by process"), locks.held(f"{bucket}/run"):
            pass


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written: Not a directory"), locks.held(tmp_path / "file" / "run"):
        pass

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with pytest.raises(UserError, match=r"run cannot be written: No space left on device"), locks.held(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_may_be_called_anything():
    """Its name is in the line that says when it was started, whatever bytes it is."""
    own, started = Path("/proc/self/comm"), locks._started(os.getpid())
    if not started:
        pytest.skip("the system does not say when a process was started")
    name = own.read_bytes()
    try:
        own.write_bytes(b"\xff) Z 1")
        assert locks._started(os.getpid()) == started
    finally:
        own.write_bytes(name)

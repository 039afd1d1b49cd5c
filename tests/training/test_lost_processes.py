"""One of several processes dies: the others say which, end soon, and the same command continues."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowseg_jax import experiment as configs
from flowseg_jax.synthetic.shapes import load_or_build_shapes
from flowseg_jax.system import process_watch
from tests.training.test_kills import children
from tests.training.test_two_processes import ROOT, config, finish, launch, metrics, pair  # noqa: F401

WITHIN = 30.0  # seconds until the others have ended; `process_watch.OWN_END` and a busy machine's time to start and stop
PATIENCE = 600  # seconds for what takes as long as the machine is busy
pytestmark = [pytest.mark.timeout(1800)]

JOB = """
import sys, time
from flowseg_jax import errors
from flowseg_jax.errors import UserError
from flowseg_jax.system import distributed

def main():
    index, address, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    with distributed.joined(address, 3, index):
        print("joined", flush=True)
        if what == "fail" and index == 1:
            raise UserError("a mistake of this process alone")
        if what != "end":
            time.sleep(600)

errors.run_cli(main)
"""


def start(what: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", JOB]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*command, str(i), address, what], env=environment, **pipes) for i in range(3)]


def ended(processes: list[subprocess.Popen], timeout: float = PATIENCE) -> list[tuple[int, list[str]]]:
    """Exit code and lines of each."""
    said = [process.communicate(timeout=timeout)[0].splitlines() for process in processes]
    return [(process.returncode, lines) for process, lines in zip(processes, said, strict=True)]


def clean(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def remaining(index: int, who: str) -> str:
    return f"error: {who} is gone, so process {index} ends; the same command continues"


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_others_say_which_one_is_gone(victim):
    jobs = start("wait")
    try:
        for job in jobs:
            assert "joined" in job.stdout.readline()
        host, pid = socket.gethostname(), jobs[victim].pid
        jobs[victim].kill()
        killed = time.monotonic()
        who = "process 0 (on host 127.0.0.1)" if victim == 0 else f"process {victim} ({pid} on host {host})"
        rest = [index for index in range(3) if index != victim]
        found = ended([jobs[index] for index in rest])
        assert time.monotonic() - killed < WITHIN
        assert found == [(process_watch.GONE, [remaining(index, who)]) for index in rest]
    finally:
        clean(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fail", "end"])
def test_an_end_of_its_own(what):
    """A process that fails takes the others along and its own line with it; where all end alike, nobody is missed."""
    jobs = start(what)
    try:
        found = ended(jobs)
        if what == "end":
            assert found == [(0, ["joined"])] * 3
            return
        assert found[1] == (2, ["joined", "error: a mistake of this process alone"])
        who = f"process 1 ({jobs[1].pid} on host {socket.gethostname()})"
        assert [found[index] for index in (0, 2)] == [
            (process_watch.GONE, ["joined", remaining(index, who)]) for index in (0, 2)
        ]
    finally:
        clean(jobs)


def wait_for(there, jobs: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs)
        time.sleep(0.05)


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def kill_one(jobs: list[subprocess.Popen], victim: int) -> str:
    """Kills one of two; what the other says, without its reports."""
    os.kill(jobs[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    (code, said) = ended([jobs[1 - victim]])[0]
    assert time.monotonic() - killed < WITHIN and code == process_watch.GONE, "\n".join(said)
    assert "Traceback" not in "\n".join(said) and "stack trace" not in "\n".join(said)
    errors = [line for line in said if line.startswith("error")]
    assert len(errors) == 1 and said[-1] == errors[0]
    return errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_training(config, tmp_path, victim):  # noqa: F811
    long = configs.from_json(configs.to_json(config))
    long.update(num_steps=100_000, checkpoint_every=2)
    long.mesh.data = 1
    workdir = tmp_path / "two"
    jobs = [launch(long, workdir, 1, *flags) for flags in pair()]
    try:
        wait_for(lambda: lines_of(workdir / "metrics.jsonl") > 4, jobs)
        assert f"process {victim} (" in kill_one(jobs, victim)
    finally:
        clean(jobs)
    done = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    long.num_steps = done + 4
    said = finish(*[launch(long, workdir, 1, *flags) for flags in pair()])
    assert "continuing from the checkpoint of step" in said and "is in use" not in said


COUNTING = """
import sys, time
from pathlib import Path
from flowseg_jax import errors
from flowseg_jax.system import distributed

def main():
    address, index, file = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    with distributed.joined(address, 2, index):
        start = int(file.read_text()) if file.exists() else 0
        print("from", start, flush=True)
        for step in range(start + 1, 41):
            assert distributed.all_gather_bytes(b"%d" % step) == [b"%d" % step] * 2
            if index == 0 and step % 4 == 0:
                file.with_suffix(".new").write_text(str(step))
                file.with_suffix(".new").rename(file)
            time.sleep(0.1)

errors.run_cli(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_job_is_restarted_by_the_command_that_each_process_has(tmp_path, victim):
    """A supervisor for each process, as `--restart-on-failure` is: both start theirs again, and they meet. They count together
    and note every fourth number, where a run trains and saves."""
    file, (address, *_) = tmp_path / "count", pair()[0]
    jobs = []
    for index in range(2):
        command = [sys.executable, "-c", COUNTING, address.partition("=")[2], str(index), str(file)]
        script = f"import sys; from flowseg_jax.system.restarts import supervise; sys.exit(supervise({command!r}, 2))"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        jobs.append(subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes))
    try:
        wait_for(lambda: file.exists() and int(file.read_text()) >= 8, jobs)
        (pid,) = children(jobs[victim])
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: children(jobs[victim]) not in ([], [pid]), jobs)  # the other one has ended long before
        reached = file.read_text()
        wait_for(lambda: file.read_text() != reached, jobs)
        seconds = time.monotonic() - killed
        said = finish(*jobs)
    finally:
        for pid in [pid for job in jobs for pid in children(job)]:
            os.kill(pid, signal.SIGKILL)
        clean(jobs)
    assert re.findall(r"^from (\d+)$", said, re.MULTILINE) == ["0", reached] * 2 and file.read_text() == "40"
    assert said.count("the run was ended by SIGKILL; it is started again in 15 s, 1 of 2") == 1
    assert said.count("the run ended with exit code 1; it is started again in 15 s, 1 of 2") == 1
    print(f"\nprocess {victim} killed, both continued from {reached}, a new note after {seconds:.0f} s")


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):  # noqa: F811
    """(config, metrics) of a run of two processes, of which none is killed."""
    run, workdir = configs.from_json(configs.to_json(config)), tmp_path_factory.mktemp("undisturbed") / "run"
    run.update(num_steps=40, checkpoint_every=4)
    run.mesh.data = 1
    finish(*[launch(run, workdir, 1, *flags) for flags in pair()])
    return run, metrics(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_that_are_restarted_train_as_if_none_had_been_killed(undisturbed, tmp_path, victim):
    (run, expected), workdir = undisturbed, tmp_path / "killed"
    jobs = [launch(run, workdir, 1, "--restart-on-failure=2", *flags) for flags in pair()]
    try:
        wait_for(lambda: lines_of(workdir / "metrics.jsonl") >= 10, jobs)
        (pid,) = children(jobs[victim])
        os.kill(pid, signal.SIGKILL)
        reached = lines_of(workdir / "metrics.jsonl")
        codes, lines = zip(*ended(jobs), strict=True)
    finally:
        for pid in [pid for job in jobs for pid in children(job)]:
            os.kill(pid, signal.SIGKILL)
        clean(jobs)
    said = "\n".join(itertools.chain(*lines))
    assert codes == (0, 0), said
    assert said.count("the run was ended by SIGKILL; it is started again in 15 s, 1 of 2") == 1
    assert said.count(f"the run ended with exit code {process_watch.GONE}; it is started again in 15 s, 1 of 2") == 1
    (start,) = map(int, re.findall(r"continuing from the checkpoint of step (\d+)", said))
    assert 0 <= reached - start < 12  # an interval, a checkpoint that was being written, and steps until the other noticed
    found = metrics(workdir)
    assert [row["step"] for row in found] == list(range(1, 41)) and found == expected
    print(f"\nprocess {victim} killed after step {reached}, both continued from {start}, the losses of all 40 steps are equal")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_evaluation(tmp_path, victim):
    data, out = load_or_build_shapes(tmp_path / "shapes", 300, 0, log=lambda _: None).directory, tmp_path / "eval"

    def launch_both() -> list[subprocess.Popen]:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "eval.py"), f"--out={out}", f"--data={data}", "--batch-size=2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
        return [subprocess.Popen([*command, *flags], env=environment, **pipes) for flags in pair()]

    jobs = launch_both()
    try:
        wait_for(lambda: lines_of(out / "val.partial.jsonl") > 4, jobs)
        assert f"process {victim} (" in kill_one(jobs, victim)
    finally:
        clean(jobs)
    said = finish(*launch_both())
    assert "continuing after" in said and (out / "val.json").exists() and not (out / "val.partial.jsonl").exists()

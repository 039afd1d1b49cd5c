"""A run that is killed, stopped, damaged or out of disk space, and continued by the same command, is the uninterrupted run.

Everything here goes through `train.py` in processes of its own. The twenty kills, with their table:

    python -m pytest tests/training/test_kills.py -m slow
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.data import prepare
from flowseg_jax.models.language_config import LanguageConfig
from tests.helpers import minirefcoco as mini
from tests.helpers import small
from tests.helpers.trees import flip, largest

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 24
PATIENCE = 600  # seconds for one process, however busy the machine is
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]


@dataclasses.dataclass(frozen=True)
class Command:
    """The `train.py` command of a tiny run that logs every step and saves every fourth."""

    config: Path

    @contextlib.contextmanager
    def started(self, workdir: Path, log: Path, *flags: str, **options) -> Iterator[subprocess.Popen]:
        """Starts, or continues, the run in `workdir`; what it prints goes into `log`."""
        arguments = [sys.executable, str(ROOT / "train.py"), f"--config={self.config}", f"--workdir={workdir}", *flags]
        environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"}
        if workdir.exists():  # what could be killed reads the compilation cache and leaves it alone
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
        with log.open("w") as file:
            process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, **options)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def run(self, workdir: Path, log: Path, **options) -> int:
        """Its exit code, once it has ended by itself."""
        with self.started(workdir, log, **options) as process:
            return process.wait(PATIENCE)


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Command:
    root = tmp_path_factory.mktemp("data")
    prepared = prepare.prepare(mini.write(root / "layout"), root / "prepared", tokenizer_vocab=300, log=lambda _: None)
    llm = dataclasses.replace(LanguageConfig.tiny(300), hidden_size=28, num_hidden_layers=1, head_dim=14, intermediate_size=36)
    cfg = small.lean(negatives_group_size=1, llm=llm)
    save_pretrained(root / "start", small.params(cfg), cfg.to_dict(), prepared.tokenizer_directory, dtype=None)
    config = small.experiment(cfg, small.batch(cfg))
    config.update(num_steps=STEPS, log_every=1, checkpoint_every=4, init_from=(str(root / "start"),))
    config.data.update(dir=str(prepared.directory), shapes_images=0, text_length=120, max_phrases=2, max_masks=4)
    file = root / "config.json"
    file.write_text(configs.to_json(config))
    return Command(file)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: its losses by step, and a checksum of every trained parameter."""

    losses: dict[int, dict[str, float]]
    checksums: dict[str, int]

    @classmethod
    def of(cls, workdir: Path) -> Outcome:
        return cls(losses(workdir), json.loads((workdir / "model" / "config.json").read_text())["checksums"])


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> Path:
    """The directory of the run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    log = workdir.with_name("log")
    assert command.run(workdir, log) == 0, log.read_text()
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(finished) -> Outcome:
    return Outcome.of(finished)


def test_a_step_directory_holds_all_that_it_takes_to_continue(finished, command):
    directory = finished / "checkpoints" / str(STEPS)
    assert {"state", "meta"} <= {path.name for path in directory.iterdir()}
    meta = json.loads((directory / "meta" / "metadata").read_text())
    config = json.loads(command.config.read_text())
    assert meta["step"] == meta["data_position"] == STEPS
    assert meta["config"] == config  # every key, so the seed as well: with the step it determines every random number
    assert "seed" in meta["config"]
    assert meta["versions"].keys() >= {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert "revision" in meta
    assert meta["manifest"].keys() == meta["checksums"].keys()
    assert any(name.startswith("trainable/") for name in meta["manifest"])
    assert sorted(losses(finished)) == list(range(1, STEPS + 1))


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """The losses that were logged, without a last line that is being written."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (workdir / "metrics.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                found[row["step"]] = {name: value for name, value in row.items() if name.startswith("loss")}
    return found


def last_logged(workdir: Path) -> int:
    return max(losses(workdir), default=0)


def saved(workdir: Path) -> list[int]:
    directory = workdir / "checkpoints"
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.exists() else []


def saving(workdir: Path) -> int | None:
    """The step whose checkpoint lies there half-written."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(workdir / "checkpoints"):
            if "-tmp" in entry.name:
                return int(entry.name.partition(".")[0])
    return None


def continued_from(log: Path) -> int:
    """The step that a run said it continued from; 0 for none."""
    found = re.search(r"continuing from the checkpoint of step (\d+)", log.read_text())
    return int(found[1]) if found else 0


def wait_until(moment: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    """Returns as soon as `moment` is there; fails if the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not moment():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)


@dataclasses.dataclass(frozen=True)
class Kill:
    """A moment to kill a run: `seconds` after the process has started, has logged `step`, or is seen to save after it."""

    kind: str  # "starting", "training" or "saving"
    step: int
    seconds: float

    def come(self, workdir: Path) -> bool:
        if self.kind == "starting":
            return True
        return (self.kind == "training" or saving(workdir) is not None) and last_logged(workdir) >= self.step


def difference(workdir: Path, truth: Outcome) -> str:
    """The first step whose losses differ from the uninterrupted run's in any bit, or "none"."""
    found = losses(workdir)
    return next((str(step) for step in sorted(found) if found[step] != truth.losses[step]), "none")


def kill(command: Command, workdir: Path, log: Path, moment: Kill) -> bool:
    """Starts or continues a run and kills it; whether it was saving."""
    leftover = saving(workdir)  # of the last kill; the run removes it when it opens its checkpoints
    with command.started(workdir, log) as process:
        if moment.kind == "saving":
            wait_until(lambda: saving(workdir) is None, process, log)
        wait_until(lambda: moment.come(workdir), process, log)
        time.sleep(moment.seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
    half = saving(workdir)
    # A checkpoint is begun when all lines up to it are written: a run that continues from it has no gap in its metrics.
    assert last_logged(workdir) >= max([*saved(workdir), half or 0])
    return half is not None and (moment.kind != "starting" or half != leftover)


def kill_and_continue(command: Command, truth: Outcome, root: Path, kills: list[Kill]) -> tuple[Path, list[str], int]:
    """A run with all these kills and an end: its directory, the rows of a table, and how many kills hit a save."""
    workdir, rows, hits = root / "run", ["kill  moment    step  half-saved  resumed  first differing loss"], 0
    for number, moment in enumerate([*kills, None]):
        log = root / f"log{number}"
        if moment:
            half = kill(command, workdir, log, moment)
        else:
            assert command.run(workdir, log) == 0, log.read_text()
        if number:
            rows[-1] += f"  {continued_from(log):7d}  {difference(workdir, truth)}"
        if moment:
            hits += half
            rows.append(f"{number + 1:4d}  {moment.kind:8s}  {last_logged(workdir):4d}  {'yes' if half else 'no':10s}")
    return workdir, rows, hits


def test_killed_while_training_and_while_saving(command, uninterrupted, tmp_path):
    kills = [Kill("saving", 7, 0.0), Kill("training", 14, 0.01)]
    workdir, _, hits = kill_and_continue(command, uninterrupted, tmp_path, kills)
    assert hits >= 1
    assert Outcome.of(workdir) == uninterrupted
    assert saving(workdir) is None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(command, uninterrupted, tmp_path, capsys):
    rng = random.Random(0)
    kinds = ["starting"] * 3 + ["training"] * 8 + ["saving"] * 9
    rng.shuffle(kinds)
    steps = sorted(rng.randrange(STEPS - 3) for _ in kinds)
    reach = {"starting": 10.0, "training": 0.1, "saving": 0.05}  # seconds
    kills = [Kill(kind, step, rng.uniform(0, reach[kind])) for kind, step in zip(kinds, steps, strict=True)]
    workdir, table, hits = kill_and_continue(command, uninterrupted, tmp_path, kills)
    with capsys.disabled():
        print("", *table, sep="\n")
    assert hits >= 5
    assert Outcome.of(workdir) == uninterrupted


def test_stopped_damaged_and_out_of_space(command, uninterrupted, tmp_path, capsys):
    workdir, log = tmp_path / "run", tmp_path / "log"

    def stop(number: int, step: int) -> tuple[int, float]:
        """Sends a signal after `step`; the exit code and the seconds until the process was gone."""
        with command.started(workdir, log) as process:
            wait_until(lambda: last_logged(workdir) >= step, process, log)
            started = time.monotonic()
            process.send_signal(number)
            return process.wait(PATIENCE), time.monotonic() - started

    code, seconds = stop(signal.SIGTERM, 4)
    assert code == 0, log.read_text()
    with capsys.disabled():
        print(f"\nSIGTERM: saved and gone after {seconds:.1f} s")
    assert saved(workdir)[-1] == last_logged(workdir)
    assert f"the state of step {last_logged(workdir)} is saved" in log.read_text()

    code, _ = stop(signal.SIGINT, last_logged(workdir) + 2)
    assert code == 130
    assert log.read_text().endswith("interrupted\n") and "Traceback" not in log.read_text()
    assert saved(workdir)[-1] == last_logged(workdir)

    def full_disk() -> None:  # writing after this many bytes of a file fails, as it would on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    before = saved(workdir)
    assert command.run(workdir, log, preexec_fn=full_disk) == 2
    *_, error = log.read_text().splitlines()
    listed = ", ".join(map(str, before))
    assert re.fullmatch(rf"error: checkpoint of step \d+ in .* could not be written: File too large; .*: {listed}", error)
    assert "Traceback" not in log.read_text()
    assert saved(workdir) == before

    newest = workdir / "checkpoints" / str(before[-1])
    flip(largest(newest / "state"))
    assert command.run(workdir, log) == 0, log.read_text()
    assert f"checkpoint {newest} is damaged (" in log.read_text()
    assert f"set aside as {newest.name}.damaged" in log.read_text()
    assert continued_from(log) == before[-2]
    assert Outcome.of(workdir) == uninterrupted


def test_a_run_that_is_killed_between_two_checkpoints_continues_from_the_local_one(command, uninterrupted, tmp_path):
    config = configs.from_json(command.config.read_text())
    config.update(checkpoint_every=20)
    config.checkpoint.update(local_dir=str(tmp_path / "local"), local_every=2)
    file = tmp_path / "config.json"
    file.write_text(configs.to_json(config))
    workdir, log = tmp_path / "run", tmp_path / "log"
    with Command(file).started(workdir, log) as process:
        wait_until(lambda: last_logged(workdir) >= 9, process, log)
        process.kill()
    first = json.loads((workdir / "first_start.json").read_text())
    reached = last_logged(workdir)
    assert saved(workdir) == [] or reached >= 20
    assert Command(file).run(workdir, log) == 0, log.read_text()
    assert 0 < reached - continued_from(log) < 4 and f"in {tmp_path}/local/{first['run_id']}/process_0" in log.read_text()
    assert Outcome.of(workdir) == uninterrupted and list((tmp_path / "local").iterdir()) == []
    assert json.loads((workdir / "first_start.json").read_text()) == first
    goodput = [json.loads(line)["goodput"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < share < 1 for share in goodput)


def children(process: subprocess.Popen) -> list[int]:
    return [
        int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ]


def test_a_killed_run_is_restarted_by_its_own_command(command, uninterrupted, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    with command.started(workdir, log, "--restart-on-failure=2") as supervisor:
        try:
            wait_until(lambda: last_logged(workdir) >= 10 and 8 in saved(workdir), supervisor, log)
            (pid,) = children(supervisor)
            os.kill(pid, signal.SIGKILL)
            killed, reached = time.monotonic(), last_logged(workdir)
            wait_until(lambda: children(supervisor) not in ([], [pid]) and continued_from(log) > 0, supervisor, log)
            wait_until(lambda: last_logged(workdir) > reached, supervisor, log)
            seconds = time.monotonic() - killed
            assert supervisor.wait(PATIENCE) == 0, log.read_text()
        finally:
            for pid in children(supervisor):
                os.kill(pid, signal.SIGKILL)
    assert "the run was ended by SIGKILL; it is started again in 15 s, 1 of 2" in log.read_text()
    assert reached - continued_from(log) < 8  # one interval, and a checkpoint that was being written
    assert Outcome.of(workdir) == uninterrupted
    print(f"\nkilled after step {reached}, continued from {continued_from(log)}, a new step after {seconds:.0f} s")

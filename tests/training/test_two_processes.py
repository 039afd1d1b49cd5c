"""Two processes of two devices each train as one process of four does; one process alone goes on and evaluates."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.data import prepare
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
from flowseg_jax.models.language_config import LanguageConfig
from tests.helpers import minirefcoco as mini
from tests.helpers import small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of four steps on miniature data, saved after the second; it starts from parameters that cost nothing to draw."""
    root = tmp_path_factory.mktemp("run")
    prepared = prepare.prepare(mini.write(root / "layout"), root / "prepared", tokenizer_vocab=300, log=lambda _: None)
    cfg = small.lean(negatives_group_size=4)
    cfg = dataclasses.replace(
        cfg,
        llm=dataclasses.replace(
            LanguageConfig.tiny(300), hidden_size=28, num_hidden_layers=1, head_dim=14, intermediate_size=36
        ),
    )
    config = small.experiment(cfg, small.batch(cfg, images=8), data=2, fsdp=2)
    config.update(num_steps=4, log_every=1, checkpoint_every=2, init_from=(str(root / "start"),))
    config.data.update(dir=str(prepared.directory), shapes_images=0, text_length=120, max_masks=4)
    save_pretrained(root / "start", small.params(cfg), cfg.to_dict(), prepared.tokenizer_directory, dtype=None)
    return config


def launch(config, workdir: Path, devices: int, *flags: str) -> subprocess.Popen:
    workdir.parent.mkdir(exist_ok=True)
    file = workdir.parent / f"{workdir.name}-{'-'.join(flags) or 'alone'}.json".replace("/", "").replace(":", "")
    file.write_text(configs.to_json(config))
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": xla, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), f"--config={file}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> str:
    outputs = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return "\n".join(outputs)


def metrics(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("speed/", "input/", "goodput"))} for row in rows]


def pair() -> list[tuple[str, ...]]:
    """The flags of two processes of one run on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [(f"--coordinator={address}", "--num-processes=2", f"--process-id={index}") for index in range(2)]


def train_both(config, tmp_path, devices: int) -> list[dict]:
    """One process into `one`, two with half of the devices each into `two`; returns the metrics of the first."""
    whole = launch(config, tmp_path / "one", devices)
    halves = [launch(config, tmp_path / "two", devices // 2, *flags) for flags in pair()]
    said = finish(*halves)
    finish(whole)
    assert said.count("of them trained; mesh:") == 1  # one speaks for both
    return metrics(tmp_path / "one")


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(config, tmp_path):
    short = configs.from_json(configs.to_json(config))
    short.update(num_steps=2, eval_every=2)
    short.mesh.data = 1
    expected = train_both(short, tmp_path, 2)
    assert len(expected) == 2 and "eval/ciou" in expected[1]  # 0 after two steps: what counts is that both come through it
    assert_equal(metrics(tmp_path / "two"), expected)
    assert (tmp_path / "two" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(config, tmp_path):
    slices = configs.from_json(configs.to_json(config))
    slices.mesh.slices = 2  # simulated: each of two processes, or the two halves of the devices of one
    expected = train_both(slices, tmp_path, 4)
    assert_equal(metrics(tmp_path / "two"), expected)
    assert sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir()) == ["2", "4"]
    (tmp_path / "two" / "checkpoints" / "4").rename(tmp_path / "set-aside")
    changed = configs.from_json(configs.to_json(config))  # four slices of one device, and the batch in two parts
    changed.mesh.update(data=4, fsdp=1, slices=4)
    changed.optimizer.grad_accum_steps = 2
    assert "continuing from the checkpoint of step 2" in finish(launch(changed, tmp_path / "two", 4))
    assert_equal(metrics(tmp_path / "two"), expected)
    benchmarks = [
        ReferringEvaluation(EvalModel.load(tmp_path / run / "model"), PreparedDataset.open(config.data.dir), 2)
        for run in ("one", "two")
    ]
    one, two = (benchmark.run("val", tmp_path / f"eval{i}", pictures=False).result for i, benchmark in enumerate(benchmarks))
    assert two["n"] == one["n"] and two["ciou"] == pytest.approx(one["ciou"], abs=1e-3)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_after_the_same_step(config, tmp_path):
    endless = configs.from_json(configs.to_json(config))
    endless.update(num_steps=100_000, checkpoint_every=100_000)
    endless.mesh.data = 1
    halves = [launch(endless, tmp_path / "two", 1, *flags) for flags in pair()]
    deadline = time.monotonic() + 250
    while not (tmp_path / "two" / "metrics.jsonl").exists() or len(metrics(tmp_path / "two")) < 3:
        assert time.monotonic() < deadline and all(half.poll() is None for half in halves)
        time.sleep(0.1)
    halves[1].send_signal(signal.SIGTERM)  # the one that does not speak
    said = finish(*halves)
    last = metrics(tmp_path / "two")[-1]["step"]
    assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == [str(last)]
    assert f"stopped: the state of step {last} is saved" in said

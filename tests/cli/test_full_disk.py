"""A disk that is full and one that is only read: one line, nothing half-written, and the same command continues.

The disks are real ones, small file systems in memory, where mounting them is allowed (as root); what must hold everywhere is
tested beside it with errors that are made.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowseg_jax import errors
from flowseg_jax.checkpoints import storage
from flowseg_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.data import prepare
from flowseg_jax.data.tokenizer import train_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import resumable
from tests.helpers import minirefcoco as mini


class Disk:
    """A file system in memory."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()

    def mount(self, options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*"))


@pytest.fixture
def disk(tmp_path):
    """Mount it before use."""
    disk = Disk(tmp_path / "disk")
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system takes root on Linux")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk.path)], capture_output=True, check=False)


def quiet(_: str) -> None:
    pass


def test_prepare(disk, tmp_path):
    layout = mini.write(tmp_path / "layout")
    expected = prepare.prepare(layout, tmp_path / "expected", tokenizer_vocab=300, log=quiet)
    out = disk.path / "out"
    disk.mount("size=4k")
    for size in (4, 12, 24, 48, 96):
        disk.remount(f"size={size}k")
        try:
            prepare.prepare(layout, out, tokenizer_vocab=300, log=quiet)
        except UserError as error:
            assert "No space left on device" in str(error) and "\n" not in str(error), size
        assert not out.exists(), size
    disk.remount("size=4m")
    prepared = prepare.prepare(layout, out, tokenizer_vocab=300, log=quiet)
    assert prepared.digest == expected.digest
    assert disk.files() == ["out", *(f"out/{path.relative_to(tmp_path / 'expected')}" for path in tree(tmp_path / "expected"))]
    disk.remount("ro")
    with pytest.raises(UserError, match="again cannot be written: Read-only file system"):
        prepare.prepare(layout, disk.path / "again", log=quiet)


def tree(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the red circle"], directory, vocab=300)
    return directory


def test_a_model_directory(disk, tokenizer):
    """What training and conversion write at their end: the old one stays until the new one is there."""
    params = [{"w": np.random.default_rng(n).normal(size=(256, 256)).astype(np.float32)} for n in (1, 2)]
    disk.mount("size=4m")
    target = save_pretrained(disk.path / "model", params[0], {}, tokenizer, dtype=None)
    full = disk.path / "full"
    full.write_bytes(bytes(4 * 2**20 - 96 * 1024 - sum(path.stat().st_size for path in tree(disk.path) if path.is_file())))
    with pytest.raises(UserError, match=f"{target} could not be written: No space left on device"):
        save_pretrained(target, params[1], {}, tokenizer, dtype=None, overwrite=True)
    assert sorted(path.name for path in disk.path.iterdir()) == ["full", "model"]
    assert (load_pretrained(target, dtype=None).params["w"] == params[0]["w"]).all()
    full.unlink()
    save_pretrained(target, params[1], {}, tokenizer, dtype=None, overwrite=True)
    assert (load_pretrained(target, dtype=None).params["w"] == params[1]["w"]).all()
    disk.remount("ro")
    with pytest.raises(UserError, match="model cannot be written: Read-only file system"):
        save_pretrained(target, params[0], {}, tokenizer, dtype=None, overwrite=True)
    assert (load_pretrained(target, dtype=None).params["w"] == params[1]["w"]).all()


def test_a_partial_evaluation(disk):
    """What is done is kept as far as there is room, and the run goes on after it."""
    disk.mount("size=16k")
    path, settings = disk.path / "val.partial.jsonl", {"split": "val"}
    with (
        pytest.raises(UserError, match=rf"cannot write {path}: No space left on device"),
        resumable.ResumableRecords.open(path, settings) as p,
    ):
        for place in range(1000):
            p.add({place: [{"sentence": "x" * 200}]})
    done = len(p.records)
    assert 10 < done < 1000 and f"{done} images are done" in p.progress_note()
    disk.remount("size=1m")
    with resumable.ResumableRecords.open(path, settings) as again:
        assert again.records.keys() == p.records.keys()


def test_an_evaluation_that_cannot_keep_its_records(tmp_path, monkeypatch):
    """As above, on any system."""
    path = tmp_path / "val.partial.jsonl"
    with pytest.raises(UserError, match=f"cannot write {path}: No space left"), resumable.ResumableRecords.open(path, {}) as p:
        p.add({0: [{"a": 1}]})
        p._file = FullFile(p._file)
        p.add({1: [{"a": 1}]})
    with resumable.ResumableRecords.open(path, {}) as again:
        assert list(again.records) == [0] == list(p.records)


class FullFile:
    """Takes nothing, and says so again when it is closed."""

    def __init__(self, file):
        self._file = file

    def writelines(self, lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        self._file.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_results_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "val.json"
    storage.write_text_atomic(path, "old")

    def half(self, text, **_):
        self.write_bytes(text[:1].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(path), "write_text", half)
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device; make room"):
        storage.write_text_atomic(path, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_export(monkeypatch, tmp_path, capfd):
    """The library that writes the weights has an error type of its own."""
    from safetensors import SafetensorError

    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert errors.not_writable(error) == "No space left on device"
    assert errors.not_writable(PermissionError(errno.EACCES, "Permission denied", "/x/y")) == "Permission denied: /x/y"
    assert errors.not_writable(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    assert errors.not_writable(ValueError("what was said about No space")) is None

    def fail(*arguments):
        raise error

    target = tmp_path / "out"
    full = pytest.raises(UserError, match=f"^{target} could not be written: No space left on device$")
    with full, storage.fresh_directory(target) as folder:
        (folder / "begun").write_text("")
        fail()
    assert not [*tmp_path.iterdir()]


def test_whatever_else_cannot_write(capfd):
    """The last resort of every command: one line, and the exit code of what a user can put right."""

    def main():
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(SystemExit) as stopped:
        errors.run_cli(main)
    assert stopped.value.code == 2
    said = capfd.readouterr().err
    assert said == "error: cannot write: No space left on device; make room, or choose another place\n"


def test_predict_train_and_eval_say_it_before_they_load_anything(disk, tmp_path):
    disk.mount("ro")
    image = tmp_path / "x.png"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(image)
    prepared = prepare.prepare(mini.write(tmp_path / "layout"), tmp_path / "prepared", log=quiet)
    with pytest.raises(UserError, match="out cannot be written: Read-only file system"):
        flowseg(["predict", f"--image={image}", "--text=it", f"--out={disk.path / 'out'}"])
    with pytest.raises(UserError, match="run cannot be written: Read-only file system; choose another with --workdir"):
        storage.prepare_workdir(disk.path / "run")
    with pytest.raises(UserError, match="eval cannot be written: Read-only file system"):
        flowseg(["eval", f"--out={disk.path / 'eval'}", f"--data={prepared.directory}", "--split=val"])


def test_the_tables_of_a_prediction_have_no_half_a_line(disk, tmp_path):
    from flowseg_jax.inference.outputs import TABLE, PredictionWriter, Unwritable

    disk.mount("size=16k")
    full = pytest.raises(Unwritable, match="No space left on device; make room")
    with full, PredictionWriter(disk.path / "out", ("rle",), table=True) as w:
        for _ in range(1000):
            w.fail("x" * 300, "broken")
    lines = (disk.path / "out" / TABLE).read_text().splitlines()
    assert len(lines) > 10 and all(json.loads(line)["failure"] == "broken" for line in lines)

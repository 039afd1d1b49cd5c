"""One picture that fails never ends a run: whatever it raises, wherever, and however it is called."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.errors import UserError
from flowseg_jax.inference import outputs
from flowseg_jax.reports import overlay
from tests.inference.test_segmentor import command, model, picture, tokenizer_directory  # noqa: F401


def pictures(folder, *names: bytes) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(picture()).save(os.path.join(os.fsencode(folder), name), format="PNG")


def test_names_that_are_long_or_no_text(command, tmp_path, capsys):  # noqa: F811
    """They are answered, and the table reads back which they were."""
    long, other, broken = b"l" * 236 + b".png", b"l" * 235 + b"m.png", b"\xff\xc3.png"
    pictures(tmp_path / "in", long, other, broken, "é".encode() * 118 + b".png")
    code, lines = command(tmp_path / "out", f"--image={tmp_path / 'in'}", "--text=it", "--save=overlay,rle,png")
    assert code == 0 and len(lines) == 4
    assert {os.fsencode(os.path.basename(line["image"])) for line in lines} == set(os.listdir(os.fsencode(tmp_path / "in")))
    written = [name for line in lines for name in line["files"]]
    assert sorted([*written, "predictions.jsonl"]) == sorted(os.listdir(tmp_path / "out"))
    assert len(set(written)) == 8
    for line in lines:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / line["files"][0])).shape[:2], (60, 90))
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes().decode("utf-8")
    code, _ = command(tmp_path / "one", f"--image={os.path.join(tmp_path / 'in', os.fsdecode(broken))}", "--text=it")
    assert code == 0 and "\\udcff" in capsys.readouterr().out
    (file,) = (tmp_path / "one").glob("*.json")
    assert json.loads(file.read_bytes().decode("utf-8"))["image"].endswith(os.fsdecode(broken))


def failing(original, error):
    """Fails at the second call."""
    calls = []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return original(*arguments, **options)

    return call


@pytest.mark.parametrize(
    "where, error",
    [
        ("decoding", struct.error("short")),
        ("asking", RuntimeError()),
        ("drawing", MemoryError()),
        ("writing", KeyError("x")),
        ("describing", RecursionError("deep")),
    ],
)
def test_whatever_a_picture_raises(command, model, tmp_path, monkeypatch, capsys, where, error):  # noqa: F811
    pictures(tmp_path / "in", b"a.png", b"b.png", b"c.png")
    owner, name = {
        "decoding": (model, "preprocess"),
        "asking": (model, "_candidates_of"),
        "drawing": (overlay, "overlay"),
        "writing": (Image.Image, "save"),
        "describing": (outputs.Prediction, "to_json"),
    }[where]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), error))
    code, lines = command(tmp_path / "out", f"--image={tmp_path / 'in'}", "--text=it")
    assert code == 1
    assert [os.path.basename(line["image"]) for line in lines] == ["a.png", "b.png", "c.png"]
    assert ["failure" in line for line in lines] == [False, True, False]
    assert type(error).__name__ in lines[1]["failure"] and "b.png" in lines[1]["failure"]
    said = capsys.readouterr().out
    assert said.count("failed: ") == 1 and "2 of 3 images answered" in said and "1 failed" in said
    assert sorted(os.listdir(tmp_path / "out")) == ["a_it.png", "c_it.png", "predictions.jsonl"]


def test_a_folder_that_can_be_written_no_more_ends_the_run(command, tmp_path, monkeypatch):  # noqa: F811
    """It is no failure of one picture: one line, and what is there is whole."""
    pictures(tmp_path / "in", b"a.png", b"b.png", b"c.png")
    monkeypatch.setattr(Image.Image, "save", failing(Image.Image.save, OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"cannot write .*b_it\.png: No space left on device; make room"):
        command(tmp_path / "out", f"--image={tmp_path / 'in'}", "--text=it")
    assert sorted(os.listdir(tmp_path / "out")) == ["a_it.png", "predictions.jsonl"]
    (line,) = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["files"] == ["a_it.png"]


def test_texts_that_are_no_text(command, tmp_path):  # noqa: F811
    pictures(tmp_path / "in", b"a.png")
    with pytest.raises(UserError, match=r"half of a character pair"):
        command(tmp_path / "out", f"--image={tmp_path / 'in'}", "--text=it \udcff")
    assert not (tmp_path / "out").exists()

"""Which file is the model: bounds, the order of what is said, paths that are no names of a hub repository."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from convert_weights import files, torch_source
from convert_weights.files import open_source, read_json, resolve_source
from convert_weights.safetensors_source import SafetensorsSource
from convert_weights.sources import ArraySource, JoinedSource, RenamedSource
from flowseg_jax.errors import UserError


def test_the_largest_json(tmp_path, monkeypatch):
    assert files.MAX_JSON == 67_108_864
    monkeypatch.setattr(files, "MAX_JSON", 2 << 20)
    file = tmp_path / "x.json"
    text = '{"a": 1}'
    file.write_text(text + " " * ((2 << 20) - len(text)))
    assert read_json(file) == {"a": 1}
    file.write_text(text + " " * ((2 << 20) - len(text) + 1))
    with pytest.raises(UserError, match=r"x.json is larger than 2 MiB: that is no config and no index$"):
        read_json(file)
    with pytest.raises(UserError, match=r"nope.json cannot be read: .*No such file.*; download it again$"):
        read_json(tmp_path / "nope.json")
    file.write_text("[1]")
    with pytest.raises(UserError, match=r"x.json holds no JSON object$"):
        read_json(file)


@pytest.mark.parametrize("name", ["./x", "../x", "~/x", "a//b", "/a/b", "a/b/c", "a/", "x", ""])
def test_what_is_no_repository_is_not_looked_for(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(tmp_path))
    if name == "":
        assert resolve_source(name) == tmp_path  # the current folder
    else:
        with pytest.raises(UserError) as caught:
            resolve_source(name)
        assert str(caught.value) == f"{name}: no such file or directory"
    assert asked == []
    assert resolve_source("owner/name") == tmp_path and asked == ["owner/name"]


def test_a_path_that_exists_comes_before_a_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("owner/name") == tmp_path / "owner" / "name"
    assert resolve_source("~/owner") == tmp_path / "owner"


def test_a_download_that_fails_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **options):
        raise OSError(["first\nsecond", ""][len(said)])

    said: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for reason in ("first", "OSError"):
        with pytest.raises(UserError) as caught:
            resolve_source("owner/name")
        said.append(str(caught.value))
        assert f"and no download from the hub ({reason}); download it where" in said[-1]


def save(file: Path, value: float) -> None:
    safetensors.numpy.save_file({"w": np.full(2, value, np.float32)}, file)


def test_one_index_beside_a_whole_file_is_the_model(tmp_path):
    save(tmp_path / "part-00001-of-00001.safetensors", 1)
    save(tmp_path / "whole.safetensors", 2)
    (tmp_path / "part.index.json").write_text(json.dumps({"weight_map": {"w": "part-00001-of-00001.safetensors"}}))
    source = open_source(tmp_path)
    assert source.read("w")[0] == 1
    assert source.notes == ["taken: part.index.json; not used beside it: whole.safetensors"]
    (tmp_path / "more.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds 3 checkpoint files: more.index.json, part.index.json, whole.safetensors; name"):
        open_source(tmp_path)


def test_a_shard_beside_a_whole_file_leaves_the_choice_to_the_user(tmp_path):
    save(tmp_path / "x-00001-of-00002.safetensors", 1)
    save(tmp_path / "whole.safetensors", 2)
    with pytest.raises(UserError, match=r"holds shards without their index \(\*\.index\.json\): download the index as well"):
        open_source(tmp_path)


def test_what_is_said_comes_in_the_order_of_reading(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    (tmp_path / "other.pth").write_bytes(b"")
    said = open_source(tmp_path).notes
    assert said == [
        "taken: pytorch_model.bin; not used beside it: other.pth",
        f"{tmp_path}/pytorch_model.bin: the weights were taken, not epoch beside them",
    ]
    (tmp_path / "adapter_config.json").write_text("{}")
    said = open_source(tmp_path / "pytorch_model.bin").notes
    assert said[0] == f"not used: the adapter beside {tmp_path}/pytorch_model.bin (adapter_config.json)"
    assert len(said) == 2
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pth")
    (tmp_path / "adapter_config.json").unlink()
    assert open_source(tmp_path / "plain.pth").notes == []


@pytest.mark.parametrize(
    ("error", "reason"), [(PermissionError(13, "Permission denied"), "Permission denied"), (OSError("odd"), "odd")]
)
def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch, error, reason):
    def fail(self):
        raise error

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be read: {reason}$"):
        open_source(tmp_path)


def test_a_safetensors_file_that_is_gone(tmp_path):
    with pytest.raises(UserError, match=r"gone.safetensors cannot be read: No such file or directory$"):
        SafetensorsSource([tmp_path / "gone.safetensors"], "it")
    save(tmp_path / "a.safetensors", 1)
    save(tmp_path / "b.safetensors", 1)
    with pytest.raises(UserError, match=r"b.safetensors and .*a.safetensors both hold w: leave one of the two files out$"):
        SafetensorsSource([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "it")


def test_rows_of_a_narrow_matrix(tmp_path):
    x = np.arange(5, dtype=np.float32)[:, None]
    safetensors.numpy.save_file({"w": x}, tmp_path / "x.safetensors")
    assert open_source(tmp_path).read("w", 1, 4).tolist() == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_read_is_the_callers(tmp_path, zipped):
    torch.save({"w": torch.arange(6.0), "h": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x.pth",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    source = open_source(tmp_path / "x.pth")
    assert source.notes == []
    for name, first in (("w", 0), ("h", 1)):
        source.read(name)[...] = 9
        assert source.read(name)[0] == first


def test_whole_pages_of_a_tensor_are_given_back(tmp_path, monkeypatch):
    """From the first page that begins inside the tensor to the last one that ends inside it."""
    torch.save({"w": torch.arange(10_000, dtype=torch.float32)}, tmp_path / "x.pth")
    source = open_source(tmp_path / "x.pth")
    given = []

    class Library:
        def __init__(self, name):
            pass

        def madvise(self, first, length, advice):
            given.append((first.value, length.value, advice))

    monkeypatch.setattr(torch_source.ctypes, "CDLL", Library)
    source.read("w", 100, 9000)
    start, page = source._tensors["w"].data_ptr(), mmap.PAGESIZE
    first = next(at for at in range(start + 400, start + 400 + page) if at % page == 0)
    last = next(at for at in range(start + 36_000, start + 36_000 - page, -1) if at % page == 0)
    assert given == [(first, last - first, mmap.MADV_DONTNEED)]
    source.read("w", 0, 5)  # less than a page
    assert len(given) == 1


def test_sources_under_other_names():
    one = ArraySource({"w": np.arange(3.0), "x.b": np.ones(2)}, "one")
    one.notes = ("first",)
    two = ArraySource({"old.w": np.arange(4.0)}, "two")
    joined = JoinedSource([(one, "", "a."), (two, "old.", "b.")], "both")
    assert joined.name == "both" and joined.notes == ["first"]
    assert {name: entry.shape for name, entry in joined.entries.items()} == {"a.w": (3,), "a.x.b": (2,), "b.w": (4,)}
    assert joined.read("b.w", 1, 3).tolist() == [1, 2]
    assert joined.read("a.w").tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"^two and one both hold old.w: give one of them$"):
        JoinedSource([(one, "", "a."), (two, "old.", "a.")], "both")
    new = RenamedSource(one, {"v": "w"}, ["second"])
    assert (new.name, new.notes, list(new.entries)) == ("one", ["first", "second"], ["v"])
    assert new.read("v", 1).tolist() == [1, 2]
    scalar = ArraySource({"s": np.array(2.0)})
    assert scalar.name == "the given arrays" and scalar.read("s", 0, 1) == 2


def test_an_index_names_what_is_missing(tmp_path):
    save(tmp_path / "a.safetensors", 1)
    index = tmp_path / "x.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors", "u": "c.safetensors"}}))
    with pytest.raises(UserError, match=r" lacks 2 of 3 shards: b.safetensors, c.safetensors; download them again$"):
        open_source(index)
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}))
    with pytest.raises(UserError, match=r"names 1 tensors that its shards do not hold: v; download it again$"):
        open_source(index)
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    source = open_source(index)
    assert source.name == str(tmp_path) and source.read("w").tolist() == [1, 1]
    index.write_text(json.dumps({"weight_map": {"w": "a.txt"}}))
    with pytest.raises(UserError, match=r"names the shard 'a.txt': a shard is a file beside its index, no other path$"):
        open_source(index)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError) as caught:
        open_source(tmp_path / "x.txt")
    assert str(caught.value) == f"{tmp_path}/x.txt is no checkpoint: expected .safetensors, .bin, .pth, .pt or .gguf"
    assert os.listdir(tmp_path) == ["x.txt"]

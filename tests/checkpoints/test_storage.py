"""What checkpoints and models stand on: manifests, dtypes, reasons, chunks, meshes, at their smallest and largest values."""

from __future__ import annotations

import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax import errors, sharding
from flowseg_jax.checkpoints import storage, streaming
from flowseg_jax.checkpoints.manifest import check_arrays, check_manifest, verify
from flowseg_jax.errors import UserError


@pytest.mark.parametrize(
    ("shard", "itemsize", "chunk"),
    [
        ((1 << 20, 8), 1, (1 << 20, 8)),  # exactly what a chunk may have
        ((1 << 20, 16), 1, (1 << 19, 16)),
        ((1 << 20, 8), 4, (1 << 18, 8)),
        ((6, 1 << 22), 1, (2, 1 << 22)),  # a whole number of chunks: 3 would be too large
        ((2, 3, 1 << 23), 1, (2, 3, 1 << 20)),
        ((4, 1 << 22, 1 << 22), 1, (1, 2, 1 << 22)),  # no one axis is enough
        ((), 4, ()),
    ],
)
def test_chunks_are_the_largest_that_divide(shard, itemsize, chunk):
    assert streaming.chunk_shape(shard, itemsize) == chunk


def test_arrays_are_what_was_announced(tmp_path):
    make = lambda: np.arange(6, dtype=np.float32).reshape(2, 3)  # noqa: E731
    for shape, dtype in (((3, 2), "float32"), ((2, 3), "int32")):
        lazy = streaming.LazyArray(shape, np.dtype(dtype), make)
        with pytest.raises(ValueError, match=r"a/w was announced as .* made \(2, 3\) float32"):
            streaming.write_arrays(tmp_path / dtype, {"a/w": lazy})


def test_reasons_are_one_sentence():
    assert errors.short_reason(ValueError("one\ntwo")) == "one"
    assert errors.short_reason(ValueError("one. See two")) == errors.short_reason(ValueError("one [two]")) == "one"
    assert errors.short_reason(ValueError("x" * 300)) == "x" * 200
    assert errors.short_reason(KeyError()) == "KeyError"
    assert errors.short_reason(ValueError("long [os_error_code='28']")) == "No space left on device"
    assert storage.read_error(Exception("chunk")) == "chunk" and storage.read_error(MemoryError("full")) is None


def test_a_text_is_replaced_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "a" / "b.json"
    for text in ("first", "é"):
        storage.write_text_atomic(path, text)
        assert path.read_bytes() == text.encode() and [p.name for p in path.parent.iterdir()] == ["b.json"]
    with pytest.raises(UserError, match="cannot write .*Is a directory; make room, or choose a folder"):
        storage.write_text_atomic(path.parent, "x")
    with pytest.raises(UnicodeEncodeError):  # no fault of the place
        storage.write_text_atomic(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "é" and [p.name for p in path.parent.iterdir()] == ["b.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_dtypes_are_those_on_disk_and_then_those_that_are_asked_for():
    asked = {"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.int32)}
    stored = storage.with_stored_dtypes(asked, {"a": [[2], "bfloat16"], "b": [[], "int32"]})
    assert (stored["a"].dtype, stored["b"]) == (jnp.bfloat16, asked["b"])
    given = {"a": np.ones(2, jnp.bfloat16), "b": np.int32(3)}
    found = storage.cast_like(given, asked)
    assert found["a"].dtype == np.float32 and found["b"] is given["b"]


def test_every_array_that_differs_is_counted():
    tree = {"a": np.ones(3), "b": np.ones(2)}
    with pytest.raises(ValueError, match="the bytes of a and 1 more have changed"):
        verify(tree, {})
    check_manifest({"a": [[2], "float32"]}, {"a": [(2,), "bfloat16"]}, "x")  # dtypes may differ


@pytest.mark.parametrize(
    ("shape", "total", "fits"),
    [
        ([0], 0, True), ([1 << 40], (1 << 32) - 1, True), ([1] * 16, 1, True), ([1] * 17, 1, False), ([-1], 1, False),
        ([(1 << 40) + 1], 1, False), ([1], 1 << 32, False), ([1], -1, False), ([True], 1, False), ([1], 0.5, False),
    ],
)  # fmt: skip
def test_the_smallest_and_largest_of_a_manifest(shape, total, fits):
    kinds, sums = {"a": [shape, "float32"]}, {"a": total}
    if fits:
        return check_arrays(kinds, sums, "x")
    with pytest.raises(UserError, match="x: (manifest|checksums).a is "):
        check_arrays(kinds, sums, "x")


def test_meshes_that_there_are_not():
    for make in (sharding.make_mesh, sharding.abstract_mesh):
        with pytest.raises(UserError, match=r"mesh\.model: unknown axis \(known: data, fsdp, tensor\)"):
            make({"model": 2})
    with pytest.raises(UserError, match=r"mesh\.fsdp must be at least 1, got 0"):
        sharding.abstract_mesh({"fsdp": 0})
    assert dict(sharding.abstract_mesh({"fsdp": 1}).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ({"data": -1, "fsdp": -1}, {"data": -1, "tensor": 2}, {"data": 0}):
        with pytest.raises(UserError, match="does not fit 1 device"):
            sharding.make_mesh(sizes, jax.devices()[:1])
    assert dict(sharding.make_mesh({"tensor": -1}, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_the_revision_is_that_of_the_checkout():
    root, revision = Path(__file__).resolve().parents[2], None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    found = storage.provenance.__wrapped__()
    assert found["revision"] == revision
    assert found["versions"]["jax"] == jax.__version__

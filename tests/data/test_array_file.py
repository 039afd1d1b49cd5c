"""Arrays on disk that are read slice by slice: what is read, and what another file is."""

from __future__ import annotations

import numpy as np
import pytest

from flowseg_jax.data import array_file
from flowseg_jax.data.array_file import ArrayFile
from flowseg_jax.errors import UserError

KIND = np.dtype("<u4")


def written(path, length: int, more: bytes = b""):
    with path.open("wb") as file:
        array_file.write_header(file, KIND, length)
        file.write(np.arange(length, dtype=KIND).tobytes() + more)
    return path


def test_slices_are_those_of_the_array(tmp_path, monkeypatch):
    path = written(tmp_path / "a.npy", 10)
    array = ArrayFile(path, KIND, 10, "prepare it again")
    assert len(array) == 10 and np.array_equal(np.load(path), np.arange(10))
    for place in (slice(None), slice(2, 5), slice(-3, None), slice(5, 2), slice(8, 99), slice(10, 10)):
        assert array[place].tolist() == list(range(10))[place]
    with pytest.raises(ValueError, match="only contiguous slices are read, got a step of 2"):
        array[::2]
    monkeypatch.setattr(array_file, "CHUNK", 4)
    assert [(start, part.tolist()) for start, part in array.chunks()] == [(0, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (8, [8, 9])]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert array[0:9].tolist() == list(range(9))
    with pytest.raises(UserError, match=rf"a\.npy: ends before byte {path.stat().st_size + 1}; prepare it again"):
        array[9:10]


def test_another_file_is_refused(tmp_path):
    path, size = written(tmp_path / "a.npy", 3, b"!"), 128 + 12
    for length, kind, message in (
        (3, KIND, f": {size + 1} bytes, expected {size}; again"),
        (4, KIND, ": not an array of 4 rows as it should be here; again"),
        (3, np.dtype("<i4"), ": not an array of 3 rows as it should be here; again"),
    ):
        with pytest.raises(UserError, match=message):
            ArrayFile(path, kind, length, "again")
    with pytest.raises(UserError, match=r"none\.npy: cannot be read \(No such file or directory\); again"):
        ArrayFile(tmp_path / "none.npy", KIND, 3, "again")

"""A NumPy array on disk that is read slice by slice, so that its length costs no memory.

Reads go through `pread` and not through a memory map: the pages of a map count as the process's memory, and a file that shrinks
under a map ends the process with SIGBUS instead of an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flowseg_jax.errors import UserError

CHUNK = 1 << 16  # elements that are read at a time where all are looked at


class ArrayFile:
    """A one-dimensional array in a .npy file; safe with threads.

    Args:
        path: the file.
        dtype: that it must have.
        length: that it must have.
        remedy: end of the message if it is another file.

    Raises:
        UserError: the file cannot be read, or is not such an array.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int, remedy: str):
        self._path, self._remedy, self._length, self.dtype = path, remedy, length, dtype
        header = io.BytesIO()
        write_header(header, dtype, length)
        self._start = len(header.getvalue())
        try:
            self._file = path.open("rb", buffering=0)
            begin, size = self._file.read(self._start), os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
        if begin != header.getvalue():  # compared, not parsed
            raise UserError(f"{path}: not an array of {length} rows as it should be here; {remedy}")
        if size != self._start + length * dtype.itemsize:
            raise UserError(f"{path}: {size} bytes, expected {self._start + length * dtype.itemsize}; {remedy}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> np.ndarray:
        """A contiguous slice, read-only. UserError if the file cannot be read, or is shorter by now."""
        start, stop, step = place.indices(self._length)
        if step != 1:
            raise ValueError(f"only contiguous slices are read, got a step of {step}")
        wanted = max(stop - start, 0) * self.dtype.itemsize
        data = read_bytes(self._file.fileno(), self._start + start * self.dtype.itemsize, wanted, self._path, self._remedy)
        return np.frombuffer(data, self.dtype)

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first element, elements) of consecutive slices."""
        for start in range(0, self._length, CHUNK):
            yield start, self[start : start + CHUNK]


def read_bytes(file: int, start: int, count: int, path: Path, remedy: str) -> bytes:
    """So many bytes of an open file. UserError if they are not there."""
    try:
        data = os.pread(file, count, start)
        while data and len(data) < count and (more := os.pread(file, count - len(data), start + len(data))):
            data += more
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if len(data) < count:
        raise UserError(f"{path}: ends before byte {start + count}; {remedy}")
    return data


def write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """The beginning of a .npy file; the elements' bytes follow."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)

"""safetensors files, read by the library that defines them: it checks the whole header before anything is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert_weights.refusals import refuse_dtypes, refuse_pointer
from convert_weights.sources import TensorInfo
from flowseg_jax.errors import UserError, listed, plain

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 16 << 20  # bytes. The largest checkpoints have 100,000 names and 10 MB of them; the library allows 100 MB


class SafetensorsSource:
    """One safetensors file, or several that belong together.

    Raises:
        UserError: a file that is missing, truncated or no safetensors file; dtypes of quantised weights; names that two files
            share.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, files: list[Path], name: str):
        self.name = name
        self.entries: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        for file in files:
            self._opened[file], found = _open(file)
            for key, entry in found.items():
                if key in self.entries:
                    raise UserError(f"{file} and {self._files[key]} both hold {plain(key)}: leave one of the two files out")
                self.entries[key], self._files[key] = entry, file

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        (shape, dtype), file = self.entries[name], self._files[name]
        start, stop, _ = slice(start, stop).indices(shape[0]) if shape else (0, 0, 1)
        try:
            if not shape or (start, stop) == (0, shape[0]):
                return self._opened[file].get_tensor(name)
            if start >= stop or 0 in shape:
                return np.empty((max(stop - start, 0), *shape[1:]), dtype)
            # Rows come from a map of the file that lives for this read alone, so that memory in use is that of the rows. (An
            # open file without a map would read the whole tensor for each of them.)
            with safe_open(file, "np") as mapped:
                return mapped.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read any more ({plain(str(error))}): download it again") from None


def _open(file: Path) -> tuple[Any, dict[str, TensorInfo]]:
    """An open file and what it holds."""
    refuse_pointer(file)
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if MAX_HEADER < length <= size - 8:
                raise UserError(f"{file}: a header of {length:,} bytes; a checkpoint's is below {MAX_HEADER:,}")
            # Without a map of the file: nothing of it counts as memory in use, and a file that shrinks is an error, no crash.
            opened = safe_open(file, "np", backend="pread")
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            headers = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
            repeated = _repeated_names(file, stream.read(length))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        reason = plain(str(error).removeprefix("Error while deserializing header: "))
        raise UserError(f"{file} is no complete safetensors file ({size:,} bytes; {reason}): download it again") from None
    if repeated:
        raise UserError(f"{file} holds {len(repeated)} names twice: {listed(repeated)}; which one is meant cannot be known")
    odd = [name for name, (_, kind) in headers.items() if kind not in DTYPES]
    if odd:
        refuse_dtypes(file, {name: headers[name][1] for name in odd})
    return opened, {name: TensorInfo(shape, DTYPES[kind]) for name, (shape, kind) in headers.items()}


def _repeated_names(file: Path, header: bytes) -> list[str]:
    """Names that a header gives twice: the library takes the last of them, other readers may take the first."""
    found: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> None:
        known: set[str] = set()
        for name, _ in items:
            (found.append if name in known else known.add)(name)

    try:
        json.loads(header, object_pairs_hook=pairs)
    except (ValueError, RecursionError):  # what the library skips without a look: nested values under names it does not know
        raise UserError(f"{file} is no safetensors file: its header cannot be read; download it again") from None
    return found

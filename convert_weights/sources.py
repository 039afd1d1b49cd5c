"""Where tensors come from: files that are read one tensor, or some rows of one, at a time.

Opening a source reads names, shapes and dtypes only, and finds what is wrong with the files: truncated, a shard missing, not
a checkpoint at all. Reading goes through ordinary file reads into fresh arrays, never through a map of the whole file, so that
the memory in use is that of the tensor in hand.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from convert_weights.ops import Shape
from flowseg_jax.errors import UserError

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
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 100 << 20  # bytes; safetensors' own limit


class Entry(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: Shape
    dtype: np.dtype


class TensorSource(Protocol):
    """Named tensors.

    Attributes:
        name: what messages call it.
        entries: {tensor name: shape and dtype}.
    """

    name: str
    entries: Mapping[str, Entry]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor, all by default. The array is the caller's to keep."""
        ...


class ArraySource:
    """Arrays that are in memory already."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "the given arrays"):
        self.name, self._arrays = name, arrays
        self.entries = {key: Entry(tuple(x.shape), np.dtype(x.dtype)) for key, x in arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        x = np.asarray(self._arrays[name])
        return x if x.ndim == 0 else x[start:stop]


class JoinedSource:
    """Several sources as one.

    Args:
        parts: (source, prefix that its names have, prefix that takes its place); None for the first one keeps all names as
            they are. Names without the prefix keep theirs, behind the new one.
    """

    def __init__(self, parts: list[tuple[TensorSource, str, str]], name: str):
        self.name = name
        self.entries, self._origin = {}, {}
        for source, old, new in parts:
            for key, entry in source.entries.items():
                ours = new + key.removeprefix(old)
                if ours in self.entries:
                    raise UserError(f"{source.name} and {self._origin[ours][0].name} both hold {key}: give one of them")
                self.entries[ours], self._origin[ours] = entry, (source, key)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        source, key = self._origin[name]
        return source.read(key, start, stop)


class SafetensorsSource:
    """One safetensors file, or several that belong together.

    Raises:
        UserError: a file that is missing, truncated or no safetensors file; names that two files share.
    """

    def __init__(self, files: list[Path], name: str):
        self.name = name
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file in files:
            for key, (entry, offset) in _read_header(file).items():
                if key in self.entries:
                    raise UserError(f"{file} and {self._places[key][0]} both hold {key}: leave one of the two files out")
                self.entries[key], self._places[key] = entry, (file, offset)

    def file_of(self, name: str) -> Path:
        return self._places[name][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        (shape, dtype), (file, offset) = self.entries[name], self._places[name]
        return read_rows(file, offset, shape, dtype, start, stop)


def read_rows(file: Path, offset: int, shape: Shape, dtype: np.dtype, start: int, stop: int | None) -> np.ndarray:
    """Rows of a C-ordered array at `offset` bytes of a file, read into a new array."""
    if shape:
        start, stop, _ = slice(start, stop).indices(shape[0])
        row = math.prod(shape[1:])
        offset, shape = offset + start * row * dtype.itemsize, (stop - start, *shape[1:])
    out = np.empty(shape, dtype)
    view = out.reshape(-1).view(np.uint8)
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(offset)
            done = 0
            while done < view.size:
                count = stream.readinto(memoryview(view)[done:])
                if not count:
                    raise UserError(f"{file} ends {view.size - done} bytes too early: download it again")
                done += count
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return out


def _read_header(file: Path) -> dict[str, tuple[Entry, int]]:
    """{tensor: its entry and its offset in the file}. Checks that the file is as long as its header says."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise UserError(f"{file} is no complete safetensors file ({size} bytes): download it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {}
        for key, value in header.items():
            (begin, end), shape, kind = value["data_offsets"], tuple(value["shape"]), value["dtype"]
            if kind not in DTYPES:
                raise UserError(f"{file}: {key} has the dtype {kind}, which is not supported (known: {', '.join(DTYPES)})")
            dtype = DTYPES[kind]
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise UserError(f"{file}: {key} {shape} {kind} takes {end - begin} bytes: the file is damaged")
            if 8 + length + end > size:
                raise UserError(
                    f"{file} is truncated: {key} {shape} ends at byte {8 + length + end}, the file at {size}; download it again"
                )
            found[key] = Entry(shape, dtype), 8 + length + begin
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no safetensors file: its header cannot be read; download it again") from None
    return found


def _sharded(index: Path) -> list[Path]:
    """The files that a `*.index.json` names."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({index.parent / name for name in names.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of shards: download it again") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}; download them again"
        )
    return files


def _check_index(index: Path, source: TensorSource) -> None:
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    absent = [name for name in names if name not in source.entries]
    if absent:
        raise UserError(f"{index} names {len(absent)} tensors that its shards do not hold, the first is {absent[0]}")


def open_source(path: str | os.PathLike[str]) -> TensorSource:
    """Opens a checkpoint: a file, or the directory that it lies in.

    Args:
        path: `.safetensors`, `.bin`, `.pth`, `.pt` or `.gguf`; or a directory with `model.safetensors`, with shards and their
            index, or with exactly one file of these kinds. Else the name of a hub repository, where the hub can be reached.

    Raises:
        UserError: nothing there, several candidates, or files that are damaged or incomplete.
    """
    path = local(path)
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _open_shards(path)
        return _open_file(path)
    for name in ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"):
        if (path / name).is_file():
            return open_source(path / name)
    indices = sorted(path.glob("*.index.json"))
    if len(indices) == 1:
        return _open_shards(indices[0])
    found = [file for kind in ("safetensors", "bin", "pth", "pt", "gguf") for file in sorted(path.glob(f"*.{kind}"))]
    if any("-of-0" in file.name for file in found):
        raise UserError(f"{path} holds shards without their index (*.index.json): download the index as well")
    if len(found) != 1:
        listed = f": {', '.join(file.name for file in found)}; name one of them" if found else ""
        raise UserError(f"{path} holds {len(found) or 'no'} checkpoint files{listed}")
    return _open_file(found[0])


def _open_file(file: Path) -> TensorSource:
    kind = file.suffix
    if kind == ".safetensors":
        return SafetensorsSource([file], str(file))
    if kind in (".bin", ".pth", ".pt"):
        from convert_weights.torch_source import TorchSource

        return TorchSource([file], str(file))
    if kind == ".gguf":
        from convert_weights.gguf_source import GgufSource

        return GgufSource(file)
    raise UserError(f"{file} is no checkpoint: expected .safetensors, .bin, .pth, .pt or .gguf")


def _open_shards(index: Path) -> TensorSource:
    files = _sharded(index)
    if all(file.suffix == ".safetensors" for file in files):
        source: TensorSource = SafetensorsSource(files, str(index.parent))
    else:
        from convert_weights.torch_source import TorchSource

        source = TorchSource(files, str(index.parent))
    _check_index(index, source)
    return source


def local(path: str | os.PathLike[str]) -> Path:
    """A path that exists: the given one, or the download of the hub repository of that name.

    Raises:
        UserError: no such path, and no repository either, or no hub within reach.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found.absolute()
    name = os.fspath(path)
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(f"{name}: no such file or directory")
    try:
        import huggingface_hub

        wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no hub, no such repository, a gated one: many types, one remedy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: no such file or directory, and no download from the hub ({reason}); download it where there is a "
            "connection, and give its directory"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises a UserError that names it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object")
    return value

"""Where tensors come from: named tensors that are read one at a time, or some rows of one.

The memory in use is that of the tensor in hand. `files.open_source` makes a source of a checkpoint's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from convert_weights.ops import Shape
from flowseg_jax.errors import UserError, plain


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: Shape
    dtype: np.dtype


class TensorSource(Protocol):
    """Named tensors.

    Attributes:
        name: what messages call it.
        entries: {tensor name: shape and dtype}.
        notes: what the user should know of how it was read: files that were left aside, prefixes that were taken off.
    """

    name: str
    entries: Mapping[str, TensorInfo]
    notes: Sequence[str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor, all by default. The array is the caller's to keep."""
        ...


class ArraySource:
    """Arrays that are in memory already."""

    notes: tuple[str, ...] = ()

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "the given arrays"):
        self.name, self._arrays = name, arrays
        self.entries = {key: TensorInfo(tuple(x.shape), np.dtype(x.dtype)) for key, x in arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        x = np.asarray(self._arrays[name])
        return x if x.ndim == 0 else x[start:stop]


class JoinedSource:
    """Several sources as one.

    Args:
        parts: (source, prefix that its names have, prefix that takes its place); None for the first one keeps all names as
            they are. Names without the prefix keep theirs, after the new one.
    """

    def __init__(self, parts: list[tuple[TensorSource, str, str]], name: str):
        self.name = name
        self.notes = [note for source, _, _ in parts for note in source.notes]
        self.entries, self._origin = {}, {}
        for source, old, new in parts:
            for key, entry in source.entries.items():
                ours = new + key.removeprefix(old)
                if ours in self.entries:
                    raise UserError(f"{source.name} and {self._origin[ours][0].name} both hold {plain(key)}: give one of them")
                self.entries[ours], self._origin[ours] = entry, (source, key)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        source, key = self._origin[name]
        return source.read(key, start, stop)


class RenamedSource:
    """A source under other names.

    Args:
        names: {its new name: its name in `source`}; tensors that it leaves out are not there.
        notes: what there is to say about it, after what the source has to say.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str], notes: Sequence[str] = ()):
        self.name, self._source, self._names = source.name, source, names
        self.notes = [*source.notes, *notes]
        self.entries = {new: source.entries[old] for new, old in names.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._source.read(self._names[name], start, stop)

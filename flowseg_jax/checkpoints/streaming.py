"""Arrays that are made when they are written: a model directory larger than memory.

Orbax takes a tree whose leaves are `LazyArray`s; its own format comes out, so whatever restores a saved tree restores this
one. One array exists at a time, beside the few chunks of it that are being compressed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from flowseg_jax.checkpoints.manifest import checksums, unflatten_params

CHUNK = 8 << 20  # bytes; what is compressed at a time, and what one read of a sharded restore takes


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that `make` returns when it is called; it is called once, and the array is dropped once it is written.

    `shard` is the shape of the shard that one device will hold: the stored chunks are such that none lies in two shards,
    and every device reads its own and nothing else. None: the whole array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    shard: tuple[int, ...] | None = None


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes one array after the other, each made just before. What is on disk cannot be told from NumPy arrays."""

    async def serialize(self, values: Sequence[LazyArray], infos: Sequence[Any], args: Sequence[Any] | None = None) -> list:
        for value, info in zip(values, infos, strict=True):
            await self._background_serialize([value], [info], [ocp.SaveArgs()])
        return []

    async def _open_and_write(self, value: LazyArray, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        """One chunk at a time: Orbax's own form hands TensorStore all chunks at once, which it then all holds compressed."""
        chunk = chunk_shape(value.shard or value.shape, value.dtype.itemsize)
        tspec = tspec | {"metadata": tspec["metadata"] | {"chunks": chunk}}
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        array = value.make()
        for box in chunk_slices(store):
            await store[box].write(array[box], can_reference_source_data_indefinitely=True)

    def memory_size(self, values: Sequence[LazyArray]) -> list[tuple[int, int]]:
        return [(0, 0) for _ in values]


def chunk_shape(shard: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The largest chunk of at most `CHUNK` bytes whose sides divide those of `shard`.

    If dividing one axis is enough, the axis that leaves the largest chunk is divided. Otherwise the first axis is cut into
    single steps and the rest is handled alone.
    """
    shard = tuple(shard)
    if math.prod(shard) * itemsize <= CHUNK:
        return shard
    options = []
    for axis, side in enumerate(shard):
        rest = math.prod(shard) // side * itemsize
        fitting = [n for n in range(1, min(side, CHUNK // rest) + 1) if side % n == 0]
        options += [(*shard[:axis], fitting[-1], *shard[axis + 1 :])] if fitting else []
    if options:
        return max(options, key=math.prod)
    first = next(axis for axis, side in enumerate(shard) if side > 1)
    return chunk_shape((*shard[:first], 1, *shard[first + 1 :]), itemsize)


def chunk_slices(store: ts.TensorStore) -> Iterator[tuple[slice, ...]]:
    """The chunks that a stored array consists of, each as the index of its values."""
    chunk = store.chunk_layout.write_chunk.shape or ()  # None for a scalar
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(store.shape, chunk, strict=True))):
        yield tuple(slice(i, min(i + c, n)) for i, c, n in zip(corner, chunk, store.shape, strict=True))


def write_arrays(
    directory: str | os.PathLike, arrays: Mapping[str, LazyArray], progress: Callable[[str], None] = lambda name: None
) -> dict[str, int]:
    """Writes arrays into a new directory, as `ocp.PyTreeCheckpointer` would write their tree.

    Args:
        arrays: by flat name ("llm/table").
        progress: called with the name of each array once it is made.

    Returns:
        The checksum of each (`manifest.checksums`).

    Raises:
        OSError, ValueError: it cannot be written; what `make` raises.
    """
    sums: dict[str, int] = {}

    def summed(name: str, lazy: LazyArray) -> LazyArray:
        def make() -> np.ndarray:
            array = lazy.make()
            if array.shape != lazy.shape or array.dtype != lazy.dtype:
                raise ValueError(f"{name} was announced as {lazy.shape} {lazy.dtype}, made {array.shape} {array.dtype}")
            sums.update(checksums({name: array}))
            progress(name)
            return array

        return dataclasses.replace(lazy, make=make)

    # Orbax warns where jax.Array has no handler, though no leaf is one.
    handlers = (LazyArray, _LazyHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    tree = unflatten_params({name: summed(name, lazy) for name, lazy in arrays.items()})
    with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree))
    return sums

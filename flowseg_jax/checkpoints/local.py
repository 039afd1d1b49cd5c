"""Checkpoints on each host's own disk or in its memory, in front of those in the work directory: `checkpoint.local_dir`.

A work directory is often a bucket, which is slow to write. A local checkpoint costs a copy and no network, so there can be many
more of them. Every process writes the shards that its devices hold into one safetensors file a step. A run that is started
again with the same shards continues from there where that is newer; otherwise from the work directory.

A host that was replaced has no such file. Where the mesh has replicas (`mesh.data`), another process holds the same shards: its
peer, which sends its file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flowseg_jax.checkpoints.manager import RestoredCheckpoint
from flowseg_jax.checkpoints.manifest import Tree, checksums, flatten_params, verify
from flowseg_jax.checkpoints.storage import read_error
from flowseg_jax.errors import UserError, short_reason
from flowseg_jax.system import json_files
from flowseg_jax.system.console import log
from flowseg_jax.system.distributed import all_gather_bytes, collective_try, is_primary, send_file
from flowseg_jax.system.paths import is_remote

KEEP = 2  # a process may be killed while another one has written the next step already
SUFFIX = ".safetensors"


class LocalCheckpoints:
    """The newest states of a run on this host. Every process makes one and calls its methods in the same order.

    Args:
        directory: `checkpoint.local_dir`; "": there are none, and nothing is done.
        every: steps between two of them.
        run_id: `FirstStart.run_id`; those of another run are left alone.

    Raises:
        UserError: one of directory and interval without the other, a remote directory, or one that cannot be written.
    """

    def __init__(self, directory: str, every: int, run_id: str):
        if every < 0 or bool(directory) != bool(every):
            raise UserError(
                f"checkpoint.local_dir is {directory!r} and checkpoint.local_every {every}: set both, or neither ('' and 0)"
            )
        if directory and is_remote(epath.Path(directory)):
            raise UserError(
                f"checkpoint.local_dir is {directory}: it must be a disk or memory of this host, as /dev/shm/flowseg"
            )
        self._every, self._thread, self._writing = every, ThreadPoolExecutor(1, "local checkpoint"), Future()
        self._writing.set_result(None)
        self._directory: epath.Path | None = None
        if directory:
            self._directory = epath.Path(directory).absolute() / run_id / f"process_{jax.process_index()}"
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"checkpoint.local_dir {directory} cannot be written: {error.strerror}; choose another"
                ) from None

    def due(self, step: int) -> bool:
        return bool(self._every) and step % self._every == 0

    def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> None:
        """Copies this process's shards and starts writing them; the arrays may be donated as soon as this returns.

        A copy that cannot be written is a line in the log: the run goes on, with the checkpoints in its work directory.
        """
        self._writing.result()
        shards = {name: np.array(shard.data) for name, shard in _shards(state).items()}
        self._writing = self._thread.submit(self._write, step, shards, {**meta, "step": step})

    def restore(self, abstract: Tree, check: Callable[[dict], None], newer_than: int | None) -> RestoredCheckpoint | None:
        """The newest state that every process has here or gets from a peer, if it is newer than a step; None otherwise.

        Args:
            abstract: `jax.ShapeDtypeStruct`s with shardings, in the structure of the state.
            check: called with the JSON of the checkpoint; raises a UserError if another config wrote it.
            newer_than: the newest step in the work directory, None for none.
        """
        if self._directory is None:
            return None
        shards = hashlib.sha256("\n".join(sorted(_wanted(abstract))).encode()).hexdigest()
        given_up: set[int] = set()
        while True:
            mine = [step for step in self._steps() if step > (newer_than or 0)]
            everyone = [json.loads(said) for said in all_gather_bytes(json.dumps([shards, mine]).encode())]
            sources = {step: _sources(step, everyone) for step in {step for _, steps in everyone for step in steps} - given_up}
            step = max((step for step, found in sources.items() if None not in found), default=None)
            if step is None:
                return None
            copies = [(source, target) for target, source in enumerate(sources[step]) if source != target]
            _, fault = collective_try(functools.partial(self._copy, step, copies), _reason)
            if not fault:
                found, fault = collective_try(functools.partial(self._read, step, abstract), _reason)
                if not fault:
                    meta, state = found
                    check(meta)
                    return RestoredCheckpoint(step, state, meta, str(self._directory))
                if found is None:
                    self._file(step).unlink(missing_ok=True)
            if is_primary():
                log(f"the local checkpoint of step {step} is not used: {fault}")
            if copies:
                given_up.add(step)

    def close(self) -> None:
        self._thread.shutdown()

    def remove(self) -> None:
        """Gives the disk or the memory back, when the run has ended and all of it is in its work directory."""
        if self._directory is not None:
            self._writing.result()
            self._directory.rmtree(missing_ok=True)
            with contextlib.suppress(OSError):  # another process of this host has its own in there
                self._directory.parent.rmdir()

    def __enter__(self) -> LocalCheckpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _steps(self) -> list[int]:
        names = [path.name.removesuffix(SUFFIX) for path in self._directory.iterdir() if path.name.endswith(SUFFIX)]
        return sorted(int(name) for name in names if name.isdecimal())

    def _file(self, step: int) -> epath.Path:
        return self._directory / f"{step}{SUFFIX}"

    def _copy(self, step: int, copies: list[tuple[int, int]]) -> None:
        """Gets the files of a step to the processes that lack them: from and to which. Raises OSError where one cannot."""
        fault = None
        for source, target in copies:
            if is_primary():
                log(f"the local checkpoint of step {step} of process {target} is sent by process {source}")
            try:
                send_file(self._file(step), source, target)
            except OSError as error:  # the others go on
                fault = error
        if fault:
            raise fault

    def _write(self, step: int, shards: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        meta["checksums"] = checksums(shards)
        meta[json_files.ITSELF] = json_files.checksum(meta)
        part, path = self._directory / f"{step}.part", self._file(step)
        try:
            save_file({name: _bits(x) for name, x in shards.items()}, part, {"meta": json.dumps(meta)})
            os.replace(part, path)
            for old in self._steps()[:-KEEP]:
                self._file(old).unlink()
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            log(f"WARNING: the local checkpoint of step {step} could not be written: {short_reason(error)}; the run goes on")

    def _read(self, step: int, abstract: Tree) -> tuple[dict[str, Any], Tree]:
        wanted = _wanted(abstract)
        with safe_open(self._file(step), "numpy") as file:
            meta = json_files.loads((file.metadata() or {})["meta"])
            if meta[json_files.ITSELF] != json_files.checksum(meta) or meta["step"] != step:
                raise ValueError("its JSON has changed since it was written")
            if set(file.keys()) != set(wanted):
                raise ValueError("this process now holds other shards")
            shards = {name: file.get_tensor(name).view(kind).reshape(shape) for name, (shape, kind) in wanted.items()}
        verify(shards, meta["checksums"])

        def place(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
            name, places = (
                jax.tree_util.keystr(path, simple=True, separator="/"),
                x.sharding.addressable_devices_indices_map(x.shape),
            )
            parts = [jax.device_put(shards[_name(name, index, x.shape)], device) for device, index in places.items()]
            return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)

        return meta, jax.tree_util.tree_map_with_path(place, abstract)


def _sources(step: int, everyone: list[list]) -> list[int | None]:
    """From which process each one gets its file of a step: itself, a peer that holds the same shards, or None.

    Args:
        everyone: of each process, a digest of its shards and the steps that it has.
    """
    having = [(shards, index) for index, (shards, steps) in enumerate(everyone) if step in steps]
    return [
        index if step in steps else next((peer for theirs, peer in having if theirs == shards), None)
        for index, (shards, steps) in enumerate(everyone)
    ]


def _wanted(abstract: Tree) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{name of a shard that this process is to hold: its shape and dtype}."""
    return {
        _name(name, index, x.shape): (x.sharding.shard_shape(x.shape), x.dtype)
        for name, x in flatten_params(abstract).items()
        for index in x.sharding.addressable_devices_indices_map(x.shape).values()
    }


def _shards(state: Tree) -> dict[str, Any]:
    """One of each of the different shards that this process holds, by its array and its place in it."""
    found = {}
    for name, x in flatten_params(state).items():
        for shard in x.addressable_shards:
            found.setdefault(_name(name, shard.index, x.shape), shard)
    return found


def _name(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    return f"{name}[{','.join(':'.join(map(str, part.indices(size)[:2])) for part, size in zip(index, shape, strict=True))}]"


def _bits(x: np.ndarray) -> np.ndarray:
    """The array as unsigned integers: safetensors has no names for all of JAX's dtypes."""
    return np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}")


def _reason(error: Exception) -> str | None:
    return short_reason(error) if isinstance(error, SafetensorError) else read_error(error)

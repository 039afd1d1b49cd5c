"""Several processes that run one program: which one reports for all, and how they agree on an error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from flowseg_jax.errors import UserError
from flowseg_jax.system import console, locks, process_watch

T = TypeVar("T")
SENT_BYTES = 1 << 26  # of a file at a time, on every device
FAULT_BYTES = 1024  # of a fault's text, which is exchanged as an array


def is_primary() -> bool:
    """Whether this is the process that prints, renames and writes what exists once."""
    return jax.process_index() == 0


def collective_try(work: Callable[[], T], reason: Callable[[Exception], str | None]) -> tuple[T | None, str]:
    """Does something that may fail on some processes only, and tells all of them whether it did.

    Every process must call it. It returns when all have tried, so it is also a barrier; nothing is exchanged if there is one
    process.

    Args:
        work: what to do; its collectives, if any, must not come after a point where it can fail.
        reason: a line about an error that counts as a failure, None for an error that is to be raised at once.

    Returns:
        What `work` returned, None where it failed; and the first failed process's reason, "" if there is none.
    """
    result, fault = None, ""
    try:
        result = work()
    except Exception as error:
        found = reason(error)
        if found is None:
            raise
        fault = found
    return result, _first(fault)


def _first(fault: str) -> str:
    """The fault of the first process that has one, the same on all of them."""
    if jax.process_count() == 1:
        return fault
    mine = np.zeros(FAULT_BYTES, np.uint8)
    text = fault.encode()[:FAULT_BYTES]
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = multihost_utils.process_allgather(mine)
    return next((bytes(row).rstrip(b"\0").decode(errors="ignore") for row in everyone if row.any()), "")


def all_gather_bytes(mine: bytes) -> list[bytes]:
    """What every process has to say, in the order of processes; all of them must call it."""
    if jax.process_count() == 1:
        return [mine]
    lengths = multihost_utils.process_allgather(np.array([len(mine)]))[:, 0]
    padded = np.zeros(max(1, lengths.max()), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(everyone, lengths, strict=True)]


def send_file(path: str | os.PathLike, source: int, target: int) -> None:
    """Copies a file of process `source` to the same path of process `target`, over the network that connects the devices.

    It is a broadcast, `SENT_BYTES` at a time, of which all others keep nothing; all processes must call it.

    Raises:
        OSError: on one of the two, at the end: it cannot be read, or written.
    """
    me, fault = jax.process_index(), None
    part = f"{os.fspath(path)}.part"
    with contextlib.ExitStack() as stack:
        try:
            file = None
            if me in (source, target):
                file = stack.enter_context(open(path, "rb") if me == source else open(part, "wb"))
            size = os.fstat(file.fileno()).st_size if me == source else 0
        except OSError as error:
            fault, size = error, 0
        size = int(all_gather_bytes(str(size).encode())[source])
        for start in range(0, size, SENT_BYTES):
            block = np.zeros(min(SENT_BYTES, size), np.uint8)
            try:
                if me == source and not fault:
                    file.readinto(block)
            except OSError as error:  # what arrives then has wrong checksums
                fault = error
            block = np.asarray(multihost_utils.broadcast_one_to_all(block, is_source=me == source))
            try:
                if me == target and not fault:
                    file.write(block[: size - start].data)
            except OSError as error:
                fault = error
    if fault:
        raise fault
    if me == target and size:
        os.replace(part, path)


@contextlib.contextmanager
def locked(directory: str | os.PathLike, *, beside: bool = False) -> Iterator[None]:
    """`locks.held` for a whole job: the first process holds the lock, a refusal is told to all. Every process must enter."""
    with contextlib.ExitStack() as stack:
        hold = lambda: stack.enter_context(locks.held(directory, beside=beside)) if is_primary() else None  # noqa: E731
        _, fault = collective_try(hold, lambda error: str(error) if isinstance(error, UserError) else None)
        if fault:
            raise UserError(fault)
        yield


@contextlib.contextmanager
def joined(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> Iterator[None]:
    """Makes this process one of several; to be entered before anything asks JAX for devices.

    Inside, the death or the failure of one process ends all others (`watch`).

    Args:
        coordinator: HOST:PORT that process 0 listens on. None: it, `count` and `index` are found out from the environment (TPU
            pods, GKE, SLURM, Open MPI).
        count, index: how many processes there are, and which this one is.

    Raises:
        UserError: some but not all of them, values that make no sense, or no environment to find them out from.
    """
    watching = _join(coordinator, count, index)
    try:
        yield
    except BaseException as error:
        code = {UserError: 2, KeyboardInterrupt: 130, SystemExit: getattr(error, "code", None) or 0}.get(type(error), 1)
        if code:
            watching.fail(code, error)
        else:
            watching.end()
        raise
    watching.end()


@contextlib.contextmanager
def joined_if(wanted: bool, coordinator: str | None, count: int | None, index: int | None) -> Iterator[None]:
    """`joined` where it is `wanted`; all processes but the first then print nothing."""
    if not wanted:
        yield
        return
    with joined(coordinator, count, index):
        if not is_primary():
            console.mute_console()
        yield


def _join(coordinator: str | None, count: int | None, index: int | None) -> process_watch.Watch:
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"{', '.join(missing)} missing: give --coordinator, --num-processes and --process-id, or --distributed alone"
        )
    if not missing and (":" not in coordinator or not 0 <= index < count):
        raise UserError(
            f"--coordinator={coordinator} --num-processes={count} --process-id={index}: HOST:PORT, and a process below N"
        )
    try:
        with process_watch.service_beside():
            jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        hint = "" if coordinator else "; name --coordinator, --num-processes and --process-id"
        raise UserError(f"the processes could not be joined: {str(error).splitlines()[0]}{hint}") from None
    job = distributed.global_state
    host = job.coordinator_address.rpartition(":")[0].strip("[]")
    return process_watch.Watch(job.process_id, job.num_processes, host, job.client)

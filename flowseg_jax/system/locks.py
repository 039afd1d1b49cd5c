"""One command at a time writes into a directory: the second is refused, and told which process is there.

The lock is a small file: `.lock` in a directory that grows while a command runs, `.NAME.lock` beside one that appears whole. It
names the process that holds it, is renewed while that runs, and is removed when it ends. `docs/checkpoints.md` says when a lock
that was left over counts for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from flowseg_jax.errors import UserError, leave, short_reason
from flowseg_jax.system.console import log
from flowseg_jax.system.paths import is_remote, resolve_path

RENEWED = 15.0  # seconds between two signs of life of whoever holds a lock
SILENT = 60.0  # seconds without one after which a process elsewhere is taken for dead
LOOK = 1.0  # seconds between two looks at a lock that is watched
LONGEST = 4096  # bytes of a lock file that are read
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a file system without locks

_held: dict[str, int] = {}  # by this process; a lock may be entered again inside of itself


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        pid, host: the process, and the name of its host.
        machine: within which `pid` is unique: a boot of the host, and the container.
        started: of the process, in the kernel's ticks; tells it from a later one of the same number.
        command: its script.
        since: when the lock was taken.
        token: of this very lock.
    """

    pid: int
    host: str
    machine: str
    started: str
    command: str
    since: str
    token: str

    @classmethod
    def me(cls) -> Owner:
        since = time.strftime("%Y-%m-%d %H:%M:%S%z")
        script = Path(sys.argv[0]).name or "python"
        return cls(os.getpid(), socket.gethostname(), _machine(), _started(os.getpid()), script, since, uuid.uuid4().hex)

    @classmethod
    def read(cls, text: bytes) -> Owner | None:
        """Whom a lock file names; None where it is cut short or something else."""
        try:
            values = json.loads(text)
            owner = cls(**values)
        except (ValueError, TypeError, RecursionError):
            return None
        strings = [value for name, value in values.items() if name != "pid"]
        good = isinstance(owner.pid, int) and owner.pid > 0 and all(isinstance(s, str) and s.isprintable() for s in strings)
        return owner if good else None

    def runs(self) -> bool | None:
        """Whether the process still runs; None where it ran elsewhere, out of our sight."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} ({self.command}, since {self.since})"


@contextlib.contextmanager
def held(directory: str | os.PathLike, *, beside: bool = False) -> Iterator[None]:
    """Holds the lock of a directory, local or remote; where there are several processes, see `processes.locked`.

    Args:
        directory: made where it is missing.
        beside: the directory is to appear whole: the lock lies beside it, and only what it lies in is made.

    Raises:
        UserError: another process holds it, or the lock cannot be written.
    """
    directory = resolve_path(directory)
    path = directory.with_name(f".{directory.name}.lock") if beside else directory / ".lock"
    if path.as_posix() in _held:
        _held[path.as_posix()] += 1
        try:
            yield
        finally:
            _held[path.as_posix()] -= 1
        return
    with contextlib.ExitStack() as stack:
        try:
            lock, mine = _Object(path) if is_remote(path) else _File(path), Owner.me()
            stack.callback(lock.close)
            path.parent.mkdir(parents=True, exist_ok=True)
            _take(lock, mine, directory)
        except UserError:
            raise
        except Exception as error:
            if not isinstance(error, OSError | ImportError) and not is_remote(path):  # clients of stores have their own
                raise
            why = getattr(error, "strerror", None) or short_reason(error)
            raise UserError(f"{directory} cannot be written: {why}; choose another place") from None
        ended = threading.Event()
        thread = threading.Thread(target=_renew, args=(lock, mine, directory, ended), name="lock", daemon=True)
        thread.start()
        _held[path.as_posix()] = 1
        try:
            yield
        finally:
            _held.pop(path.as_posix(), None)
            ended.set()
            thread.join()
            with contextlib.suppress(Exception):  # one that is left over names a process that has ended
                lock.remove(mine)


def _take(lock: _File | _Object, mine: Owner, directory: epath.Path) -> None:
    """Makes `mine` the owner. A lock of another host is watched: it is renewed, or a leftover."""
    watched, until = None, 0.0
    while True:
        text, version = lock.read()
        owner = Owner.read(text)
        if owner is not None and owner.token == mine.token:
            return
        runs = False if version is None else lock.runs(owner)
        seen = version, text
        if runs is None and watched is None:
            who = owner or "an unknown process"
            log(f"{directory} was last used by {who}: seeing for {SILENT:.0f} s whether that still runs")
            watched, until = seen, time.monotonic() + SILENT
        if runs or (runs is None and seen != watched):
            raise UserError(
                f"{directory} is in use by {owner or 'another process'}: wait for its end or stop it, or choose another place"
            )
        if runs is None and time.monotonic() < until:
            time.sleep(LOOK)
            continue
        lock.write(mine, version)


def _renew(lock: _File | _Object, mine: Owner, directory: epath.Path, ended: threading.Event) -> None:
    """Shows that the owner lives. It ends at once where another has taken its place, so that never two write."""
    while not ended.wait(RENEWED):
        with contextlib.suppress(Exception):  # a network that is down; the next time will do
            if not lock.renew(mine):
                other = Owner.read(lock.read()[0]) or "another process"
                leave(f"error: {directory} was taken over by {other}, which had seen no sign of life of this one", 2)


class _File:
    """A local lock: the kernel holds it, and drops it however the process ends."""

    def __init__(self, path: epath.Path):
        self._path = Path(path)
        self._file: int | None = None
        self._locked = False  # by the kernel

    def read(self) -> tuple[bytes, Any]:
        """The text, and what changes whenever the file is written or renewed; (b"", None) where nobody holds it."""
        while self._file is None:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                locked = self._lock(file)
            except BlockingIOError:
                time.sleep(0.1)  # it may just be written
                text = os.pread(file, LONGEST, 0)
                os.close(file)
                return text, 0
            if self._is(file):
                self._file, self._locked = file, locked
            else:  # removed by its owner meanwhile
                os.close(file)
        with self._path.open("rb") as again:  # opened anew: so network file systems look at the server
            text = again.read(LONGEST)
            return text, os.fstat(again.fileno()).st_mtime_ns if text else None

    @staticmethod
    def _lock(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
        return True

    def _is(self, file: int) -> bool:
        """Whether the file is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def runs(self, owner: Owner | None) -> bool | None:
        if self._file is None:
            return True  # the kernel says so
        if owner is None:
            return False if self._locked else None
        return False if self._locked and owner.machine == _machine() else owner.runs()

    def write(self, mine: Owner, version: Any) -> None:
        text = json.dumps(dataclasses.asdict(mine)).encode()
        os.ftruncate(self._file, 0)
        try:
            if os.pwrite(self._file, text, 0) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._path.unlink(missing_ok=True)
            raise

    def renew(self, mine: Owner) -> bool:
        """Renews the lock; False if it is another's now."""
        if self._is(self._file):
            owner = Owner.read(os.pread(self._file, LONGEST, 0))
            os.utime(self._file)
            return owner is not None and owner.token == mine.token
        self.close()  # removed by hand
        _, version = self.read()
        if version is not None:
            return False
        self.write(mine, version)
        return True

    def remove(self, mine: Owner) -> None:
        owner = Owner.read(os.pread(self._file, LONGEST, 0))
        if self._is(self._file) and owner is not None and owner.token == mine.token:
            self._path.unlink()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


class _Object:
    """A lock in a bucket: created, replaced and removed only as long as nobody else has written it, by its generation."""

    def __init__(self, path: epath.Path):
        from google.cloud import storage

        bucket, _, name = str(path).removeprefix("gs://").partition("/")
        self._bucket, self._name = storage.Client().bucket(bucket), name
        self._version = 0

    def read(self) -> tuple[bytes, Any]:
        while (found := self._bucket.get_blob(self._name)) is not None:
            with _unless_changed():
                return found.download_as_bytes(end=LONGEST, if_generation_match=found.generation), found.generation
        return b"", None

    def runs(self, owner: Owner | None) -> bool | None:
        return None if owner is None else owner.runs()

    def write(self, mine: Owner, version: Any) -> None:
        """Where another was quicker, nothing: whoever reads next sees that."""
        blob = self._bucket.blob(self._name)
        with _unless_changed():
            blob.upload_from_string(json.dumps(dataclasses.asdict(mine)), if_generation_match=version or 0)
            self._version = blob.generation

    def renew(self, mine: Owner) -> bool:
        before = self._version
        self.write(mine, before)
        if self._version != before:
            return True
        text, version = self.read()  # another has written it, or an answer of the store was lost
        owner = Owner.read(text)
        if version is None or (owner is not None and owner.token == mine.token):
            self._version = version
            return True
        return False

    def remove(self, mine: Owner) -> None:
        with _unless_changed():
            self._bucket.blob(self._name).delete(if_generation_match=self._version or None)

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _unless_changed() -> Iterator[None]:
    """Goes on after a request whose precondition did not hold, or whose object is gone."""
    try:
        yield
    except Exception as error:
        if getattr(error, "code", None) not in (404, 412):
            raise


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        return f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process was started; "" if it has ended, or where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")  # its name may be any bytes
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]

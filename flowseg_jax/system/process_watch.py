"""What happens to a job when one of its processes dies: the others say which one is gone, and end.

Left alone, they would wait for it in the next collective, or be aborted by JAX with a stack trace of its C++. So every process
keeps a connection to the first one. The system closes it with the process, however that ends, and after `UNREACHABLE` seconds
where a whole host vanishes. JAX's coordination service takes all processes down that lose it, so it is no part of the first
process but one beside it (`Service`), which lives a little longer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from flowseg_jax.errors import UserError, leave, short_reason, tell
from flowseg_jax.traces import printable

UNREACHABLE = 45  # seconds without an answer after which a host counts as gone
OWN_END = 5.0  # seconds in which a process may still end by itself: often it fails for the same reason as the one that is gone
KEY = "flowseg_jax/watch"
GONE = 1  # the exit code of those that are left
BYE = "bye"

# Ends with the first process: at its word, or some time after its death.
SERVICE = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
from jaxlib import _jax
address, nodes, heartbeat, shutdown, recoverable, patience = sys.argv[1], *map(int, sys.argv[2:])
service = _jax.get_distributed_runtime_service(
    address, nodes, heartbeat_timeout=heartbeat, shutdown_timeout=shutdown, recoverable=bool(recoverable)
)
print("ready", flush=True)
if sys.stdin.readline():
    service.shutdown()
else:
    time.sleep(patience)
os._exit(0)
"""


class Service:
    """Stands in for `jaxlib`'s coordination service, which runs in a process of its own.

    Raises:
        RuntimeError: it cannot be started, say because the port is taken.
    """

    def __init__(self, address: str, nodes: int, *, heartbeat_timeout: int, shutdown_timeout: int, recoverable: bool = False):
        numbers = nodes, heartbeat_timeout, shutdown_timeout, int(recoverable), int(2 * OWN_END)
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, address, *map(str, numbers)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._process.stdout.readline() != b"ready\n":
            self._process.wait()
            raise RuntimeError(f"no coordinator can listen on {address}; is the port taken?")

    def shutdown(self) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(b"end\n", timeout=OWN_END)


@contextlib.contextmanager
def service_beside() -> Iterator[None]:
    """Lets `jax.distributed.initialize` start a `Service`."""
    from jaxlib import _jax

    original = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = Service
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = original


class Watch:
    """The connections of this process. Ends the process when one of the others does so without having said goodbye.

    Args:
        index, count: which process this is, and of how many.
        host: of process 0, as the others reach it.
        client: JAX's client of the coordination service, through which the port is told.
    """

    def __init__(self, index: int, count: int, host: str, client: Any):
        self._index, self._ended, self._loss = index, threading.Event(), threading.Event()
        self._peers: dict[int, socket.socket] = {}
        self._names = {number: f"process {number}" for number in range(count)}
        self._line = ""
        try:
            if index == 0:
                self._accept(count, client)
            else:
                port = int(client.blocking_key_value_get(KEY, 1000 * UNREACHABLE))
                self._peers[0] = socket.create_connection((host, port), UNREACHABLE)
                self._peers[0].sendall(f"{index} {socket.gethostname()} {os.getpid()}\n".encode())
                self._names[0] = f"process 0 (on host {host})"
        except Exception as error:  # the job can do without
            tell(f"note: process {index} is not told when another one dies: {short_reason(error)}")
        for number, peer in self._peers.items():
            _keep_alive(peer)
            peer.settimeout(None)
            threading.Thread(target=self._listen, args=(number, peer), name="watch", daemon=True).start()

    def _accept(self, count: int, client: Any) -> None:
        """Waits for the connections of all others."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
            client.key_value_set(KEY, str(server.getsockname()[1]))
            server.settimeout(UNREACHABLE)
            while len(self._peers) < count - 1:
                peer, _ = server.accept()
                peer.settimeout(UNREACHABLE)
                with contextlib.suppress(OSError, ValueError):  # something else that came by
                    number, host, pid = _line(peer).split()
                    if 0 < int(number) < count:
                        self._names[int(number)] = f"process {int(number)} ({pid} on host {host})"
                        self._peers[int(number)] = peer

    def _listen(self, number: int, peer: socket.socket) -> None:
        """Waits for what a peer says: goodbye, or the name of one that is gone."""
        line = ""
        with contextlib.suppress(OSError):
            line = _line(peer)
        if line != BYE and not self._ended.is_set():
            self._lost(line or self._names[number])

    def _lost(self, who: str) -> None:
        self._line = f"error: {who} is gone, so process {self._index} ends; the same command continues"
        self._loss.set()
        for peer in self._peers.values() if self._index == 0 else ():
            with contextlib.suppress(OSError):
                peer.sendall(f"{who}\n".encode())
        if not self._ended.wait(OWN_END):
            leave(self._line, GONE)

    def end(self) -> None:
        """Says goodbye, when all processes end alike."""
        self._close(f"{BYE}\n".encode())

    def fail(self, code: int, error: BaseException) -> None:
        """Lets the others know that this process ends with an error; it is gone soon, where JAX's own end would wait for them.

        Where the error is that another one is gone, that is what is reported, and this does not return.
        """
        if not isinstance(error, UserError) or _of_a_collective(error):
            if self._loss.wait(0 if isinstance(error, KeyboardInterrupt) else OWN_END):
                leave(self._line, GONE)
        self._close(b"")
        threading.Thread(target=lambda: (time.sleep(OWN_END), os._exit(code)), name="watch", daemon=True).start()

    def _close(self, word: bytes) -> None:
        self._ended.set()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(word)
                peer.shutdown(socket.SHUT_WR)


def _line(peer: socket.socket) -> str:
    """The next line that a peer sends, "" at the end."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 1024 and (byte := peer.recv(1)):
        line += byte
    return printable(line.decode(errors="replace").strip())


def _of_a_collective(error: BaseException | None) -> bool:
    """Whether an exception, or a cause of it, is that of a collective that lacks a process."""
    while error is not None:
        if any(word in str(error) for word in ("Gloo", "coordination", "barrier")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _keep_alive(peer: socket.socket) -> None:
    """Lets the system notice a host that is gone without a word."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", UNREACHABLE // 3), ("TCP_KEEPINTVL", UNREACHABLE // 9), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

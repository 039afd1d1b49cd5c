"""What a host writes and reads of a checkpoint as the number of hosts grows, with a process for each host on this machine.

    python -m benchmarks.checkpoint_growth         # into benchmarks/checkpoint_growth.json
    python -m benchmarks.checkpoint_growth --mib=1024 --hosts 1 2 4 8

The state is divided among all processes (`fsdp`), or among half of them and repeated on the others (`data=2`). Each process
counts the bytes that it writes when it saves and reads when it restores, and its CPU seconds. Arithmetic: a host writes the
state's bytes over the number of hosts. What is printed is the most that one of the processes did.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:checkpoint_growth")

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import ratio
from benchmarks.command_line import checkpoint_growth_parser
from benchmarks.table import ROOT
from flowseg_jax.checkpoints.manager import CheckpointManager
from flowseg_jax.system import distributed
from flowseg_jax.system.console import log

MIB = 1 << 20
ARRAYS = 16  # of the state


def count_bytes(name: str) -> int:
    """Bytes that this process has handed to (`wchar`) or got from (`rchar`) the system."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(directory: Path, mib: int, data: int) -> dict[str, Any]:
    """Saves and restores a state of so many MiB; what this process did for it."""
    devices = np.array(jax.devices()).reshape(data, -1)
    sharding = NamedSharding(jax.sharding.Mesh(devices, ("data", "fsdp")), PartitionSpec("fsdp"))
    shape = (mib * MIB // 4 // ARRAYS // 1024, 1024)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)  # Orbax compresses: zeros would take no room
    state = {str(i): jax.make_array_from_callback(shape, sharding, lambda at: values[at]) for i in range(ARRAYS)}
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in state.items()}
    found = {}
    with CheckpointManager(directory) as checkpoints:
        for name, counter, work in (
            ("save", "wchar", lambda: (checkpoints.save(1, state, {}), checkpoints.wait())),
            ("restore", "rchar", lambda: checkpoints.restore_latest(abstract)),
        ):
            before, cpu, began = count_bytes(counter), time.process_time(), time.perf_counter()
            assert work() is not None
            found[name] = {
                "bytes": count_bytes(counter) - before,
                "cpu_seconds": time.process_time() - cpu,
                "wall_seconds": time.perf_counter() - began,
            }
    return found


def run(hosts: int, data: int, mib: int) -> dict[str, Any]:
    """The most that one of the processes did."""
    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="checkpoint-growth-") as directory:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [
            sys.executable,
            "-m",
            "benchmarks.checkpoint_growth",
            f"--mib={mib}",
            "--serve",
            directory,
            str(data),
            str(hosts),
        ]
        started = [
            subprocess.Popen([*command, str(index), str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for index in range(hosts)
        ]
        said = [process.communicate(timeout=400)[0] for process in started]
        if any(process.returncode for process in started):
            raise RuntimeError("\n".join(said))
    each = [json.loads(text.splitlines()[-1]) for text in said]
    most = {what: {key: max(one[what][key] for one in each) for key in each[0][what]} for what in ("save", "restore")}
    return {"hosts": hosts, "data": data, "mib": mib, **most}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = checkpoint_growth_parser().parse_args(argv)
    if arguments.serve:
        directory, data, hosts, index, port = arguments.serve
        with distributed.joined_if(int(hosts) > 1, f"127.0.0.1:{port}", int(hosts), int(index)):
            print(json.dumps(measure(Path(directory), arguments.mib, int(data))), flush=True)
        return 0
    results = []
    for hosts in arguments.hosts:
        for data in (1, 2):
            if hosts % data:
                continue
            one = run(hosts, data, arguments.mib)
            results.append(one)
            cells = [
                f"{what} {one[what]['bytes'] / MIB:8.1f} MiB {one[what]['cpu_seconds']:6.2f} CPU s"
                for what in ("save", "restore")
            ]
            expected = f"state / hosts {arguments.mib / hosts:.1f} MiB"
            log(f"{hosts} hosts, data={data}, fsdp={hosts // data}: {'  '.join(cells)}  ({expected})")
    ratio.write_json(arguments.json, {"results": results, "environment": ratio.environment()})
    return 0

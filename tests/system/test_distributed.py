"""Two processes with two devices each write together what one process reads, and agree on what is damaged."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from flowseg_jax.checkpoints.manager import CheckpointManager
from flowseg_jax.checkpoints.manifest import checksums
from flowseg_jax.checkpoints.pretrained import load_pretrained
from flowseg_jax.errors import UserError
from flowseg_jax.system import distributed
from tests.helpers.trees import abstract_of

PROGRAM = """
import json, sys
from pathlib import Path
import jax
process, port, workdir = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from flowseg_jax.checkpoints.manager import CheckpointManager
from flowseg_jax.errors import UserError
from flowseg_jax.checkpoints.manifest import checksums
from flowseg_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from flowseg_jax.checkpoints.local import LocalCheckpoints
from tests.helpers.trees import abstract_of, flip, largest

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("fsdp",), ()))

def make(step):
    w = jax.random.normal(jax.random.key(step), (64, 64), jnp.bfloat16)
    return {"w": w, "step": jnp.asarray(step)}

create = jax.jit(make, static_argnums=0, out_shardings={"w": split, "step": whole})
state = create(3)
assert not state["w"].is_fully_addressable
with CheckpointManager(workdir, best=("loss", "min")) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, create(step), {"config": {}}, {"loss": state["step"]})
    checkpoints.wait()
    if process == 0:  # what process 1 wrote, and will read, of the last one
        largest(workdir / "checkpoints" / "3" / "state" / "ocdbt.process_1").write_bytes(b"spoilt")
    multihost_utils.sync_global_devices("spoilt")
    restored = checkpoints.restore_latest(abstract_of(state))
    assert checkpoints.latest_step == restored.step == 2

model = save_pretrained(workdir / "model", {"w": state["w"]}, {}, workdir / "tokenizer", dtype=None)
loaded = load_pretrained(model, abstract_of({"w": state["w"]})).params
if process == 0:
    (workdir / "tokenizer" / "tokenizer.json").unlink()
    (workdir / "tokenizer").rmdir()
multihost_utils.sync_global_devices("no tokenizer")
refusal = None
try:
    save_pretrained(model, {"w": state["w"]}, {}, workdir / "tokenizer", overwrite=True)
except UserError as error:
    refusal = str(error)

hosts = workdir.with_name("hosts")

def local_of(run):
    return LocalCheckpoints(str(hosts / str(process)), 1, run)

def newest(run, state):
    found = local_of(run).restore(abstract_of(state), lambda meta: None, 2)
    return found and [found.step, checksums(found.state)]

replicas = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
halves = jax.jit(lambda: make(3)["w"], out_shardings=NamedSharding(replicas, PartitionSpec("fsdp")))()
local = []
for run, tree in (("replicas", {"w": halves}), ("parts", {"w": state["w"]})):
    with local_of(run) as checkpoints:
        checkpoints.save(5, tree, {})
    file = hosts / str(process) / run / f"process_{process}" / "5.safetensors"
    if process == 1:
        file.unlink()  # a new host
    local.append(newest(run, tree))
    if run == "replicas":
        if process == 0:
            flip(file)
        local.append(newest(run, tree))
print("RESULT", json.dumps([checksums(restored.state), checksums(loaded), refusal, local]))
multihost_utils.sync_global_devices("end")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def outputs(workdir):
    """What each of the two processes printed."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags}
    port = str(free_port())
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    processes = [
        subprocess.Popen(
            [*command, str(i), port, str(workdir)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return printed


def results(outputs):
    return [json.loads(line.removeprefix("RESULT ")) for text in outputs for line in text.splitlines() if "RESULT" in line]


def expected(step):
    return {"w": jax.random.normal(jax.random.key(step), (64, 64), jnp.bfloat16), "step": jnp.asarray(step)}


def test_a_host_without_local_checkpoints_gets_them_from_one_that_holds_the_same_shards(outputs):
    """A new host, then a damaged file; without replicas nobody else has what the new host lacks."""
    same = [5, checksums({"w": expected(3)["w"]})]
    assert [result[3] for result in results(outputs)] == [[same, same, None]] * 2


def test_both_processes_read_the_same_and_only_one_speaks(outputs):
    first, second = results(outputs)
    assert first == second
    assert first[0] == checksums(expected(2))
    assert first[1] == checksums({"w": expected(3)["w"]})
    spoken = [[line for line in text.splitlines() if "is damaged" in line] for text in outputs]
    assert [len(lines) for lines in spoken] == [1, 0]
    assert "set aside as 3.damaged" in spoken[0][0]


def test_one_process_reads_what_two_wrote(outputs, workdir):
    like = abstract_of(expected(2))
    with CheckpointManager(workdir) as checkpoints:
        restored = checkpoints.restore_latest(like)
    assert restored.step == 2
    assert checksums(restored.state) == checksums(expected(2))
    assert checksums(load_pretrained(workdir / "model", dtype=None).params) == checksums({"w": expected(3)["w"]})
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "model"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", None, None), "^--num-processes, --process-id missing: give --coordinator, --num-processes and"),
        ((None, 2, 0), "^--coordinator missing: give"),
        (("host", 2, 0), "^--coordinator=host --num-processes=2 --process-id=0: HOST:PORT, and a process below N$"),
        (("host:1", 2, 2), "--process-id=2: HOST:PORT, and a process below N$"),
        (("host:1", 2, -1), "--process-id=-1: HOST:PORT, and a process below N$"),
    ],
)
def test_processes_are_named_whole_or_not_at_all(given, message):
    with pytest.raises(UserError, match=message):
        distributed._join(*given)

"""Topologies by name, what is said where a compiler is missing, and the table of devices."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic import tpu_info
from jax.experimental.mesh_utils import create_hybrid_device_mesh

from flowseg_jax.aot import topology
from flowseg_jax.aot.topology import open_topology
from flowseg_jax.errors import UserError
from flowseg_jax.sharding import make_mesh
from flowseg_jax.system import hardware
from tests.helpers import tpu

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="JAX's CUDA plugin (extra `cuda12`) is not installed"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "unknown; known: v5e:2x2, v5e:4x4"),
        ("v5:4x4", "unknown .*did you mean"),
        ("v5e-16", r"unknown \(did you mean 'v5e:4x4'\?\)"),
        ("v5litepod-8", "did you mean 'v5e:2x4'"),
        ("v5p-8", "did you mean 'v5p:2x2x1'"),  # the number counts cores, two a chip
        ("v5p-64", "did you mean 'v5p:2x4x4'"),
        ("h100x8", "did you mean 'h100:8'"),
        ("v5e-12", "unknown; known"),
        ("v5e:16", r"v5e takes NxN; known: v5e:2x2"),
        ("v5p:2x2", r"v5p takes NxNxN"),
        ("cpu:0", r"cpu takes N;"),
        ("h100:eight", r"h100 takes N;"),
        ("2xv5e-16", r"unknown \(did you mean '2xv5e:4x4'\?\)"),
        ("0xv5e:4x4", "unknown"),
        ("2xv5e:16", r"v5e takes NxN;"),
        ("h100:12", r"up to 8 GPUs, or whole hosts of 8"),
    ],
)
def test_an_unknown_name_is_told_what_is_known(name, message):
    with pytest.raises(UserError, match=f"--topology={name}: .*{message}"):
        open_topology(name)


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("v5e:4x4", "libtpu", r"pip install 'jax\[tpu\]==[\d.]+'"),
        (
            "h100:8",
            "jax_cuda12_plugin",
            r"jax\[cuda12\]==[\d.]+' or, to plan only, jax-cuda12-plugin==[\d.]+ jax-",
        ),
    ],
)
def test_a_missing_compiler_is_named_with_its_remedy(monkeypatch, name, module, remedy):
    find = importlib.util.find_spec
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)  # libtpu sets it once it is loaded
    monkeypatch.setattr(importlib.util, "find_spec", lambda x, *rest: None if x == module else find(x, *rest))
    with pytest.raises(UserError, match=f"--topology={name} needs .*{remedy}"):
        open_topology(name)


def test_host_devices_that_jax_has_not_started_with():
    found = open_topology("cpu:1")
    assert found.devices == tuple(jax.devices()[:1])
    assert found.usable is None
    with pytest.raises(UserError, match="JAX has started with .* host device.*device_count=999"):
        open_topology("cpu:999")


@tpu.needs_libtpu
@pytest.mark.parametrize(
    ("name", "count", "kind", "gib"),
    [
        ("v5e:4x4", 16, "v5e", 15.75),
        ("v5e:1x1", 1, "v5e", 15.75),
        ("v5p:2x2x2", 8, "v5p", 95.74),
        ("v6e:4x4", 16, "v6e", 31.25),
        ("tpu7x:2x2x1", 8, "tpu7x", 94.75),
    ],
)
def test_tpus_without_a_tpu(name, count, kind, gib):
    found = open_topology(name)
    assert len(found.devices) == count
    assert hardware.DEVICE_SPECS[found.devices[0].device_kind].name == kind
    assert found.usable == pytest.approx(gib * hardware.GIB, abs=1)
    assert "nothing was executed" in found.note


@tpu.needs_libtpu
def test_two_slices_are_laid_out_as_jax_does():
    found = open_topology("2xv5e:4x4")
    devices = list(found.devices)
    theirs = create_hybrid_device_mesh((1, 4, 4, 1), (2, 1, 1, 1), devices, allow_split_physical_axes=True)
    assert (found.slices, len(devices)) == (2, 32)
    assert np.array_equal(make_mesh({"data": -1, "fsdp": 16}, devices).devices, theirs.reshape(2, 16, 1))
    with pytest.raises(UserError, match="mesh.data is 1, and the 32 devices are in 2 slices"):
        make_mesh({"fsdp": -1}, devices)


@tpu.needs_libtpu
def test_a_topology_that_libtpu_does_not_have():
    with pytest.raises(UserError, match="--topology=v5e:3x3: libtpu has no such topology .*v5e:4x4"):
        open_topology("v5e:3x3")


@needs_cuda
def test_gpus_without_a_gpu(monkeypatch):
    found = open_topology("h100:8")
    assert len(found.devices) == 8
    assert len(open_topology("h100:16").devices) == 16
    two = open_topology("2xh100:8")
    assert (two.slices, len(two.devices)) == (2, 16)  # they say one slice: `plan` sets mesh.slices
    assert hardware.DEVICE_SPECS[found.devices[0].device_kind].name == "h100"
    assert found.usable == int(84929347584 * 0.75)
    assert "cuDNN" in found.note
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert open_topology("h100:1").usable == int(84929347584 * 0.9)


def test_every_topology_family_has_a_peak():
    assert set(topology.FAMILIES) - {kind.name for kind in hardware.DEVICE_SPECS.values()} == {"cpu"}


@pytest.mark.parametrize("kind", [kind for kind in hardware.DEVICE_SPECS if kind.startswith("TPU")])
def test_the_table_agrees_with_jax_about_tpus(kind):
    cores = 2 if kind in ("TPU v4", "TPU v5", "TPU v5p") else 1  # which JAX takes as one device
    info = tpu_info.get_tpu_info_for_chip(tpu_info.chip_version_from_device_kind(kind), cores)
    ours = hardware.DEVICE_SPECS[kind]
    assert ours.peak == pytest.approx(cores * info.bf16_ops_per_second, rel=0.01)
    if ours.usable is not None:
        assert 0.9 * info.hbm_capacity_bytes * cores < ours.usable <= info.hbm_capacity_bytes * cores


def device(kind: str, **stats) -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats or None)


def test_mfu_is_the_share_of_all_devices_peak():
    chips = [device("TPU v5 lite")] * 4
    assert hardware.mfu(197e12 * 4, 2.0, chips) == pytest.approx(0.5)
    assert hardware.mfu(1e12, 1.0, jax.devices()) is None
    assert hardware.peak_flops(jax.devices()[0]) is None


def test_memory_is_that_of_the_fullest_device_of_this_process():
    stats = {"bytes_in_use": 5, "peak_bytes_in_use": 9, "bytes_limit": 16}
    fuller = device("TPU v5 lite", **stats | {"bytes_in_use": 7})
    elsewhere = device("TPU v5 lite", **stats | {"bytes_in_use": 12})
    elsewhere.process_index = 1
    assert hardware.memory_in_use([device("TPU v5 lite", **stats), fuller, elsewhere]) == {"in_use": 7, "peak": 9, "limit": 16}
    assert hardware.memory_in_use([device("cpu")]) == {"in_use": None, "peak": None, "limit": None}

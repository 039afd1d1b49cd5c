"""Programs outlive the process that compiled them, where users did not say otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowseg_jax.system import hardware, host

PROGRAM = """
import jax
from flowseg_jax.system import host
host.enable_compilation_cache()
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
"""


def run(home: Path, **extra: str) -> list[str]:
    """What PROGRAM prints where nothing about a cache is set but `extra`."""
    told = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name and "_CACHE_" not in name}
    env = told | {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | extra
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_programs_are_kept_in_a_folder_of_the_users_own(tmp_path: Path) -> None:
    folder, limit = run(tmp_path)
    assert Path(folder).parent == tmp_path / "flowseg_jax"
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert int(limit) == host.CACHE_BYTES
    programs = sorted(Path(folder).glob("*-cache"))
    assert programs
    assert run(tmp_path) == [folder, limit]
    assert sorted(Path(folder).glob("*-cache")) == programs  # found, not compiled again under another name


@pytest.mark.parametrize("value", ["false", "elsewhere"])
def test_the_environment_has_the_last_word(tmp_path: Path, value: str) -> None:
    if value == "false":
        assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == ["None", "-1"]
    else:
        elsewhere = str(tmp_path / "elsewhere")
        assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=elsewhere) == [elsewhere, "-1"]
    assert not (tmp_path / "flowseg_jax").exists()
    assert run(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE="-1")[1] == "-1"


def test_where_nothing_can_be_written_programs_run_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == ["None", "-1"]


def test_memory_is_that_of_this_process() -> None:
    assert 2**26 < host.peak_memory() < 2**37
    assert host.memory_line().startswith("peak host memory ")


def test_what_programs_are_exchanged_between(monkeypatch) -> None:
    """Machines with the same instructions, whatever else stands in /proc/cpuinfo."""
    told = {"text": "processor: 0\nflags: avx avx2\nMHz: 3"}
    monkeypatch.setattr(host.Path, "read_text", lambda *_, **__: told["text"])
    first = host._kind()
    assert first.startswith(f"{host.jaxlib.__version__}-") and len(first.rpartition("-")[2]) == 8
    for text, same in (
        ("processor: 1\nflags: avx avx2\nMHz: 5", True),
        ("processor: 0\nflags: avx\nMHz: 3", False),
        ("processor: 0\nFeatures: asimd", False),
        ("nothing known", False),
    ):
        told["text"] = text
        assert (host._kind() == first) == same, text
    by_processor = host._kind()
    told["text"] = "something else"
    assert host._kind() != by_processor

    def none(*_, **__):
        raise OSError

    monkeypatch.setattr(host.Path, "read_text", none)  # no Linux
    monkeypatch.setattr(host.platform, "processor", lambda: "nothing known")
    assert host._kind() == by_processor


def test_memory_is_told_in_bytes_on_every_system(monkeypatch) -> None:
    monkeypatch.setattr(host.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 << 20))
    for system, size in (("linux", 3 << 30), ("darwin", 3 << 20)):
        monkeypatch.setattr(host.sys, "platform", system)
        assert host.peak_memory() == size
    monkeypatch.setattr(host.sys, "platform", "linux")
    assert host.memory_line() == "peak host memory 3.0 GiB"


# What the vendors say: Cloud TPU's pages on its versions (peak compute per chip, HBM and ICI bandwidth per chip), NVIDIA's
# data sheets (dense, BF16): TFLOP/s, GB/s of memory, Gbit/s of all links, axes of the torus.
VENDORS = {
    "v4": (275, None, None, None),
    "v5e": (197, 819, 1600, 2),
    "v5p": (459, 2765, 4800, 3),
    "v6e": (918, 1638, 3200, 2),
    "tpu7x": (2307 / 2, None, None, None),  # a device is one of a chip's two chiplets
    "a100": (312, None, None, None),
    "h20": (148, None, None, None),
    "h100": (989, 3350, None, None),
    "h200": (989, None, None, None),
}
CHIPS = {"v5e": (16, 1.5), "v5p": (95.74, 1.75), "v6e": (32, 1.75), "tpu7x": (96, None)}  # GiB of memory, GHz


def test_devices_can_do_what_their_vendors_say() -> None:
    for kind in hardware.DEVICE_SPECS.values():
        peak, memory, links, axes = VENDORS[kind.name]
        assert kind.peak == peak * 1e12 and kind.memory == (memory and memory * 1e9), kind.name
        assert kind.links == (links and links * 1e9 / 8 / axes), kind.name  # both directions count in the vendor's number
        size, clock = CHIPS.get(kind.name, (None, None))
        assert (kind.usable is None) == (size is None)
        if size:
            assert size * 0.97 < kind.usable / 2**30 <= size, kind.name
        assert kind.clock is clock is None or kind.clock == pytest.approx(clock * 1e9, rel=0.01), kind.name
    assert {kind.name for kind in hardware.DEVICE_SPECS.values()} == set(VENDORS)
    assert hardware.peak_flops(SimpleNamespace(device_kind="cpu")) is None

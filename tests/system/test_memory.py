"""Memory that a process keeps, in a process of its own: the setting lasts."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from flowseg_jax.system import memory

# The pages that are new in each of three rounds in which 64 MB are allocated, written and freed.
ROUNDS = """
import resource
import numpy as np
from flowseg_jax.system.memory import keep_freed_memory
kept = KEEP and keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, int(kept))
"""


def pages(keep: bool) -> tuple[list[int], bool]:
    code = ROUNDS.replace("KEEP", str(keep))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    new, kept = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    return [int(n) for n in new], kept[0] == "1"


def test_freed_memory_is_used_again_without_being_mapped_again():
    new, kept = pages(keep=True)
    if kept:  # not with an accelerator, nor without glibc
        assert new[0] > 0 and new[2] < 100
        assert min(pages(keep=False)[0]) > 100


def test_what_the_c_library_is_told(monkeypatch, tmp_path):
    """Nothing where JAX has started threads, on another system, beside an accelerator, or without glibc."""
    told = []
    library = SimpleNamespace(mallopt=lambda option, value: told.append((option, value)) or 1)
    system = SimpleNamespace(platform="linux", modules={})
    monkeypatch.setattr(memory, "sys", system)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path)
    assert memory.keep_freed_memory()
    assert told == [(-4, 0), (-1, 2**31 - 1), (-8, 1)]  # glibc's mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
    for name in ("accel0", "vfio/7", "nvidia3", "kfd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        assert not memory.keep_freed_memory(), name
        (tmp_path / name).unlink()
    (tmp_path / "vfio" / "vfio").write_text("")  # there without any device
    assert memory.keep_freed_memory()
    library.mallopt = lambda option, value: int(option != -1)  # it refuses one
    assert not memory.keep_freed_memory()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not memory.keep_freed_memory()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("asked"))
    for changes in ({"platform": "darwin"}, {"modules": {"jax": 1}}):
        monkeypatch.setattr(memory, "sys", SimpleNamespace(**vars(system) | changes))
        assert not memory.keep_freed_memory()

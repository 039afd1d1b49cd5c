"""Memory that a process keeps, in a process of its own: the setting lasts."""

from __future__ import annotations

import subprocess
import sys

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

"""Compiles a function for TPUs that are not there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (extra `tpu`) is not installed")

_SCRIPT = """
import re, jax, jax.numpy as jnp
from flowseg_jax.aot.topology import open_topology
place = jax.sharding.SingleDeviceSharding(open_topology({topology!r}).devices[0])
array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
{program}
text = jax.jit(function).lower(*arguments).compile().as_text()
print(*(len(re.findall(rf" {{op}}[(]", text)) for op in {operations!r}), "tpu_custom_call" in text)
"""


def compiled(topology: str, program: str, operations: tuple[str, ...]) -> tuple[list[int], bool]:
    """Compiles for the first device of a topology, in a process of its own: libtpu is loaded once a process.

    Args:
        topology: like "v5e:2x2".
        program: Python that defines `function` and `arguments`, made with `array(dtype, *shape)`.
        operations: names in the compiled program, like "sort".

    Returns:
        How often each of the operations occurs, and whether there is a kernel of ours.
    """
    script = _SCRIPT.format(topology=topology, program=program, operations=operations)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *counts, kernel = done.stdout.split("\n")[-2].split()
    return [*map(int, counts)], kernel == "True"

"""Devices that are not there: `v5e:4x4`, `2xv5e:4x4` (two slices), `h100:8`, `cpu:8` -> what a mesh is made of.

The TPU compiler (libtpu) and XLA's GPU compiler (in JAX's CUDA plugin) describe devices without having any. Programs for such
devices can be lowered and compiled, and their memory and collectives read; nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.system.hardware import DEVICE_SPECS

# What to write, and how many numbers a TPU topology has. libtpu knows which numbers exist.
FAMILIES = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3, "h100": 1, "cpu": 1}
EXAMPLES = "v5e:2x2, v5e:4x4, v5e:8x8, 2xv5e:4x4, v5p:2x2x1, v5p:2x2x2, v6e:2x2, v6e:4x4, tpu7x:2x2x1, h100:8, cpu:8"

# libtpu looks for the metadata of a cloud machine and complains where there is none: the topology's name says all it needs.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a second plan at the same time, or a plan beside a run, is no conflict
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
GPUS_PER_HOST = 8
# JAX's share of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_MEMORY_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Topology:
    """Attributes:
    name: as asked for.
    devices: for a mesh; compile-only ones, but for a CPU's.
    usable: bytes that a program may use on each of them, None without a limit to judge by.
    note: what kind of statement a program compiled for them is.
    slices: how many the devices are in.
    """

    name: str
    devices: tuple[Any, ...]
    usable: int | None
    note: str
    slices: int = 1


def open_topology(name: str) -> Topology:
    """The devices of a topology's name.

    Keeps JAX away from accelerators that this machine may have. The devices of `cpu:N` must be asked for before JAX has
    started, unless it has started with that many.

    Raises:
        UserError: an unknown name, or a compiler that is not installed.
    """
    count, one = re.fullmatch(r"(?:([1-9][0-9]{0,3})x(?=[a-z]))?(.*)", name, re.DOTALL).groups()
    slices = int(count or 1)
    family, colon, sizes = one.partition(":")
    if family not in FAMILIES or not colon:
        ours = accelerator_type(one)
        meant = (
            f" (did you mean '{name.removesuffix(one)}{ours}'?)" if ours else did_you_mean(family, FAMILIES) if colon else ""
        )
        raise UserError(f"--topology={name}: unknown{meant}; known: {EXAMPLES}")
    numbers = sizes.split("x")
    if len(numbers) != FAMILIES[family] or not all(re.fullmatch("[1-9][0-9]*", number) for number in numbers):
        raise UserError(f"--topology={name}: {family} takes {'x'.join('N' * FAMILIES[family])}; known: {EXAMPLES}")
    jax.config.update("jax_platforms", "cpu")
    if family == "cpu":
        return _cpu(name, slices, int(sizes))
    return _gpu(name, slices, int(sizes)) if family == "h100" else _tpu(name, slices)


def accelerator_type(name: str) -> str:
    """What an accelerator type as clouds write it is called here; "" for what is none.

    `v5e-16` and `v5litepod-16`, 16 chips, are `v5e:4x4`; `v5p-16`, 16 cores of 8 chips, is `v5p:2x2x2`; `h100-8` is `h100:8`.
    """
    found = re.fullmatch(r"(v5e|v5litepod|v5p|v6e|h100|cpu)[-x]?([1-9][0-9]{0,5})", name)
    if not found:
        return ""
    family, count = found[1].replace("litepod", "e"), int(found[2])
    axes = FAMILIES[family]
    if axes == 1:
        return f"{family}:{count}"
    chips = count // 2 if family == "v5p" else count
    doublings = chips.bit_length() - 1
    if not chips or chips != 1 << doublings:
        return ""
    sides = [1 << (doublings + i) // axes for i in range(axes)]  # as even as can be, the shorter ones first
    return f"{family}:{'x'.join(map(str, sorted(sides, key=lambda side: (side == 1, side))))}"


def _tpu(name: str, slices: int) -> Topology:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(f"--topology={name} needs libtpu, the TPU compiler: pip install 'jax[tpu]=={jax.__version__}'")
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        options = {"num_slices": slices} if slices > 1 else {}
        shape = name.removeprefix(f"{slices}x")
        if set(re.split("[:x]", shape)[1:]) == {"1"}:  # a single chip, where libtpu would take the host for larger
            options["chips_per_host_bounds"] = (1, 1, 1)
        devices = topologies.get_topology_desc(shape, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        raise UserError(f"--topology={name}: libtpu has no such topology ({reason}); known: {EXAMPLES}") from None
    note = "compiled ahead of time by the TPU compiler for devices that are not there; nothing was executed"
    return Topology(name, tuple(devices), DEVICE_SPECS[devices[0].device_kind].usable, note, slices)


def _gpu(name: str, slices: int, count: int) -> Topology:
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UserError(f"--topology={name}: up to {GPUS_PER_HOST} GPUs, or whole hosts of {GPUS_PER_HOST}")
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        packages = " ".join(f"jax-cuda12-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
        raise UserError(
            f"--topology={name} needs JAX's CUDA plugin: pip install 'jax[cuda12]=={jax.__version__}' or, "
            f"to plan only, {packages}"
        )
    target = importlib.resources.files("flowseg_jax.aot").joinpath("h100_target_config.txtpb").read_text(encoding="utf-8")
    hosts, each = (1, count) if count <= GPUS_PER_HOST else (count // GPUS_PER_HOST, GPUS_PER_HOST)
    devices = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=target, topology=f"{slices}x{hosts}x{each}"
    ).devices
    memory = int(re.search(r"device_memory_size: (\d+)", target)[1])
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION))
    note = (
        "compiled ahead of time by XLA's GPU compiler for devices that are not there; nothing was executed. Attention is "
        f"XLA's: cuDNN's takes a device. Usable is the {fraction:.0%} of memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    )
    return Topology(name, tuple(devices), int(memory * fraction), note, slices)


def _cpu(name: str, slices: int, count: int) -> Topology:
    count *= slices
    with contextlib.suppress(RuntimeError):  # JAX runs already: whoever started it has chosen
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology={name}: JAX has started with {len(devices)} host device(s); "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Topology(name, tuple(devices[:count]), None, "compiled for host devices; nothing was executed", slices)

"""What devices can do: peak arithmetic and memory by the name that JAX gives them, and how much of the memory is in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """One device as JAX counts them: a chip up to v6e, one of the two chiplets of a TPU7x, a GPU.

    Attributes:
        name: what people call it.
        peak: dense bf16 FLOP/s, from the vendor.
        usable: bytes that a program may use, by the TPU compiler's word: less than the chip has. None where only the device
            tells.
        cycle_flops: dense bf16 FLOPs of all matrix units in one cycle, TPUs only; `peak` over this is the clock.
        memory: bytes/s to and from the device's memory, from the vendor.
        links: bytes/s in one direction over the links of one axis of the torus, from the vendor: half of what the chip has
            where the torus has two axes, a third where it has three.
    """

    name: str
    peak: float
    usable: int | None = None
    cycle_flops: int | None = None
    memory: float | None = None
    links: float | None = None

    @property
    def clock(self) -> float | None:
        """Cycles/s."""
        return self.cycle_flops and self.peak / self.cycle_flops


# Keys are `jax.Device.device_kind`; a TPU has a second name in some runtimes.
DEVICE_SPECS = {
    "TPU v4": DeviceKind("v4", 275e12),
    "TPU v5 lite": DeviceKind("v5e", 197e12, int(15.75 * GIB), 2**17, 819e9, 100e9),
    "TPU v5e": DeviceKind("v5e", 197e12, int(15.75 * GIB), 2**17, 819e9, 100e9),
    "TPU v5": DeviceKind("v5p", 459e12, int(95.74 * GIB), 2**18, 2765e9, 200e9),
    "TPU v5p": DeviceKind("v5p", 459e12, int(95.74 * GIB), 2**18, 2765e9, 200e9),
    "TPU v6 lite": DeviceKind("v6e", 918e12, int(31.25 * GIB), 2**19, 1638e9, 200e9),
    "TPU v6e": DeviceKind("v6e", 918e12, int(31.25 * GIB), 2**19, 1638e9, 200e9),
    "TPU7x": DeviceKind("tpu7x", 1153.5e12, int(94.75 * GIB)),
    "NVIDIA A100-SXM4-40GB": DeviceKind("a100", 312e12),
    "NVIDIA A100-SXM4-80GB": DeviceKind("a100", 312e12),
    "NVIDIA H20": DeviceKind("h20", 148e12),
    "NVIDIA H100 80GB HBM3": DeviceKind("h100", 989e12, memory=3350e9),
    "NVIDIA H200": DeviceKind("h200", 989e12),
}


def peak_flops(device: Any) -> float | None:
    """Dense bf16 FLOP/s of a `jax.Device`; None for a CPU and for what the table does not know."""
    kind = DEVICE_SPECS.get(device.device_kind)
    return kind.peak if kind else None


def mfu(step_flops: float, step_seconds: float, devices: Iterable[Any]) -> float | None:
    """The share of all devices' peak arithmetic that a step of `step_flops` model FLOPs makes use of; None without a peak."""
    peaks = [peak_flops(device) for device in devices]
    return step_flops / (step_seconds * sum(peaks)) if peaks and None not in peaks else None


def memory_in_use(devices: Iterable[Any]) -> dict[str, int | None]:
    """Bytes on the fullest of this process's devices: in use now, at most since the start, and available to the program.

    A value is None where the devices do not say, as CPUs.
    """
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    values = {ours: [x[name] for x in stats if name in x] for ours, name in names.items()}
    return {ours: max(found) if found else None for ours, found in values.items()}

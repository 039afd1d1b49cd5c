"""What an instruction of optimised HLO cannot do without: multiplications, and bytes to and from the device's memory."""

from __future__ import annotations

import math
import re

import numpy as np

from flowseg_jax.aot.hlo import ARRAY, Instruction, Module, array_bytes

_LABELS = re.compile(r"dim_labels=(?P<lhs>\w+)_(?P<rhs>\w+)->(?P<out>\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_SLICES = ("slice", "dynamic-slice", "gather")
ON_CHIP = "S("  # a layout with a memory space is in the chip's own memory


def flops(module: Module, computation: str, x: Instruction) -> float:
    """FLOPs of the matrix products of an instruction, those of its fused computation included; 0 without any."""
    if x.opcode == "convolution":
        return _convolution_flops(module, computation, x)
    if x.opcode == "dot":
        lhs = sizes(module.instructions(computation)[x.operands[0]].type)
        return (
            2.0 * math.prod(sizes(x.type)) * math.prod(lhs[int(i)] for i in _CONTRACTED.search(x.attributes)[1].split(",") if i)
        )
    called = x.called("calls") if x.opcode in ("fusion", "async-start") else None
    return 0.0 if called is None else sum(flops(module, called, inner) for inner in module.instructions(called).values())


def memory_bytes(module: Module, computation: str, x: Instruction) -> int:
    """Bytes that an instruction reads from and writes to the device's memory: of a slice, what the slice holds."""
    local = module.instructions(computation)
    called = x.called("calls") if x.opcode == "fusion" else None
    if x.opcode in ("dynamic-slice", "slice"):
        return 2 * _bytes(x.type)
    if x.opcode == "dynamic-update-slice":
        return 2 * _bytes(local[x.operands[1]].type)
    inside = module.instructions(called) if called else {}
    parameters = {int(y.operands[0]): y for y in inside.values() if y.opcode == "parameter"}
    read = 0
    for index, name in enumerate(x.operands):
        if name in local and not local[name].type.startswith("("):
            whole = _bytes(local[name].type)
            read += min(whole, _read_of_parameter(inside, parameters[index])) if index in parameters else whole
    return read + (_written(inside, next(reversed(inside.values())), x.type) if inside else _bytes(x.type))


def _read_of_parameter(inside: dict[str, Instruction], parameter: Instruction) -> int:
    users = [y for y in inside.values() if parameter.name in y.operands]
    read = 0
    for user in users:
        if user.opcode in _SLICES:
            read += array_bytes(user.type)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name):
            return array_bytes(parameter.type)
    return read


def _written(inside: dict[str, Instruction], root: Instruction, type_text: str) -> int:
    if root.opcode == "tuple":
        return sum(_written(inside, inside[name], inside[name].type) for name in root.operands if name in inside)
    if root.opcode == "bitcast" and root.operands[0] in inside:
        return _written(inside, inside[root.operands[0]], type_text)
    if root.opcode == "dynamic-update-slice":
        return array_bytes(inside[root.operands[1]].type)
    return _bytes(type_text)


def _bytes(type_text: str) -> int:
    """Of the arrays of a type that are in the device's memory."""
    return sum(array_bytes(match[0]) for match in ARRAY.finditer(type_text) if ON_CHIP not in (match["layout"] or ""))


def sizes(type_text: str) -> list[int]:
    """Of the first array of a type."""
    return [int(size) for size in ARRAY.search(type_text)["sizes"].split(",") if size]


def elements(type_text: str) -> int:
    """Of the largest array of a type."""
    return max((math.prod(sizes(match[0])) for match in ARRAY.finditer(type_text)), default=0)


def _convolution_flops(module: Module, computation: str, x: Instruction) -> float:
    """A TPU has batches of matrix products as windows most of whose taps fall outside the operand: these are not counted."""
    local = module.instructions(computation)
    lhs, rhs, out = (sizes(y) for y in (local[x.operands[0]].type, local[x.operands[1]].type, x.type))
    labels = _LABELS.search(x.attributes)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", found[1])) if (found := _WINDOW.search(x.attributes)) else {}
    count = 2.0 * out[labels["out"].index("b")] * out[labels["out"].index("f")] * rhs[labels["rhs"].index("i")]
    axes = sum(label.isdigit() for label in labels["lhs"])

    def of(key: str, default: str) -> list[tuple[int, ...]]:
        parts = window[key].split("x") if key in window else [default] * axes
        return [tuple(map(int, part.split("_"))) for part in parts]

    parts = (of("size", "1"), of("stride", "1"), of("pad", "0_0"), of("lhs_dilate", "1"), of("rhs_dilate", "1"))
    for axis, ((size,), (stride,), (pad, _), (spread,), (step,)) in enumerate(zip(*parts, strict=True)):
        extent = (lhs[labels["lhs"].index(str(axis))] - 1) * spread + 1
        starts = np.arange(out[labels["out"].index(str(axis))]) * stride - pad
        taps = 0
        for tap in range(size):
            at = starts + tap * step
            taps += int(((at >= 0) & (at < extent) & (at % spread == 0)).sum())
        count *= taps
    return count

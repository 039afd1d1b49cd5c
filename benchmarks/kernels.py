"""Counts the instruction bundles of our TPU kernels, which is what `flowseg plan` prices them by.

    python -m benchmarks.kernels v5e v5p v6e            # beside the committed table; exit code 1 if they differ by 2 % or more
    python -m benchmarks.kernels v5e v5p v6e --write    # into flowseg_jax/aot/kernel_bundles.json

Needs libtpu (the extra `tpu`); nothing runs. A kernel is compiled for a device that is not there, and the compiler writes its
final code down: one line a bundle, loops and skipped regions marked. A kernel tells how many bodies it has. They are its
longest inner loops, or else the largest region that a step may skip; the rest of the code runs in every step.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that a Ctrl-C while they last is as clean as later
    from flowseg_jax.errors import run_cli

    run_cli("benchmarks.kernels:main")

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.cli.parser import Parser
from flowseg_jax.errors import UserError
from flowseg_jax.system.console import log
from flowseg_jax.system.paths import ROOT

TABLE = ROOT / "flowseg_jax" / "aot" / "kernel_bundles.json"
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TOLERANCE = 0.02
SMALLEST_REGION, SMALLEST_LOOP = 72, 16  # bundles of a region and of a loop worth telling apart

_LINE = re.compile(r"\s*(?:0x)?(?P<address>[0-9a-f]+)\s+(?:[A-Z]{2})?\s*:\s*(?P<depth>(?:>\s*)*)\{(?P<code>.*)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_SETTLED = re.compile(r"-\d+-final_bundles\.txt$")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call whose kernels are counted.

    Attributes:
        name: for people.
        build: () -> (function, shapes and dtypes of its arguments); imports what it needs.
    """

    name: str
    build: Callable[[], tuple[Callable, list[tuple[tuple[int, ...], str]]]]


def _attention(tokens: int, heads: int, groups: int, key_width: int, value_width: int, mask: str = "none") -> Callable:
    def build() -> tuple[Callable, list]:
        from flowseg_jax.ops.attention import flash
        from flowseg_jax.ops.attention.mask import causal_mask

        def both(q, k, v, ids, out, logsum, cotangent):
            causal = causal_mask(ids, ids)
            rule = {"none": None, "causal": causal, "rule": dataclasses.replace(causal, in_order=False)}[mask]
            return flash.forward(q, k, v, rule, 0.1), flash.backward(q, k, v, rule, 0.1, out, logsum, cotangent)

        def of(count, width):
            return ((1, tokens, count, width), "bfloat16")

        result = of(heads, value_width)
        keys = of(groups, key_width), of(groups, value_width)
        ids, logsum = ((1, tokens), "int32"), ((1, heads, tokens), "float32")
        return both, [of(heads, key_width), *keys, ids, result, logsum, result]

    return build


def _attention_to_a_cache(queries: int, keys: int, heads: int) -> Callable:
    def build() -> tuple[Callable, list]:
        from flowseg_jax.ops.attention import flash
        from flowseg_jax.ops.attention.mask import AttentionMask, TokenInfo

        def forward(q, k, v, of_queries, of_keys):
            return flash.forward(q, k, v, AttentionMask(TokenInfo(*[of_queries] * 3), TokenInfo(*[of_keys] * 3)), 0.1)

        k = (1, keys, 1, 128), "bfloat16"
        return forward, [((1, queries, heads, 128), "bfloat16"), k, k, ((1, queries), "int32"), ((1, keys), "int32")]

    return build


def _deformable_attention(maps: Sequence[tuple[int, int]], heads: int, channels: int, points: int) -> Callable:
    def build() -> tuple[Callable, list]:
        from flowseg_jax.ops.msda.kernel import Kernel

        kernel, queries = Kernel(interpret=False), sum(h * w for h, w in maps)

        def both(cotangent, value, at, weights):
            forward = kernel.forward(maps, 0, value, at, weights)
            return forward, kernel.backward(maps, 0, cotangent, value, at, weights)

        value = ((1, queries, heads, channels), "bfloat16")
        weights = (1, queries, heads, len(maps), points)
        return both, [value, value, ((*weights, 2), "float32"), (weights, "float32")]

    return build


def _points(masks: int, candidates: int, keep: int, points: int) -> Callable:
    def build() -> tuple[Callable, list]:
        from flowseg_jax.ops.points import kernel

        def all_of_them(maps, packed, logits, candidates, points):
            chosen = kernel.of_smallest(logits, candidates, keep)
            return chosen, kernel.read(maps, points), kernel.read_packed(packed, points, 1024)

        of_points = ((masks, points, 2), "float32")
        maps = ((masks, 128, 128), "float32"), ((masks, 1024, 128), "uint8")
        return all_of_them, [*maps, ((masks, candidates), "float32"), ((masks, candidates, 2), "float32"), of_points]

    return build


def _window(side: int, heads: int) -> Callable:
    def build() -> tuple[Callable, list]:
        from flowseg_jax.ops.attention import window

        def both(q, k, v, rows, columns, cotangent):
            operands = q, k, v, rows, columns
            return window.forward(*operands), window.backward(*operands, cotangent)

        tokens, table = ((1, side**2, heads * 64), "bfloat16"), ((2 * side - 1, 64), "float32")
        return both, [tokens] * 3 + [table] * 2 + [tokens]

    return build


def _divided(grid: int, side: int) -> Callable:
    def build() -> tuple[Callable, list]:
        from flowseg_jax.ops import windows_kernel

        def both(x, windows):
            return windows_kernel.split(side, grid, x), windows_kernel.join(side, grid, windows)

        count = (-(-grid // side)) ** 2
        return both, [((1, grid, grid, 128), "bfloat16"), ((count, side * side, 128), "bfloat16")]

    return build


def _rotary(tokens: int) -> Callable:
    def build() -> tuple[Callable, list]:
        from flowseg_jax.ops import rope_kernel

        def both(x, scale, cos, sin, cotangent):
            plain = rope_kernel.forward(0.0, x, None, cos, sin), rope_kernel.backward(0.0, x, None, cos, sin, cotangent)
            operands = 1e-6, x, scale, cos, sin
            return plain, rope_kernel.forward(*operands), rope_kernel.backward(*operands, cotangent)

        heads, angles = ((1, tokens, 8, 128), "bfloat16"), ((1, tokens, 64), "float32")
        return both, [heads, ((128,), "float32"), angles, angles, heads]

    return build


def _masked_attention(queries: int, keys: int, width: int) -> Callable:
    def build() -> tuple[Callable, list]:
        from flowseg_jax.ops.attention import flash

        def both(q, k, v, mask, out, logsum, cotangent):
            return flash.forward(q, k, v, mask, 0.1), flash.backward(q, k, v, mask, 0.1, out, logsum, cotangent)

        q, k = (((1, count, 2, width), "bfloat16") for count in (queries, keys))
        return both, [q, k, k, ((1, 1, queries, keys), "bool"), q, ((1, 2, queries), "float32"), q]

    return build


# The shapes of configs/stage3_mixed.py with each of its language models.
CASES = (
    *(Case(f"language model, {n} heads", _attention(2304, n, 1, 128, 128, mask="causal")) for n in (1, 2, 4)),
    *(Case(f"language model beside a cache, {n} heads", _attention(2304, n, 1, 128, 128, mask="rule")) for n in (1, 2, 4)),
    Case("language model, an image before its expressions", _attention(1792, 4, 1, 128, 128, mask="causal")),
    Case("language model, a round of expressions", _attention_to_a_cache(192, 1984, 4)),
    Case("SAM, whole image", _attention(4096, 2, 2, 192, 64)),
    Case("SigLIP2", _attention(729, 2, 2, 72, 72)),
    Case("mask decoder", _masked_attention(1800, 4096, 32)),
    Case("pixel decoder", _deformable_attention(((32, 32), (64, 64), (128, 128)), 8, 32, 4)),
    Case("SAM, windows", _window(14, 2)),
    Case("SAM, division into windows", _divided(64, 14)),
    Case("rotary embedding", _rotary(2304)),
    Case("points of the losses", _points(16, 37632, 9408, 12544)),
)


def bodies(text: str, count: int = 1) -> tuple[int, list[int]]:
    """(bundles of a step without its bodies, bundles of each of `count` bodies as they stand) of a kernel's final code.

    Raises:
        ValueError: text that holds no bundle, or fewer bodies than `count`.
    """
    depth, code = {}, {}
    for line in text.splitlines():
        if match := _LINE.match(line):
            address = int(match["address"], 16)
            depth[address], code[address] = match["depth"].count(">"), match["code"]
    if not depth:
        raise ValueError("no bundles in this text")
    total, addresses = max(depth) + 1, sorted(depth)
    runs = _runs(depth, total)
    if runs:
        if len(runs) < count:
            raise ValueError(f"{len(runs)} loops in a kernel of {count} bodies")
        chosen = sorted(sorted(range(len(runs)), key=lambda n: -runs[n])[:count])
        loops = [runs[n] for n in chosen]
        return total - sum(loops), loops
    regions = []
    for address in addresses:
        for target in _BRANCH.findall(code[address]):
            regions.append((address, _end(code, address, target)))
    regions = [(start, end) for start, end in regions if end - start >= SMALLEST_REGION]
    # Around the step is a region too, skipped when the pipeline runs empty.
    inner = [r for r in regions if not any(r != other and r[0] <= other[0] and other[1] <= r[1] for other in regions)]
    body = max((end - start for start, end in inner), default=0)
    return total - body, [body]


def _end(code: dict[int, str], start: int, region: str) -> int:
    """Where the code after a region starts, or `start` if the text does not tell."""
    pattern = re.compile(rf"(?:Start/End empty|Start) region {region}\b")
    return min((address for address in code if address > start and pattern.search(code[address])), default=start)


def _runs(depth: dict[int, int], total: int) -> list[int]:
    """Lengths of the stretches of code inside an inner loop: the grid is the outermost one."""
    found, current, inside = [], 0, 0
    for address in range(total):
        current = depth.get(address, current)
        if current > 1:
            inside += 1
        elif inside:
            found.append(inside)
            inside = 0
    return [size for size in (*found, inside) if size >= SMALLEST_LOOP]


def count(device: str, case: Case) -> dict[str, dict[str, Any]]:
    """{kernel: {"step", "bodies"}} of a case, compiled in a process of its own.

    Raises:
        UserError: it did not compile; with the last thing that was said.
    """
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.kernels", device, f"--compile={CASES.index(case)}"]
        ran = subprocess.run(command, env={**os.environ, "LIBTPU_INIT_ARGS": flags}, capture_output=True, text=True, cwd=ROOT)
        if ran.returncode:
            raise UserError(f"{case.name} on {device}: {(ran.stderr or ran.stdout).strip().splitlines()[-1]}")
        files = {path.name: path for path in Path(directory).iterdir() if _SETTLED.search(path.name)}
        found = {}
        for instruction, (kernel, told) in json.loads(ran.stdout.splitlines()[-1]).items():
            [path] = [p for name, p in files.items() if f"-{instruction}-" in name and "schedule-analysis" not in name]
            step, inner = bodies(path.read_text(errors="replace"), told)
            found[kernel] = {"step": step, "bodies": inner}
        return found


def _compile(device: str, case: Case) -> dict[str, tuple[str, int]]:
    """{HLO instruction: (kernel, its bodies)} of a case; the compiler writes its code to where LIBTPU_INIT_ARGS says."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from flowseg_jax.aot.hlo import Module
    from flowseg_jax.aot.topology import open_topology
    from flowseg_jax.aot.tpu_cost import kernel_metadata

    at = SingleDeviceSharding(open_topology(TOPOLOGIES[device]).devices[0])
    function, arguments = case.build()
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=at) for shape, dtype in arguments]
    module = Module(jax.jit(function).lower(*shapes).compile().as_text())
    metadata = {x.name: kernel_metadata(x) for x in module.instructions(module.entry).values()}
    return {name: (found["kernel"], len(found["bodies"].split())) for name, found in metadata.items() if "kernel" in found}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="+", choices=TOPOLOGIES, help="what to compile for")
    parser.add_argument("--write", action="store_true", help="replace the devices' rows of the committed table")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.compile is not None:
        print(json.dumps(_compile(arguments.devices[0], CASES[arguments.compile])))
        return 0
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    differ = False
    for device in arguments.devices:
        rows, before = {}, table.get(device, {})
        for case in CASES:
            for kernel, row in count(device, case).items():
                rows[kernel] = row
                size = row["step"] + sum(row["bodies"])
                old = before.get(kernel, {"step": 0, "bodies": []})
                changed = abs(old["step"] + sum(old["bodies"]) - size) > TOLERANCE * size
                differ |= changed
                log(
                    f"{device}: {kernel}: {row['step']} + {row['bodies']} bundles" + (" (the table differs)" if changed else "")
                )
        table[device] = rows
    if arguments.write:
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        log(f"written to {TABLE.relative_to(ROOT)}")
        return 0
    return int(differ)

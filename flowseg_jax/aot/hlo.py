"""The collectives of a compiled program, read from its optimised HLO text: which, how often, how many bytes, in which loops.

Text is all that ahead-of-time compilation leaves for every platform. Read are XLA's CPU, GPU and TPU dialects of it, with their
ways to overlap a collective with arithmetic: each collective counts once, where it starts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ASSIGNMENT = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = ")
ARRAY = re.compile(r"\b(?P<dtype>[a-z][a-z0-9]*)\[(?P<sizes>[\d,]*)\](?P<layout>\{[^}]*\})?")
_BITS = re.compile(r"\d+")
_NAME = re.compile(r"%([\w.\-]+)")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{[^{}]*\}")  # the only attribute that is printed on several lines


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: one of `KINDS`.
        bytes: of the whole array on a device: what is gathered to, reduced, or scattered from.
        executions: how often it runs in one run of the program.
        loops: names of the loops around it, outermost first.
        between_slices: whether it exchanges with devices of another slice.
    """

    kind: str
    bytes: int
    executions: int
    loops: tuple[str, ...]
    between_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop.

    Attributes:
        name: of the instruction.
        trip_count: how often it runs each time; None where that depends on data. Such a loop is counted as one run.
        collectives: kinds inside it, inner loops included.
    """

    name: str
    trip_count: int | None
    collectives: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CollectiveStats:
    """All collectives and all loops of a program."""

    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]

    def totals(self, between_slices: bool = False) -> dict[str, tuple[int, int]]:
        """{kind: (executions, bytes of all executions)}; of all collectives, or only of those between slices."""
        found: dict[str, tuple[int, int]] = {}
        for x in self.collectives:
            if between_slices and not x.between_slices:
                continue
            count, size = found.get(x.kind, (0, 0))
            found[x.kind] = count + x.executions, size + x.executions * x.bytes
        return dict(sorted(found.items()))

    def largest(self, kind: str) -> int:
        """Bytes of the largest collective of a kind, 0 without one."""
        return max((x.bytes for x in self.collectives if x.kind == kind), default=0)

    def largest_in_a_loop(self, kind: str) -> int:
        """Bytes of the largest collective of a kind that stands in a loop, 0 without one."""
        return max((x.bytes for x in self.collectives if x.kind == kind and x.loops), default=0)


def collective_stats(text: str, slice_size: int | None = None) -> CollectiveStats:
    """Reads optimised HLO text (`jax.stages.Compiled.as_text()`).

    Args:
        text: of the program.
        slice_size: devices of a slice, where there are several; a mesh has one slice's devices after the other's.

    Raises:
        ValueError: text without an entry computation.
    """
    return _Traffic(Module(text), slice_size).read()


def device_groups(x: Instruction) -> list[list[int]]:
    """The groups of devices that exchange, by their places in the mesh; [] stands for all in one group."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", x.attributes):
        return [[int(index) for index in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    # The short form [groups,size]<=[sides]T(axes): the numbers from 0 in a box of these sides, transposed and cut into groups.
    if short := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", x.attributes):
        groups, sides, axes = ([int(n) for n in part.split(",")] if part else None for part in short.groups())
        return np.arange(math.prod(sides)).reshape(sides).transpose(axes).reshape(groups).tolist()
    return []


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @classmethod
    def parse(cls, line: str, name: str, start: int) -> Instruction:
        """`line[start:]` follows the equals sign. A type is a tuple in parentheses or has no space in it."""
        end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
        paren = line.index("(", end)
        close = _closing(line, paren)
        operands = line[paren + 1 : close - 1]
        named = tuple(_NAME.findall(operands)) or (operands,)
        return cls(name, line[start:end], line[end:paren].strip(), named, line[close:])

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


def _closing(line: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"unbalanced parentheses in HLO: {line[:120]}")


def array_bytes(type_text: str) -> int:
    """Bytes of all arrays of a type, without the padding of its layout."""
    total = 0
    for match in ARRAY.finditer(type_text):
        bits = _BITS.search(match["dtype"])
        width = int(bits[0]) if bits else 8  # "pred"
        total += math.ceil(math.prod(int(size) for size in match["sizes"].split(",") if size) * width / 8)
    return total


class Module:
    """A program's computations, each parsed when it is first asked for.

    Attributes:
        entry: the name of the computation that is run.
    """

    entry: str

    def __init__(self, text: str):
        """Raises ValueError for text without an entry computation."""
        self._lines: dict[str, list[str]] = {}
        entry, current = None, None
        for line in _KERNEL_METADATA.sub(lambda match: match[0].replace("\n", ""), text).splitlines():
            if current is None and (header := _COMPUTATION.match(line)):
                current = self._lines[header["name"]] = []
                entry = header["name"] if header["entry"] else entry
            elif line.startswith("}"):
                current = None
            elif current is not None:
                current.append(line)
        if entry is None:
            raise ValueError("no entry computation: this is no HLO text")
        self.entry = entry
        self._parsed: dict[str, dict[str, Instruction]] = {}

    def instructions(self, computation: str) -> dict[str, Instruction]:
        """Those of one computation by name, in order."""
        if computation not in self._parsed:
            matches = ((line, _ASSIGNMENT.match(line)) for line in self._lines.get(computation, ()))
            found = [Instruction.parse(line, match["name"], match.end()) for line, match in matches if match]
            self._parsed[computation] = {x.name: x for x in found}
        return self._parsed[computation]

    def trip_count(self, loop: Instruction) -> int | None:
        """Given by the compiler, or the bound that the loop's counter is compared with: `lax.scan` counts from 0 in ones."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.instructions(loop.called("condition"))
        test = next(reversed(condition.values()))  # the root is the last
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        bound = condition.get(test.operands[1])
        return int(bound.operands[0]) if bound is not None and bound.opcode == "constant" else None

    @staticmethod
    def branches(conditional: Instruction) -> list[str]:
        """The computations of which a conditional runs one."""
        if several := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
            return _NAME.findall(several[1])
        return [name for name in (conditional.called("true_computation"), conditional.called("false_computation")) if name]


class _Traffic:
    """One pass over a program: from the entry into everything that it calls."""

    def __init__(self, module: Module, slice_size: int | None):
        self._module, self._slice_size = module, slice_size
        self._loops: dict[str, int | None] = {}

    def read(self) -> CollectiveStats:
        found = tuple(self._walk(self._module.entry, 1, ()))
        inside = {name: tuple(sorted({x.kind for x in found if name in x.loops})) for name in self._loops}
        return CollectiveStats(found, tuple(Loop(name, trips, inside[name]) for name, trips in self._loops.items()))

    def _walk(self, computation: str, executions: int, loops: tuple[str, ...]) -> Iterator[Collective]:
        chains: set[str] = set()
        for x in self._module.instructions(computation).values():
            if x.opcode == "while":
                self._loops[x.name] = trips = self._module.trip_count(x)
                for part in ("condition", "body"):
                    yield from self._walk(x.called(part), executions * (1 if trips is None else trips), (*loops, x.name))
            elif x.opcode == "conditional":
                branches = [list(self._walk(name, executions, loops)) for name in self._module.branches(x)]
                yield from max(branches, key=lambda found: sum(c.executions * c.bytes for c in found), default=[])
            elif x.opcode == "call":
                yield from self._walk(x.called("to_apply"), executions, loops)
            elif x.opcode in ("fusion", "async-start"):
                yield from self._fused(x.called("calls"), executions, loops, chains)
            elif collective := self._collective(x, computation):
                yield Collective(*collective, executions, loops, self._between_slices(x))

    def _fused(self, computation: str, executions: int, loops: tuple[str, ...], chains: set[str]) -> Iterator[Collective]:
        """The collectives of a fusion. The TPU compiler spreads one over several fusions that bear its chain's id."""
        for x in self._module.instructions(computation).values():
            collective = self._collective(x, computation)
            chain = re.search(r'chain_id="(\d+)"', x.attributes)
            if not collective or (chain and chain[1] in chains):
                continue
            if chain:
                chains.add(chain[1])
            kind, size = collective
            # An all-reduce of which a device keeps one part is what the TPU compiler makes a reduce-scatter of.
            kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
            yield Collective(kind, size, executions, loops, self._between_slices(x))

    def _between_slices(self, x: Instruction) -> bool:
        if x.opcode == "send":
            return True
        groups = device_groups(x) if self._slice_size else [[0]]
        return not groups or any(len({place // self._slice_size for place in group}) > 1 for group in groups if len(group) > 1)

    def _collective(self, x: Instruction, computation: str) -> tuple[str, int] | None:
        """(kind, bytes) if the instruction is a collective; its end, if it has one of its own, is none."""
        kind, local = x.opcode.removesuffix("-start"), self._module.instructions(computation)
        # The TPU compiler exchanges inside each slice first, and hands what is left to the hosts' network.
        if kind == "send" and (between := _BETWEEN_SLICES.search(x.attributes)):
            return between[1].lower().replace("_", "-"), array_bytes(local[x.operands[0]].type)
        if kind not in KINDS:
            return None
        taken = sum(array_bytes(local[name].type) for name in x.operands if name in local)
        given = array_bytes(x.type)
        if x.opcode.endswith("-start") and kind != "all-reduce":
            given -= taken  # the type of an asynchronous start has the operands in it
        return kind, max(taken, given)

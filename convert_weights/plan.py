"""Which tensor fills which parameter: matched completely, and strictly both ways, before anything is read.

Every fault is collected, with shapes, into one error: a parameter without a tensor, a tensor without a use, another shape.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert_weights import refusals
from convert_weights.families import FAMILIES, Family
from convert_weights.ops import Shape
from convert_weights.sources import Entry, TensorSource
from convert_weights.table import Piece, Section, expand, unnumbered
from flowseg_jax.errors import UserError, plain

COMPARED_ROWS = 4096  # rows of a tied head that are compared at a time
SHOWN = 10  # lines of faults in an error


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter and what it is made of; without pieces it is fresh."""

    name: str
    shape: Shape
    dtype: np.dtype
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion does.

    Attributes:
        layout: the naming that the file follows.
        targets: all parameters, in the order of the model.
        resized: {parameter: (rows in the file, rows here)} of vocabularies that are cut or grown.
        ignored: tensors that are known and not used.
        twins: {ignored tensor: the one that it must equal}, see `check_twins`.
    """

    family: Family
    cfg: Any
    layout: str
    targets: tuple[Target, ...]
    resized: dict[str, tuple[int, int]]
    ignored: tuple[str, ...]
    twins: dict[str, str]

    @property
    def fresh(self) -> tuple[str, ...]:
        return tuple(target.name for target in self.targets if not target.pieces)


def make_plan(family: Family, cfg: Any, source: TensorSource, dtype: str | None = None) -> Plan:
    """Matches a source with a family's tables for one config.

    Args:
        dtype: what all parameters are stored as; None keeps each one's own (float64 becomes float32, fresh ones are float32).

    Raises:
        UserError: one that lists every missing, unexpected and wrongly shaped tensor, or names the family that the file
            belongs to.
    """
    shapes = family.shapes(cfg)
    layout = choose_layout(family, source.entries)
    sections = family.layouts[layout](cfg)
    pieces = list(expand(sections, cfg, shapes))
    by_target: dict[str, list[Piece]] = {name: [] for name in shapes}
    for piece in pieces:
        by_target[piece.target].append(piece)
    present = {family.fresh_group(p.target) for p in pieces if p.source in source.entries} - {None}

    faults, resized, used = [], {}, set()
    targets = []
    for name, shape in shapes.items():
        parts, group = by_target[name], family.fresh_group(name)
        complete = [p for p in parts if p.source in source.entries]
        if not complete and group is not None and group not in present:
            targets.append(Target(name, shape, np.dtype(dtype or np.float32), ()))
            continue
        kinds = set()
        for piece in parts:
            if piece.source not in source.entries:
                faults.append(("missing", piece.source, piece.source_shape))
                continue
            found = source.entries[piece.source]
            used.add(piece.source)
            kinds.add(found.dtype)
            fault = _misfit(piece, found, family.resizes)
            if fault:
                faults.append((fault, piece.source, found.shape))
            elif found.shape != piece.source_shape:
                resized[name] = (found.shape[0], piece.total)
        if not parts:
            faults.append(("the tables do not cover", name, shape))
        targets.append(Target(name, shape, np.dtype(dtype) if dtype else _common(kinds), tuple(parts)))

    twins = _twins(sections)
    ignore = [re.compile(re.escape(s.source) + f"(?:{text})") for s in sections for text in s.table.ignore]
    spare = [name for name in source.entries if name not in used]
    ignored = [name for name in spare if name in twins or any(p.fullmatch(name) for p in ignore)]
    faults += [("unexpected", name, source.entries[name].shape) for name in spare if name not in set(ignored)]
    if faults:
        raise UserError(_report(family, source, faults))
    pairs = {name: twins[name] for name in ignored if name in twins}
    return Plan(family, cfg, layout, tuple(targets), resized, tuple(ignored), pairs)


def choose_layout(family: Family, entries: Iterable[str]) -> str:
    """The layout of a family that recognises most of a file's names; the first one when in doubt."""
    names = {unnumbered(name) for name in entries}
    counts = {layout: len(names & known) for layout, known in family.names.items()}
    return max(counts, key=lambda layout: counts[layout])


def recognise(entries: Iterable[str]) -> str | None:
    """The family whose names a file's names look most like, or None."""
    names = collections.Counter(unnumbered(name) for name in entries)

    def likeness(known: frozenset[str]) -> float:
        common = names.keys() & known
        return sum(names[name] for name in common) / max(names.total(), 1) * len(common) / len(known)

    scores = {family.name: max(map(likeness, family.names.values())) for family in FAMILIES.values()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] > 0.2 else None


def same_family(looks: str, asked: str) -> bool:
    """Whether names that look like one family may be another's: X-SAM's are a subset of FlowSeg's."""
    return looks == asked or {looks, asked} <= {"xsam", "flowseg"}


def _misfit(piece: Piece, found: Entry, resizes: bool) -> str | None:
    if not jnp.issubdtype(found.dtype, jnp.floating):
        return f"not a floating-point tensor but {found.dtype}:"
    want = piece.source_shape
    if found.shape == want:
        return None
    free = resizes and piece.op.resizes and len(found.shape) == len(want) and found.shape[0] > 0
    return None if free and found.shape[1:] == want[1:] else f"expected {want} for"


def _common(kinds: Iterable[np.dtype]) -> np.dtype:
    """The dtype that layers are stacked in: their own, or the wider one where they differ."""
    kinds = list(kinds) or [np.dtype(np.float32)]
    common = kinds[0]
    for kind in kinds[1:]:
        common = jnp.promote_types(common, kind)
    return np.dtype(np.float32) if common == np.float64 else np.dtype(common)


def _twins(sections: Iterable[Section]) -> dict[str, str]:
    return {s.source + name: s.source + other for s in sections for name, other in s.table.twins.items()}


def check_twins(plan: Plan, source: TensorSource) -> None:
    """Raises a UserError where a tied head that the file lists as well is another matrix than the embedding table."""
    for name, other in plan.twins.items():
        a, b = source.entries[name], source.entries[other]
        same = a.shape == b.shape
        for start in range(0, a.shape[0] if same else 0, COMPARED_ROWS):
            rows = start, start + COMPARED_ROWS
            same = same and np.array_equal(source.read(name, *rows), source.read(other, *rows))
        if not same:
            raise UserError(
                f"{source.name}: {name} {a.shape} differs from {other} {b.shape}, which it is tied to by the model's config; "
                "set tie_word_embeddings to false in config.json"
            )


def _report(family: Family, source: TensorSource, faults: list[tuple[str, str, Shape]]) -> str:
    looks = recognise(source.entries)
    if looks is not None and not same_family(looks, family.name):
        return (
            f"{source.name} looks like a checkpoint of the family {looks}, not {family.name}: "
            f"use python -m convert_weights {looks} ..."
        )
    groups = compress(faults)
    shown = "; ".join(f"{kind} {plain(name)} {plain(str(shape))}" for kind, name, shape in groups[:SHOWN])
    if len(groups) > SHOWN:
        shown += f"; and {len(groups) - SHOWN} more such lines, {len(faults)} tensors in all"
    if refusals.placeholders(entry.shape for entry in source.entries.values()):
        shown += (
            "; most of its tensors are empty: DeepSpeed's ZeRO-3 saves such placeholders, python zero_to_fp32.py in the run's "
            "directory gathers the weights"
        )
    return f"{source.name} does not fit {family.name}: {shown}"


def compress(faults: Iterable[tuple[str, str, Shape]]) -> list[tuple[str, str, Shape]]:
    """Names that differ in one number alone, with equal kind and shape, as one line: `layers.{0-3,5}.weight`."""
    groups: dict[tuple, list[int]] = {}
    for kind, name, shape in faults:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = (kind, name[: number.start()], name[number.end() :], shape) if number else (kind, name, None, shape)
        numbers = groups.setdefault(key, [])
        if number and int(number.group()) not in numbers:
            numbers.append(int(number.group()))
    return [
        (kind, head if tail is None else f"{head}{_ranges(numbers)}{tail}", shape)
        for (kind, head, tail, shape), numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"

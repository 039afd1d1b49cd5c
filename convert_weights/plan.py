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
from convert_weights.families import FAMILIES, CheckpointFamily
from convert_weights.ops import Shape
from convert_weights.sources import TensorInfo, TensorSource
from convert_weights.table import ParamSlice, expand, unnumbered
from flowseg_jax.errors import UserError, plain

COMPARED_ROWS = 4096  # rows of a tied head that are compared at a time
SHOWN = 10  # lines of faults in an error


@dataclasses.dataclass(frozen=True)
class ParamTarget:
    """A parameter and what it is made of; without slices it is newly initialised."""

    name: str
    shape: Shape
    dtype: np.dtype
    slices: tuple[ParamSlice, ...]


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """What a conversion does.

    Attributes:
        layout: the naming that the file follows.
        targets: all parameters, in the order of the model.
        resized: {parameter: (rows in the file, rows here)} of vocabularies that are cut or grown.
        ignored: tensors that are known and not used.
        tied_copies: {ignored tensor: the one that it must equal}, see `check_tied_copies`.
    """

    family: CheckpointFamily
    cfg: Any
    layout: str
    targets: tuple[ParamTarget, ...]
    resized: dict[str, tuple[int, int]]
    ignored: tuple[str, ...]
    tied_copies: dict[str, str]

    @property
    def fresh(self) -> tuple[str, ...]:
        return tuple(target.name for target in self.targets if not target.slices)


def make_plan(family: CheckpointFamily, cfg: Any, source: TensorSource, dtype: str | None = None) -> ConversionPlan:
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
    tied_copies = {s.source + name: s.source + other for s in sections for name, other in s.table.tied_copies.items()}
    slices = _under_the_name_that_exists(expand(sections, cfg, shapes), tied_copies, source)
    by_target: dict[str, list[ParamSlice]] = {name: [] for name in shapes}
    for part in slices:
        by_target[part.target].append(part)
    present = {family.fresh_group(p.target) for p in slices if p.source in source.entries} - {None}

    faults, resized, used = [], {}, set()
    targets = []
    for name, shape in shapes.items():
        parts, group = by_target[name], family.fresh_group(name)
        complete = [p for p in parts if p.source in source.entries]
        if not complete and group is not None and group not in present:
            targets.append(ParamTarget(name, shape, np.dtype(dtype or np.float32), ()))
            continue
        dtypes = set()
        for part in parts:
            if part.source not in source.entries:
                faults.append(("missing", part.source, part.source_shape))
                continue
            found = source.entries[part.source]
            used.add(part.source)
            dtypes.add(found.dtype)
            fault = _misfit(part, found, family.resizable_vocab)
            if fault:
                faults.append((fault, part.source, found.shape))
            elif found.shape != part.source_shape:
                resized[name] = (found.shape[0], part.total)
        if not parts:
            faults.append(("the tables do not cover", name, shape))
        targets.append(ParamTarget(name, shape, np.dtype(dtype) if dtype else _common(dtypes), tuple(parts)))

    ignore = [re.compile(re.escape(s.source) + f"(?:{text})") for s in sections for text in s.table.ignore]
    spare = [name for name in source.entries if name not in used]
    ignored = [name for name in spare if name in tied_copies or any(p.fullmatch(name) for p in ignore)]
    faults += [("unexpected", name, source.entries[name].shape) for name in spare if name not in set(ignored)]
    if faults:
        raise UserError(_report(family, source, faults) + _untied(faults, tied_copies, source))
    pairs = {name: tied_copies[name] for name in ignored if name in tied_copies}
    return ConversionPlan(family, cfg, layout, tuple(targets), resized, tuple(ignored), pairs)


def choose_layout(family: CheckpointFamily, entries: Iterable[str]) -> str:
    """The layout of a family that recognises most of a file's names; the first one when in doubt."""
    names = {unnumbered(name) for name in entries}
    counts = {layout: len(names & known) for layout, known in family.names.items()}
    return max(counts, key=lambda layout: counts[layout])


def detect_family(entries: Iterable[str]) -> str | None:
    """The family whose names a file's names look most like, or None."""
    names = collections.Counter(unnumbered(name) for name in entries)

    def likeness(known: frozenset[str]) -> float:
        common = names.keys() & known
        return sum(names[name] for name in common) / max(names.total(), 1) * len(common) / len(known)

    scores = {family.name: max(map(likeness, family.names.values())) for family in FAMILIES.values()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] > 0.2 else None


def same_family(detected: str, requested: str) -> bool:
    """Whether names that look like one family may be another's: X-SAM's are a subset of FlowSeg's."""
    return detected == requested or {detected, requested} <= {"xsam", "flowseg"}


def _misfit(part: ParamSlice, found: TensorInfo, resizable: bool) -> str | None:
    if not jnp.issubdtype(found.dtype, jnp.floating):
        return f"not a floating-point tensor but {found.dtype}:"
    want = part.source_shape
    if found.shape == want:
        return None
    free = resizable and part.op.resizable and len(found.shape) == len(want) and found.shape[0] > 0
    return None if free and found.shape[1:] == want[1:] else f"expected {want} for"


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that layers are stacked in: their own, or the wider one where they differ."""
    dtypes = list(dtypes) or [np.dtype(np.float32)]
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = jnp.promote_types(common, dtype)
    return np.dtype(np.float32) if common == np.float64 else np.dtype(common)


def _under_the_name_that_exists(
    slices: Iterable[ParamSlice], tied_copies: dict[str, str], source: TensorSource
) -> list[ParamSlice]:
    """The slices, those of a tied embedding table under the head's name where the file has only that."""
    slices = list(slices)
    wanted = {part.source for part in slices}
    alone = {b: a for a, b in tied_copies.items() if a in source.entries and b not in source.entries and a not in wanted}
    return [dataclasses.replace(part, source=alone.get(part.source, part.source)) for part in slices]


def check_tied_copies(plan: ConversionPlan, source: TensorSource, words: int | None = None) -> None:
    """Compares a tied head that the file lists as well with the embedding table.

    They are the same up to padding rows, and up to rounding where one is stored in a smaller dtype.

    Args:
        words: rows that are in use; None: all that both have.

    Raises:
        UserError: another matrix.
    """
    for name, other in plan.tied_copies.items():
        a, b = source.entries[name], source.entries[other]
        rows = min(a.shape[0], b.shape[0], *(() if words is None else (words,)))
        alike = a.shape[1:] == b.shape[1:] and jnp.issubdtype(a.dtype, jnp.floating)
        different = _different_rows(source, name, other, rows) if alike else rows
        if different:
            raise UserError(
                f"{source.name}: {name} {a.shape} differs from {other} {b.shape} in {different:,} of {rows:,} rows, and the "
                f"config ties them. If {name} is an outdated copy, leave it out of the file; only if it was trained by itself, "
                "set tie_word_embeddings to false in config.json"
            )


def _different_rows(source: TensorSource, name: str, other: str, rows: int) -> int:
    """How many of the first `rows` rows differ by more than rounding."""
    dtypes = [source.entries[n].dtype for n in (name, other)]
    small = max((jnp.finfo(dtype) for dtype in dtypes), key=lambda info: info.eps)
    count = 0
    for start in range(0, rows, COMPARED_ROWS):
        a, b = (source.read(n, start, min(start + COMPARED_ROWS, rows)).astype(np.float64) for n in (name, other))
        allowed = 0.0
        if dtypes[0] != dtypes[1]:
            allowed = float(small.eps) * np.maximum(abs(a), abs(b)) + float(small.smallest_subnormal)
        count += int((~(abs(a - b) <= allowed)).any(tuple(range(1, a.ndim))).sum())
    return count


def _untied(faults: list[tuple[str, str, Shape]], tied_copies: dict[str, str], source: TensorSource) -> str:
    """A hint where a head is missing that may be tied."""
    heads = [name for kind, name, _ in faults if kind == "missing" and tied_copies.get(name) in source.entries]
    return (
        f"; if {heads[0]} is tied to {tied_copies[heads[0]]}, set tie_word_embeddings to true in config.json" if heads else ""
    )


def _report(family: CheckpointFamily, source: TensorSource, faults: list[tuple[str, str, Shape]]) -> str:
    looks = detect_family(source.entries)
    if looks is not None and not same_family(looks, family.name):
        return (
            f"{source.name} looks like a checkpoint of the family {looks}, not {family.name}: use flowseg convert {looks} ..."
        )
    groups = collapse_layer_names(faults)
    shown = "; ".join(f"{kind} {plain(name)} {plain(str(shape))}" for kind, name, shape in groups[:SHOWN])
    if len(groups) > SHOWN:
        shown += f"; and {len(groups) - SHOWN} more such lines, {len(faults)} tensors in all"
    if refusals.placeholders(entry.shape for entry in source.entries.values()):
        shown += (
            "; most of its tensors are empty: DeepSpeed's ZeRO-3 saves such placeholders, python zero_to_fp32.py in the run's "
            "directory gathers the weights"
        )
    return f"{source.name} does not fit {family.name}: {shown}"


def collapse_layer_names(faults: Iterable[tuple[str, str, Shape]]) -> list[tuple[str, str, Shape]]:
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

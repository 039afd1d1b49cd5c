"""What a table is made of: rows that pair a PyTorch name with our parameter path, and their expansion for one config.

A row reads `source pattern -> target path(s), operation`. `{layer}`, `{level}` and the like are indices; a table's `axes`
says which values they take for a config. With `{layer}` in the source the target is a stack: the layers stand on its leading
axis, in order. With several targets the source is fused: its rows are theirs, one after the other. Import and export read the
same rows, in opposite directions.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from convert_weights.ops import OPS, Op, Shape

Index = Mapping[str, Any]  # one value of an axis: the fields that patterns may use
FIELD = re.compile(r"\{(\w+)\}")
STACKED = "layer"  # the axis that is stacked; others are part of the target's path


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One line of a table.

    Attributes:
        source: pattern of the PyTorch name.
        targets: our path, or several with spaces between them for a fused tensor; without the component's prefix.
        op: name in `ops.OPS`.
    """

    source: str
    targets: str
    op: str = "identity"


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of one component.

    Attributes:
        rows: see `TableRow`. A row whose target the config does not have (an untied head, say) is skipped.
        axes: config -> {axis: its values}; a row's axis is the first index in its source pattern.
        ignore: patterns (whole name) of tensors that are known and not used.
        tied_copies: {name: other name}: a copy that some files carry; it must equal the other tensor, and is not used.
    """

    rows: tuple[TableRow, ...]
    axes: Callable[[Any], Mapping[str, Iterable[Index]]] = lambda cfg: {}
    ignore: tuple[str, ...] = ()
    tied_copies: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TableSection:
    """A table inside a model: what stands before its names on both sides, and which part of the config it belongs to."""

    table: Table
    source: str = ""
    target: str = ""
    config: Callable[[Any], Any] = lambda cfg: cfg


@dataclasses.dataclass(frozen=True)
class ParamSlice:
    """The part of a parameter that comes from one tensor, or from some rows of a fused one.

    Attributes:
        target: our path. layer: index on the leading axis of a stack, None where there is no stack.
        shape: of the slice on our side.
        source: the tensor's name. start, rows: which of its rows; the tensor has `total` of them.
        op, cfg: the operation and the config it asks.
    """

    target: str
    layer: int | None
    shape: Shape
    source: str
    start: int
    total: int
    op: Op
    cfg: Any

    @property
    def torch_shape(self) -> Shape:
        """The shape of the tensor's rows that belong to this slice, in PyTorch's layout."""
        return self.op.source_shape(self.shape)

    @property
    def source_shape(self) -> Shape:
        """The shape of the whole tensor."""
        return (self.total, *self.torch_shape[1:])


def norm(source: str, target: str, *, bias: bool = True) -> tuple[TableRow, ...]:
    """The rows of a norm: weight -> scale, bias -> bias."""
    rows = (TableRow(f"{source}.weight", f"{target}/scale"),)
    return (*rows, TableRow(f"{source}.bias", f"{target}/bias")) if bias else rows


def linear(source: str, targets: str, *, bias: bool = True, op: str = "linear", suffix: str = ".") -> tuple[TableRow, ...]:
    """The rows of a Linear or Conv2d. `targets`: one module path, or those whose rows are fused in `source`."""
    kernels, biases = (" ".join(f"{target}/{leaf}" for target in targets.split()) for leaf in ("kernel", "bias"))
    rows = (TableRow(f"{source}{suffix}weight", kernels, op),)
    return (*rows, TableRow(f"{source}{suffix}bias", biases)) if bias else rows


def conv(source: str, target: str, *, bias: bool = True) -> tuple[TableRow, ...]:
    return linear(source, target, bias=bias, op="conv")


def numbered(axis: str, count: int) -> list[Index]:
    """The values of an axis that is nothing but a number."""
    return [{axis: i} for i in range(count)]


def unnumbered(name: str) -> str:
    """A name, or a pattern of names, without its numbers: what two layers have in common."""
    return re.sub(r"\d+|\{\w+\}", "#", name)


def expand(sections: Iterable[TableSection], cfg: Any, shapes: Mapping[str, Shape]) -> Iterator[ParamSlice]:
    """All slices of the model that `cfg` describes.

    Args:
        shapes: {our path: shape} of its parameters; rows whose targets are not among them are skipped.

    Raises:
        KeyError: a fused row of which only some targets exist, or an index that the table's axes do not have.
    """
    for section in sections:
        part = section.config(cfg)
        axes = section.table.axes(part)
        for row in section.table.rows:
            fields = FIELD.findall(row.source)
            values = axes[fields[0]] if fields else ({},)
            counts: dict[str, Iterator[int]] = {}
            for index in values:
                targets = [section.target + target.format(**index) for target in row.targets.split()]
                if targets[0] not in shapes:
                    continue
                yield from _slices(row, section.source + row.source.format(**index), targets, counts, part, shapes)


def _slices(
    row: TableRow, source: str, targets: list[str], counts: dict[str, Iterator[int]], cfg: Any, shapes: Mapping[str, Shape]
) -> Iterator[ParamSlice]:
    op, stacked = OPS[row.op], STACKED in FIELD.findall(row.source)
    inner = [shapes[target][1:] if stacked else shapes[target] for target in targets]
    rows = [op.source_shape(shape)[0] for shape in inner]
    for target, shape, start in zip(targets, inner, itertools.accumulate([0, *rows[:-1]]), strict=True):
        layer = next(counts.setdefault(target, itertools.count())) if stacked else None
        yield ParamSlice(target, layer, shape, source, start, sum(rows), op, cfg)

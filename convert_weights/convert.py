"""Runs the tables: tensors in, our parameters out, and the other way round, one array at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert_weights.families import FAMILIES, CheckpointFamily
from convert_weights.plan import ConversionPlan, ParamTarget, check_tied_copies, make_plan
from convert_weights.sources import ArraySource, RenamedSource, TensorInfo, TensorSource
from convert_weights.table import ParamSlice, expand
from flowseg_jax.checkpoints.manifest import check_manifest, flatten_params, unflatten_params
from flowseg_jax.errors import UserError, did_you_mean

CHUNK = 1 << 22  # values of a vocabulary that are read, or averaged, at a time


def get_family(name: str) -> CheckpointFamily:
    """The family of that name. Raises a UserError that lists the known ones."""
    if name not in FAMILIES:
        raise UserError(f"unknown family {name!r}{did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]


def import_params(
    family_name: str, tensors: Mapping[str, np.ndarray] | TensorSource, cfg: Any, *, dtype: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """PyTorch's tensors as our parameters.

    Args:
        family_name: a key of `families.FAMILIES`.
        tensors: arrays by name, or a source of them.
        cfg: `FlowSegConfig` for xsam and flowseg, the component's config for a component.
        dtype: what all parameters become; None keeps each one's own.
        seed: of the parameters that the checkpoint may lack (`CheckpointFamily.newly_initialized`).

    Returns:
        A nested dict of NumPy arrays with the names and shapes of the model that `cfg` describes.

    Raises:
        UserError: one that lists every missing, unexpected and wrongly shaped tensor.
    """
    source = tensors if not isinstance(tensors, Mapping) else ArraySource(tensors)
    plan = make_plan(get_family(family_name), cfg, source, dtype)
    check_tied_copies(plan, source)
    initial = fresh_params(plan, seed)
    return unflatten_params({target.name: build(target, source, initial) for target in plan.targets})


def export_params(family_name: str, params: Mapping[str, Any], cfg: Any, *, layout: str | None = None) -> dict[str, np.ndarray]:
    """Our parameters as PyTorch's tensors: the inverse of `import_params`, bit for bit.

    Args:
        params: nested dict of arrays.
        layout: naming, a key of the family's `layouts`; None for the first.

    Raises:
        UserError: parameters that are not those of `cfg`.
    """
    family = get_family(family_name)
    flat = {name: np.asarray(x) for name, x in flatten_params(params).items()}
    view = TorchView(family, cfg, ArraySource(flat, "the parameters"), layout)
    return {name: view.read(name) for name in view.entries}


def fresh_params(plan: ConversionPlan, seed: int) -> dict[str, np.ndarray]:
    """The parameters that the source may lack and does lack, as a new model has them."""
    return {name: np.asarray(x) for name, x in plan.family.initial(plan.cfg, plan.fresh, seed).items()}


def build(target: ParamTarget, source: TensorSource, initial: Mapping[str, np.ndarray]) -> np.ndarray:
    """One parameter. Besides it, no more than one tensor (of one layer) is in memory."""
    if not target.slices:
        return initial[target.name].astype(target.dtype)
    out = np.empty(target.shape, target.dtype)
    for part in target.slices:
        _fill(out if part.layer is None else out[part.layer], part, source)
    return out


def _fill(out: np.ndarray, part: ParamSlice, source: TensorSource) -> None:
    found = source.entries[part.source].shape
    if not part.op.row_preserving or not found:
        out[...] = part.op.to_jax(source.read(part.source, part.start, part.start + part.torch_shape[0]), part.cfg)
        return
    # X-SAM sizes the table by the tokenizer: padded rows go, or new tokens start from the mean of the known ones.
    kept = min(len(out), found[0])
    step = max(1, CHUNK // max(math.prod(found[1:]), 1))
    for start in range(0, kept, step):  # a vocabulary is as large as a parameter gets, and not held twice
        stop = min(start + step, kept)
        out[start:stop] = source.read(part.source, part.start + start, part.start + stop)
    if kept < len(out):
        out[kept:] = _mean_row(out[:kept]).astype(out.dtype)


def _mean_row(table: np.ndarray) -> np.ndarray:
    total = np.zeros(table.shape[1], np.float64)
    step = max(1, CHUNK // table.shape[1])
    for start in range(0, len(table), step):
        total += table[start : start + step].astype(np.float64).sum(0)
    return total / len(table)


class TorchView:
    """Our parameters as a source of PyTorch's tensors, each made when it is read (most quickly `in_order`).

    Args:
        params: a source of our parameters under their flat names ("llm/embed_tokens").
        layout: naming, a key of the family's `layouts`; None for the first.

    Raises:
        UserError: parameters that are not those of `cfg`; an unknown layout.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, family: CheckpointFamily, cfg: Any, params: TensorSource, layout: str | None = None):
        layout = layout or next(iter(family.layouts))
        if layout not in family.layouts:
            raise UserError(f"{family.name} has no layout {layout!r}{did_you_mean(layout, family.layouts)}")
        shapes = family.shapes(cfg)
        known = {name: [list(shape), "float32"] for name, shape in shapes.items()}
        check_manifest(known, {name: [list(e.shape), str(e.dtype)] for name, e in params.entries.items()}, params.name)
        self.name, self._params = params.name, params
        self._slices: dict[str, list[ParamSlice]] = {}
        for part in expand(family.layouts[layout](cfg), cfg, shapes):
            self._slices.setdefault(part.source, []).append(part)
        self.entries = {name: self._entry(slices) for name, slices in self._slices.items()}
        self._held: dict[str, np.ndarray] = {}

    def _entry(self, slices: list[ParamSlice]) -> TensorInfo:
        dtypes = [self._params.entries[part.target].dtype for part in slices]
        return TensorInfo(slices[0].source_shape, functools.reduce(jnp.promote_types, dtypes))

    def in_order(self) -> Iterator[str]:
        """Names, those that come from the same stacks one after the other."""
        return iter(sorted(self.entries, key=lambda name: [part.target for part in self._slices[name]]))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        slices = self._slices[name]
        # The next tensor mostly comes from the same stacks: they are kept until one comes from others.
        wanted = dict.fromkeys(part.target for part in slices)
        self._held = {target: x for target, x in self._held.items() if target in wanted}
        for target in wanted:
            if target not in self._held:
                self._held[target] = self._params.read(target)
        parts = []
        for part in slices:
            ours = self._held[part.target]
            parts.append(part.op.to_torch(ours if part.layer is None else ours[part.layer], part.cfg))
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.ascontiguousarray(whole[start:stop])


def in_layout(family: CheckpointFamily, cfg: Any, source: TensorSource, layout: str) -> TensorSource:
    """A source under the names of another layout of its family, which must not differ in operations.

    Raises:
        UserError: what `make_plan` raises.
    """
    plan = make_plan(family, cfg, source)  # nothing that is unknown may be left out below
    found = plan.layout
    if found == layout:
        return source
    shapes = family.shapes(cfg)
    theirs, wanted = (
        {(p.target, p.layer, p.start): p for p in expand(family.layouts[name](cfg), cfg, shapes)} for name in (found, layout)
    )
    if any(wanted[place].op is not part.op for place, part in theirs.items()):
        raise ValueError(f"{family.name}: the layouts {found} and {layout} differ in more than names")
    pairs = {wanted[place].source: part.source for place, part in theirs.items()}
    return RenamedSource(source, {new: old for new, old in pairs.items() if old in source.entries})


def cast(x: np.ndarray, dtype: str | None) -> np.ndarray:
    """A floating-point array in another dtype; None keeps it."""
    floating = np.issubdtype(x.dtype, np.floating) or x.dtype == ml_dtypes.bfloat16
    return x.astype(dtype) if dtype and floating else x

"""The named operations of the tables: what turns a PyTorch tensor into one of our parameters, and back, bit for bit.

An operation acts on one tensor, or on the rows of a fused tensor that belong to one parameter. All of them move values and
change none, so every inverse is exact. Stacking layers and splitting fused rows are not operations but properties of a row
(see `table.Row`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """An invertible operation.

    Attributes:
        source_shape: the PyTorch shape that belongs to a parameter's shape.
        to_jax, to_torch: (array, the component's config) -> a view or a copy in the other layout.
        row_preserving: nothing moves: a run of the tensor's rows is a run of ours.
        resizable: the first axis counts tokens, and a table of another length can be cut or grown to fit.
    """

    source_shape: Callable[[Shape], Shape]
    to_jax: Callable[[np.ndarray, Any], np.ndarray]
    to_torch: Callable[[np.ndarray, Any], np.ndarray]
    row_preserving: bool = False
    resizable: bool = False


def _identity(x: np.ndarray, cfg: Any) -> np.ndarray:
    return x


def _transpose(x: np.ndarray, cfg: Any) -> np.ndarray:
    return x.T


def _regroup(x: np.ndarray, width: int, groups: int) -> np.ndarray:
    """Transposes each head's rows as a [groups, width / groups] table of rows."""
    rows, inputs = x.shape
    return x.reshape(rows // width, groups, width // groups, inputs).swapaxes(1, 2).reshape(rows, inputs)


def _interleaved_to_jax(x: np.ndarray, cfg: Any) -> np.ndarray:
    return _regroup(x, cfg.head_dim, cfg.head_dim // 2).T


def _jax_to_interleaved(x: np.ndarray, cfg: Any) -> np.ndarray:
    return _regroup(x.T, cfg.head_dim, 2)


OPS: dict[str, Op] = {
    "identity": Op(lambda s: s, _identity, _identity, row_preserving=True),
    # torch.nn.Linear keeps [out, in], ours [in, out]
    "linear": Op(lambda s: (s[1], s[0]), _transpose, _transpose),
    # torch.nn.Conv2d keeps OIHW, ours HWIO
    "conv": Op(
        lambda s: (s[3], s[2], s[0], s[1]),
        lambda x, cfg: x.transpose(2, 3, 1, 0),
        lambda x, cfg: x.transpose(3, 2, 0, 1),
    ),
    # a leading batch axis of one, as on SAM's position table
    "unbatch": Op(lambda s: (1, *s), lambda x, cfg: x[0], lambda x, cfg: x[None]),
    # rows are tokens
    "vocabulary": Op(lambda s: s, _identity, _identity, row_preserving=True, resizable=True),
    # llama.cpp stores the two rotary halves of a head's rows interleaved; otherwise as "linear"
    "rotary": Op(lambda s: (s[1], s[0]), _interleaved_to_jax, _jax_to_interleaved),
}

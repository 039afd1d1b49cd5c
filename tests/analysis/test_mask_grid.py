"""Perfect masks on a grid: what is left of them is recomputed by hand, and finer grids leave more."""

from __future__ import annotations

import types

import numpy as np
import pytest

from flowseg_jax.analysis import mask_grid
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import postprocess
from tests.analysis.test_layer_trace import data, model  # noqa: F401


def source(batches):
    evaluation = types.SimpleNamespace(open=lambda split, images: batches)
    return types.SimpleNamespace(evaluation=evaluation, split="val", images=2)


def test_a_grid_as_fine_as_the_image_loses_nothing(rng):
    truth = rng.random((8, 6)) > 0.5
    where = postprocess.geometry(np.array([[8, 6]]), [(8, 6)], grid=(8, 8), padded_size=8, bucket=(16, 8))
    np.testing.assert_array_equal(mask_grid.on_grid(truth, where, 0), truth)


def test_half_a_cell_is_lost_by_hand():
    """Cells of 4 x 4 pixels; the truth ends within one of them, a quarter of the way."""
    truth = np.zeros((16, 16), bool)
    truth[:, :9] = True
    where = postprocess.geometry(np.array([[16, 16]]), [(16, 16)], grid=(4, 4), padded_size=16, bucket=(16, 16))
    # Columns of cells are covered by 1, 1, 0.25 and 0; between the middles of the second and the third, at 5.5 and 9.5, the
    # share falls from 1 to 0.25 and is one half at 5.5 + 4 x 0.5 / 0.75 = 8.17: columns 0 to 8.
    found = mask_grid.on_grid(truth, where, 0)
    np.testing.assert_array_equal(found, truth)
    truth[:, 9:11] = True  # covered by 1, 1, 0.75 and 0: one half at 9.5 + 4 x 0.25 / 0.75 = 10.83: columns 0 to 10
    np.testing.assert_array_equal(mask_grid.on_grid(truth, where, 0), truth)
    dot = np.zeros((16, 16), bool)
    dot[5:7, 5:7] = True  # a quarter of its cell: never one half
    assert not mask_grid.on_grid(dot, where, 0).any()


def test_what_is_counted(data):  # noqa: F811
    found = mask_grid.measure(source(data), [4, 64])
    (batch,) = data
    truths = [(mask, ~batch.ignored[b][0]) for b in range(2) for mask in batch.rounds[0].truth[b]]
    for side, masks in found.items():
        assert len(masks) == 4 and all(0 < m.intersection <= m.union for m in masks), side
    for (truth, counted), mask in zip(truths, found[64], strict=True):
        assert mask.intersection <= (truth & counted).sum() <= mask.union
    coarse, fine = (mask_grid.summarise(found[side]) for side in (4, 64))
    assert coarse["giou"] < fine["giou"] and coarse["n"] == fine["n"] == 4
    ious = [m.intersection / m.union for m in found[4]]
    assert coarse["giou"] == pytest.approx(100 * np.mean(ious))
    assert coarse["p_at"]["0.7"] == pytest.approx(100 * np.mean(np.array(ious) >= 0.7))
    both, either = (sum(getattr(m, name) for m in found[4]) for name in ("intersection", "union"))
    assert coarse["ciou"] == pytest.approx(100 * both / either)
    with pytest.raises(UserError, match="no expression to measure"):
        mask_grid.measure(source([]), [4])

"""Boundary IoU, and what is said of masks before and after BAR."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from flowseg_jax.analysis import boundary
from flowseg_jax.analysis.runner import SampleResult
from flowseg_jax.data.records import Sample


def inner(mask, distance):
    """The pixels more than `distance` steps from anything outside: SciPy's distance, the image surrounded by outside."""
    return ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1] > distance


@pytest.mark.parametrize("distance", [1, 2, 7, 40])
def test_boundaries_are_those_of_a_distance_transform(distance, rng):
    for size in ((30, 50), (1, 9), (64, 64)):
        mask = ndimage.gaussian_filter(rng.normal(size=size), 2) > -0.02
        for each in (mask, ~mask, np.ones(size, bool), np.zeros(size, bool)):
            np.testing.assert_array_equal(boundary.boundary(each, distance), each & ~inner(each, distance))


def test_boundary_iou_by_hand():
    """100 x 100: d is 3. Two squares of 40 whose boundaries are rings 3 wide, one shifted by 2."""
    ours, theirs = np.zeros((2, 100, 100), bool)
    ours[20:60, 20:60], theirs[20:60, 22:62] = True, True
    rings = []
    for left in (20, 22):
        ring = np.zeros((100, 100), bool)
        ring[20:60, left : left + 40] = True
        ring[23:57, left + 3 : left + 37] = False
        rings.append(ring)
    assert rings[0].sum() == 40**2 - 34**2
    expected = (rings[0] & rings[1]).sum() / (rings[0] | rings[1]).sum()
    assert boundary.boundary_iou(ours, theirs) == pytest.approx(expected)
    assert boundary.boundary_iou(ours, ours) == 1.0 and boundary.boundary_iou(ours, ~ours) < 0.1
    assert boundary.boundary_iou(np.zeros((9, 9), bool), np.zeros((9, 9), bool)) == 1.0
    ignored = np.zeros((100, 100), bool)
    ignored[:, 30:] = True
    left = ~ignored
    expected = (rings[0] & rings[1] & left).sum() / ((rings[0] | rings[1]) & left).sum()
    assert boundary.boundary_iou(ours, theirs, ignored) == pytest.approx(expected)


def measured(before, after):
    truth = np.zeros((20, 20), bool)
    truth[5:15, 5:15] = True
    masks = np.array([before, after])
    iou = np.array([(m & truth).sum() / (m | truth).sum() for m in masks])
    sample = Sample(1, "1.png", 1, 1, 1, "it", "", (0,), 1, "it")
    values = {"band": np.float32(masks[0].mean() / 2), "mask": np.float32(masks[0].mean())}
    return boundary.with_boundary(
        SampleResult(sample, values, iou, masks, truth, np.zeros_like(truth), np.zeros((20, 20, 3), np.uint8))
    )


def test_helped_and_harmed():
    exact, wide, narrow = (np.zeros((20, 20), bool) for _ in range(3))
    exact[5:15, 5:15], wide[4:16, 5:15], narrow[7:13, 5:15] = True, True, True
    rows = [measured(wide, exact), measured(exact, exact), measured(exact, narrow), measured(narrow, wide)]
    assert [boundary.gain(row) for row in rows] == pytest.approx([100 / 6, 0, -40, 100 * (100 / 120 - 0.6)])
    found = boundary.summarise([row.figures() for row in rows])
    assert (found["n"], found["helped"], found["harmed"]) == (4, 50, 25)
    ious = np.array([[100 / 120, 1], [1, 1], [1, 0.6], [0.6, 100 / 120]])
    assert found["iou"] == pytest.approx((100 * ious.mean(0)).tolist())
    areas = [120, 100, 100, 60]  # of the masks before BAR; every band is half as large
    assert (found["band_of_image"], found["band_of_mask"]) == pytest.approx((100 * np.mean(areas) / 2 / 400, 50))
    assert found["boundary_iou"][0] == pytest.approx(100 * np.mean([boundary.boundary_iou(r.masks[0], r.truth) for r in rows]))

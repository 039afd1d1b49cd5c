"""Objects of many parts: their union and the pixels that one part covers, against sums of drawn parts."""

import numpy as np
import pytest
from pycocotools import mask as coco

from flowseg_jax.data import masks
from tests.helpers.minirefcoco import box_mask, uncompressed

HEIGHT, WIDTH = 50, 60


def boxes(count: int, seed: int) -> list[tuple[int, int, int, int]]:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, WIDTH - 8, count), rng.integers(0, HEIGHT - 8, count)
    w, h = rng.integers(1, 8, (2, count))
    return [tuple(map(int, corners)) for corners in zip(x, y, x + w, y + h, strict=True)]


def as_polygons(drawn):
    return [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in drawn]


def as_run_lengths(drawn):
    return [uncompressed(box_mask(HEIGHT, WIDTH, *corners)) for corners in drawn]


@pytest.mark.parametrize("make", [as_polygons, as_run_lengths])
@pytest.mark.parametrize("count", [1, 2, 3, 255, 256, 257, 700])
def test_union_and_what_one_part_covers(make, count):
    segmentation = make(boxes(count, seed=count))
    parts = sum(
        coco.decode(code if isinstance(code, dict) else coco.frPyObjects([code], HEIGHT, WIDTH)[0]).astype(np.int32)
        for code in (coco.frPyObjects(p, HEIGHT, WIDTH) if isinstance(p, dict) else p for p in segmentation)
    )
    union = masks.decode([masks.rasterise(segmentation, HEIGHT, WIDTH, "x")], HEIGHT, WIDTH)[0]
    np.testing.assert_array_equal(union, parts > 0)
    once = masks.single_cover(segmentation, HEIGHT, WIDTH, "x")
    assert bool(once) == (parts > 1).any()
    if once:
        np.testing.assert_array_equal(masks.decode([once], HEIGHT, WIDTH)[0], parts == 1)


def test_many_parts_that_do_not_touch_need_no_second_mask():
    apart = [(x, y, x + 1, y + 1) for x in range(0, WIDTH, 2) for y in range(0, HEIGHT, 4)]
    assert len(apart) > 256 and masks.single_cover(as_run_lengths(apart), HEIGHT, WIDTH, "x") == ""
    all_of_it = [*as_run_lengths(apart), *as_run_lengths(apart)]  # no pixel is covered by one part alone
    once = masks.single_cover(all_of_it, HEIGHT, WIDTH, "x")
    assert once and not masks.decode([once], HEIGHT, WIDTH).any()

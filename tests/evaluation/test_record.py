"""A record is made of the numbers of its own raster and its own mask: every number that could be confused differs here."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flowseg_jax.data.records import Sample
from flowseg_jax.evaluation import protocols
from flowseg_jax.evaluation.tasks.referring import ReferringTask

SAMPLE = Sample(3, "three.jpg", 31, 5, 71, "a red dog", "attribute", (0,), 2, "a red dog")
COUNTED = {  # [selected mask, best candidate]
    "intersection": [30, 40],
    "union": [70, 60],
    "single_cover_intersection": [20, 25],
    "single_cover_union": [80, 50],
    "area": [35, 44],
    "finite": [True, True],
}


def record(protocol=protocols.XSAM, **changed):
    counted = {key: np.array(value) for key, value in (COUNTED | changed).items()}
    return ReferringTask(None, protocol, no_target_threshold=0.125).record(
        SAMPLE,
        (10, 12),
        np.array([2, 4]),
        np.array([0.75, 0.5]),
        np.array([0, 1]),
        counted,
    )


def test_every_number_is_of_its_raster_and_its_mask():
    made = record()
    assert made == {
        "image_id": 3,
        "file_name": "three.jpg",
        "ann_id": 31,
        "ref_id": 5,
        "sentence_id": 71,
        "sentence": "a red dog",
        "text": "a red dog",
        "text_form": "lower",
        "family": "attribute",
        "count": 2,
        "height": 10,
        "width": 12,
        "intersection": 30,
        "union": 70,
        "single_cover_intersection": 20,
        "single_cover_union": 80,
        "query": 2,
        "score": 0.75,
        "best_query": 4,
        "best_score": 0.5,
        "best_rank": 1,
        "best_intersection": 40,
        "best_union": 60,
        "oracle_intersection": 40,
        "oracle_union": 60,
        "oracle_single_cover_intersection": 25,
        "oracle_single_cover_union": 50,
        "area": 35,
        "truth_area": 65,  # 30 + 70 - 35
        "no_target_threshold": 0.125,
        "failed": False,
        "failure": "",
        "iou": 30 / 70,
        "best_iou": 40 / 60,
        "oracle_iou": 40 / 60,
    }
    json.dumps(made)


def test_the_oracle_keeps_a_selection_that_is_better_raster_by_raster():
    """By the union the selected mask is the better one, by the sum the other candidate."""
    made = record(intersection=[50, 40], union=[60, 70])
    assert (made["oracle_intersection"], made["oracle_union"]) == (50, 60)
    assert (made["oracle_single_cover_intersection"], made["oracle_single_cover_union"]) == (25, 50)
    assert (made["best_intersection"], made["best_union"]) == (40, 70)


@pytest.mark.parametrize(("protocol", "iou", "oracle"), [("xsam", 30 / 70, 40 / 60), ("psalm", 30 / 70, 40 / 60)])
def test_iou_is_by_the_protocols_raster(protocol, iou, oracle):
    made = record(protocols.get_protocol(protocol))
    assert (made["iou"], made["oracle_iou"]) == (iou, oracle)


def test_iou_of_the_summed_raster_is_by_that_raster():
    made = record(protocols.LISA)
    assert (made["iou"], made["best_iou"], made["oracle_iou"]) == (20 / 80, 25 / 50, 25 / 50)


def test_a_failure_says_why():
    assert record(finite=[False, True])["failure"] == "non-finite"
    assert record(finite=[False, True])["iou"] == 0.0

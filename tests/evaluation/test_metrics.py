"""Metrics against hand-computed cases and against pycocotools plus plain NumPy on random masks."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pycocotools import mask as coco

from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, protocols


def record(selected, candidate=None, family="", failed=False):
    oracle = metrics.best_of(selected, candidate or selected)
    return {
        "intersection": selected[0],
        "union": selected[1],
        "oracle_intersection": oracle[0],
        "oracle_union": oracle[1],
        "family": family,
        "failed": failed,
        "failure": "non-finite" if failed else "",
    }


def test_hand_computed_table():
    rows = [
        record((50, 100), (90, 100), "attribute"),  # 0.5; oracle 0.9
        record((0, 400), (100, 300), "relation"),  # 0; oracle 1/3
        record((9, 10), (1, 10), "relation"),  # 0.9; the candidate is worse, the oracle keeps the selected mask
        record((0, 0)),  # nothing to find, nothing found: 1
    ]
    table = metrics.summarise(rows)
    assert table["protocol"] == "xsam" and table["n"] == 4 and table["failed"] == 0
    assert table["ciou"] == pytest.approx(100 * 59 / 510)
    assert table["giou"] == pytest.approx(100 * (0.5 + 0 + 0.9 + 1) / 4)
    assert table["oracle_ciou"] == pytest.approx(100 * 199 / 410)
    assert table["oracle_giou"] == pytest.approx(100 * (0.9 + 1 / 3 + 0.9 + 1) / 4)
    assert table["selection_gap"] == pytest.approx(100 * (0.4 + 1 / 3) / 4)
    # IoU of exactly X counts: 0.5 at 0.5 and 0.9 at 0.9.
    assert table["p_at"] == {"0.5": 75.0, "0.6": 50.0, "0.7": 50.0, "0.8": 50.0, "0.9": 50.0}
    assert list(table["families"]) == ["attribute", "relation"]
    assert table["families"]["relation"] == {
        "n": 2,
        "ciou": pytest.approx(100 * 9 / 410),
        "giou": pytest.approx(45.0),
        "oracle_ciou": pytest.approx(100 * 109 / 310),
        "oracle_giou": pytest.approx(100 * (1 / 3 + 0.9) / 2),
        "selection_gap": pytest.approx(100 / 6),
        "p_at": {"0.5": 50.0, "0.6": 50.0, "0.7": 50.0, "0.8": 50.0, "0.9": 50.0},
    }


def test_failed_sample_counts_zero_even_where_both_are_empty():
    table = metrics.summarise([record((0, 0), failed=True), record((1, 1))])
    assert table["failed"] == 1
    assert table["giou"] == 50.0
    assert table["p_at"]["0.5"] == 50.0


def test_the_oracle_can_cost_ciou_but_never_giou():
    """The second sample's better IoU has so large a union that all pixels together get worse: 70/200 against 65/295."""
    table = metrics.summarise([record((69, 99), (69, 99)), record((1, 101), (100, 400))])
    assert table["ciou"] == pytest.approx(100 * 70 / 200) and table["oracle_ciou"] == pytest.approx(100 * 169 / 499)
    assert table["oracle_ciou"] < table["ciou"]
    assert table["selection_gap"] == pytest.approx(100 * (100 / 400 - 1 / 101) / 2)


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_no_gap_is_negative(name):
    """Of one sample, and so of all: with and without a target, failed, refused, empty."""
    rng, gaps = np.random.default_rng(0), []
    for _ in range(3000):
        nothing = bool(rng.random() < 0.3)
        truth = 0 if nothing else int(rng.integers(0, 4))
        area = int(rng.integers(0, 4))
        both, other_both, other_area = (int(rng.integers(0, n + 1)) for n in (min(truth, area), min(truth, 3), 3))
        other = (other_both, truth + max(other_area, other_both) - other_both)
        row = record((both, truth + area - both), other, failed=bool(rng.random() < 0.1))
        row |= {
            "ann_id": -1 if nothing else 7,
            "area": area,
            "score": float(rng.random()),
            "no_target_threshold": 0.3,
            "count": 2,
        }
        row |= {f"{of}single_cover_{what}": row[f"{of}{what}"] for of in ("", "oracle_") for what in ("intersection", "union")}
        protocol = protocols.get_protocol(name)
        gaps.append(metrics.oracle_iou(row, protocol) - metrics.sample_iou(row, protocol))
        if metrics.sample_weight(row, protocol):
            assert metrics.summarise([row], protocol)["selection_gap"] == pytest.approx(100 * gaps[-1])
    assert min(gaps) == 0 and max(gaps) == 1


def test_only_empty_samples_take_the_protocols_value():
    assert metrics.summarise([record((0, 0))])["ciou"] == 100.0


def test_against_pycocotools_and_numpy():
    rng = np.random.default_rng(0)
    rows, expected = [], []
    for i in range(200):
        h, w = rng.integers(1, 60, 2)
        density = (0.0, 0.02, 0.3, 1.0)[i % 4]
        truth, mask, other = (rng.random((3, h, w)) < density).astype(np.uint8)
        codes = [coco.encode(np.asfortranarray(m)) for m in (mask, other, truth)]
        ious = [float(coco.iou([code], [codes[2]], [0])[0, 0]) for code in codes[:2]]  # 0 for two empty masks
        expected.append((mask, other, truth, ious))
        pairs = [(int((m & truth).sum()), int((m | truth).sum())) for m in (mask, other)]
        for (intersection, union), code in zip(pairs, codes[:2], strict=True):
            assert intersection == coco.area(coco.merge([code, codes[2]], intersect=True))
            assert union == coco.area(coco.merge([code, codes[2]]))
        rows.append(record(*pairs))
    table = metrics.summarise(rows)
    total_i = total_u = 0
    values, oracle_i, oracle_u = [], 0, 0
    for mask, other, truth, ious in expected:
        total_i, total_u = total_i + (mask * truth).sum(), total_u + np.maximum(mask, truth).sum()
        values.append(1.0 if not (mask.any() or truth.any()) else ious[0])
        best = other if (ious[1] if (other.any() or truth.any()) else 1.0) > values[-1] else mask
        oracle_i, oracle_u = oracle_i + (best * truth).sum(), oracle_u + np.maximum(best, truth).sum()
    assert table["ciou"] == pytest.approx(100 * total_i / total_u, abs=1e-9)
    assert table["oracle_ciou"] == pytest.approx(100 * oracle_i / oracle_u, abs=1e-9)
    assert table["giou"] == pytest.approx(100 * np.mean(values), abs=1e-9)
    for x in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert table["p_at"][f"{x}"] == pytest.approx(100 * np.mean(np.array(values) >= x))


def test_order_changes_nothing():
    rng = random.Random(1)
    rows = [record((i, j + i)) for i, j in ((rng.randrange(1000), rng.randrange(1, 3000)) for _ in range(500))]
    first = metrics.summarise(rows)
    rng.shuffle(rows)
    assert metrics.summarise(rows) == first


def test_sums_beyond_int32_stay_exact():
    table = metrics.summarise([record((2**31 - 1, 2**31 - 1)), record((2**31 - 1, 2**31 - 1)), record((0, 2))])
    assert table["ciou"] == 100 * (2**32 - 2) / 2**32


@pytest.mark.parametrize("pair", [(2, 1), (-1, 3)])
def test_impossible_counts_raise(pair):
    with pytest.raises(ValueError, match="not those of two masks"):
        metrics.iou(*pair)


def test_no_samples_raise():
    with pytest.raises(ValueError, match="no samples"):
        metrics.summarise([])


def test_unknown_protocol_names_the_known():
    assert protocols.get_protocol("xsam") is protocols.XSAM
    with pytest.raises(UserError, match=r"unknown protocol 'xsan' .*'xsam'"):
        protocols.get_protocol("xsan")


def test_no_sample_at_all_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="no samples to summarise"):
        metrics.counted([], protocols.XSAM)

"""Which kind of error a sample is, what each kind costs, and where the best candidate stands."""

from __future__ import annotations

import numpy as np
import pytest

from flowseg_jax.analysis import oracle
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics
from tests.helpers.answers import record

ROWS = [
    (record(1, 0, iou=80, oracle=80), "good", 0),
    (record(1, 1, iou=79, oracle=95, rank=2), "boundary", 2),
    (record(2, 0, iou=50, oracle=50, rank=7, family="relation"), "boundary", 0),  # another candidate is no better
    (record(2, 1, iou=49, oracle=50, rank=1, family="relation"), "selection", 1),
    (record(3, 0, iou=0, oracle=90, rank=4), "selection", 4),
    (record(3, 1, iou=49, oracle=49), "generation", 0),
    (record(4, 0, iou=0, oracle=90, rank=3, failed=True), "no answer", 3),
]


@pytest.mark.parametrize(("row", "kind", "rank"), ROWS)
def test_kinds_and_ranks(row, kind, rank):
    assert (oracle.kind(row), oracle.rank(row)) == (kind, rank)


def test_what_each_kind_costs_adds_up():
    rows = [row for row, *_ in ROWS]
    found = oracle.summarise(rows)
    errors = found["errors"]
    assert [errors[k]["n"] for k in oracle.KINDS] == [1, 2, 2, 1, 1]
    assert sum(e["lost"] for e in errors.values()) == pytest.approx(100 - found["giou"])
    assert sum(e["selectable"] for e in errors.values()) == pytest.approx(found["oracle_giou"] - found["giou"])
    assert errors["selection"]["lost"] == pytest.approx((51 + 100) / 7)
    assert errors["selection"]["selectable"] == pytest.approx((1 + 90) / 7)
    assert errors["boundary"]["share"] == pytest.approx(100 * 2 / 7)
    table = metrics.summarise(rows)
    assert (found["ciou"], found["oracle_ciou"]) == (table["ciou"], table["oracle_ciou"])
    assert found["families"]["relation"]["n"] == 2
    assert found["families"]["relation"]["errors"]["selection"]["share"] == 50


def test_sizes_are_thirds_by_area():
    rows = [record(i, 0, iou=iou) | {"truth_area": area} for i, (area, iou) in enumerate(((4, 10), (4, 20), (9, 30), (30, 90)))]
    found = oracle.summarise(rows)["sizes"]
    assert {name: row["n"] for name, row in found.items()} == {"4 to 8 pixels": 2, "9 pixels and more": 2}
    found = oracle.summarise([r | {"truth_area": i} for i, r in enumerate(rows * 3)])["sizes"]
    assert {name: row["n"] for name, row in found.items()} == dict.fromkeys(
        ("below 4 pixels", "4 to 7 pixels", "8 pixels and more"), 4
    )


def test_ranks_are_counted_where_a_candidate_shows_the_object():
    found = oracle.summarise([row for row, *_ in ROWS])
    assert found["ranks"] == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1} and found["found"] == 6
    assert found["within"] == {k: pytest.approx(100 * n / 6) for k, n in zip(oracle.TOP, (2, 3, 4, 6, 6), strict=True)}
    lost = oracle.summarise([record(iou=3)])
    assert (lost["ranks"], lost["found"], lost["within"]) == ({}, 0, {})


def test_sentences_that_refer_to_nothing_are_left_out():
    nothing = record(5, 0, iou=0, oracle=100, ann_id=-1)
    rows = [row for row, *_ in ROWS]
    with_it, without = oracle.summarise([*rows, nothing]), oracle.summarise(rows)
    assert with_it.pop("no_target") == 1 and without.pop("no_target") == 0
    assert with_it == without
    with pytest.raises(UserError, match="no sample refers to an object"):
        oracle.summarise([nothing])


def test_the_order_of_the_samples_does_not_matter(rng):
    rows = [record(i, 0, iou=int(v), oracle=int(w), rank=1) for i, (v, w) in enumerate(np.sort(rng.integers(0, 100, (50, 2))))]
    first, second = oracle.summarise(rows), oracle.summarise(rows[::-1])
    for kind in oracle.KINDS:
        assert first["errors"][kind] == pytest.approx(second["errors"][kind])

"""Rescue and its reverse, and intervals that draw images."""

from __future__ import annotations

import numpy as np
import pytest

from flowseg_jax.analysis import failure_comparison
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit
from flowseg_jax.evaluation.protocols import XSAM
from tests.helpers.answers import record

BELOW, FAR, ABOVE = "A below 0.5", "A below 0.2", "A at least 0.5"


def rows(ious, families=None):
    return [record(i // 2, i % 2, iou=v, family=(families or {}).get(i, "")) for i, v in enumerate(ious)]


def test_rates_by_hand():
    """Four failures of A, of which B reaches 0.5 in two; three successes, of which B loses one."""
    a = rows([0, 10, 20, 49, 50, 80, 90], {0: "relation", 5: "relation"})
    b = rows([60, 0, 50, 49, 49, 80, 95], {0: "relation", 5: "relation"})
    found = failure_comparison.summarise(a, b[::-1], resamples=50)
    below, far, above, every = (found["all"][name] for name in (BELOW, FAR, ABOVE, "all"))
    assert (below["n"], below["images"], below["rescued"]) == (4, 2, 50)
    assert (below["first"], below["second"], below["gain"]) == pytest.approx((79 / 4, 159 / 4, 80 / 4))
    assert (far["n"], far["rescued"], far["gain"]) == (2, 50, 25)
    assert (above["n"], above["reverse"]) == (3, pytest.approx(100 / 3))
    assert every["net"] == pytest.approx(100 * (4 - 3) / 7)  # P@0.5: 3 of 7 in A, 4 of 7 in B
    relation = found["relation"]
    assert (relation[BELOW]["n"], relation[BELOW]["rescued"], relation[ABOVE]["reverse"]) == (1, 100, 0)


def test_a_part_without_samples_has_no_figures():
    found = failure_comparison.summarise(rows([90, 80]), rows([10, 80]), resamples=20)["all"]
    assert found[BELOW]["n"] == 0
    assert {found[BELOW][key] for key in ("first", "gain", "gain_interval", "rescued", "rescued_interval")} == {None}
    assert found[ABOVE]["reverse"] == 50


def test_intervals_are_those_of_the_comparison():
    """Over all samples the gain is the difference of gIoU: the same resamples, the same interval."""
    rng = np.random.default_rng(0)
    a, b = (rows(rng.integers(0, 100, 40).tolist()) for _ in range(2))
    found = failure_comparison.summarise(a, b, resamples=300)["all"]["all"]
    expected = audit.compare(a, b, XSAM, resamples=300)["giou"]
    assert found["gain"] == pytest.approx(expected.second - expected.first)
    assert found["gain_interval"] == pytest.approx([expected.low, expected.high])


def test_a_model_that_is_only_wrong_elsewhere_rescues_much_and_gains_nothing():
    rng = np.random.default_rng(1)
    a, b = (rows(np.where(rng.random(2000) < 0.7, 90, 5).tolist()) for _ in range(2))
    found = failure_comparison.summarise(a, b, resamples=200)["all"]
    assert found[BELOW]["rescued"] > 65 and found[BELOW]["rescued_interval"][0] > 60
    assert found[ABOVE]["reverse"] > 25
    low, high = found["all"]["net_interval"]
    assert low < 0 < high


def test_other_samples_are_refused():
    with pytest.raises(UserError, match="not the same samples"):
        failure_comparison.summarise(rows([1, 2]), rows([1, 2, 3]), resamples=5)

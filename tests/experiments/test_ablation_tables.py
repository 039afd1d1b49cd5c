"""The ablation's tables of runs that were made up: what can be said by hand."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from experiments import ablation_tables
from experiments.ablation_tables import MAIN, SIDE, Bootstrap, Counts, Estimate


def made(rng, images=40, seeds=4, budget=500, variants=(*MAIN, *SIDE)) -> Counts:
    """Three samples an image."""
    found = rng.integers(0, 60, (len(variants), seeds, 3 * images))
    best = np.minimum(found + rng.integers(0, 40, found.shape), 100)
    whole = np.full(found.shape, 100)
    runs = {
        (budget, variant, seed): np.stack([found[v, seed], whole[v, seed], best[v, seed], whole[v, seed]], -1)
        for v, variant in enumerate(variants)
        for seed in range(seeds)
    }
    return Counts(np.repeat(np.arange(images), 3), runs, {})


def test_an_estimate_of_seeds_and_images_by_hand():
    """Two images with a sample each. The seeds find 5 and 9 of 10 pixels, or 9 and 5; all of them with another variant."""
    seeds = [[(5, 9), (9, 10)], [(9, 9), (5, 10)], [(7, 9), (7, 10)]]
    runs = {(500, "baseline", s): np.array([[i, 10, o, 10] for i, o in run]) for s, run in enumerate(seeds)}
    runs |= {(500, "sr", s): np.array([[10, 10, 10, 10]] * 2) for s in range(3)}
    bootstrap = Bootstrap(Counts(np.arange(2), runs, {}), 500, ["baseline", "sr"], resamples=500)
    ciou, oracle, gap = bootstrap.figure("baseline").values()
    assert ciou.seeds == pytest.approx([70, 70, 70]) and (ciou.low, ciou.high) == pytest.approx((170 / 3, 250 / 3))
    assert (oracle.low, oracle.mean, oracle.high) == pytest.approx((90, 95, 100)) and gap.mean == pytest.approx(25)
    change = bootstrap.change("baseline", "sr")
    assert change["cIoU"].cell("+") == "+30.0 [+16.7, +43.3] ± 0.0" and change["cIoU"].agree == 3
    same = bootstrap.change("sr", "sr")["cIoU"]
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_few_seeds_have_no_interval(rng):
    assert Bootstrap(made(rng, seeds=2), 500, MAIN).figure("cr")["cIoU"].low is None
    assert Estimate((1.0, 3.0), None, None).cell() == "2.0 ± 1.4" and Estimate((1.0,), None, None).cell("+") == "+1.0"


def test_a_difference_between_seeds_widens_the_interval(rng):
    """Of seeds with the same answers the images alone are uncertain; shifted against each other, seeds are too."""
    counts = made(rng, images=200, seeds=6)
    alike = {run: counts.runs[run[0], run[1], 0] for run in counts.runs}
    shifted = {run: x + np.array([4, 0, 0, 0]) * run[2] * (run[1] == "sr") for run, x in alike.items()}
    widths = []
    for runs in (alike, shifted):
        change = Bootstrap(Counts(counts.images, runs, {}), 500, MAIN).change("baseline", "sr")["cIoU"]
        widths.append(change.high - change.low)
    spread = 4 * statistics.pstdev(range(6))
    assert widths[1] == pytest.approx((widths[0] ** 2 + (2 * 1.96 * spread / 6**0.5) ** 2) ** 0.5, rel=0.1)


def test_a_seed_counts_once_all_variants_have_it(rng):
    counts = made(rng)
    runs = {run: x for run, x in counts.runs.items() if run not in ((500, "cr", 3), (500, "sr_even", 0))}
    counts = Counts(counts.images, runs, {})
    assert counts.seeds(500, MAIN) == [0, 1, 2] and counts.seeds(500, [*MAIN, *SIDE]) == [1, 2]
    assert all(row.split(" | ")[2] == "3" for row in ablation_tables.variant_table(counts).splitlines()[2:])
    without = Counts(counts.images, {run: x for run, x in runs.items() if run[1] not in SIDE}, {})
    assert len(ablation_tables.side_table(without).splitlines()) == 2


def test_rescued_and_broken_by_hand():
    """The baseline fails in two of four samples. SR rescues one of them and breaks one of the others; a second seed, none."""
    answers = {"baseline": ([0, 0, 9, 9], [0, 0, 9, 9]), "sr": ([9, 0, 0, 9], [0, 0, 9, 9])}
    answers |= {variant: answers["baseline"] for variant in MAIN if variant not in answers}
    runs = {
        (500, variant, s): np.array([[i, 10, 10, 10] for i in run])
        for variant, both in answers.items()
        for s, run in enumerate(both)
    }
    lines = ablation_tables.rescue_table(Counts(np.arange(4), runs, {})).splitlines()
    assert lines[2:4] == ["| 500 | baseline, another seed | 0.0 | 0.0 |", "| 500 | +SR | 25.0 | 25.0 |"]

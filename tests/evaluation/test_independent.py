"""Truth, counts and tables of every protocol against pycocotools masks and plain NumPy on random objects.

Ours: polygons -> stored codes -> truth -> counts on the device -> records -> table. Theirs: polygons -> decoded arrays -> sums.
"""

from __future__ import annotations

import functools

import cv2
import jax
import numpy as np
import pytest
from pycocotools import mask as coco

from flowseg_jax.data import masks
from flowseg_jax.data.eval_dataset import ObjectMasks
from flowseg_jax.data.records import Annotation, Example, Expression, make_ref_samples
from flowseg_jax.evaluation import metrics, postprocess
from flowseg_jax.evaluation.protocols import PROTOCOLS
from flowseg_jax.types import PAD

CASES, BATCH, SIDE = 1000, 100, 48
NO_TARGET_THRESHOLD = 0.3


def polygon(rng, h, w):
    """A closed outline around a random centre, on broken coordinates that may leave the image."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
    radius = rng.uniform(0.1, 0.6) * max(h, w) + 1
    points = rng.uniform(0, 1, 2) * (w, h) + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    return points.ravel().tolist()


def decoded(polygons, h, w):
    """[parts, h, w] by pycocotools, one polygon at a time."""
    return np.stack([coco.decode(coco.frPyObjects([p], h, w))[..., 0] for p in polygons])


def objects_of(rng, count, h, w):
    found = []
    while len(found) < count:
        parts = [polygon(rng, h, w) for _ in range(rng.integers(1, 4))]
        if decoded(parts, h, w).any():  # an object without a pixel is refused at preparation
            found.append(parts)
    return found


def case(rng, number):
    """One sample: its objects (polygons; arrays of the parts), what to ignore, two answers, what else its record says."""
    h, w = rng.integers(1, SIDE + 1, 2)
    objects = objects_of(rng, (1, 1, 1, 2, 3, 0)[number % 6], h, w)
    ignored = rng.random((h, w)) < (0, 0, 0.1, 1.0)[rng.choice(4, p=(0.5, 0.2, 0.28, 0.02))]
    arrays = [decoded(parts, h, w) for parts in objects]
    truth = np.zeros((h, w), bool) if not objects else np.any([a.any(0) for a in arrays], 0)

    def answer():
        kind = rng.integers(5)
        return ((truth ^ (rng.random((h, w)) < 0.05)), truth, truth & False, truth | True, rng.random((h, w)) < 0.5)[kind]

    return {
        "objects": objects,
        "arrays": arrays,
        "ignored": ignored,
        "answers": (answer(), answer()),
        "finite": bool(rng.random() > 0.03),
        "score": float(rng.random()),
        "count": int(rng.integers(1, 4)),
        "family": ("", "attribute", "relation")[number % 3],
        "size": (int(h), int(w)),
    }


@pytest.fixture(scope="module")
def cases():
    rng = np.random.default_rng(0)
    return [case(rng, number) for number in range(CASES)]


@pytest.fixture(scope="module")
def records(cases):
    """By whether the truth is filled on whole points."""
    return {filled: ours(cases, filled) for filled in (False, True)}


def example(case):
    h, w = case["size"]
    annotations = []
    for i, parts in enumerate(case["objects"]):
        drawn = parts, h, w, "here"
        code = masks.rasterise(*drawn)
        annotations.append(
            Annotation(
                i, PAD, code, rle_single_cover=masks.single_cover(*drawn), rle_filled_polygons=masks.fill_polygons(*drawn)
            )
        )
    said = Expression("It", 0, 0, tuple(range(len(annotations))))
    ignored = Annotation(99, PAD, masks.encode(case["ignored"]), ignore=True)
    return Example(0, "x.jpg", h, w, b"", (*annotations, ignored), (said,))


@functools.cache
def restore():
    return jax.jit(postprocess.upsample_and_count)


def ours(cases, filled):
    """Records of all cases by our own route; every mask logit is one pixel of the image."""
    records = []
    for start in range(0, len(cases), BATCH):
        part = cases[start : start + BATCH]
        sizes = [c["size"] for c in part]
        where = postprocess.geometry(np.array(sizes, np.int32), sizes, grid=(SIDE, SIDE), padded_size=SIDE, bucket=(48, 48))
        logits = np.full((len(part), 1, 2, SIDE, SIDE), -3.0, np.float32)
        truth = {"union": [], "single_cover": [], "ignored": []}
        for b, c in enumerate(part):
            h, w = c["size"]
            for n, answer in enumerate(c["answers"]):
                logits[b, 0, n, :h, :w] = np.where(answer, 2.0, -1.0)
            if not c["finite"]:
                logits[b, 0, 0, 0, 0] = np.nan
            made = example(c)
            objects, (sample,) = ObjectMasks.of(made), make_ref_samples(made)
            truth["union"].append(objects.union(sample, filled)[None])
            truth["single_cover"].append(objects.sample_single_cover(sample)[None])
            truth["ignored"].append(objects.ignored)
        packed = {key: postprocess.pack_truth(value, len(part), 1, where.bucket) for key, value in truth.items()}
        found = jax.device_get(restore()(logits, where, postprocess.GroundTruth(**packed)))
        for b, c in enumerate(part):
            pairs = [(int(found.intersection[b, 0, n]), int(found.union[b, 0, n])) for n in (0, 1)]
            once = [(int(found.single_cover_intersection[b, 0, n]), int(found.single_cover_union[b, 0, n])) for n in (0, 1)]
            record = {key: c[key] for key in ("score", "count", "family")}
            record |= {"ann_id": 0 if c["objects"] else PAD, "area": int(found.area[b, 0, 0])}
            record |= {"failed": not found.finite[b, 0, 0], "failure": "" if found.finite[b, 0, 0] else "non-finite"}
            record |= {"text_form": "joined" if filled else "lower", "no_target_threshold": NO_TARGET_THRESHOLD}
            for name, (i, u) in (
                ("", pairs[0]),
                ("single_cover_", once[0]),
                ("oracle_", metrics.best_of(*pairs)),
                ("oracle_single_cover_", metrics.best_of(*once)),
            ):
                record |= {f"{name}intersection": i, f"{name}union": u}
            records.append(record)
    return records


def theirs(case, raster):
    """(truth, selected, candidate) as bool arrays without the ignored pixels."""
    h, w = case["size"]
    truth = np.zeros((h, w), int)
    for parts, array in zip(case["objects"], case["arrays"], strict=True):
        if raster == "fill_points":
            drawn = np.zeros((h, w), np.uint8)
            for part in parts:
                cv2.fillPoly(drawn, [np.array(part, dtype=np.int32).reshape(-1, 2)], 1)
        elif raster == "sum":
            drawn = array.sum(0) == 1
        else:
            drawn = array.max(0)
        truth += drawn.astype(int)
    truth = truth == 1 if raster == "sum" else truth > 0
    selected = case["answers"][0] if case["finite"] else np.zeros((h, w), bool)
    return tuple(m & ~case["ignored"] for m in (truth, selected, case["answers"][1]))


def expected(cases, name):
    """The protocol's table, written down once more: lists a sample, repeated where the protocol counts sentences."""
    raster = {"lisa": "sum", "psalm": "fill_points"}.get(name, "union")
    i, u, iou, nothing, abstains, failed, best_i, best_u, best_iou = ([] for _ in range(9))
    for c in cases:
        if name == "grefcoco-target-only" and not c["objects"]:
            continue
        truth, selected, candidate = theirs(c, raster)
        both, either = np.logical_and(truth, selected).sum(), np.logical_or(truth, selected).sum()
        other = np.logical_and(truth, candidate).sum(), np.logical_or(truth, candidate).sum()
        as_one = lambda pair: pair[0] / pair[1] if pair[1] else 1.0  # noqa: E731
        best = other if as_one(other) > as_one((both, either)) else (both, either)
        value, reachable = as_one((both, either)), as_one(best)
        silent = c["finite"] and (not selected.any() or c["score"] < NO_TARGET_THRESHOLD)
        if name == "grefcoco":
            if not c["objects"]:
                value = 1.0 if silent else 0.0
                both, either, best = (0, 0, (0, 0)) if silent else (0, selected.sum(), best)
                reachable = float(best[1] == 0)
            else:
                value = 0.0 if silent or not either else both / either
                both = 0 if silent else both
                refused = c["finite"] and c["score"] < NO_TARGET_THRESHOLD
                best = (0, best[1]) if refused else best
                reachable = best[0] / best[1] if best[1] else 0.0
        if not c["finite"]:
            both, value = 0, 0.0
            reachable = reachable if best[1] else 0.0
        for _ in range(c["count"] if name in ("lisa", "grefcoco") else 1):
            for values, one in zip(
                (i, u, iou, nothing, abstains, failed, best_i, best_u, best_iou),
                (both, either, value, not c["objects"], silent, not c["finite"], *best, reachable),
                strict=True,
            ):
                values.append(one)
    i, u, iou, nothing, abstains, failed = map(np.array, (i, u, iou, nothing, abstains, failed))
    target = ~nothing if name == "grefcoco" else np.ones(len(iou), bool)
    thresholds = (0.7, 0.8, 0.9) if name == "grefcoco" else (0.5, 0.6, 0.7, 0.8, 0.9)
    table = {
        "n": len(iou),
        "ciou": 100 * i.sum() / u.sum(),
        "giou": 100 * iou.mean(),
        "oracle_ciou": 100 * sum(best_i) / sum(best_u),
        "oracle_giou": 100 * np.mean(best_iou),
        "selection_gap": 100 * (np.array(best_iou) - iou).mean(),
        "p_at": {str(x): 100 * (iou[target] >= x).mean() for x in thresholds},
    }
    if name == "grefcoco":
        table |= {"n_acc": 100 * abstains[nothing].mean(), "t_acc": 100 * (~abstains & ~failed)[target].mean()}
    return table


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_thousand_random_cases(cases, records, name):
    protocol = PROTOCOLS[name]
    found = metrics.summarise(records[protocol.raster == "fill_points"], protocol)
    for key, value in expected(cases, name).items():
        assert found[key] == pytest.approx(value, abs=1e-9), key


def test_the_random_cases_hold_what_they_should(cases):
    """Empty, full and ignored masks, failures, several parts, and rasters that differ from each other."""
    triples = {raster: [theirs(c, raster) for c in cases] for raster in ("union", "sum", "fill_points")}
    union = triples["union"]
    assert sum(not t.any() for t, _, _ in union) > 100 and sum(not s.any() for _, s, _ in union) > 100
    assert sum(s.all() for _, s, _ in union) > 50 and sum(c["ignored"].all() for c in cases) > 5
    assert sum(not c["finite"] for c in cases) > 10 and sum(len(c["objects"]) > 1 for c in cases) > 100
    for raster in ("sum", "fill_points"):
        assert sum((a[0] != b[0]).any() for a, b in zip(union, triples[raster], strict=True)) > 300


def test_a_huge_mask():
    rng = np.random.default_rng(1)
    h, w = 1500, 2048
    parts = [polygon(rng, h, w) for _ in range(3)]
    drawn = parts, h, w, "here"
    annotation = Annotation(
        0,
        PAD,
        masks.rasterise(*drawn),
        rle_single_cover=masks.single_cover(*drawn),
        rle_filled_polygons=masks.fill_polygons(*drawn),
    )
    made = Example(0, "x.jpg", h, w, b"", (annotation,), (Expression("It", 0, 0, (0,)),))
    objects, (sample,) = ObjectMasks.of(made), make_ref_samples(made)
    where = postprocess.geometry(np.array([[6, 8]], np.int32), [(h, w)], grid=(8, 8), padded_size=8)
    logits = rng.normal(size=(1, 1, 1, 8, 8)).astype(np.float32)
    pack = lambda mask: postprocess.pack_truth([mask[None]], 1, 1, where.bucket)  # noqa: E731
    once = objects.sample_single_cover(sample)
    found = restore()(logits, where, postprocess.GroundTruth(pack(objects.union(sample)), pack(once), pack(once & False)))
    answer = postprocess.unpack_mask(np.asarray(found.masks)[0, 0, 0], (h, w))
    codes = [coco.encode(np.asfortranarray(m, np.uint8)) for m in (answer, decoded(parts, h, w).max(0))]
    assert found.area[0, 0, 0] == coco.area(codes[0]) > 500_000
    assert found.intersection[0, 0, 0] == coco.area(coco.merge(codes, intersect=True)) > 100_000
    assert found.union[0, 0, 0] == coco.area(coco.merge(codes))

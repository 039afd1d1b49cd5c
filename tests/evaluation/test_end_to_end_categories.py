"""A panoptic set from files to tables: the truth is that of the PNGs, the tables are those of the counts; by other code."""

from __future__ import annotations

import contextlib
import functools
import io
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from flowseg_jax.data import prepare
from flowseg_jax.data.generic_dataset import CategoryPrompts, GenericDataset
from flowseg_jax.data.prompts import PromptTemplates
from tests.helpers import judge, proposals, wild

SIDE = 64
NAMES = [one["name"] for one in sorted(wild.KINDS, key=lambda one: one["id"])]
THINGS = [bool(one["isthing"]) for one in sorted(wild.KINDS, key=lambda one: one["id"])]
NUMBER = {key: i for i, key in enumerate(sorted(one["id"] for one in wild.KINDS))}


def propose(batch):
    """A candidate a kind, where the picture has its colour, sure of it, and half as sure another one in the left half."""
    pixels = batch.sam_images[:, ::2, ::2].astype(np.float32)
    colours = np.array([wild.COLOURS[[k["name"] for k in wild.KINDS].index(name)] for name in NAMES])
    near = 60 - np.abs(pixels[:, None] - colours[None, :, None, None]).mean(-1)
    left = np.where(np.arange(near.shape[-1]) < near.shape[-1] // 2, near, -20)
    scores = np.concatenate([np.eye(4) * 0.9 + 0.02, np.eye(4) * 0.5 + 0.1], 0)[None].repeat(len(near), 0)
    return scores.astype(np.float32), np.concatenate([near, left], 1) / 5


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(files, result, records) after JSON."""
    root = tmp_path_factory.mktemp("panoptic")
    wild.panoptic(root / "files")
    data = prepare.prepare(root / "files", root / "prepared", layout="coco-panoptic", log=lambda line: None)
    options = {"batch": 3, "sides": (SIDE, 16), "visual_tokens": 0, "prompts": PromptTemplates()}
    images = GenericDataset(data, "val", None, CategoryPrompts.of(data.categories), **options)
    found = proposals.evaluate(propose, images, data.categories, data.things, save_masks=True)
    return root / "files", json.loads(json.dumps(found.result)), json.loads(json.dumps(found.records))


@functools.cache
def segments(files):
    """{image: [(category, whether it is a crowd, mask)]} of the PNGs."""
    table = json.loads((files / "annotations" / "panoptic_val2017.json").read_text())
    found = {}
    for one in table["annotations"]:
        blue, green, red = np.moveaxis(cv2.imread(str(files / "annotations" / "panoptic_val2017" / one["file_name"])), -1, 0)
        ids = red.astype(int) + 256 * green.astype(int) + 65536 * blue.astype(int)
        rows = [(NUMBER[s["category_id"]], bool(s["iscrowd"]), ids == s["id"]) for s in one["segments_info"]]
        found[one["image_id"]] = rows
    return found


def test_the_truth_is_that_of_the_files(evaluated):
    files, result, records = evaluated
    truth = segments(files)
    assert (result["categories"], result["things"], result["n"]) == (NAMES, THINGS, len(truth))
    assert [r["image_id"] for r in records] == list(truth)
    assert sum(crowd for rows in truth.values() for _, crowd, _ in rows) >= 2
    for r in records:
        rows = truth[r["image_id"]]
        assert (r["height"], r["width"]) == rows[0][2].shape
        objects = [
            (c, crowd, judge.decoded({"size": [r["height"], r["width"]], "counts": code})) for c, code, crowd in r["objects"]
        ]
        key = lambda one: (one[0], one[1], one[2].tobytes())  # noqa: E731
        assert sorted(map(key, objects)) == sorted(map(key, rows))
        # Every segment that is no crowd is found or missed, and every pixel of a segment counted once.
        count = lambda categories: np.bincount([*categories], minlength=4).tolist()  # noqa: E731
        assert count([*(c for c, _, _ in r["matched"]), *r["missed"]]) == count(c for c, crowd, _ in rows if not crowd)
        pixels = np.zeros(4, int)
        for true, _, n in r["confusion"]:
            pixels[true] += n
        assert pixels.tolist() == [sum(int(mask.sum()) for c, _, mask in rows if c == k) for k in range(4)]
        areas = [int(mask.sum()) for _, _, mask in rows]
        assert all(i <= max(areas) and i <= u for _, i, u in r["matched"])


def test_mask_ap_is_that_of_the_files_and_the_saved_masks(evaluated):
    files, result, records = evaluated
    images, annotations, found = [], [], []
    for r in records:
        images.append({"id": r["image_id"] + 1, "height": r["height"], "width": r["width"]})
        for category, crowd, mask in segments(files)[r["image_id"]]:
            code = coco.encode(np.asfortranarray(mask, np.uint8))
            one = {"id": len(annotations) + 1, "image_id": r["image_id"] + 1, "category_id": category + 1, "segmentation": code}
            annotations.append(one | {"area": int(mask.sum()), "iscrowd": int(crowd)})
        for category, score, place in r["found"]:
            code = {"size": [r["height"], r["width"]], "counts": r["masks"][place]}
            found.append({"image_id": r["image_id"] + 1, "category_id": category + 1, "segmentation": code, "score": score})
    truth = COCO()
    categories = [{"id": k + 1} for k in range(4) if THINGS[k]]
    truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    wanted = [None if value < 0 else pytest.approx(100 * value) for value in evaluation.stats[:6]]
    assert [result["instance"][name] for name in names] == wanted
    assert 5 < result["instance"]["ap"] < 95 and found


def test_panoptic_and_semantic_tables_are_those_of_the_counts(evaluated):
    _, result, records = evaluated
    quality, overlap = {}, {}
    for k in range(4):
        matched = [i / u for r in records for c, i, u in r["matched"] if c == k]
        missed, extra = (sum(r[key].count(k) for r in records) for key in ("missed", "extra"))
        if half := len(matched) + (missed + extra) / 2:
            sq = sum(matched) / len(matched) if matched else 0
            quality[k] = 100 * sum(matched) / half, 100 * sq, 100 * len(matched) / half
        cells = [(t, f, n) for r in records for t, f, n in r["confusion"]]
        right, row, column = (
            sum(n for t, f, n in cells if keep(t, f))
            for keep in (lambda t, f, k=k: t == f == k, lambda t, f, k=k: t == k, lambda t, f, k=k: f == k)
        )
        if row:
            overlap[k] = 100 * right / (row + column - right)
    table = result["panoptic"]
    for part, kept in (("all", range(4)), ("things", (0, 1)), ("stuff", (2, 3))):
        assert [THINGS[k] for k in kept] == {"all": THINGS, "things": [True] * 2, "stuff": [False] * 2}[part]
        for at, key in enumerate(("pq", "sq", "rq")):
            assert table[part][key] == pytest.approx(np.mean([quality[k][at] for k in kept if k in quality]))
    assert {int(k): (row["name"], row["pq"]) for k, row in table["by_category"].items()} == {
        k: (NAMES[k], pytest.approx(q[0])) for k, q in quality.items()
    }
    assert result["semantic"]["miou"] == pytest.approx(np.mean([*overlap.values()]))
    assert {int(k): row["iou"] for k, row in result["semantic"]["by_category"].items()} == pytest.approx(overlap)
    assert 5 < table["all"]["pq"] < 95 and 5 < result["semantic"]["miou"] < 95

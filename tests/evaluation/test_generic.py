"""Generic evaluation: against Mask2Former's inference in torch and brute force, and that the perfect answer scores 100."""

from __future__ import annotations

import dataclasses
import functools
import json
from fractions import Fraction

import jax
import numpy as np
import pytest
import torch

from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.cli.analyze import main as evaluation_main
from flowseg_jax.data import images, masks, prepare
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.generic_dataset import CategoryPrompts, GenericDataset
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.records import Annotation, Example
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import category_scores, fusion, postprocess
from flowseg_jax.evaluation.benchmark import EvalModel, GenericEvaluation
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.tasks import category_tables, instance, panoptic, semantic
from flowseg_jax.evaluation.tasks.panoptic import Segments
from flowseg_jax.models import flowseg
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.synthetic import multi_task
from flowseg_jax.synthetic.scene import REFERENCE_SIZE
from tests.helpers import minicoco as mini
from tests.helpers import proposals, small

PADDED, GRID = 96, (24, 24)
ORIGINALS = [(60, 100), (131, 70), (96, 96)]
THINGS = (True, True, False, False)
restore = jax.jit(fusion.restore, static_argnums=3)


# What Mask2Former's inference makes of candidates, in torch at the full size, one image at a time.


def upsampled(logits, original):
    scaled = [max(1, int(side * PADDED / max(original) + 0.5)) for side in original]
    x = torch.nn.functional.interpolate(torch.tensor(logits)[None], (PADDED, PADDED), mode="bilinear", align_corners=False)
    return torch.nn.functional.interpolate(x[..., : scaled[0], : scaled[1]], original, mode="bilinear", align_corners=False)[0]


def reference_panoptic(scores, x, thresholds):
    best, label = torch.tensor(scores).max(-1)
    keep = best > thresholds.score
    best, label, probability = best[keep], label[keep], x[keep].sigmoid()
    ids, categories, stuff = np.zeros(x.shape[1:], int), [], {}
    if not keep.any():
        return ids, categories
    owner = (best[:, None, None] * probability).argmax(0)
    for k, category in enumerate(label.tolist()):
        mine, whole = owner == k, probability[k] > 0.5
        if not (mine & whole).any() or mine.sum() / whole.sum() < thresholds.overlap:
            continue
        if category in stuff:
            ids[mine & whole] = stuff[category]
            continue
        categories.append(category)
        ids[mine & whole] = len(categories)
        if not THINGS[category]:
            stuff[category] = len(categories)
    return ids, categories


def blobs(rng, n, grid=GRID):
    x = torch.tensor(rng.normal(size=(n, 1, 4, 4)).astype(np.float32))
    return (6 * torch.nn.functional.interpolate(x, grid, mode="bicubic")[:, 0] - 1).numpy()


def candidates(rng, b=3, n=12):
    scores = rng.dirichlet([0.2] * (len(THINGS) + 1), (b, n)).astype(np.float32)[..., :-1]
    return scores, np.stack([blobs(rng, n) for _ in range(b)])


def geometry(originals=ORIGINALS, rows=None, bucket=None):
    scaled = [[max(1, int(side * PADDED / max(size) + 0.5)) for side in size] for size in originals]
    scaled += [[7, 7]] * ((rows or len(originals)) - len(originals))
    return postprocess.geometry(np.array(scaled), originals, grid=GRID, padded_size=PADDED, bucket=bucket)


@pytest.mark.parametrize("block", [postprocess.BLOCK, 5000])  # 5000: blocks of a few rows
def test_labels_and_masks_equal_mask2former(rng, monkeypatch, block):
    monkeypatch.setattr(postprocess, "BLOCK", block)
    thresholds = fusion.Thresholds(0.5, 0.6)
    scores, logits = candidates(rng)
    found = jax.device_get(jax.jit(fusion.restore, static_argnums=3)(scores, logits, geometry(), thresholds.score))
    dropped = merged = 0
    for b, size in enumerate(ORIGINALS):
        x = upsampled(logits[b], size)
        assert x.abs().min() > 1e-5  # else the comparison of masks would be a coin toss
        mine = jax.tree.map(lambda value: value[b], found)  # noqa: B023
        segments = fusion.fuse(mine.labels, THINGS, size, thresholds.overlap)
        ids, categories = reference_panoptic(scores[b], x, thresholds)
        np.testing.assert_array_equal(segments.ids, ids)
        assert list(segments.category) == categories
        taken = scores[b].max(-1) > thresholds.score
        dropped += taken.sum() - len(categories)
        merged += len(categories) < len({*np.unique(mine.labels.winner)} - {-1})
        semantic = torch.einsum("qc,qhw->chw", torch.tensor(scores[b]), x.sigmoid())
        first, second = semantic.topk(2, dim=0).values
        clear = (first - second > 1e-5).numpy()
        assert clear.mean() > 0.999
        np.testing.assert_array_equal(mine.labels.semantic[: size[0], : size[1]][clear], semantic.argmax(0).numpy()[clear])
        # Instances: the best pairs, with the mean probability inside the mask.
        values, pairs = torch.tensor(scores[b]).flatten().topk(min(fusion.TOP, scores[b].size))
        inside = x > 0
        certain = (x.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        np.testing.assert_allclose(mine.objects.score, values * certain[pairs // len(THINGS)], rtol=1e-5)
        assert mine.objects.candidate.tolist() == (pairs // len(THINGS)).tolist()
        assert mine.objects.category.tolist() == (pairs % len(THINGS)).tolist()
        for n in range(len(x)):
            np.testing.assert_array_equal(postprocess.unpack_mask(mine.objects.masks[n], size), inside[n].numpy())
    assert dropped and merged  # the case has what it is about


def test_a_candidate_is_kept_for_what_it_wins_not_for_what_it_keeps():
    """Of masks of 10 pixels, 8 are won, 5 of them inside; then 7, all inside: at 0.8 the first stays, without the three."""
    numbers = {"won": [8, 7], "area": [10, 10], "kept": [5, 7], "category": [1, 0]}
    winner = np.array([[0] * 5 + [-1] * 3 + [1] * 7 + [-1]], np.int16)
    values = {name: np.array(value, np.int32) for name, value in numbers.items()}
    labels = fusion.LabelMaps(**values, taken=np.array([True, True]), winner=winner, semantic=winner)
    segments = fusion.fuse(labels, THINGS, (1, 15), 0.8)
    assert segments.category == (1,) and segments.ids.tolist() == [[1] * 5 + [0] * 10]
    assert fusion.fuse(labels, THINGS, (1, 15), 0.7).category == (1, 0)


def test_padding_changes_nothing(rng):
    scores, logits = candidates(rng)
    plain = jax.device_get(restore(scores, logits, geometry(bucket=(136, 104)), 0.5))
    more = np.concatenate([scores, scores[:1]]), np.concatenate([logits, logits[:1]])
    padded = jax.device_get(restore(*more, geometry(rows=4, bucket=(200, 160)), 0.5))
    for b, (h, w) in enumerate(ORIGINALS):
        for name in ("won", "area", "kept"):
            np.testing.assert_array_equal(getattr(plain.labels, name)[b], getattr(padded.labels, name)[b])
        for name in ("winner", "semantic"):
            np.testing.assert_array_equal(getattr(plain.labels, name)[b, :h, :w], getattr(padded.labels, name)[b, :h, :w])
        np.testing.assert_allclose(plain.objects.score[b], padded.objects.score[b], rtol=1e-5)
        assert (padded.labels.winner[b, h:] == -1).all() and not padded.objects.masks[b, :, h:].any()
    assert (padded.labels.winner[3] == -1).all()


def test_no_map_of_all_candidates_exists_at_the_original_size():
    n, grid, bucket = 100, (32, 32), (1024, 1024)
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    where = postprocess.ResizeMatrices(
        *(shape(1, *s) for s in ((bucket[0], 32), (bucket[1], 32), (32, bucket[0]), (32, bucket[1])))
    )
    compiled = restore.lower(shape(1, n, 20), shape(1, n, *grid), where, 0.5).compile()
    whole = n * bucket[0] * bucket[1] * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 3


# Counting.


def example(ids, segments, image_id=1):
    """An image whose segment k + 1 is segments[k] = (category, crowd)."""
    annotations = [
        Annotation(k, category, masks.encode((ids == k + 1).astype(np.uint8)), crowd)
        for k, (category, crowd) in enumerate(segments)
    ]
    return Example(image_id, f"{image_id}.jpg", *ids.shape, b"", tuple(annotations))


def found(ids, *categories):
    return Segments(np.asarray(ids, np.int32), categories, (False,) * len(categories))


def strip(text):
    """One row of pixels, "." for 0."""
    return np.array([[0 if c == "." else int(c) for c in text]])


@pytest.mark.parametrize(
    "truth, segments, predicted, categories, want",
    [
        # IoU 3/4: a match. 2/4 is none: missed, and superfluous.
        ("1111....", [(0, False)], "111.....", [0], ([[0, 3, 4]], [], [])),
        ("1111....", [(0, False)], "11......", [0], ([], [0], [0])),
        # Another category is no match.
        ("1111....", [(0, False)], "1111....", [1], ([], [0], [1])),
        # Void does not count in the union: 4 of 4 + 3 pixels would be no more than 4/7, here it is 4/4.
        ("1111....", [(0, False)], "1111111.", [0], ([[0, 4, 4]], [], [])),
        # A prediction mostly on void (3 of 5) is forgiven, one with half of it (2 of 4) is not.
        ("1111....", [(0, False)], "..11111.", [1], ([], [0], [])),
        ("1111....", [(0, False)], "..1111..", [1], ([], [0], [1])),
        # A crowd is not missed, matches nothing, and forgives its own category only.
        ("1111222.", [(0, True), (1, False)], "1111222.", [0, 1], ([[1, 3, 3]], [], [])),
        ("1111222.", [(0, True), (1, False)], "1111222.", [1, 1], ([[1, 3, 3]], [], [1])),
        # Void and crowd together: 1 + 2 of 5.
        (".11222..", [(0, True), (1, False)], "11122...", [0, 0], ([], [1], [0])),
        # Nothing predicted.
        ("1111....", [(0, False)], "........", [], ([], [0], [])),
    ],
)
def test_counted_by_hand(truth, segments, predicted, categories, want):
    counted = panoptic.count_segments(found(strip(predicted), *categories), Segments.of(example(strip(truth), segments)))
    assert (counted["matched"], counted["missed"], counted["extra"]) == want


def brute_force(images, categories):
    """PQ, SQ, RQ by category with exact fractions, every pair of segments compared as sets of pixels."""
    table = {}
    for c in range(categories):
        ious, fp, fn = [], 0, 0
        for true, segments, predicted, labels in images:
            pixels = lambda ids, k: {*zip(*np.nonzero(ids == k), strict=True)}  # noqa: E731
            void = pixels(true, 0)
            truths = [pixels(true, k + 1) for k, s in enumerate(segments) if s == (c, False)]
            crowd = set().union(*(pixels(true, k + 1) for k, s in enumerate(segments) if s == (c, True)))
            for guess in (pixels(predicted, k + 1) for k, label in enumerate(labels) if label == c):
                values = [Fraction(len(guess & t), len((guess - void) | t)) for t in truths]
                hit = [v for v in values if v > Fraction(1, 2)]
                assert len(hit) <= 1
                ious += hit
                fp += not hit and 2 * len(guess & (void | crowd)) <= len(guess)
            fn += len(truths)
        fn -= len(ious)
        if len(ious) + fp + fn:
            weight = len(ious) + Fraction(fp + fn, 2)
            table[c] = (sum(ious) / weight, sum(ious) / max(len(ious), 1), len(ious) / weight, len(ious), fp, fn)
    return table


def partition(rng, size, count):
    """Rectangles painted over each other: ids 1.. of those with a pixel left, 0 elsewhere."""
    ids = np.zeros(size, int)
    for k in range(count):
        y, x = (rng.integers(0, side - 1) for side in size)
        ids[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = k + 1
    return np.unique(ids, return_inverse=True)[1].reshape(size) if (ids == 0).any() else ids * 0


def test_random_images_equal_brute_force(rng):
    categories, things = 4, THINGS
    images, records = [], []
    for _ in range(60):
        true = partition(rng, (12, 14), rng.integers(0, 7))
        segments = [(int(rng.integers(categories)), bool(rng.random() < 0.25)) for _ in range(true.max())]
        predicted = partition(rng, (12, 14), rng.integers(0, 5))
        # Most predictions are the truth with a bite taken out.
        labels = [int(rng.integers(categories)) for _ in range(predicted.max())]
        if rng.random() < 0.7 and true.max():
            predicted = np.where(rng.random(true.shape) < 0.85, true, 0)
            predicted = np.unique(np.append(predicted, 0), return_inverse=True)[1][:-1].reshape(true.shape)
            labels = [segments[min(k, len(segments) - 1)][0] for k in range(predicted.max())]
        images.append((true, segments, predicted, labels))
        truth = Segments.of(example(true, segments))
        np.testing.assert_array_equal(truth.ids, true)
        records.append(panoptic.count_segments(found(predicted, *labels), truth))
    names = [f"kind {c}" for c in range(categories)]
    table, want = panoptic.panoptic_table(records, names, things), brute_force(images, categories)
    assert len(want) == categories and all(row[3] and row[4] and row[5] for row in want.values())
    for c, (pq, sq, rq, tp, fp, fn) in want.items():
        row = table["by_category"][str(c)]
        assert row["name"] == names[c]
        assert (row["tp"], row["fp"], row["fn"]) == (tp, fp, fn)
        assert (row["pq"], row["sq"], row["rq"]) == pytest.approx((100 * pq, 100 * sq, 100 * rq), rel=1e-12)
    for part, kept in (("all", range(4)), ("things", (0, 1)), ("stuff", (2, 3))):
        for at, key in enumerate(("pq", "sq", "rq")):
            assert table[part][key] == pytest.approx(100 * float(sum(want[c][at] for c in kept)) / len(kept), rel=1e-12)
    assert panoptic.panoptic_table(records[::-1], names, things) == table


def test_a_category_that_never_occurs_is_not_averaged():
    record = {"matched": [[0, 3, 4]], "missed": [], "extra": [1]}
    table = panoptic.panoptic_table([record], ["a", "b", "c", "d"], THINGS)
    assert table["all"] == {"pq": 37.5, "sq": 37.5, "rq": 50.0, "categories": 2}
    assert table["stuff"] == {"pq": None, "sq": None, "rq": None, "categories": 0}
    assert [(key, row["name"]) for key, row in table["by_category"].items()] == [("0", "a"), ("1", "b")]


def test_two_categories_of_one_name_stay_two():
    names, whole = ["bar", "bar", "sky"], {"matched": [[0, 1, 1], [2, 3, 4]], "missed": [1], "extra": []}
    confusion = {"confusion": [[0, 0, 100], [1, 2, 50], [2, 2, 70]]}
    pixels = semantic.semantic_table([confusion], names)
    assert pixels["miou"] == pytest.approx((100 + 0 + 100 * 70 / 120) / 3) and pixels["categories"] == 3
    assert [row["iou"] for row in pixels["by_category"].values()] == pytest.approx([100, 0, 100 * 70 / 120])
    table = panoptic.panoptic_table([whole], names, (True, True, False))
    assert table["all"]["categories"] == len(table["by_category"]) == 3 and table["all"]["pq"] == pytest.approx(175 / 3)
    objects = [[c, masks.encode(np.eye(4, 5, k=c, dtype=np.uint8)), False] for c in range(3)]
    found = [[c, 0.9, c] for c in (0, 2)]
    image = {"height": 4, "width": 5, "objects": objects, "masks": [code for _, code, _ in objects], "found": found}
    objects_table = instance.instance_table([image], names)
    assert [row["ap"] for row in objects_table["by_category"].values()] == pytest.approx([100, 0, 100])
    assert objects_table["ap"] == pytest.approx(200 / 3)


def test_miou_equals_sets_of_pixels(rng):
    categories, images = 5, []
    for _ in range(8):
        true = partition(rng, (9, 11), 5)
        segments = [(int(rng.integers(3)), bool(rng.random() < 0.3)) for _ in range(true.max())]  # 3 and 4 are never true
        images.append((true, segments, rng.integers(-1, categories, true.shape)))
    records = [semantic.count_pixels(p, Segments.of(example(t, s))) for t, s, p in images]
    table = semantic.semantic_table(records, list("abcde"))
    want = {}
    for c in range(3):
        both = either = 0
        for t, s, p in images:
            kind = np.array([-9, *(category for category, _ in s)])[t]
            both += ((kind == c) & (p == c)).sum()
            either += (((kind == c) | (p == c)) & (t > 0)).sum()
        want[c] = 100 * both / either
    assert table["by_category"] == {str(c): {"name": "abc"[c], "iou": pytest.approx(iou)} for c, iou in want.items()}
    assert table["miou"] == pytest.approx(sum(want.values()) / 3) and table["categories"] == 3


def test_mask_ap_by_hand():
    """Two objects: one found best, then a wrong one, then the other: precision 1 up to recall 1/2, then 2/3.

    What lies on a crowd region is forgiven, and stuff that is not found does not matter.
    """
    ids = strip("1111" * 8 + "2222" * 8 + "3333" * 8 + "4444" * 8)
    image = example(ids, [(0, False), (0, False), (0, True), (1, False)])
    boxes = [ids == 1, ids == 0, ids == 2, ids == 3]
    boxes[1][:, :3] = True  # overlaps the first object by 3 of 32
    found = [(0, 0.9, 0), (0, 0.8, 1), (0, 0.7, 2), (0, 0.95, 3), (1, 0.99, 0)]
    size = {"height": ids.shape[0], "width": ids.shape[1]}
    counted = lambda found: size | instance.count_objects(image, found, boxes.__getitem__)  # noqa: E731
    table = instance.instance_table([counted(found)], ["a", "b"], (True, False))
    want = 100 * (51 * 1 + 50 * 2 / 3) / 101  # at recall 0, 0.01, ..., 1
    assert (table["ap"], table["ap50"], table["ap75"]) == pytest.approx((want,) * 3)
    assert table["by_category"] == {"0": {"name": "a", "ap": pytest.approx(want)}}
    assert table["ap_small"] == pytest.approx(want) and table["ap_large"] is None
    assert instance.instance_table([counted([])], ["a", "b"])["ap"] == 0.0
    assert instance.instance_table([], ["a"], (False,))["ap"] is None


def test_predictions_of_one_candidate_share_its_mask_and_empty_ones_are_left_out():
    ids = strip("1122")
    found = [(0, 0.5, 7), (1, 0.4, 3), (1, 0.3, 7)]
    counted = instance.count_objects(example(ids, [(0, False), (1, True)]), found, lambda n: ids == (1 if n == 7 else 9))
    assert [o[0::2] for o in counted["objects"]] == [[0, False], [1, True]]
    assert counted["masks"] == [counted["objects"][0][1]] and counted["found"] == [[0, 0.5, 0], [1, 0.3, 0]]


# The whole, on miniature data.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("generic")
    quiet = lambda text: None  # noqa: E731
    multi_task.write_datasets(root / "raw", reasonseg=5, panoptic=30, chat=1, report=quiet)
    return prepare.prepare(root / "raw" / "coco", root / "panoptic", layout="coco-panoptic", tokenizer_vocab=400, log=quiet)


def perfect(prepared, split="val", side=REFERENCE_SIZE):
    """Candidates that are the truth: the masks of the image's objects, drawn at the encoder's size."""
    source = prepared.source(split)
    known = {source[i].image_id: source[i] for i in range(len(source))}

    def propose(batch):
        scores = np.full((len(batch.sam_images), 12, len(prepared.categories)), 1e-4, np.float32)
        logits = np.full((len(batch.sam_images), 12, side, side), -20, np.float32)
        for b, number in enumerate(batch.example_id):
            if number in known:
                one = known[int(number)]
                for n, annotation in enumerate(one.annotations):
                    scores[b, n, annotation.category] = 0.99
                    logits[b, n, : one.height, : one.width] = 40.0 * masks.decode([annotation.rle], side, side)[0] - 20
        return scores, logits

    return propose


def validation(prepared, batch):
    """The data at the size of the images, so that a mask at the encoder's size is the mask."""
    categories, sides = CategoryPrompts.of(prepared.categories), (REFERENCE_SIZE, 16)
    return GenericDataset(
        prepared, "val", None, categories, batch=batch, sides=sides, visual_tokens=0, prompts=PromptTemplates()
    )


def model(prepared, **changes):
    """A random model with a word for each id of the set's tokenizer, and with a boundary refinement that does something."""
    llm = dataclasses.replace(small.config().llm, vocab_size=load_tokenizer(prepared.tokenizer_directory).vocab)
    return dataclasses.replace(small.lean(negatives_group_size=1, llm=llm), **changes)


@functools.cache  # what one test compiles, another uses
def benchmark(prepared, cfg, **options):
    tokenizer = load_tokenizer(prepared.tokenizer_directory) if cfg.has_language_model else None
    evaluator = Evaluator(flowseg.abstract_model(cfg)[0])
    model = EvalModel(cfg, evaluator, small.params(cfg), {"digest": "d"}, tokenizer, PromptTemplates())
    return GenericEvaluation(model, prepared, batch=4, **options)


def refused(prepared, cfg, **options):
    return GenericEvaluation(EvalModel(cfg, None, {}, {}, None, PromptTemplates()), prepared, **options)


def test_the_prepared_set_knows_its_things(prepared, tmp_path):
    assert prepared.things == (True,) * 8 + (False,) and prepared.categories[-1] == "background"
    assert PreparedDataset.open(prepared.directory).things == prepared.things
    root = mini.write(tmp_path / "raw", "instances")
    assert prepare.prepare(root, tmp_path / "set", layout="coco-instances", log=lambda text: None).things is None


def test_a_model_without_language_is_opened(prepared, tmp_path):
    cfg = model(prepared, **SEGMENTOR)
    params = small.params(cfg)
    save_pretrained(tmp_path / "model", params, cfg.to_dict(), None, {"step": 7}, dtype=None)
    ours = EvalModel.load(tmp_path / "model", expressions=False)
    assert (ours.cfg, ours.tokenizer) == (cfg, None)
    assert ours.checkpoint["step"] == 7 and len(ours.checkpoint["digest"]) == 16
    read, written = (each["mask_decoder"]["queries_features"] for each in (ours.params, params))
    np.testing.assert_array_equal(read, written)
    assert GenericEvaluation(ours, prepared, names=4).category_prompts.count == 1
    with pytest.raises(UserError, match="holds only the components 'segmentor'"):
        EvalModel.load(tmp_path / "model")


def test_the_truth_scores_a_hundred(prepared):
    data = validation(prepared, 4)
    assert len(data) == 2 and data.samples == 6  # the last batch is padded
    evaluation = proposals.evaluate(perfect(prepared), data, prepared.categories, prepared.things)
    result = evaluation.result
    for part in ("all", "things", "stuff"):
        assert (result["panoptic"][part]["pq"], result["panoptic"][part]["rq"]) == (100, 100)
    assert result["semantic"]["miou"] == 100 and result["instance"]["ap"] == pytest.approx(100)
    assert result["n"] == result["panoptic"]["n"] == 6 and result["failed"] == 0
    names = {row["name"] for row in result["instance"]["by_category"].values()}
    assert names <= set(prepared.categories) - {"background"}
    # Without things and stuff, only mask AP.
    alone = proposals.evaluate(perfect(prepared), data, prepared.categories, None).result
    assert alone["instance"]["ap"] == pytest.approx(100) and "panoptic" not in alone and "semantic" not in alone
    assert "background" in {row["name"] for row in alone["instance"]["by_category"].values()}


def test_numbers_that_are_none_fail_and_are_counted(prepared):
    data = validation(prepared, 6)

    def broken(batch):
        scores, logits = perfect(prepared)(batch)
        logits[0, 3, 5, 5] = np.nan
        scores[1, 0, 0] = np.inf
        return scores, logits

    evaluation = proposals.evaluate(broken, data, prepared.categories, prepared.things)
    assert evaluation.result["failed"] == 2 and [r["failed"] for r in evaluation.records] == [True] * 2 + [False] * 4
    for record in evaluation.records[:2]:
        assert not record["matched"] and not record["extra"] and record["missed"]
        assert {found for _, found, _ in record["confusion"]} == {-1}
    assert all(not r["missed"] for r in evaluation.records[2:])
    assert 0 < evaluation.result["instance"]["ap"] < 100
    json.dumps(evaluation.result, allow_nan=False)


LOW = fusion.Thresholds(0.1, 0.3)
SEGMENTOR = {"components": "segmentor", "num_classes": 9, "semantic_flow": SemanticFlowConfig(mode="off")}


@pytest.mark.parametrize("changes", [{"generic_pass": "with_flow"}, SEGMENTOR], ids=["named", "segmentor"])
def test_an_untrained_model_is_evaluated(prepared, tmp_path, capsys, changes):
    ours = benchmark(prepared, model(prepared, **changes), thresholds=LOW)
    found = ours.run("val", tmp_path)
    result = json.loads((tmp_path / "val.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    assert result == found.result and records == found.records
    assert (result["n"], result["failed"], result["conversations"]) == (6, 0, int(changes is not SEGMENTOR))
    assert result["checkpoint"] == {"digest": "d"} and result["data"] == prepared.digest and len(result["setup"]) == 16
    assert {p.name for p in tmp_path.iterdir()} == {"val.json", "val.jsonl"}
    again = panoptic.panoptic_table(records, result["categories"], result["things"])
    assert again.items() <= result["panoptic"].items()
    assert semantic.semantic_table(records, result["categories"]).items() <= result["semantic"].items()
    assert any(r["extra"] for r in records) and all(r["confusion"] for r in records)
    printed = capsys.readouterr().out
    assert "panoptic, n 6, PQ " in printed and "semantic, n 6, mIoU " in printed and "instance, n 6, AP " in printed
    assert ours.run("val", None, images=2).records == found.records[:2]
    assert dict(ours.model.evaluator.compiles) == {"score_categories": 1, "fuse": 1}


def audited(path, capsys, *flags):
    capsys.readouterr()
    evaluation_main(["audit", str(path), *flags])
    return capsys.readouterr().out


def test_a_damaged_image_loses_nothing_and_the_next_start_goes_on(prepared, tmp_path, monkeypatch, capsys):
    ours = benchmark(prepared, model(prepared, generic_pass="with_flow"), thresholds=LOW)
    decode = images.decode
    ours.run("val", tmp_path / "whole", save_masks=True)
    source, seen = prepared.source("val"), []

    def damaged(data, *, name):
        seen.append(name)
        if name == source[5].file_name:
            raise UserError(f"{name}: truncated or damaged image")
        return decode(data, name=name)

    monkeypatch.setattr(images, "decode", damaged)
    with pytest.raises(UserError, match=r"damaged image; 4 images are done and kept in .*val.partial.jsonl, the same command"):
        ours.run("val", tmp_path / "eval", save_masks=True)
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {"val.partial.jsonl"}
    seen.clear()
    monkeypatch.setattr(images, "decode", lambda data, *, name: seen.append(name) or decode(data, name=name))
    ours.run("val", tmp_path / "eval", save_masks=True)
    assert seen == [source[place].file_name for place in (4, 5)]
    assert "continuing after 4 images" in capsys.readouterr().out
    for name in ("val.json", "val.jsonl"):
        assert (tmp_path / "eval" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "eval" / "val.partial.jsonl").exists()


def test_an_audit_makes_the_tables_again(prepared, tmp_path, capsys):
    ours = benchmark(prepared, model(prepared, generic_pass="with_flow"), thresholds=LOW)
    result = ours.run("val", tmp_path, save_masks=True).result
    tables = json.loads(audited(tmp_path / "val.jsonl", capsys, "--json"))
    assert set(tables) == {"panoptic", "semantic", "instance"}
    for name, table in tables.items():
        assert table.items() <= result[name].items()
    assert "instance, n 6, AP " in audited(tmp_path / "val.jsonl", capsys)
    ours.run("val", tmp_path)  # without masks
    assert set(json.loads(audited(tmp_path / "val.jsonl", capsys, "--json"))) == {"panoptic", "semantic"}
    with pytest.raises(UserError, match="leave --no-target-threshold out"):
        audited(tmp_path / "val.jsonl", capsys, "--no-target-threshold=0.5")
    first, *rest = (tmp_path / "val.jsonl").read_text().splitlines(keepends=True)
    for change in (
        {"missed": [99]},
        {"extra": [-1]},
        {"matched": [[0, 3, 2]]},
        {"confusion": [[-1, 0, 5]]},
        {"confusion": [[0, -2, 5]]},
        {"objects": [], "masks": [], "found": [[0, 0.5, 0]]},
    ):
        wrong = json.dumps(json.loads(first) | change) + "\n"
        (tmp_path / "val.jsonl").write_text("".join([first, wrong, *rest]))
        with pytest.raises(UserError, match=r"val.jsonl:2: no counts of 9 categories \(ValueError.*; evaluate again"):
            audited(tmp_path / "val.jsonl", capsys)
    (tmp_path / "val.json").unlink()
    with pytest.raises(UserError, match=r"val.json: cannot be read .* keep the files of an evaluation together"):
        audited(tmp_path / "val.jsonl", capsys)


def rows(prepared, cfg, categories):
    tokenizer, sides = load_tokenizer(prepared.tokenizer_directory), (cfg.sam.image_size, cfg.siglip.image_size)
    options = {"sides": sides, "visual_tokens": cfg.num_visual_tokens, "prompts": PromptTemplates()}
    return GenericDataset(prepared, "val", tokenizer, categories, batch=4, **options).batch(0).inputs


@pytest.mark.parametrize("generic_pass", ["with_flow", "without_flow"])
def test_candidates_are_those_of_the_generic_pass_of_training(prepared, generic_pass):
    cfg = model(prepared, generic_pass=generic_pass)
    ours = benchmark(prepared, cfg, thresholds=LOW)
    batch = rows(prepared, cfg, CategoryPrompts.of(prepared.categories))
    params, graphdef = ours.model.params, flowseg.abstract_model(cfg)[0]
    scores, logits = ours.model.evaluator.score_categories(params, batch, ours.category_prompts)
    taught = jax.jit(lambda p, b: flowseg.bind_params(graphdef, p)(b))(params, small.pad(batch, phrases=1, text=8))
    passes = lambda x: x[-1].reshape(4, 2, *x.shape[2:])[:, 1]  # noqa: E731 (after the referring pass)
    want = jax.nn.softmax(passes(taught.decoder_output.class_logits), -1)[..., : scores.shape[-1]]
    np.testing.assert_allclose(scores, want, atol=1e-5)
    raw = np.einsum("bnd,bhwd->bnhw", passes(taught.decoder_output.mask_embeds), taught.mask_features)
    refined = flowseg.bind_params(graphdef, params).refine_masks(raw, taught.mask_features)
    np.testing.assert_allclose(logits, refined, atol=1e-4)
    assert np.abs(raw - refined).max() > 1e-3


def test_several_conversations_are_asked_as_if_each_stood_alone(prepared):
    cfg = model(prepared, generic_pass="with_flow")
    ours, whole = benchmark(prepared, cfg, names=5), CategoryPrompts.of(prepared.categories, 5)
    params, graphdef = ours.model.params, flowseg.abstract_model(cfg)[0]
    scores, logits = ours.model.evaluator.score_categories(params, rows(prepared, cfg, whole), ours.category_prompts)
    first, second = whole.chunks()
    assert (len(first), len(second)) == (5, 4)  # the second one is padded
    alone = CategoryPrompts.of(second)
    find = jax.jit(lambda p, b: category_scores.score_categories(flowseg.bind_params(graphdef, p), b, alone))
    want, want_logits = find(params, rows(prepared, cfg, alone))
    q = cfg.mask_decoder.num_queries
    np.testing.assert_allclose(scores[:, q:, 5:], want, atol=1e-5)
    np.testing.assert_allclose(logits[:, q:], want_logits, atol=1e-4)
    assert not np.asarray(scores[:, q:, :5]).any() and not np.asarray(scores[:, :q, 5:]).any()
    assert np.asarray(scores[:, :q, :5]).any() and np.abs(logits[:, :q] - logits[:, q:]).max() > 1e-2


def test_conversations_are_as_few_as_they_can_be():
    for count in range(1, 40):
        for at_most in range(count + 3):
            prompts = CategoryPrompts.of(tuple(map(str, range(count))), at_most)
            chunks = prompts.chunks()
            assert sum(chunks, ()) == prompts.categories and len(chunks) == prompts.count
            assert len(chunks) == (-(-count // at_most) if at_most else 1)
            assert all(0 < len(chunk) <= prompts.size <= (at_most or count) for chunk in chunks)


class Nothing(list):
    samples = 0


def test_what_cannot_be_evaluated_is_told(prepared):
    cfg = model(prepared, generic_pass="with_flow")
    with pytest.raises(UserError, match=r"has 9 categories, the model's linear head has 3 \(model.num_classes\)"):
        refused(prepared, model(prepared, **{**SEGMENTOR, "num_classes": 3}))
    with pytest.raises(UserError, match="holds only the components 'vlm': it makes no masks"):
        refused(prepared, model(prepared, components="vlm"))
    with pytest.raises(UserError, match="must not be negative, got -1"):
        refused(prepared, cfg, names=-1)
    with pytest.raises(UserError, match="unknown split 'vla'"):
        refused(prepared, cfg).run("vla", None)
    other = PreparedDataset(prepared.directory, prepared.metadata | {"task": "referring"})
    with pytest.raises(UserError, match="referring data has no categories to evaluate on"):
        refused(other, cfg)
    marked = PreparedDataset(prepared.directory, prepared.metadata | {"categories": ["a </p> b", *prepared.categories[1:]]})
    with pytest.raises(UserError, match="contains '</p>', which is a special token"):
        rows(marked, cfg, CategoryPrompts.of(marked.categories))
    with pytest.raises(UserError, match="holds no image to evaluate"):
        proposals.evaluate(perfect(prepared), Nothing(), prepared.categories, prepared.things)


@pytest.mark.parametrize(
    ("record", "fits"),
    [
        ({}, True), ({"matched": [[2, 0, 0]]}, True), ({"matched": [[3, 0, 0]]}, False), ({"matched": [[0, 5, 4]]}, False),
        ({"matched": [[0, -1, 4]]}, False), ({"missed": [2], "extra": [0]}, True), ({"missed": [3]}, False),
        ({"extra": [-1]}, False), ({"extra": [True]}, False), ({"confusion": [[2, -1, 0]]}, True),
        ({"confusion": [[0, -2, 1]]}, False), ({"confusion": [[0, 1, -1]]}, False), ({"objects": [[3, {}]]}, False),
        ({"found": [[0, 0.5, 1]], "masks": [1, 2]}, True), ({"found": [[0, 0.5, 2]], "masks": [1, 2]}, False),
        ({"found": [[0, 0.5, -1]], "masks": [1]}, False),
    ],
)  # fmt: skip
def test_counts_that_can_be(record, fits):
    if fits:
        return category_tables.check(record, 3)
    with pytest.raises(ValueError, match="a negative count or no such category"):
        category_tables.check(record, 3)

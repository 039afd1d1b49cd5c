"""Exact masks on the device: against torch's published route, under more padding, with broken numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flowseg_jax.evaluation import postprocess as post
from flowseg_jax.models.outputs import MaskCandidates
from flowseg_jax.ops.resize import apply_matrices

PADDED, GRID = 96, (24, 24)
ORIGINALS = [(60, 100), (131, 70), (96, 96), (1, 1), (300, 3)]


def scaled_sizes(originals):
    sizes = [[max(1, int(side * PADDED / max(size) + 0.5)) for side in size] for size in originals]
    return np.array(sizes, np.int32)


def smooth(rng, *shape):
    """Random logits with blobs rather than noise."""
    maps = torch.tensor(rng.normal(size=(int(np.prod(shape[:-2])), 1, 6, 6)).astype(np.float32))
    maps = torch.nn.functional.interpolate(maps, shape[-2:], mode="bicubic")
    return (4 * maps.numpy()).reshape(shape).astype(np.float32)


def published(logits, scaled, original):
    """Upsample to the padded input, crop to the resized image, resize to the original, with torch. [k, h, w] -> [k, H, W]."""
    maps = torch.nn.functional.interpolate(torch.tensor(logits)[None], (PADDED, PADDED), mode="bilinear", align_corners=False)
    maps = maps[..., : scaled[0], : scaled[1]]
    return torch.nn.functional.interpolate(maps, tuple(original), mode="bilinear", align_corners=False)[0].numpy()


def case(rng, originals=ORIGINALS, phrases=2, bucket=None, batch=None):
    scaled = scaled_sizes(originals)
    truth = [rng.random((phrases, h, w)) < 0.5 for h, w in originals]
    if batch:
        scaled = np.concatenate([scaled, np.full((batch - len(scaled), 2), 7, np.int32)])
    where = post.geometry(scaled, originals, grid=GRID, padded_size=PADDED, bucket=bucket)
    return where, truth, post.pack_truth(truth, len(scaled), phrases, where.bucket)


def test_size_buckets():
    assert [post.size_bucket(s) for s in (1, 128, 129, 640, 641, 2048, 2049, 8000)] == [
        128,
        128,
        320,
        640,
        1024,
        2048,
        4096,
        8192,
    ]


def test_logits_equal_torch_at_the_original_size():
    rng = np.random.default_rng(0)
    where, _, _ = case(rng)
    logits = smooth(rng, len(ORIGINALS), 2, *GRID)
    for i, (h, w) in enumerate(ORIGINALS):
        ours = np.stack([apply_matrices(mask, where.rows[i], where.cols[i]) for mask in logits[i]])
        expected = published(logits[i], scaled_sizes(ORIGINALS)[i], (h, w))
        np.testing.assert_allclose(ours[:, :h, :w], expected, rtol=0, atol=1e-5)
        assert not ours[:, h:].any() and not ours[:, :, w:].any()


def test_masks_and_counts_equal_numpy():
    rng = np.random.default_rng(1)
    where, truth, packed = case(rng)
    logits = smooth(rng, len(ORIGINALS), 2, 3, *GRID)
    out = jax.jit(post.upsample_and_count)(logits, where, post.GroundTruth.plain(packed))
    assert out.intersection.dtype == jnp.int32 and out.masks.dtype == jnp.uint8
    assert np.asarray(out.finite).all()
    for i, size in enumerate(ORIGINALS):
        for k in range(2):
            expected = published(logits[i, k], scaled_sizes(ORIGINALS)[i], size)
            for n in range(3):
                mask = post.unpack_mask(np.asarray(out.masks)[i, k, n], size)
                clear = np.abs(expected[n]) > 1e-5
                np.testing.assert_array_equal(mask[clear], (expected[n] > 0)[clear])
                assert out.intersection[i, k, n] == (mask & truth[i][k]).sum()
                assert out.union[i, k, n] == (mask | truth[i][k]).sum()


def test_larger_bucket_and_more_batch_change_nothing():
    rng = np.random.default_rng(2)
    logits = smooth(rng, len(ORIGINALS), 2, 3, *GRID)
    where, _, packed = case(np.random.default_rng(5))
    small = post.upsample_and_count(logits, where, post.GroundTruth.plain(packed))
    where2, _, packed2 = case(np.random.default_rng(5), bucket=(640, 320), batch=7)
    big = post.upsample_and_count(
        np.concatenate([logits, np.ones((2, 2, 3, *GRID), np.float32)]), where2, post.GroundTruth.plain(packed2)
    )
    n = len(ORIGINALS)
    np.testing.assert_array_equal(big.intersection[:n], small.intersection)
    np.testing.assert_array_equal(big.union[:n], small.union)
    assert not np.asarray(big.union[n:]).any()
    for i, size in enumerate(ORIGINALS):
        for k in range(2):
            np.testing.assert_array_equal(
                post.unpack_mask(np.asarray(big.masks)[i, k, 0], size), post.unpack_mask(np.asarray(small.masks)[i, k, 0], size)
            )
    grid = np.asarray(post.truth_on_grid(packed, where))
    np.testing.assert_allclose(np.asarray(post.truth_on_grid(packed2, where2))[:n], grid, atol=1e-6)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    where, _, packed = case(rng)
    logits = smooth(rng, len(ORIGINALS), 2, 3, *GRID)
    whole = post.upsample_and_count(logits, where, post.GroundTruth.plain(packed))
    monkeypatch.setattr(post, "BLOCK", 1 << 14)
    parts = post.upsample_and_count(logits, where, post.GroundTruth.plain(packed))
    np.testing.assert_array_equal(parts.masks, whole.masks)


def test_truth_on_grid_is_the_covered_share():
    # 48 x 96 original at scale 1 in a padded input of 96: a cell is 4 x 4 pixels, the lower half of the grid is padding.
    truth = np.zeros((1, 48, 96), bool)
    truth[0, 0:4, 0:2] = True  # half of cell (0, 0)
    truth[0, 44:48, 92:96] = True  # the last cell on the image
    where = post.geometry(np.array([[48, 96]], np.int32), [(48, 96)], grid=GRID, padded_size=96)
    grid = np.asarray(post.truth_on_grid(post.pack_truth([truth], 1, 1, where.bucket), where))[0, 0]
    expected = np.zeros(GRID)
    expected[0, 0], expected[11, 23] = 0.5, 1.0
    np.testing.assert_allclose(grid, expected, atol=1e-6)
    inside = np.asarray(post.image_on_grid(where))[0]
    np.testing.assert_allclose(inside, np.repeat([[1.0], [0.0]], 12, 0) * np.ones(GRID), atol=1e-6)


def chosen_case():
    rng = np.random.default_rng(4)
    size = (72, 96)
    scaled = scaled_sizes([size])
    where = post.geometry(scaled, [size], grid=GRID, padded_size=PADDED)
    logits = smooth(rng, 1, 2, 6, *GRID)
    truth = np.stack([published(logits[0, k], scaled[0], size)[q] > 0 for k, q in ((0, 4), (1, 1))])
    packed = post.pack_truth([truth], 1, 2, where.bucket)
    return where, logits, packed, post.truth_on_grid(packed, where), post.image_on_grid(where)


def test_choose_takes_the_highest_score_and_the_highest_iou():
    where, logits, packed, truth, inside = chosen_case()
    scores = np.array([[[0.1, 0.9, 0.2, 0.3, 0.4, 0.5], [0.6, 0.1, 0.2, 0.6, 0.0, 0.0]]], np.float32)
    chosen = jax.jit(post.select_masks)(scores, logits, truth, inside)
    np.testing.assert_array_equal(chosen.query, [[[1, 4], [0, 1]]])  # of the tied 0 and 3 the first
    np.testing.assert_array_equal(chosen.rank, [[[0, 2], [0, 3]]])
    np.testing.assert_allclose(chosen.score, [[[0.9, 0.4], [0.6, 0.1]]])
    np.testing.assert_array_equal(chosen.logits[0, 0, 1], logits[0, 0, 4])
    restored = post.upsample_and_count(chosen.logits, where, post.GroundTruth.plain(packed))
    np.testing.assert_array_equal(restored.intersection[..., 1], restored.union[..., 1])


def test_the_best_answer_to_nothing_is_nothing():
    _, logits, _, truth, inside = chosen_case()
    logits[0, 0, 3] = -1.0
    scores = np.full((1, 2, 6), 0.5, np.float32)
    assert jax.jit(post.select_masks)(scores, logits, 0 * truth, inside).query[0, 0].tolist() == [0, 3]


def test_padding_of_the_input_does_not_count_in_the_choice():
    # Candidate 0 equals the truth on the image and spills far over the padding; candidate 1 misses half of the truth.
    where = post.geometry(np.array([[48, 96]], np.int32), [(48, 96)], grid=GRID, padded_size=96)
    truth = np.zeros((1, 48, 96), bool)
    truth[0, 16:, 16:48] = True
    logits = np.full((1, 1, 2, *GRID), -1.0, np.float32)
    logits[0, 0, 0, 4:, 4:12] = 1
    logits[0, 0, 1, 4:8, 4:12] = 1
    packed = post.pack_truth([truth], 1, 1, where.bucket)
    chosen = post.select_masks(
        np.zeros((1, 1, 2), np.float32), logits, post.truth_on_grid(packed, where), post.image_on_grid(where)
    )
    assert chosen.query[0, 0, 1] == 0


def test_numbers_that_are_none_give_an_empty_mask():
    where, logits, packed, truth, inside = chosen_case()
    scores = np.full((1, 2, 6), np.nan, np.float32)
    scores[0, 0, 3] = 0.1  # the only number of phrase 0; phrase 1 has none
    broken = logits.copy()
    broken[0, 0, 3] = np.nan
    broken[0, 0, 5] = np.inf
    chosen = post.select_masks(scores, broken, truth, inside)
    assert chosen.query[0, 0, 0] == 3
    restored = post.upsample_and_count(chosen.logits, where, post.GroundTruth.plain(packed))
    np.testing.assert_array_equal(restored.finite[..., 0], [[False, False]])
    assert not np.asarray(restored.masks[..., 0, :, :]).any()
    area = np.unpackbits(packed, axis=-1).sum((-2, -1))
    np.testing.assert_array_equal(restored.intersection[..., 0], np.zeros((1, 2)))
    np.testing.assert_array_equal(restored.union[..., 0], area)


def test_top_orders_by_score():
    _, logits, _, _, _ = chosen_case()
    scores = np.array([[[0.1, 0.9, 0.2, np.nan, 0.4, 0.5], [0.6, 0.1, 0.2, 0.6, 0.0, 0.0]]], np.float32)
    # Features are a one for every cell: embeddings that are the masks.
    cells = math.prod(GRID)
    found = MaskCandidates(scores, logits.reshape(1, 2, 6, cells), np.eye(cells, dtype=np.float32).reshape(1, *GRID, cells))
    np.testing.assert_array_equal(found.mask_logits, logits)
    chosen = post.top_k_masks(found, 3)
    np.testing.assert_array_equal(chosen.query, [[[1, 5, 4], [0, 3, 2]]])
    np.testing.assert_array_equal(chosen.logits[0, 1, 1], logits[0, 1, 3])


def test_a_bucket_that_is_too_small_raises():
    with pytest.raises(ValueError, match="size bucket"):
        post.geometry(scaled_sizes([(100, 200)]), [(100, 200)], grid=GRID, padded_size=PADDED, bucket=(128, 128))


def test_ignored_pixels_count_for_nothing_and_overlaps_drop_out_of_the_sum():
    """Against NumPy, as LISA counts: ignored pixels leave both masks; where two parts lie, only the prediction counts."""
    rng = np.random.default_rng(3)
    original = (50, 70)
    scaled = scaled_sizes([original])
    where = post.geometry(scaled, [original], grid=GRID, padded_size=PADDED)
    parts = rng.random((2, 2, *original)) < 0.4  # [k, part]
    ignored = rng.random((1, *original)) < 0.2
    union, once = parts.any(1), parts.sum(1) == 1
    pack = lambda masks: post.pack_truth([masks], 1, len(masks), where.bucket)  # noqa: E731
    logits = smooth(rng, 1, 2, 1, *GRID)
    found = jax.jit(post.upsample_and_count)(logits, where, post.GroundTruth(pack(union), pack(once), pack(ignored)))
    for k in range(2):
        mask = post.unpack_mask(np.asarray(found.masks)[0, k, 0], original)
        for name, truth in (("", union[k]), ("single_cover_", once[k])):
            kept = ~ignored[0]
            assert getattr(found, f"{name}intersection")[0, k, 0] == (mask & truth & kept).sum()
            assert getattr(found, f"{name}union")[0, k, 0] == ((mask | truth) & kept).sum()
        assert found.area[0, k, 0] == (mask & kept).sum() < mask.sum()
    assert (found.single_cover_union != found.union).any() or (found.single_cover_intersection != found.intersection).any()

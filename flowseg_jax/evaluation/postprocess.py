"""From mask logits to exact masks at the original image size, on the device.

Selection comes first and upsampling last: of the Q candidates of a phrase only those that are used (the selected one; the best
one in an evaluation; the top few in a prediction) are refined by BAR and brought to the original size. The published route is
"upsample to the padded input, crop to the resized image, resize to the original, threshold". All of it is linear up to the
threshold, so it is two small matrices an image (`ops.resize.restore_matrices`), zero beyond the original size: their product is
exact whatever size bucket it is padded to. Intersections and unions are counted from packed bits in int32.

Everything is a pure function of arrays with static shapes. What depends on the size bucket (`truth_on_grid`, `restore`) is
apart from what does not (`choose`), so that the model compiles once however many image sizes there are.

B images, K phrases an image, Q queries, N masks that are used a phrase, h x w the mask logits, H x W the size bucket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from flowseg_jax.data.images import size_bucket
from flowseg_jax.models.outputs import MaskCandidates
from flowseg_jax.ops.resize import apply_matrices, restore_matrices

BLOCK = 1 << 22  # logits at the original size that exist at once, an image


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResizeMatrices:
    """How the mask grid of each image lies on its original pixels.

    Attributes:
        rows: float32 [B, H, h], cols: float32 [B, W, w]; `rows @ logits @ cols.T` are the logits at the original size, else 0.
        cover_rows: float32 [B, h, H], cover_cols: float32 [B, w, W]; share of a grid cell that each original pixel covers, so
            that `cover_rows @ mask @ cover_cols.T` is the covered share of every cell.
    """

    rows: Float[Array, "b H h"]
    cols: Float[Array, "b W w"]
    cover_rows: Float[Array, "b h H"]
    cover_cols: Float[Array, "b w W"]

    @property
    def bucket(self) -> tuple[int, int]:
        return self.rows.shape[1], self.cols.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows.shape[2], self.cols.shape[2]


def _coverage(cells: int, padded: int, scaled: int, original: int, out: int) -> np.ndarray:
    """[cells, out]: overlap of each original pixel with each cell of the padded input, as a share of the cell."""
    step = padded / cells * original / scaled  # one cell in original pixels
    start = np.arange(cells)[:, None] * step
    pixel = np.arange(out)[None]
    overlap = np.minimum(start + step, pixel + 1) - np.maximum(start, pixel)
    return np.where(pixel < original, np.maximum(overlap, 0.0) / step, 0.0).astype(np.float32)


def geometry(
    scaled: Int[np.ndarray, "b 2"],
    originals: Sequence[tuple[int, int]],
    *,
    grid: tuple[int, int],
    padded_size: int,
    bucket: tuple[int, int] | None = None,
) -> ResizeMatrices:
    """Builds the matrices of a batch on the host.

    Args:
        scaled: (h', w') of each resized image inside the padded input; rows after the last original are padding.
        originals: (height, width) of each image.
        grid: (h, w) of the mask logits, which cover the whole padded input.
        padded_size: side S of the padded input.
        bucket: (H, W); None: the smallest size buckets that hold the batch.
    """
    if bucket is None:
        bucket = (size_bucket(max(h for h, _ in originals)), size_bucket(max(w for _, w in originals)))
    if any(h > bucket[0] or w > bucket[1] for h, w in originals) or bucket[1] % 8:
        raise ValueError(f"size bucket {bucket} does not hold {list(originals)} or is no multiple of 8")
    b = len(scaled)
    rows, cols = np.zeros((b, bucket[0], grid[0]), np.float32), np.zeros((b, bucket[1], grid[1]), np.float32)
    cover_rows, cover_cols = np.zeros((b, grid[0], bucket[0]), np.float32), np.zeros((b, grid[1], bucket[1]), np.float32)
    for i, original in enumerate(originals):
        inner = (int(scaled[i][0]), int(scaled[i][1]))
        rows[i], cols[i] = restore_matrices(grid, padded_size, inner, original, bucket)
        cover_rows[i] = _coverage(grid[0], padded_size, inner[0], original[0], bucket[0])
        cover_cols[i] = _coverage(grid[1], padded_size, inner[1], original[1], bucket[1])
    return ResizeMatrices(rows, cols, cover_rows, cover_cols)


def pack_truth(truth: Sequence[Bool[np.ndarray, "k y x"]], batch: int, phrases: int, bucket: tuple[int, int]) -> np.ndarray:
    """Truth masks at their original sizes -> uint8 [B, K, H, W // 8], packed along the width (big end first), zero padded."""
    packed = np.zeros((batch, phrases, bucket[0], bucket[1] // 8), np.uint8)
    for i, masks in enumerate(truth):
        if len(masks):
            bits = np.packbits(np.asarray(masks, bool), axis=-1)
            packed[i, : bits.shape[0], : bits.shape[1], : bits.shape[2]] = bits
    return packed


def unpack_mask(packed: UInt8[np.ndarray, "H W8"], size: tuple[int, int]) -> Bool[np.ndarray, "y x"]:
    """The inverse of the packing for one mask of (height, width) `size`, on the host."""
    return np.unpackbits(packed[: size[0]], axis=-1, count=size[1]).astype(bool)


def _pack(bits: Bool[Array, "*s W"]) -> UInt8[Array, "*s W8"]:
    weights = (1 << jnp.arange(7, -1, -1, dtype=jnp.int32)).astype(jnp.uint8)
    return (bits.reshape(*bits.shape[:-1], -1, 8) * weights).sum(-1, dtype=jnp.uint8)


def _unpack(packed: UInt8[Array, "*s W8"]) -> Float[Array, "*s W"]:
    bits = (packed[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], -1).astype(jnp.float32)


def _count(packed: UInt8[Array, "*s y x"]) -> Int[Array, "*s"]:
    return jax.lax.population_count(packed).astype(jnp.int32).sum((-2, -1))


def truth_on_grid(truth: UInt8[Array, "b k H W8"], where: ResizeMatrices) -> Float[Array, "b k h w"]:
    """Share of every mask-logit cell that the truth covers, in [0, 1]."""

    def image(packed, rows, cols):  # one phrase at a time: the unpacked truth is the largest buffer here
        return jax.lax.map(lambda mask: apply_matrices(_unpack(mask), rows, cols), packed)

    return jax.vmap(image)(truth, where.cover_rows, where.cover_cols)


def image_on_grid(where: ResizeMatrices) -> Float[Array, "b h w"]:
    """Share of every mask-logit cell that lies on the image (0 on the padding)."""
    return where.cover_rows.sum(-1)[:, :, None] * where.cover_cols.sum(-1)[:, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectedMasks:
    """The candidates that are used, N a phrase.

    Attributes:
        query: int32 [B, K, N], which candidate.
        score: float32 [B, K, N], its score.
        logits: float32 [B, K, N, h, w], its mask logits, unrefined; NaN where its score is no number: no answer.
        rank: int32 [B, K, N], number of candidates with a higher score.
    """

    query: Int[Array, "b k n"]
    score: Float[Array, "b k n"]
    logits: Float[Array, "b k n h w"]
    rank: Int[Array, "b k n"]


def ranked(scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.where(jnp.isfinite(scores), scores, -jnp.inf)  # NaN would win every argmax


def _selected(scores: Float[Array, " q"], query: Int[Array, " n"], logits: Float[Array, "n h w"]) -> SelectedMasks:
    score = scores[query]
    rank = (ranked(scores)[None] > ranked(score)[:, None]).sum(-1, dtype=jnp.int32)
    used = jnp.where(jnp.isfinite(score)[:, None, None], logits, jnp.nan)
    return SelectedMasks(query.astype(jnp.int32), score, used, rank)


def iou_on_grid(logits: Float[Array, "q h w"], truth: Float[Array, "h w"], inside: Float[Array, "h w"]) -> Float[Array, " q"]:
    """IoU in [0, 1] of candidates with one truth on the mask grid, counting every cell by its share of truth and of image."""
    bits = (logits > 0).astype(jnp.float32).reshape(logits.shape[0], -1)
    sides = jnp.stack([truth.ravel(), inside.ravel()], 1)
    both, area = jnp.matmul(bits, sides, precision=jax.lax.Precision.HIGHEST).T
    union = area + truth.sum() - both
    return jnp.where(union > 0, both / jnp.maximum(union, 1e-6), 1.0)  # nothing found where nothing is


def select_masks(
    scores: Float[Array, "b k q"],
    logits: Float[Array, "b k q h w"],
    truth: Float[Array, "b k h w"],
    inside: Float[Array, "b h w"],
) -> SelectedMasks:
    """The selected candidate (N = 0) and the best one (N = 1) of every phrase.

    Selected is the highest score over all queries, without a threshold (X-SAM). Best is the highest IoU with the truth on the
    mask grid, counting every cell by its share of truth and of image. The first query wins a tie.

    Args:
        scores, logits: the candidates.
        truth: from `truth_on_grid`. inside: from `image_on_grid`.
    """

    def image(scores, logits, truth, inside):
        def one(phrase):  # one at a time: [q, h, w] bits as float32, never [k, q, h, w]
            scores, logits, truth = phrase
            query = jnp.stack([jnp.argmax(ranked(scores)), jnp.argmax(iou_on_grid(logits, truth, inside))])
            return _selected(scores, query, logits[query])

        return jax.lax.map(one, (scores, logits, truth))

    return jax.vmap(image)(scores, logits, truth, inside)


def top_k_masks(found: MaskCandidates, count: int) -> SelectedMasks:
    """The `count` candidates with the highest scores, best first (N = count); no mask of the others is computed."""
    _, query = jax.lax.top_k(ranked(found.scores), count)
    return jax.vmap(jax.vmap(_selected))(found.scores, query, found.mask_logits_of(query))


def top_candidates(model: Any, found: MaskCandidates, count: int) -> SelectedMasks:
    """The `count` best of the candidates that a model found, or all if there are fewer, refined by BAR.

    Args:
        model: a `FlowSeg`. found: what it found. count: static.
    """
    chosen = top_k_masks(found, min(count, found.scores.shape[-1]))
    return dataclasses.replace(chosen, logits=refine(model, chosen.logits, found.mask_features))


def refine(model: Any, logits: Float[Array, "b k n h w"], mask_features: Float[Array, "b h w f"]) -> Float[Array, "b k n h w"]:
    """BAR on the candidates that are used, by the model's `refine`."""
    b, k, n, *grid = logits.shape
    return model.refine_masks(logits.reshape(b, k * n, *grid), mask_features).reshape(logits.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """What masks are counted against, packed along the width (`pack_truth`).

    Attributes:
        union: uint8 [B, K, H, W // 8], objects as the union of their parts.
        single_cover: uint8 [B, K, H, W // 8], without the pixels that several parts cover.
        ignored: uint8 [B, 1, H, W // 8], pixels that count for nothing.
    """

    union: UInt8[Array, "b k H W8"]
    single_cover: UInt8[Array, "b k H W8"]
    ignored: UInt8[Array, "b 1 H W8"]

    @classmethod
    def plain(cls, union: UInt8[Array, "b k H W8"]) -> GroundTruth:
        """A truth in which no parts overlap and nothing is ignored."""
        return cls(union, union, union[:, :1] & 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullSizeMasks:
    """Masks at the original size.

    Attributes:
        masks: uint8 [B, K, N, H, W // 8], packed along the width, zero beyond the image.
        intersection, union: int32 [B, K, N], pixels that are not ignored, with the truth of the phrase.
        single_cover_intersection, single_cover_union: int32 [B, K, N], the same with `GroundTruth.single_cover`.
        area: int32 [B, K, N], pixels of the mask that are not ignored.
        finite: bool [B, K, N]; False where the logits held NaN or infinity: the mask is then empty.
    """

    masks: UInt8[Array, "b k n H W8"]
    intersection: Int[Array, "b k n"]
    union: Int[Array, "b k n"]
    single_cover_intersection: Int[Array, "b k n"]
    single_cover_union: Int[Array, "b k n"]
    area: Int[Array, "b k n"]
    finite: Bool[Array, "b k n"]


def upsample(
    logits: Float[Array, "b k n h w"], where: ResizeMatrices
) -> tuple[UInt8[Array, "b k n H W8"], Bool[Array, "b k n"]]:
    """Thresholds at logit > 0 at the original size (= sigmoid > 0.5, strict): `FullSizeMasks.masks` and `finite`."""
    finite = jnp.isfinite(logits).all((-2, -1))
    logits = jnp.where(finite[..., None, None], logits, -1.0)
    height, width = where.bucket
    logits_a_row = logits.shape[1] * logits.shape[2] * width
    # Blocks of rows bound the memory of huge images; one block for usual sizes.
    divisors = [n for n in range(1, height + 1) if height % n == 0]
    blocks = next((n for n in divisors if logits_a_row * (height // n) <= BLOCK), height)

    def image(logits, rows, cols):
        def block(rows):
            return _pack(jax.vmap(jax.vmap(lambda mask: apply_matrices(mask, rows, cols)))(logits) > 0)

        parts = jax.lax.map(block, rows.reshape(blocks, height // blocks, -1))  # [blocks, k, n, H / blocks, W / 8]
        return jnp.moveaxis(parts, 0, 2).reshape(*logits.shape[:2], height, width // 8)

    return jax.vmap(image)(logits, where.rows, where.cols), finite


def upsample_and_count(logits: Float[Array, "b k n h w"], where: ResizeMatrices, truth: GroundTruth) -> FullSizeMasks:
    """`upsample`, and what the masks have in common with the truth."""
    masks, finite = upsample(logits, where)
    counted = ~truth.ignored[:, :, None]

    def counts(wanted: UInt8[Array, "b k H W8"]) -> tuple[Array, Array]:
        wanted = wanted[:, :, None]
        return _count(masks & wanted & counted), _count((masks | wanted) & counted)

    return FullSizeMasks(masks, *counts(truth.union), *counts(truth.single_cover), _count(masks & counted), finite)

"""A small stand-in for the model and the data set: same interface, numbers that depend on image, text and phrase."""

from __future__ import annotations

import dataclasses
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from flowseg_jax.data.batch import IMAGE_TOKEN, NO_LABEL, NONE, Batch

SIDE, CELL, PHRASES, TEXT, QUERIES = 48, 4, 3, 24, 5


class Found(NamedTuple):
    scores: jax.Array
    mask_logits: jax.Array
    mask_features: jax.Array


class FakeSegmentor(nnx.Module):
    """Candidate q of any phrase: where the image is brighter than a threshold of q. The score follows the phrase's tokens."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.gain = nnx.Param(jnp.full((1,), 8.0))

    def segment(self, batch):
        b = batch.tokens.shape[0]
        grid = SIDE // CELL
        gray = batch.images.astype(jnp.float32).mean(-1).reshape(b, grid, CELL, grid, CELL).mean((2, 4)) / 255
        thresholds = (jnp.arange(QUERIES) + 0.5) / QUERIES
        logits = self.gain[0] * (gray[:, None, None] - thresholds[None, None, :, None, None])
        logits = jnp.broadcast_to(logits, (b, PHRASES, *logits.shape[2:]))
        said = batch.phrase_ids[:, None] == jnp.arange(PHRASES)[None, :, None]
        signature = (said * batch.tokens[:, None]).sum(-1).astype(jnp.float32)  # [b, k]
        scores = -jnp.abs(thresholds * 100 - (signature % 100)[..., None])
        return Found(scores, logits, gray[..., None])

    def refine(self, mask_logits, mask_features):
        return mask_logits + 0.3 * jnp.moveaxis(mask_features, -1, 1)


class Sample(NamedTuple):
    image_id: int
    file_name: str
    ann_id: int
    ref_id: int
    sentence_id: int
    sentence: str
    family: str
    prompt: str
    count: int = 1


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    batch: Batch
    samples: list
    truth: list
    once: list
    ignored: list
    images: list
    sizes: list


class EvalData(list):
    """The split as a list of batches; with `control`, image i is asked the sentences of image i + 1."""

    def __init__(self, scenes, batch, control=False):
        if control:
            texts = [[s.sentence for s in row] for _, row, _ in scenes]
            scenes = [
                (image, [s._replace(prompt=(t := texts[(i + 1) % len(texts)])[j % len(t)]) for j, s in enumerate(row)], truth)
                for i, (image, row, truth) in enumerate(scenes)
            ]
        super().__init__(batches(scenes, batch))
        self.samples = sum(len(row) for _, row, _ in scenes)


def parts():
    model = FakeSegmentor(rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def scene(rng, image_id, size, sentences):
    """An image of a bright disc in a dark one, with `sentences` samples."""
    y, x = np.mgrid[: size[0], : size[1]]
    cy, cx = rng.uniform(0.3, 0.7, 2) * size
    radius = np.hypot(y - cy, x - cx) / max(size)
    gray = 0.15 + 0.4 * (radius < 0.35) + 0.3 * (radius < 0.18)
    image = np.uint8(255 * np.clip(gray[..., None] + rng.normal(0, 0.01, (*size, 3)), 0, 1))
    samples, truth = [], []
    for j in range(sentences):
        text = f"object {image_id}.{j}"
        family = ("attribute", "relation")[j % 2]
        samples.append(Sample(image_id, f"{image_id}.jpg", 10 * image_id, image_id, 100 * image_id + j, text, family, text))
        truth.append(radius < (0.18, 0.35)[j % 2])
    return image, samples, np.array(truth)


def batches(scenes, batch):
    """Rows of at most PHRASES sentences, `batch` rows at a time, the last batch padded."""
    rows = []
    for image, samples, truth in scenes:
        rows += [(image, samples[i : i + PHRASES], truth[i : i + PHRASES]) for i in range(0, len(samples), PHRASES)]
    for start in range(0, len(rows), batch):
        yield _batch(rows[start : start + batch], batch)


def _batch(rows, size):
    images = np.zeros((size, SIDE, SIDE, 3), np.uint8)
    scaled = np.full((size, 2), SIDE, np.int32)
    tokens = np.zeros((size, TEXT), np.int32)
    phrase_ids = np.full((size, TEXT), NONE, np.int32)
    phrase_mask = np.full((size, PHRASES), NONE, np.int32)
    example = np.full(size, NONE, np.int64)
    tokens[:, :4] = IMAGE_TOKEN
    for b, (image, samples, _) in enumerate(rows):
        scaled[b] = [max(1, int(s * SIDE / max(image.shape[:2]) + 0.5)) for s in image.shape[:2]]
        small = Image.fromarray(image).resize((int(scaled[b][1]), int(scaled[b][0])), Image.Resampling.BILINEAR)
        images[b, : scaled[b][0], : scaled[b][1]] = np.asarray(small)
        for k, sample in enumerate(samples):
            at = 4 + 3 * k
            tokens[b, at : at + 2] = zlib.crc32(sample.prompt.encode()) % 90 + 1, 5
            phrase_ids[b, at : at + 2] = k
            phrase_mask[b, k] = 0
        example[b] = samples[0].image_id
    batch = Batch(
        images=images,
        scaled_size=scaled,
        vision_images=np.zeros((size, 8, 8, 3), np.uint8),
        tokens=tokens,
        positions=np.tile(np.arange(TEXT, dtype=np.int32), (size, 1)),
        segments=np.zeros((size, TEXT), np.int32),
        labels=np.full((size, TEXT), NO_LABEL, np.int32),
        phrase_ids=phrase_ids,
        seg_ids=np.full((size, TEXT), NONE, np.int32),
        masks=np.zeros((size, 1, SIDE, SIDE // 8), np.uint8),
        mask_valid=np.zeros((size, 1), bool),
        phrase_mask=phrase_mask,
        object_class=np.full((size, 1), NONE, np.int32),
        object_name=np.full((size, 1), NONE, np.int32),
        name_valid=np.zeros((size, 0), bool),
        example_id=example,
    )
    sizes = [r[0].shape[:2] for r in rows]
    truth = [r[2] for r in rows]
    nothing = [np.zeros((1, *size), bool) for size in sizes]
    return EvalBatch(batch, [r[1] for r in rows], truth, truth, nothing, [r[0] for r in rows], sizes)


def scenes(seed=0):
    rng = np.random.default_rng(seed)
    layout = [((60, 90), 2), ((90, 60), 5), ((200, 40), 1), ((48, 48), 3), ((140, 90), 2)]
    return [scene(rng, i + 1, size, n) for i, (size, n) in enumerate(layout)]

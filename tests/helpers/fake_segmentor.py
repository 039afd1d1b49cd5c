"""A small stand-in for the model and the data set: same interface, numbers that depend on image, text and phrase."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from flowseg_jax.data import collate, images
from flowseg_jax.data.eval_dataset import EvalBatch, QueryRound
from flowseg_jax.models import flowseg
from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.outputs import ImageCache, MaskCandidates
from flowseg_jax.types import PAD

SIDE, CELL, PHRASES, TEXT, QUERIES = 48, 4, 3, 24, 5
PREFIX = (3, 1, 4)


class FakeSegmentor(flowseg.FlowSeg):
    """Candidate q of any phrase: where the image is brighter than a threshold of q. The score follows the phrase's tokens."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.gain = nnx.Param(jnp.full((1,), 8.0))

    def prefill_image(self, views, prefix):
        b, grid = views.sam_images.shape[0], SIDE // CELL
        gray = views.sam_images.astype(jnp.float32).mean(-1).reshape(b, grid, CELL, grid, CELL).mean((2, 4)) / 255
        nothing = jnp.zeros((b, 1), jnp.int32)
        keys = jnp.full((1, b, 1, 1), prefix.sum(), jnp.float32)
        return ImageCache(jnp.stack([gray, jnp.ones_like(gray)], -1), (), KVCache(keys, keys, nothing, nothing))

    def predict_cached(self, seen, questions):
        b, k = questions.query_valid.shape
        thresholds = (jnp.arange(QUERIES) + 0.5) / QUERIES
        embeds = self.gain[0] * jnp.stack([jnp.ones(QUERIES), -thresholds], -1)
        said = questions.phrase_ids[:, None] == jnp.arange(k)[None, :, None]
        signature = (
            (said * questions.input_ids[:, None]).sum(-1).astype(jnp.float32) + seen.kv_cache.keys[0, :, :, 0] - sum(PREFIX)
        )
        scores = -jnp.abs(thresholds * 100 - (signature % 100)[..., None])
        return MaskCandidates(scores, jnp.broadcast_to(embeds, (b, k, QUERIES, 2)), seen.mask_features)

    def refine_masks(self, mask_logits, mask_features):
        return mask_logits + 0.3 * mask_features[:, None, ..., 0]


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


class EvalData:
    """The split as batches; with `control`, image i is asked the sentences of image i + 1."""

    prefix = np.array(PREFIX, np.int32)

    def __init__(self, scenes, batch, control=False, *, only=None, skip=(), rows=None):
        if control:
            texts = [[s.sentence for s in row] for _, row, _ in scenes]
            scenes = [
                (image, [s._replace(prompt=(t := texts[(i + 1) % len(texts)])[j % len(t)]) for j, s in enumerate(row)], truth)
                for i, (image, row, truth) in enumerate(scenes)
            ]
        self.scenes = [(i, *scene) for i, scene in enumerate(scenes) if (only is None or i in only) and i not in skip]
        self.samples = sum(len(row) for _, _, row, _ in self.scenes)
        self.size, self.rows = batch, range(batch) if rows is None else rows

    def __iter__(self):
        for start in range(0, len(self.scenes), self.size):
            yield self._batch(self.scenes[start : start + self.size])

    def _batch(self, group):
        bucket = tuple(images.size_bucket(max(image.shape[axis] for _, image, *_ in group)) for axis in (0, 1))
        rounds = -(-max(len(row) for _, _, row, _ in group) // PHRASES)
        group = [group[row] for row in self.rows if row < len(group)]
        pictures, sizes = [image for _, image, *_ in group], [image.shape[:2] for _, image, *_ in group]
        return EvalBatch(
            collate.collate_images([_pixels(image) for image in pictures], len(self.rows), (SIDE, 8)),
            [self._round(group, slice(r * PHRASES, (r + 1) * PHRASES)) for r in range(rounds)],
            [place for place, *_ in group],
            [np.zeros((1, *size), bool) for size in sizes],
            pictures,
            sizes,
            bucket,
        )

    def _round(self, group, part):
        samples, truth = [row[part] for _, _, row, _ in group], [truth[part] for *_, truth in group]
        said = [[_encoded(sample.prompt, k) for k, sample in enumerate(row)] for row in samples]
        shape = (len(self.rows), PHRASES, TEXT)
        return QueryRound(collate.collate_queries(said, shape, len(PREFIX), 0, ["fake"] * len(said)), samples, truth, truth)


def _encoded(prompt, k):
    return collate.TokenizedConversation([zlib.crc32(prompt.encode()) % 90 + 1, 5], [0, 0], [k, k], [PAD, PAD])


def _pixels(image):
    fitted, scaled = images.resize_and_pad(Image.fromarray(image), SIDE)
    return collate.ProcessedImage(fitted, scaled, np.zeros((8, 8, 3), np.uint8), np.zeros((0, SIDE, SIDE // 8), np.uint8))


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


def scenes(seed=0):
    rng = np.random.default_rng(seed)
    layout = [((60, 90), 2), ((90, 60), 5), ((200, 40), 1), ((48, 48), 3), ((140, 90), 2)]
    return [scene(rng, i + 1, size, n) for i, (size, n) in enumerate(layout)]

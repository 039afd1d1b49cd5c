"""Evaluation batches of a split, in order, each with the truth it is held against."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import grain
import numpy as np

from flowseg_jax.data import batching, images, masks
from flowseg_jax.data.batch import Batch, BatchShape
from flowseg_jax.data.batching import LengthBound, Pixels
from flowseg_jax.data.pipeline import open_tokenizer
from flowseg_jax.data.prepared import Entry, Prepared
from flowseg_jax.data.prompts import Prompts, check_phrase
from flowseg_jax.data.records import Example, Sample
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError

_DEFAULT_PROMPTS = Prompts()


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch to evaluate and what it is about. The lists have one entry for each real row.

    Attributes:
        batch: without targets; `phrase_mask` is 0 for a phrase that exists.
        samples: the row's samples, sample k is phrase k.
        truth: bool [k, H, W], the samples' masks at original size.
        once: bool [k, H, W], the same without the pixels that several parts of an object cover (`Annotation.once`).
        ignored: bool [1, H, W], pixels that count for nothing.
        images: uint8 [H, W, 3], the original image.
        sizes: (H, W).
    """

    batch: Batch
    samples: list[list[Sample]]
    truth: list[np.ndarray]
    once: list[np.ndarray]
    ignored: list[np.ndarray]
    images: list[np.ndarray]
    sizes: list[tuple[int, int]]


class EvalData:
    """All samples of a split, one per (annotation, unique lower-cased sentence), image by image.

    An image with more than K samples takes several rows; the last batch is padded.

    Args:
        prepared: the data set.
        split: which split.
        tokenizer: None for the one of the data set.
        shape: the batch's static shape.
        prompts: wording; the fixed one is used.
        visual_tokens: slots that the image takes in the sequence.
        max_images: only the first images of the split; None for all.
        control_seed: not None: the shuffled-text control. Every image is asked the sentences of another image
            (`Sample.prompt`); its own samples and truth stay.
        threads, prefetch: of the iteration; batches.

    Raises:
        UserError: an unknown split, or a row may need more text than the shape has.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: str,
        tokenizer: Tokenizer | None,
        shape: BatchShape,
        *,
        prompts: Prompts = _DEFAULT_PROMPTS,
        visual_tokens: int,
        max_images: int | None = None,
        control_seed: int | None = None,
        threads: int = 1,
        prefetch: int = 2,
    ):
        self.tokenizer = tokenizer or open_tokenizer(prepared, prompts)
        self.shape, self.split = shape, split
        self._prompts = dataclasses.replace(prompts, vary=False)
        self._visual_tokens = visual_tokens
        self._read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        entries = list(prepared.index(split)[:max_images])
        if control_seed is not None:
            entries = _shuffle_text(entries, control_seed, prepared.directory)
        bound = LengthBound(self._prompts, self.tokenizer, visual_tokens)
        if prepared.task not in ("referring", "reasoning"):
            raise UserError(f"{prepared.directory}: {prepared.task} data has no expressions to evaluate on")
        self._task = prepared.task
        batching.check_fit(entries, shape.phrases, shape, bound, (), all_objects=False, task=self._task)
        for entry in entries:
            for sample in entry.samples:
                check_phrase(sample.prompt, self.tokenizer, entry.file_name)
        self._source = prepared.source(split)
        k = shape.phrases
        self._rows = [(i, e.samples[at : at + k]) for i, e in enumerate(entries) for at in range(0, len(e.samples), k)]
        self.samples = sum(len(s) for _, s in self._rows)

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self._rows) / self.shape.batch)

    def batch(self, number: int) -> EvalBatch:
        """Batch `number` of the split."""
        first = number * self.shape.batch
        rows, asked, truth, once, ignored, originals, sizes = ([] for _ in range(7))
        read = functools.lru_cache(maxsize=1)(self._read_image)  # rows of one image lie next to each other
        for record, row_samples in self._rows[first : first + self.shape.batch]:
            example, original, pixels = read(record)
            objects = Objects.of(example)
            truth.append(np.stack([objects.union(sample) for sample in row_samples]))
            once.append(np.stack([objects.covered_once(sample) for sample in row_samples]))
            ignored.append(objects.ignored)
            originals.append(original)
            sizes.append((example.height, example.width))
            asked.append(list(row_samples))
            prompts = [s.prompt for s in row_samples]
            families = [s.family for s in row_samples] if self._task == "reasoning" else None
            rows.append(batching.question_row(example.file_name, pixels, prompts, self._prompts, example.image_id, families))
        batch = batching.assemble(rows, self.shape, self._prompts, self.tokenizer, self._visual_tokens)
        return EvalBatch(batch, asked, truth, once, ignored, originals, sizes)

    def _read_image(self, record: int) -> tuple[Example, np.ndarray, Pixels]:
        example = self._source[record]
        image = images.decode(example.image, name=example.file_name)
        return example, np.asarray(image), batching.prepare_pixels(image, (), self.shape)

    def __iter__(self) -> Iterator[EvalBatch]:
        return iter(grain.MapDataset.range(len(self)).map(self.batch).to_iter_dataset(self._read))


@dataclasses.dataclass(frozen=True)
class Objects:
    """The masks of an image's objects at its original size.

    Attributes:
        whole, once: bool [A, H, W], each object as the union of its parts, and where exactly one part covers it.
        ignored: bool [1, H, W], pixels that count for nothing.
    """

    whole: np.ndarray
    once: np.ndarray
    ignored: np.ndarray

    @classmethod
    def of(cls, example: Example) -> Objects:
        size = example.height, example.width
        whole = masks.decode([a.rle for a in example.annotations], *size).astype(bool)
        once = whole
        if any(a.once for a in example.annotations):
            once = masks.decode([a.once or a.rle for a in example.annotations], *size).astype(bool)
        ignored = [i for i, a in enumerate(example.annotations) if a.ignore]
        return cls(whole, once, whole[ignored].any(0, keepdims=True))

    def union(self, sample: Sample) -> np.ndarray:
        """bool [H, W]: what the sample refers to, empty if that is nothing."""
        return self.whole[list(sample.annotations)].any(0)

    def covered_once(self, sample: Sample) -> np.ndarray:
        """The same where the masks of the objects and of their parts, added up, are 1."""
        return self.once[list(sample.annotations)].sum(0, dtype=np.int32) == 1


def _shuffle_text(entries: list[Entry], seed: int, where: object) -> list[Entry]:
    """Gives every image the sentences of another one: a random cycle through all images."""
    if len(entries) < 2:
        raise UserError(f"{where}: the shuffled-text control needs at least two images")
    order = np.random.default_rng(seed).permutation(len(entries))
    result = list(entries)
    for here, other in zip(order, np.roll(order, 1), strict=True):
        texts = [s.sentence for s in entries[other].samples]
        asked = tuple(dataclasses.replace(s, prompt=texts[i % len(texts)]) for i, s in enumerate(entries[here].samples))
        result[here] = dataclasses.replace(entries[here], samples=asked)
    return result

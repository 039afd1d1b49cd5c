"""From a prepared data set to static-shape batches on the host, through Grain.

The order of training data is a pure function of (seed, step): batch `step` can be built without its predecessors, so that
resuming needs one integer and neither the number of threads, of workers nor of processes matters.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import multiprocessing.util
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from flowseg_jax.data import batching, images, masks, workers
from flowseg_jax.data.batch import NONE, Batch, BatchShape
from flowseg_jax.data.batching import LengthBound, Pixels, Row
from flowseg_jax.data.prepared import Entry, Prepared
from flowseg_jax.data.prompts import Prompts, check_phrase
from flowseg_jax.data.records import Annotation, Example, Sample, samples
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.errors import UserError, suggest

__all__ = ["EvalBatch", "EvalData", "Prepared", "TrainData", "TrainOptions", "open_tokenizer"]

_ANY = "*"
_DEFAULT_PROMPTS = Prompts()


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What training asks of an image.

    Attributes:
        objects: "all": every object of the image is a target (the generic pass needs this); "referred": only those asked for.
        include_generic: add a conversation that names all kinds of objects in the image; needs `objects="all"`.
        max_phrases: ask at most this many phrases an image; 0 for as many as the batch has room for.
        curriculum: ((until_step, {family: weight}), ...) in rising order: before `until_step`, phrases are drawn in proportion
            to their family's weight and never at weight 0. A family that is not listed has the weight of "*", or 0. Behind the
            last entry all phrases count alike.
        cache_bytes: decoded and resized images kept in memory, by all workers together; 0 for none.
        threads: that build batches, in each process.
        prefetch: batches that lie ready, of all workers together; at least two a worker.
        workers: processes that build batches, where threads of one do not keep up; 0 for none but this one. Neither this nor
            the three above change results.
    """

    objects: str = "all"
    include_generic: bool = False
    max_phrases: int = 0
    curriculum: tuple[tuple[int, Mapping[str, float]], ...] = ()
    cache_bytes: int = 1 << 29
    threads: int = 2
    prefetch: int = 8
    workers: int = 0

    def __post_init__(self):
        if self.objects not in ("all", "referred"):
            raise UserError(f"data.objects: unknown value {self.objects!r}{suggest(self.objects, ('all', 'referred'))}")
        if self.include_generic and self.objects != "all":
            raise UserError(
                "data.include_generic needs data.objects='all': a kind that is named must have its objects as targets"
            )
        steps = [until for until, _ in self.curriculum]
        if steps != sorted(set(steps)):
            raise UserError(f"data.curriculum: steps must rise, got {steps}")
        if any(w < 0 for _, weights in self.curriculum for w in weights.values()):
            raise UserError("data.curriculum: weights must not be negative")
        if self.workers < 0:
            raise UserError(f"data.workers must not be negative, got {self.workers}")


def open_tokenizer(prepared: Prepared, prompts: Prompts, directory: str | None = None) -> Tokenizer:
    """The tokenizer in `directory`, else the one trained when the data set was prepared."""
    place = directory or prepared.tokenizer_directory
    if place is None:
        raise UserError(
            f"{prepared.directory}: no tokenizer was trained for this data set; name the language model's tokenizer directory"
        )
    return load_tokenizer(place, needed=prompts.needed)


class _Cache:
    """Least recently used decoded images, bounded by bytes; safe with threads."""

    def __init__(self, limit: int):
        self._limit, self._used = limit, 0
        self._items: collections.OrderedDict[int, tuple[_Decoded, int]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int, make: Callable[[], _Decoded]) -> _Decoded:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key][0]
        value = make()
        size = value.pixels.nbytes + 2000  # and the small Python objects around them, roughly
        if size <= self._limit:
            with self._lock:
                if key not in self._items:
                    self._items[key] = value, size
                    self._used += size
                while self._used > self._limit:
                    self._used -= self._items.popitem(last=False)[1][1]
        return value


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """A stored image, decoded and resized."""

    image_id: int
    file_name: str
    annotations: tuple[Annotation, ...]
    samples: tuple[Sample, ...]
    pixels: Pixels


def _decode(example: Example, shape: BatchShape) -> _Decoded:
    image = images.decode(example.image, name=example.file_name)
    pixels = batching.prepare_pixels(image, example.annotations, shape)
    annotations = tuple(dataclasses.replace(a, rle="") for a in example.annotations)  # packed now: no need to keep the codes
    return _Decoded(example.image_id, example.file_name, annotations, samples(example), pixels)


class TrainData:
    """Training batches.

    Args:
        prepared: the data set.
        shape: the static shape of the *global* batch.
        prompts: wording.
        seed: of order, phrases and wording.
        visual_tokens: slots that the image takes in the sequence (the model says how many).
        tokenizer: None for the one of the data set.
        split: which split.
        options: what is asked of an image.
        rows: which rows of each global batch this process builds, and in which order; None for all of them. What a row holds
            depends on (seed, step, row) alone, whoever builds it.

    Raises:
        UserError: an image may need more text or masks than the shape has; an unknown split or family.
        ValueError: a row twice, or one that the global batch does not have.
    """

    def __init__(
        self,
        prepared: Prepared,
        shape: BatchShape,
        prompts: Prompts,
        seed: int,
        *,
        visual_tokens: int,
        tokenizer: Tokenizer | None = None,
        split: str = "train",
        options: TrainOptions = TrainOptions(),
        rows: Sequence[int] | None = None,
    ):
        self.tokenizer = tokenizer or open_tokenizer(prepared, prompts)
        self._prompts, self._options, self._seed, self._visual_tokens = prompts, options, seed, visual_tokens
        self._categories = prepared.categories
        if seed < 0:
            raise UserError(f"seed must not be negative, got {seed}")
        self._global_batch, self._rows = shape.batch, _check_rows(rows, shape.batch)
        self.shape = dataclasses.replace(shape, batch=len(self._rows))
        self._phrases = min(options.max_phrases or shape.phrases, shape.phrases)
        if options.objects == "referred" and shape.masks < self._phrases:
            raise UserError(f"the batch has room for {shape.masks} masks, fewer than its {self._phrases} phrases")
        entries = prepared.index(split)
        if not entries:
            raise UserError(f"{prepared.directory}: split {split!r} has no images")
        families = prepared.families(split)
        for _, weights in options.curriculum:
            for family in weights:
                if family != _ANY and family not in families:
                    raise UserError(f"data.curriculum: split {split!r} has no family {family!r}{suggest(family, families)}")
        bound = LengthBound(prompts, self.tokenizer, visual_tokens)
        names = prepared.categories if options.include_generic else ()
        batching.check_fit(entries, self._phrases, shape, bound, names, options.objects == "all")
        self.images = len(entries)
        self.prepared, self._split = prepared, split
        self._open(options.cache_bytes)

    def _open(self, cache_bytes: int) -> None:
        self._source = self.prepared.source(self._split)
        self._cache = _Cache(cache_bytes)
        self._order = functools.lru_cache(maxsize=4)(self._permutation)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker is sent: no locks, open files or images, nor the index, which only `__init__` needs."""
        return {key: value for key, value in vars(self).items() if key not in ("_source", "_cache", "_order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open(self._options.cache_bytes // max(self._options.workers, 1))

    def _permutation(self, epoch: int) -> np.ndarray:
        # Not Grain's shuffle: it needs milliseconds an index for a handful of images (overfitting one batch).
        return np.random.default_rng((self._seed, 0, epoch)).permutation(self.images)

    def _weights(self, step: int) -> Mapping[str, float] | None:
        for until, weights in self._options.curriculum:
            if step < until:
                return weights
        return None

    def _choose(self, asked: Sequence[Sample], step: int, rng: np.random.Generator) -> list[Sample]:
        """At most K samples, without replacement, in random order; families weighted by the curriculum."""
        draws = rng.exponential(size=len(asked))  # the smallest of draw / weight win: weighted sampling without replacement
        weights = self._weights(step)
        if weights is None:
            keyed = list(zip(draws, range(len(asked)), strict=True))
        else:
            each = [weights.get(s.family, weights.get(_ANY, 0.0)) for s in asked]
            keyed = [(draw / w, i) for i, (draw, w) in enumerate(zip(draws, each, strict=True)) if w > 0]
        return [asked[i] for _, i in sorted(keyed)[: self._phrases]]

    def _row(self, position: int, step: int) -> Row:
        """Row at `position` of the endless stream of images."""
        epoch, place = divmod(position, self.images)
        record = int(self._order(epoch)[place])
        decoded = self._cache.get(record, lambda: _decode(self._source[record], self.shape))
        rng = np.random.default_rng((self._seed, 1, position))
        name = decoded.file_name
        chosen = self._choose(decoded.samples, step, rng)
        conversations = []
        for number, sample in enumerate(chosen):
            check_phrase(sample.sentence, self.tokenizer, name)
            conversations.append(self._prompts.referring(sample.sentence, number, rng))
        targets = list(range(len(decoded.annotations)))
        if self._options.objects == "referred":
            targets = sorted({s.annotation for s in chosen})
        classes = [NONE if decoded.annotations[t].crowd else decoded.annotations[t].category for t in targets]
        bears = [NONE] * len(targets)
        kinds = sorted({c for c in classes if c != NONE})
        if self._options.include_generic and kinds:
            kinds = [kinds[i] for i in rng.permutation(len(kinds))]
            bears = [NONE if c == NONE else kinds.index(c) for c in classes]
            conversations.append(self._prompts.generic([self._categories[c] for c in kinds], self.shape.phrases, rng))
        pixels = decoded.pixels
        if len(targets) != len(pixels.masks):
            pixels = dataclasses.replace(pixels, masks=pixels.masks[targets])
        phrase_mask = [targets.index(s.annotation) for s in chosen]
        return Row(name, pixels, conversations, phrase_mask, classes, bears, decoded.image_id)

    def batch(self, step: int) -> Batch:
        """This process's rows of global batch `step`: row r is the image at position step * B + r of the stream."""
        rows = [self._row(step * self._global_batch + row, step) for row in self._rows]
        return batching.assemble(rows, self.shape, self._prompts, self.tokenizer, self._visual_tokens)

    def iterate(self, start_step: int = 0) -> Batches:
        """Endless batches from `start_step` on, built ahead by threads or by workers; close it when done.

        Workers start with the first batch that is asked for. As they import the main module, it must be guarded by
        `if __name__ == "__main__"`.
        """
        threads, count = self._options.threads, self._options.workers
        # A worker's batches lie ready behind it, half in its queue and half in this process, not in front of it.
        ahead = threads if count else self._options.prefetch
        steps = grain.MapDataset.range(start_step, 1 << 40).map(self.batch)
        batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        if count:
            if not flags.FLAGS.is_parsed():  # Grain's flags have their defaults: our commands do not use absl's
                flags.FLAGS.mark_as_parsed()
            queue = max(self._options.prefetch // (2 * count), 1)
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(count, queue), worker_init_fn=_start_worker)
        return Batches(iter(batches))


def _check_rows(rows: Sequence[int] | None, batch: int) -> tuple[int, ...]:
    rows = tuple(range(batch) if rows is None else rows)
    if not rows or len(set(rows)) < len(rows) or not set(rows) <= set(range(batch)):
        raise ValueError(f"rows must be distinct and among 0..{batch - 1}, the rows of the global batch; got {list(rows)}")
    return rows


def _start_worker(index: int, count: int) -> None:
    """Runs in each worker before it reads any data."""
    workers.start(signal.SIGINT, signal.SIGTERM)
    jax.config.update("jax_platforms", "cpu")  # should anything here compute with JAX: the accelerators are the trainer's
    multiprocessing.util.Finalize(None, _leave, exitpriority=-10)  # behind its queues, which deliver what they hold at -5


def _leave() -> None:
    # `close` waits for one worker after the other: none should finish what its threads have begun, nor take Python down first.
    if sys.exception() is None:
        os._exit(0)


class Batches(Iterator[Batch]):
    """Batches that threads or workers build ahead; `close` ends those.

    What fails in a worker is raised here as it was raised there.

    Raises:
        UserError: a worker was killed.
    """

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if died := re.match(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error)):
                raise UserError(
                    f"a data worker died with exit code {died[1]}; if it ran out of memory (-9) or of shared memory (-7), "
                    "set data.workers or data.prefetch lower, or make /dev/shm larger"
                ) from None
            raise

    def close(self) -> None:
        """Ends the threads or workers; safe to call twice."""
        self._batches.close()


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch to evaluate and what it is about. The lists have one entry for each real row.

    Attributes:
        batch: without targets; `phrase_mask` is 0 for a phrase that exists.
        samples: the row's samples, sample k is phrase k.
        truth: bool [k, H, W], the samples' masks at original size.
        images: uint8 [H, W, 3], the original image.
        sizes: (H, W).
    """

    batch: Batch
    samples: list[list[Sample]]
    truth: list[np.ndarray]
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
        batching.check_fit(entries, shape.phrases, shape, bound, (), all_objects=False)
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
        rows, asked, truth, originals, sizes = [], [], [], [], []
        read = functools.lru_cache(maxsize=1)(self._read_image)  # rows of one image lie next to each other
        for record, row_samples in self._rows[first : first + self.shape.batch]:
            example, original, pixels = read(record)
            rles = [example.annotations[s.annotation].rle for s in row_samples]
            truth.append(masks.decode(rles, example.height, example.width).astype(bool))
            originals.append(original)
            sizes.append((example.height, example.width))
            asked.append(list(row_samples))
            prompts = [s.prompt for s in row_samples]
            rows.append(batching.question_row(example.file_name, pixels, prompts, self._prompts, example.image_id))
        batch = batching.assemble(rows, self.shape, self._prompts, self.tokenizer, self._visual_tokens)
        return EvalBatch(batch, asked, truth, originals, sizes)

    def _read_image(self, record: int) -> tuple[Example, np.ndarray, Pixels]:
        example = self._source[record]
        image = images.decode(example.image, name=example.file_name)
        return example, np.asarray(image), batching.prepare_pixels(image, (), self.shape)

    def __iter__(self) -> Iterator[EvalBatch]:
        return iter(grain.MapDataset.range(len(self)).map(self.batch).to_iter_dataset(self._read))


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

"""From a prepared data set to static-shape batches on the host, through Grain.

The order of training data is a pure function of (seed, step): batch `step` can be built without its predecessors, so that
resuming needs one integer and neither the number of threads nor of processes matters.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from flowseg_jax.data import batching, images, masks
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
        cache_bytes: decoded and resized images kept in memory; 0 for none. Does not change results.
        threads, prefetch: of `TrainData.iterate`; batches.
    """

    objects: str = "all"
    include_generic: bool = False
    max_phrases: int = 0
    curriculum: tuple[tuple[int, Mapping[str, float]], ...] = ()
    cache_bytes: int = 1 << 29
    threads: int = 2
    prefetch: int = 8

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


def _check_fit(
    entries: Sequence[Entry],
    phrases_at_most: int,
    shape: BatchShape,
    bound: LengthBound,
    names: Sequence[str],
    all_objects: bool,
) -> None:
    """Refuses a shape that some image would overflow, before training instead of in the middle of it."""
    asked = sorted({s.prompt for e in entries for s in e.samples})
    length = dict(zip(asked, bound.phrase_lengths(asked), strict=True))
    name_length = bound.phrase_lengths(names)
    worst, worst_entry = 0, None
    for entry in entries:
        if all_objects and len(entry.categories) > shape.masks:
            raise UserError(
                f"{entry.file_name}: has {len(entry.categories)} objects, but the batch has room for {shape.masks} masks; "
                "raise the number of masks or set data.objects='referred'"
            )
        longest = sorted((length[s.prompt] for s in entry.samples), reverse=True)[:phrases_at_most]
        kinds = sorted({c for c in entry.categories if c != NONE}) if names else []
        needed = bound.needed(longest, [name_length[c] for c in kinds])
        if needed > worst:
            worst, worst_entry = needed, entry
    if worst > shape.text:
        raise UserError(
            f"{worst_entry.file_name}: may need {worst} tokens, more than the text length {shape.text}; "
            "raise the text length or ask fewer phrases per image"
        )


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
        shard: (index, count) of this process: it builds rows [index * B / count, (index + 1) * B / count) of each global batch.

    Raises:
        UserError: an image may need more text or masks than the shape has; an unknown split or family.
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
        shard: tuple[int, int] = (0, 1),
    ):
        self.tokenizer = tokenizer or open_tokenizer(prepared, prompts)
        self._prompts, self._options, self._seed, self._visual_tokens = prompts, options, seed, visual_tokens
        self._categories = prepared.categories
        if seed < 0:
            raise UserError(f"seed must not be negative, got {seed}")
        if shape.batch % shard[1]:
            raise UserError(f"batch_size {shape.batch} does not divide by {shard[1]} processes")
        rows = shape.batch // shard[1]
        self._global_batch, self._first_row = shape.batch, shard[0] * rows
        self.shape = dataclasses.replace(shape, batch=rows)
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
        _check_fit(entries, self._phrases, shape, bound, names, options.objects == "all")
        self._source = prepared.source(split)
        self._cache = _Cache(options.cache_bytes)
        self._order = functools.lru_cache(maxsize=4)(self._permutation)
        self.images = len(entries)

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
        """This process's rows of global batch `step`."""
        first = step * self._global_batch + self._first_row
        rows = [self._row(first + i, step) for i in range(self.shape.batch)]
        return batching.assemble(rows, self.shape, self._prompts, self.tokenizer, self._visual_tokens)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Endless batches from `start_step` on, built ahead by threads."""
        options = grain.ReadOptions(num_threads=self._options.threads, prefetch_buffer_size=self._options.prefetch)
        return iter(grain.MapDataset.range(start_step, 1 << 40).map(self.batch).to_iter_dataset(options))


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
        _check_fit(entries, shape.phrases, shape, bound, (), all_objects=False)
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

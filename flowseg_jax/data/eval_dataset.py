"""Evaluation batches of a split: images that are encoded once, and rounds of expressions about them.

The images of a batch have about as many expressions, of about the same length, so that little is padding; the order in which
they come is therefore not the split's, and every image carries its place in it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import grain
import numpy as np

from flowseg_jax.data import collate, images, masks
from flowseg_jax.data.collate import ProcessedImage
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.eval_plan import PHRASE_BUCKETS, BatchPlans, ConversationLengths, RoundShape, bucket_shape
from flowseg_jax.data.index import Index, IndexEntry
from flowseg_jax.data.prompts import PromptTemplates, check_phrase
from flowseg_jax.data.records import Example, Sample
from flowseg_jax.data.token_budget import TokenBudget
from flowseg_jax.data.token_lengths import TokenLengths, count_phrases
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.data.train_dataset import open_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.types import BatchShape, ExpressionQueries, ImageInputs, PromptQueries

_DEFAULT_PROMPTS = PromptTemplates()


@dataclasses.dataclass(frozen=True)
class QueryRound:
    """Up to K expressions about each image of a batch. The lists have one entry for each real row.

    Attributes:
        questions: the prompts, with the answers unless the model writes them itself (`PromptQueries`).
        samples: the row's samples, sample k is phrase k.
        truth: bool [k, H, W], the samples' masks at original size; with `filled_polygons`, their polygons filled on whole
            points.
        single_cover: bool [k, H, W], the same without the pixels that several parts of an object cover
            (`Annotation.rle_single_cover`).
    """

    questions: ExpressionQueries | PromptQueries
    samples: list[list[Sample]]
    truth: list[np.ndarray]
    single_cover: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """Images to evaluate and the rounds of expressions about them. The lists have one entry for each real row.

    Attributes:
        views: the images; missing rows are black.
        rounds: the expressions, a part of them per round.
        places: the images' places in the split.
        ignored: bool [1, H, W], pixels that count for nothing.
        images: uint8 [H, W, 3], the original image.
        sizes: (H, W).
        bucket: padded (H, W).
    """

    views: ImageInputs
    rounds: list[QueryRound]
    places: list[int]
    ignored: list[np.ndarray]
    images: list[np.ndarray]
    sizes: list[tuple[int, int]]
    bucket: tuple[int, int]


class EvalDataset:
    """All samples of a split, one per (annotation, unique lower-cased sentence) or one per ref.

    Args:
        prepared: the data set.
        split: which split.
        tokenizer: None for the one of the data set.
        sides: S and V, pixels of the two encoders' square inputs.
        batch: images at a time.
        prompts: prompt template; the fixed one is used.
        visual_tokens: slots that the image takes in the sequence.
        max_images: only the first images of the split; None for all.
        control_seed: not None: the shuffled-text control. Every image gets the sentences of another image
            (`Sample.prompt`); its own samples and truth stay.
        by_ref: ask once a ref, with all of its sentences in one (protocols of unit "ref").
        generate: ask without answers: the model writes them itself.
        filled_polygons: hold the answers against polygons filled on whole points (protocols of raster "fill_points").
        only: places of the images to evaluate; None for all.
        skip: places of images to leave out.
        rows: which rows of each batch to build, in this order (a process's own); None for all.
        threads, prefetch: of the iteration; batches.

    Attributes:
        samples: how many there are in all rows.
        prefix: int32 [P], token ids that every conversation begins with, the image's slots at the end.

    Raises:
        UserError: an unknown split, a data set without expressions, `by_ref` of questions that have no refs, or an expression
            with a special token of the tokenizer.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        split: str,
        tokenizer: Tokenizer | None,
        *,
        sides: tuple[int, int],
        batch: int,
        prompts: PromptTemplates = _DEFAULT_PROMPTS,
        visual_tokens: int,
        max_images: int | None = None,
        control_seed: int | None = None,
        by_ref: bool = False,
        generate: bool = False,
        filled_polygons: bool = False,
        only: Collection[int] | None = None,
        skip: Collection[int] = (),
        rows: Sequence[int] | None = None,
        threads: int = 1,
        prefetch: int = 2,
    ):
        self.tokenizer = tokenizer or open_tokenizer(prepared, prompts)
        self.split = split
        self._prompts = dataclasses.replace(prompts, randomize=False)
        self._shape = BatchShape(batch, 0, PHRASE_BUCKETS[-1], 0, *sides)
        self._rows = range(batch) if rows is None else rows
        self._read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        if by_ref and prepared.task == "reasoning":
            raise UserError(
                f"{prepared.directory}: reasoning questions have no refs whose sentences belong together; "
                "choose a protocol that asks sentence by sentence, such as xsam"
            )
        self._filled_polygons, self._generate = filled_polygons, generate
        self._entries: Sequence[IndexEntry] = _Entries(prepared.index(split), max_images, by_ref)
        if control_seed is not None:
            self._entries = _ShuffledText(self._entries, control_seed, prepared.directory)
        if prepared.task not in ("referring", "reasoning"):
            raise UserError(f"{prepared.directory}: {prepared.task} data has no expressions to evaluate on")
        self._task = prepared.task
        if by_ref or control_seed is not None or max_images is not None:
            counts, phrases = count_phrases(self._entries, self.tokenizer)
        else:
            counts, phrases = TokenLengths(prepared, split, self.tokenizer).phrases()
        wanted = counts > 0
        if only is not None:
            wanted &= np.isin(np.arange(len(counts)), list(only))
        wanted[[place for place in skip if place < len(counts)]] = False
        places, evaluated = np.flatnonzero(wanted), np.repeat(wanted, counts)
        for place in np.unique(np.repeat(np.arange(len(counts)), counts)[evaluated & (phrases == 0)]).tolist():
            entry = self._entries[place]
            for sample in entry.samples:
                check_phrase(sample.prompt, self.tokenizer, entry.file_name)
        bound = TokenBudget(self._prompts, self.tokenizer, visual_tokens)
        # Of an answer that is given, so with some room where it is not.
        self._longest = bucket_shape(1, bound.conversation(int(phrases.max(initial=0)), self._task))[1]
        lengths = ConversationLengths(bound.conversation(phrases[evaluated], self._task), np.cumsum(counts[places]))
        self.planned = BatchPlans(places, prepared.index(split).columns("height", "width")[places], lengths, batch)
        self.samples = len(lengths.values)
        self.prefix = np.array(collate.encode_prefix(self._prompts, self.tokenizer, visual_tokens), np.int32)
        self._source = prepared.source(split)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.planned)

    def batch(self, number: int) -> EvalBatch:
        """Batch `number`; of it, the rows of this process."""
        planned, most = self.planned[number], PHRASE_BUCKETS[-1]
        places = [planned.images[row] for row in self._rows if row < len(planned.images)]
        read = [self._read_image(place) for place in places]
        objects = [ObjectMasks.of(example) for example, *_ in read]
        entries = {place: self._entries[place] for place in places}
        rounds = []
        for number, shape in enumerate(planned.rounds):
            samples = [list(entries[i].samples[number * most : (number + 1) * most]) for i in places]
            rounds.append(self._round(shape, samples, objects, [example.file_name for example, *_ in read]))
        return EvalBatch(
            collate.collate_images(
                [pixels for *_, pixels in read], len(self._rows), (self._shape.sam_size, self._shape.siglip_size)
            ),
            rounds,
            places,
            [one.ignored for one in objects],
            [original for _, original, _ in read],
            [(example.height, example.width) for example, *_ in read],
            planned.bucket,
        )

    def _round(
        self, shape: RoundShape, samples: list[list[Sample]], objects: Sequence[ObjectMasks], names: Sequence[str]
    ) -> QueryRound:
        conversations = []
        for row in samples:
            families = [s.style for s in row] if self._task == "reasoning" else None
            conversations.append(collate.make_conversations(self._prompts, [s.prompt for s in row], families))
        rows, start, pad = len(self._rows), len(self.prefix), self.tokenizer.pad
        if self._generate:
            ids = [[collate.encode_question(c, self._prompts, self.tokenizer) for c in row] for row in conversations]
            questions = PromptQueries.of(ids, (rows, shape[0], self._longest))
        else:
            encoded = [
                [collate.encode_conversation(c, self._prompts, self.tokenizer, name) for c in row]
                for row, name in zip(conversations, names, strict=True)
            ]
            questions = collate.collate_queries(encoded, (rows, *shape), start, pad, names)
        return QueryRound(
            questions,
            samples,
            [
                one.stack(functools.partial(one.union, filled_polygons=self._filled_polygons), row)
                for one, row in zip(objects, samples, strict=True)
            ],
            [one.stack(one.sample_single_cover, row) for one, row in zip(objects, samples, strict=True)],
        )

    def _read_image(self, place: int) -> tuple[Example, np.ndarray, ProcessedImage]:
        example = self._source[place]
        image = images.decode(example.image, name=example.file_name)
        return example, np.asarray(image), collate.prepare_pixels(image, (), self._shape)

    def __iter__(self) -> Iterator[EvalBatch]:
        return iter(grain.MapDataset.range(len(self)).map(self.batch).to_iter_dataset(self._read))


@dataclasses.dataclass(frozen=True)
class ObjectMasks:
    """The masks of an image's objects at its original size.

    Attributes:
        whole, single_cover, filled_polygons: bool [A, H, W], each object as the union of its parts, where exactly one part
            covers it, and with its polygons filled on whole points.
        ignored: bool [1, H, W], pixels that count for nothing.
    """

    whole: np.ndarray
    single_cover: np.ndarray
    filled_polygons: np.ndarray
    ignored: np.ndarray

    @classmethod
    def of(cls, example: Example) -> ObjectMasks:
        size = example.height, example.width
        whole = masks.decode([a.rle for a in example.annotations], *size).astype(bool)

        def drawn(as_drawn: list[str]) -> np.ndarray:
            if not any(as_drawn):
                return whole
            rles = [other or a.rle for other, a in zip(as_drawn, example.annotations, strict=True)]
            return masks.decode(rles, *size).astype(bool)

        single_cover, filled = (
            drawn([a.rle_single_cover for a in example.annotations]),
            drawn([a.rle_filled_polygons for a in example.annotations]),
        )
        ignored = [i for i, a in enumerate(example.annotations) if a.ignore]
        return cls(whole, single_cover, filled, whole[ignored].any(0, keepdims=True))

    def stack(self, draw: Callable[[Sample], np.ndarray], samples: Sequence[Sample]) -> np.ndarray:
        """bool [k, H, W]: what `draw`, one of the methods below, makes of each sample."""
        return np.stack([draw(sample) for sample in samples]) if samples else np.zeros((0, *self.whole.shape[1:]), bool)

    def union(self, sample: Sample, filled_polygons: bool = False) -> np.ndarray:
        """bool [H, W]: what the sample refers to, empty if that is nothing; `filled_polygons`: drawn as PSALM draws it."""
        return (self.filled_polygons if filled_polygons else self.whole)[list(sample.annotations)].any(0)

    def sample_single_cover(self, sample: Sample) -> np.ndarray:
        """The same where the masks of the objects and of their parts, added up, are 1."""
        return self.single_cover[list(sample.annotations)].sum(0, dtype=np.int32) == 1


class _Entries(Sequence[IndexEntry]):
    """The first entries of a split, by ref or as they are."""

    def __init__(self, index: Index, most: int | None, by_ref: bool):
        self._index, self._by_ref = index, by_ref
        self._length = len(range(len(index))[:most])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> IndexEntry:
        entry = self._index[place]
        return entry.by_ref if self._by_ref else entry

    def __iter__(self) -> Iterator[IndexEntry]:
        return (entry.by_ref if self._by_ref else entry for entry in itertools.islice(self._index, self._length))


class _ShuffledText(Sequence[IndexEntry]):
    """Gives every image the sentences of another one: a random cycle through all images."""

    def __init__(self, entries: Sequence[IndexEntry], seed: int, where: object):
        with_text = np.array([i for i, entry in enumerate(entries) if entry.samples])
        if len(with_text) < 2:
            raise UserError(f"{where}: the shuffled-text control needs at least two images with expressions")
        order = np.random.default_rng(seed).permutation(with_text)
        self._entries, self._other = entries, np.arange(len(entries))
        self._other[order] = np.roll(order, 1)
        if all(sample.prompt == sample.sentence for entry in self for sample in entry.samples):
            raise UserError(f"{where}: all images have the same sentences, so shuffling them is no control")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, place: int) -> IndexEntry:
        if not 0 <= place < len(self):
            raise IndexError(f"image {place} of {len(self)}")
        entry, others = self._entries[place], self._entries[int(self._other[place])].samples
        prompts = [{"prompt": s.sentence, "style": s.family} for s in others]
        samples = tuple(dataclasses.replace(s, **prompts[i % len(prompts)]) for i, s in enumerate(entry.samples))
        return dataclasses.replace(entry, samples=samples)

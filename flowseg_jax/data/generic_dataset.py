"""Evaluation batches of a split with categories: the model looks for all of them in every image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence

import grain
import numpy as np

from flowseg_jax.data import collate, images
from flowseg_jax.data.collate import TrainExample
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.prompts import PromptTemplates, check_phrase
from flowseg_jax.data.records import Example
from flowseg_jax.data.token_budget import TokenBudget
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.types import Batch, BatchShape

TEXT_STEP = 16  # text lengths are multiples of it, so that similar data sets share compilations


@dataclasses.dataclass(frozen=True)
class CategoryPrompts:
    """How the categories are divided into conversations: `size` names each, the last one perhaps fewer.

    Attributes:
        categories: their names.
        size: names a conversation.
    """

    categories: tuple[str, ...]
    size: int

    @classmethod
    def of(cls, categories: tuple[str, ...], at_most: int = 0) -> CategoryPrompts:
        """As few conversations as `at_most` names each allow (0: one), of about equal length."""
        return cls(categories, math.ceil(len(categories) / math.ceil(len(categories) / (at_most or len(categories)))))

    @property
    def count(self) -> int:
        return math.ceil(len(self.categories) / self.size)

    def chunks(self) -> list[tuple[str, ...]]:
        return [self.categories[at : at + self.size] for at in range(0, len(self.categories), self.size)]


@dataclasses.dataclass(frozen=True)
class GenericBatch:
    """Images in which all categories are looked for; the lists have one entry for each real row.

    Attributes:
        inputs: without targets.
        places: where each image stands in the split.
        examples: the images with their objects, without their pixels.
        sizes: (H, W) of each.
        bucket: padded (H, W), of the whole batch.
    """

    inputs: Batch
    places: list[int]
    examples: list[Example]
    sizes: list[tuple[int, int]]
    bucket: tuple[int, int]


class GenericDataset:
    """The images of a split, in order; the last batch is padded.

    Args:
        prepared: a data set of task "generic".
        split: which split.
        tokenizer: None for a model without language.
        category_prompts: how the categories are asked for.
        batch: images at a time.
        sides: S and V, pixels of the two encoders' square inputs.
        visual_tokens: slots that the image takes in the sequence.
        prompts: prompt templates; the fixed one is used.
        max_images: only the first images of the split; None for all.
        skip: places in the split that are left out.
        rows: which rows of each batch to build, in this order (a process's own); None for all.

    Attributes:
        samples: how many images there are in all rows.

    Raises:
        UserError: an unknown split, or a category name that contains a special token.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        split: str,
        tokenizer: Tokenizer | None,
        category_prompts: CategoryPrompts,
        *,
        batch: int,
        sides: tuple[int, int],
        visual_tokens: int,
        prompts: PromptTemplates,
        max_images: int | None = None,
        skip: Collection[int] = (),
        rows: Sequence[int] | None = None,
    ):
        prompts = dataclasses.replace(prompts, randomize=False)
        self._source, self._batch = prepared.source(split), batch
        self._sizes = prepared.index(split).columns("height", "width")[:max_images].astype(np.int32)
        kept = np.ones(len(self._sizes), bool)
        kept[[place for place in skip if place < len(kept)]] = False
        self._places = np.flatnonzero(kept)
        self.samples = len(self._places)
        self._rows = range(batch) if rows is None else rows
        self._tokenizer, self._prompts, self._visual_tokens = tokenizer, prompts, visual_tokens
        self._conversations, self._names, text = [], 0, 1
        if tokenizer is not None:
            for name in category_prompts.categories:
                check_phrase(name, tokenizer, f"{prepared.directory}: category {name!r}")
            chunks = category_prompts.chunks()
            self._conversations = [prompts.generic(chunk, j * category_prompts.size) for j, chunk in enumerate(chunks)]
            self._names = len(category_prompts.categories)
            budget = TokenBudget(prompts, tokenizer, visual_tokens)
            needed = [budget.generic(budget.phrase_lengths(chunk)) for chunk in chunks]
            text = sum(needed) - (len(chunks) - 1) * budget.upper_bound(())  # they share the image
            text = math.ceil(text / TEXT_STEP) * TEXT_STEP
        slots = category_prompts.count * category_prompts.size if tokenizer is not None else 0
        self.shape = BatchShape(len(self._rows), text, 0, 0, *sides, slots)

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(self.samples / self._batch)

    def batch(self, number: int) -> GenericBatch:
        """Batch `number` of the images that are not left out; of it, the rows of this process."""
        whole = self._places[number * self._batch : (number + 1) * self._batch].tolist()
        bucket = tuple(images.size_bucket(side) for side in self._sizes[whole].max(0).tolist())
        places = [whole[row] for row in self._rows if row < len(whole)]
        rows, examples = [], []
        for place in places:
            example = self._source[place]
            image = images.decode(example.image, name=example.file_name)
            pixels = collate.prepare_pixels(image, (), self.shape)
            rows.append(TrainExample(example.file_name, pixels, self._conversations, (), (), (), example.image_id, self._names))
            examples.append(dataclasses.replace(example, image=b""))
        inputs = collate.collate(rows, self.shape, self._prompts, self._tokenizer, self._visual_tokens)
        return GenericBatch(inputs, places, examples, [(e.height, e.width) for e in examples], bucket)

    def __iter__(self) -> Iterator[GenericBatch]:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.range(len(self)).map(self.batch).to_iter_dataset(options))

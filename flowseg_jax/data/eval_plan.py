"""Which images of a split are evaluated together, and how much room their expressions take."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flowseg_jax.data import images

PHRASE_BUCKETS = (1, 2, 4, 8)  # room for expressions of an image in a round; more of them take several rounds
MIN_BUCKET_USES = 8  # rounds of a shape below which it is not worth a compilation: the next larger shape in use takes them

RoundShape = tuple[int, int]  # (K, T): expressions and text tokens an image


def bucket_shape(phrases: int, tokens: int) -> RoundShape:
    """The smallest room for so many expressions and text tokens: two lengths an octave."""
    octave = 1 << max(3, (tokens - 1).bit_length() - 1)
    length = next(n for n in (octave, octave * 3 // 2, octave * 2) if tokens <= n)
    return next(k for k in PHRASE_BUCKETS if phrases <= k), length


def merge_rare_buckets(uses: Mapping[RoundShape, int]) -> dict[RoundShape, RoundShape]:
    """The shape that each shape becomes: itself, or for a rare one the smallest other that holds it, if there is one."""
    kept: list[RoundShape] = []
    settled = {}
    for shape in sorted(uses, reverse=True):
        larger = [other for other in kept if other[0] >= shape[0] and other[1] >= shape[1]]
        if uses[shape] < MIN_BUCKET_USES and larger:
            settled[shape] = min(larger, key=lambda s: s[0] * s[1])
        else:
            kept.append(shape)
            settled[shape] = shape
    return settled


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """A batch before anything is read.

    Attributes:
        images: places of its images in the split.
        rounds: shape of each round.
        bucket: padded (height, width) of the original images.
    """

    images: tuple[int, ...]
    rounds: tuple[RoundShape, ...]
    bucket: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ConversationLengths:
    """Tokens of each conversation about each of n images, of which each has at least one.

    Attributes:
        values: int [m], of all images one after the other.
        ends: int64 [n], where each image's end.
    """

    values: np.ndarray
    ends: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """int64 [n]: conversations about each image."""
        return np.diff(self.ends, prepend=0)

    def sums(self) -> np.ndarray:
        """int64 [n]: tokens of each image."""
        return np.diff(np.cumsum(self.values, dtype=np.int64)[self.ends - 1], prepend=0)

    def __getitem__(self, image: int) -> list[int]:
        return self.values[self.ends[image - 1] if image else 0 : self.ends[image]].tolist()


class BatchPlans(Sequence[BatchPlan]):
    """Images divided into batches of alike ones; the same for every process. A batch is planned when it is asked for.

    Args:
        places: int [n], the images' places in the split, rising.
        sizes: int [n, 2], (height, width) of each.
        lengths: of the conversations about each.
        batch: images at a time.
    """

    def __init__(self, places: np.ndarray, sizes: np.ndarray, lengths: ConversationLengths, batch: int):
        self._places, self._lengths, self._batch = places, lengths, batch
        self._buckets = _size_buckets(sizes)
        keys = (-lengths.sums(), -lengths.counts, self._buckets[:, 1], self._buckets[:, 0])
        self._order = np.lexsort(keys).astype(np.int32)
        self._settled = merge_rare_buckets(Counter(shape for number in range(len(self)) for shape in self._rounds(number)))

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch)

    def _group(self, number: int) -> np.ndarray:
        return self._order[number * self._batch : (number + 1) * self._batch]

    def _rounds(self, number: int) -> Iterator[RoundShape]:
        each, most = [self._lengths[i] for i in self._group(number).tolist()], PHRASE_BUCKETS[-1]
        for first in range(0, max(map(len, each)), most):
            parts = [lengths[first : first + most] for lengths in each]
            yield bucket_shape(max(map(len, parts)), max(map(sum, parts)))

    def __getitem__(self, number: int) -> BatchPlan:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        group = self._group(number)
        height, width = self._buckets[group].max(0).tolist()
        rounds = tuple(self._settled[shape] for shape in self._rounds(number))
        return BatchPlan(tuple(self._places[group].tolist()), rounds, (height, width))


def _size_buckets(sizes: np.ndarray) -> np.ndarray:
    """int32 [n, 2]: the padded sides of (height, width)."""
    sides, places = np.unique(sizes, return_inverse=True)
    return np.array([images.size_bucket(side) for side in sides.tolist()], np.int32)[places].reshape(sizes.shape)

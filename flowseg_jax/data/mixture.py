"""Which image stands where in the endless stream of training images, when several data sets are mixed.

The order is a pure function of (seed, position): an epoch is a permutation of all slots, and every data set has a fixed number
of slots in an epoch. Where these are not a multiple of its images, it goes on through a permutation of them from epoch to
epoch, so that all are seen equally often, and the seed says in which order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence

import grain
import numpy as np

from flowseg_jax.data.array_file import CHUNK
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.held_out import HeldOutKeys
from flowseg_jax.data.index import IndexEntry
from flowseg_jax.errors import UserError

REPEAT_THRESHOLD = 0.1  # t of X-SAM's repeat-factor rule
MAX_PERMUTED = 1 << 22  # slots up to which a permutation is drawn and held, 4 bytes each; more of them are walked without it


class KeptRecords(Sequence[int]):
    """The records of a split but for those that are left out, in order. Memory grows with what is left out alone.

    Args:
        size: records of the split.
        left_out: records, rising.
    """

    def __init__(self, size: int, left_out: Collection[int] = ()):
        self.left_out = np.asarray(left_out, np.int64)
        self._before = self.left_out - np.arange(len(left_out))  # kept records before each that is left out
        self._length = size - len(left_out)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int | slice) -> int | np.ndarray:
        """A record; those of a slice as int64 [n]."""
        if isinstance(place, slice):
            places = np.arange(*place.indices(self._length))
            return places + np.searchsorted(self._before, places, side="right")
        if not -self._length <= place < self._length:
            raise IndexError(f"record {place} of {self._length}")
        place %= self._length
        return place + int(np.searchsorted(self._before, place, side="right"))


@dataclasses.dataclass(frozen=True)
class MixtureComponent:
    """A data set of the mixture.

    Attributes:
        prepared: where it lies.
        split: which split.
        indices: its images that are trained on, as record numbers of the split.
        samples_per_epoch: how many places of an epoch are its.
        held_out: how many of its images were left out because an evaluation set has them.
    """

    prepared: PreparedDataset
    split: str
    indices: Sequence[int]
    samples_per_epoch: int
    held_out: int = 0

    @property
    def partial(self) -> bool:
        """Whether an epoch shows some of its images more often than others."""
        return self.samples_per_epoch % len(self.indices) != 0

    def entries(self) -> Iterator[IndexEntry]:
        """What the index knows of its images."""
        index = self.prepared.index(self.split)
        return (index[record] for record in self.indices)

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(int64 [n] records, `index.ROW` [n]) of its images, some at a time."""
        index = self.prepared.index(self.split)
        for at in range(0, len(self.indices), CHUNK):
            records = np.asarray(self.indices[at : at + CHUNK])
            yield records, index.read_rows(int(records[0]), int(records[-1]) + 1)[records - records[0]]


def repeat_factor_counts(sizes: Sequence[int]) -> list[int]:
    """Slots of each data set by the repeat-factor rule: its images times max(1, sqrt(t / share)), t = 0.1, as in X-SAM."""
    total = sum(sizes)
    return [int(size * max(1.0, math.sqrt(REPEAT_THRESHOLD * total / size))) for size in sizes]


def build_mixture(
    sets: Sequence[tuple[PreparedDataset, float]], split: str = "train", held_out: HeldOutKeys | None = None
) -> tuple[MixtureComponent, ...]:
    """The members of a mixture.

    Args:
        sets: data sets and their weights: all 0 for the repeat-factor rule, else shares of an epoch, whose length is then the
            number of all images.
        split: which split of each.
        held_out: images that nothing is trained on.

    Raises:
        UserError: weights of which only some are given, an unknown split, or a set of which no image is left.
    """
    kept: list[tuple[PreparedDataset, KeptRecords]] = []
    for prepared, _ in sets:
        index = prepared.index(split)
        if not index:
            raise UserError(f"{prepared.directory}: split {split!r} has no images")
        mine = KeptRecords(len(index), held_out.records(index) if held_out else ())
        if not mine:
            raise UserError(f"{prepared.directory}: every image of split {split!r} is held out for evaluation (data.held_out)")
        kept.append((prepared, mine))
    sizes = [len(mine) for _, mine in kept]
    weights = [weight for _, weight in sets]
    if any(weight < 0 for weight in weights) or (any(weights) and not all(weights)):
        raise UserError(f"data.mixture: weights must all be positive, or all be 0 for the repeat-factor rule, got {weights}")
    if len(kept) == 1:
        slots = sizes
    elif any(weights):
        slots = [max(1, round(weight / sum(weights) * sum(sizes))) for weight in weights]
    else:
        slots = repeat_factor_counts(sizes)
    return tuple(
        MixtureComponent(prepared, split, mine, n, len(mine.left_out)) for (prepared, mine), n in zip(kept, slots, strict=True)
    )


class SampleOrder:
    """Position in the stream -> (member, record).

    Attributes:
        epoch: number of positions of an epoch.
    """

    def __init__(self, members: Sequence[MixtureComponent], seed: int):
        self._members, self._seed = members, seed
        self._ends = np.cumsum([member.samples_per_epoch for member in members])
        self.epoch = int(self._ends[-1])
        self._permutation = functools.lru_cache(maxsize=4)(self._draw)
        # In which order a set goes through its records. It matters only where an epoch is not a whole number of passes.
        self._walks = [
            permutation(len(member.indices), (seed, 2, number)) if member.partial else range(len(member.indices))
            for number, member in enumerate(members)
        ]

    def _draw(self, epoch: int) -> Sequence[int]:
        return permutation(self.epoch, (self._seed, 0, epoch))

    def __call__(self, position: int) -> tuple[int, int]:
        """Number of the member and of its record."""
        epoch, place = divmod(position, self.epoch)
        slot = int(self._permutation(epoch)[place])
        number = int(np.searchsorted(self._ends, slot, side="right"))
        member = self._members[number]
        within = slot - (int(self._ends[number]) - member.samples_per_epoch)
        turn = (epoch * member.samples_per_epoch + within) % len(member.indices)
        return number, int(member.indices[int(self._walks[number][turn])])


def permutation(size: int, seed: tuple[int, ...]) -> Sequence[int]:
    """The numbers below `size` in an order that the seed draws.

    Up to MAX_PERMUTED it is NumPy's, in memory. Above it is Grain's shuffle, which computes each element by itself: that takes
    no memory, but needs milliseconds an element for a handful of them (overfitting one batch).
    """
    if size <= MAX_PERMUTED:
        return np.random.default_rng(seed).permutation(size).astype(np.uint32)
    return grain.MapDataset.range(size).shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))

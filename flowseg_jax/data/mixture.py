"""Which image stands where in the endless stream of training images, when several data sets are mixed.

The order is a pure function of (seed, position): an epoch is a permutation of all slots, and every data set has a fixed number
of slots in an epoch. A set that has more slots than images goes on through its images, so that all are seen equally often.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from flowseg_jax.data.leakage import image_key
from flowseg_jax.data.prepared import Entry, Prepared
from flowseg_jax.errors import UserError

REPEAT_THRESHOLD = 0.1  # t of the scaffold's repeat-factor rule


@dataclasses.dataclass(frozen=True)
class Member:
    """A data set of the mixture.

    Attributes:
        prepared: where it lies.
        split: which split.
        records: its images that are trained on, as record numbers of the split.
        slots: how many places of an epoch are its.
        held_out: how many of its images were left out because an evaluation set has them.
    """

    prepared: Prepared
    split: str
    records: tuple[int, ...]
    slots: int
    held_out: int = 0

    def entries(self) -> list[Entry]:
        """What the index knows of its images."""
        index = self.prepared.index(self.split)
        return [index[record] for record in self.records]


def repeats(sizes: Sequence[int]) -> list[int]:
    """Slots of each data set by the repeat-factor rule: its images times max(1, sqrt(t / share)), t = 0.1 (scaffold 3.3)."""
    total = sum(sizes)
    return [int(size * max(1.0, math.sqrt(REPEAT_THRESHOLD * total / size))) for size in sizes]


def mix(
    sets: Sequence[tuple[Prepared, float]], split: str = "train", held_out: Mapping[str, str] | None = None
) -> tuple[Member, ...]:
    """The members of a mixture.

    Args:
        sets: data sets and their weights: all 0 for the repeat-factor rule, else shares of an epoch, whose length is then the
            number of all images.
        split: which split of each.
        held_out: {image key: evaluation set}, images that nothing is trained on.

    Raises:
        UserError: weights of which only some are given, an unknown split, or a set of which no image is left.
    """
    kept: list[tuple[Prepared, tuple[int, ...], int]] = []
    for prepared, _ in sets:
        index = prepared.index(split)
        if not index:
            raise UserError(f"{prepared.directory}: split {split!r} has no images")
        mine = tuple(i for i, e in enumerate(index) if not held_out or prepared.key(e.file_name) not in held_out)
        if not mine:
            raise UserError(f"{prepared.directory}: every image of split {split!r} is held out for evaluation (data.held_out)")
        kept.append((prepared, mine, len(index) - len(mine)))
    sizes = [len(mine) for _, mine, _ in kept]
    weights = [weight for _, weight in sets]
    if any(weight < 0 for weight in weights) or (any(weights) and not all(weights)):
        raise UserError(f"data.sets: weights must all be positive, or all be 0 for the repeat-factor rule, got {weights}")
    if len(kept) == 1:
        slots = sizes
    elif any(weights):
        slots = [max(1, round(weight / sum(weights) * sum(sizes))) for weight in weights]
    else:
        slots = repeats(sizes)
    return tuple(Member(prepared, split, mine, n, out) for (prepared, mine, out), n in zip(kept, slots, strict=True))


class Order:
    """Position in the stream -> (member, record).

    Attributes:
        epoch: number of positions of an epoch.
    """

    def __init__(self, members: Sequence[Member], seed: int):
        self._members, self._seed = members, seed
        self._ends = np.cumsum([member.slots for member in members])
        self.epoch = int(self._ends[-1])
        self._permutation = functools.lru_cache(maxsize=4)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        # Not Grain's shuffle: it needs milliseconds an index for a handful of images (overfitting one batch).
        return np.random.default_rng((self._seed, 0, epoch)).permutation(self.epoch)

    def __call__(self, position: int) -> tuple[int, int]:
        """Number of the member and of its record."""
        epoch, place = divmod(position, self.epoch)
        slot = int(self._permutation(epoch)[place])
        number = int(np.searchsorted(self._ends, slot, side="right"))
        member = self._members[number]
        within = slot - (int(self._ends[number]) - member.slots)
        return number, member.records[(epoch * member.slots + within) % len(member.records)]


def held_out_keys(sources: Iterable[str | Path | Prepared]) -> dict[str, str]:
    """{image key: what holds it out} of everything that is evaluated on.

    Args:
        sources: prepared data sets, or their directories: the images of all splits but "train"; or text files with one image
            a line, a COCO number or a file name.

    Raises:
        UserError: a source that is neither.
    """
    keys: dict[str, str] = {}
    for source in sources:
        if not isinstance(source, Prepared):
            path = Path(source)
            if path.is_file():
                keys |= _listed(path)
                continue
            if not path.is_dir():
                raise UserError(
                    f"data.held_out: {path} is not there; prepare that evaluation set, name a text file of image names or COCO "
                    "numbers, or take it off the list to train on its images too"
                )
            source = Prepared.open(path)
        for split in source.splits:
            if split != "train":
                keys |= {source.key(e.file_name): f"{source.directory} {split}" for e in source.index(split)}
    return keys


def _listed(path: Path) -> dict[str, str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.held_out: {path} is no text file of image names ({error})") from None
    return {image_key(f"{int(name):012d}.jpg" if name.isdigit() else name): str(path) for name in names}

"""Which images nothing is trained on, because they are evaluated on.

They are known by keys (`data.leakage`). A key is kept as the first 128 bits of its SHA-256, 16 bytes however long its text is.
Equal keys have equal bits, so no image that is evaluated on slips through. Different keys with equal bits would leave out a
training image too many; the chance that there are any is the number of keys on one side times that on the other over 2^128.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.index import Index, key_numbers
from flowseg_jax.data.leakage import COCO_LAYOUTS, coco_number, is_train_split, name_key
from flowseg_jax.errors import UserError, brief


class HeldOutKeys:
    """Keys of images that are held out: 16 bytes each.

    Args:
        keys: the keys.
        more: others that are held out as well.

    Attributes:
        numbers: uint64 [n], rising: the first of `index.key_numbers` of each, by which rows of an index name candidates.
    """

    def __init__(self, keys: Iterable[str] = (), more: HeldOutKeys | None = None):
        bits = np.fromiter(map(key_numbers, keys), np.dtype((np.uint64, 2))).T
        if more is not None:
            bits = np.concatenate([bits, more._bits], 1)
        bits = bits[:, np.lexsort(bits[::-1])]
        new = np.ones(bits.shape[1], bool)
        new[1:] = (bits[:, 1:] != bits[:, :-1]).any(0)
        self._bits = np.ascontiguousarray(bits[:, new])
        self.numbers, self._rest = self._bits

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, key: str) -> bool:
        number, rest = map(np.uint64, key_numbers(key))
        first, end = (np.searchsorted(self.numbers, number, side) for side in ("left", "right"))
        return bool((self._rest[first:end] == rest).any())

    def records(self, index: Index) -> np.ndarray:
        """int64 [n]: the records of a split that are held out. Rows name candidates; their keys decide."""
        return np.fromiter((n for n in self._candidates(index) if any(key in self for key in index[n].held_out_by)), np.int64)

    def _candidates(self, index: Index) -> Iterator[int]:
        for start, rows in index.rows.chunks() if len(self) else ():
            keys = rows["keys"]
            there = self.numbers[np.minimum(np.searchsorted(self.numbers, keys), len(self) - 1)] == keys
            yield from (start + np.flatnonzero(there.any(1))).tolist()


def held_out_keys(sources: Iterable[str | Path | PreparedDataset]) -> HeldOutKeys:
    """The keys of everything that is evaluated on.

    They are those of `leakage.ImageIdentity.holds_out`, and of images that are known by name alone `leakage.name_key`.

    Args:
        sources: prepared data sets, or their directories: the images of all splits but "train"; text files with one image a
            line, a COCO number or a file name as the data set has it; Visual Genome's `image_data.json`, which tells the COCO
            numbers of its images and so which of them the others hold out.

    Raises:
        UserError: a source that is none of these, or a directory without an evaluation split.
    """
    sources = [source if isinstance(source, PreparedDataset) else Path(source) for source in sources]
    genomes = [source for source in sources if isinstance(source, Path) and source.is_file() and source.suffix == ".json"]
    keys = HeldOutKeys(key for source in sources if source not in genomes for key in _keys_of(source))
    return HeldOutKeys((key for path in genomes for key in _of_visual_genome(path, keys)), keys) if genomes else keys


def _keys_of(source: Path | PreparedDataset) -> Iterator[str]:
    if isinstance(source, PreparedDataset):
        return _evaluated(source)
    if source.is_file():
        return _listed(source)
    if not source.is_dir():
        raise UserError(
            f"data.held_out: {source} is not there; prepare that evaluation set, name a text file of image names or COCO "
            "numbers, or take it off the list to train on its images too"
        )
    prepared = PreparedDataset.open(source)
    if all(map(is_train_split, prepared.splits)):
        raise UserError(f"data.held_out: {source} has no evaluation split: prepare it with all of its splits")
    return _evaluated(prepared)


def _evaluated(prepared: PreparedDataset) -> Iterator[str]:
    for split in prepared.splits:
        if not is_train_split(split):
            for entry in prepared.index(split):
                yield from entry.identity.holds_out


def _listed(path: Path) -> Iterator[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.held_out: {path} is no text file of image names ({error})") from None
    for name in names:
        yield name_key(name)
        number = int(name) if name.isdecimal() else coco_number(name, COCO_LAYOUTS[0])
        if number is not None:
            yield f"coco:{number}"


def _of_visual_genome(path: Path, held_out: HeldOutKeys) -> Iterator[str]:
    """Visual Genome's images that are held out under their COCO numbers, by the names that LLaVA's chats give them."""
    try:
        pairs = [(int(e["image_id"]), e["coco_id"]) for e in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"data.held_out: {path} is not Visual Genome's image_data.json ({brief(error)})") from None
    for number, coco in pairs:
        if coco is not None and f"coco:{coco}" in held_out:
            for folder in ("vg/VG_100K", "vg/VG_100K_2", "gqa/images"):
                yield name_key(f"{folder}/{number}.jpg")

"""A prepared data set on disk: ArrayRecord data, an index of what each split asks, category names, a tokenizer.

Every file has a checksum. Those of the small files and of the index are compared when the set is opened, a shard's before its
first record is read. Whoever made a set may be hostile: nothing in it is imported, run, or taken for a path, and all that is
read is checked (`_metadata`, `_entry`, `serialization.deserialize`).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.data import checksums
from flowseg_jax.data.formats import LAYOUTS
from flowseg_jax.data.formats.reading import field, read_json
from flowseg_jax.data.leakage import ImageIdentity, coco_number
from flowseg_jax.data.records import TASKS, Example, Sample, make_ref_samples, make_samples
from flowseg_jax.data.serialization import AGAIN, deserialize
from flowseg_jax.errors import UserError, brief, did_you_mean, quoted
from flowseg_jax.system import paths
from flowseg_jax.types import PAD

FORMAT = 6  # of the files below; raised when they change
METADATA = "metadata.json"
TOKENIZER = "tokenizer"


def index_file(split: str) -> str:
    """The name of a split's index, in the directory."""
    return f"index/{split}.jsonl"


def shard_files(split: str, count: int) -> list[str]:
    """The names of a split's shards, in the directory; they are those of a TFDS data set."""
    return [f"data/flowseg-{split}.array_record-{number:05d}-of-{count:05d}" for number in range(count)]


@dataclasses.dataclass(frozen=True)
class IndexEntry:
    """What the index knows of one stored image, without reading it.

    Attributes:
        image_id, file_name, height, width: the image.
        image_digest: a digest of the encoded image.
        categories: category of each object, PAD (-1) for a crowd region and where nothing has a category.
        samples: its expressions, sorted.
        refs: the same with all sentences of a ref in one (`make_ref_samples`).
        number: COCO's number of the image, None for one that is not COCO's.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    image_digest: str
    categories: tuple[int, ...]
    samples: tuple[Sample, ...]
    refs: tuple[Sample, ...] = ()
    number: int | None = None

    @property
    def by_ref(self) -> IndexEntry:
        """The entry whose samples are its refs."""
        return dataclasses.replace(self, samples=self.refs)

    @property
    def identity(self) -> ImageIdentity:
        """The image's identity in any data set."""
        return ImageIdentity(self.number, self.image_digest)


def index_entry(example: Example) -> dict[str, Any]:
    """The index line of an example (JSON)."""
    return {
        "image_id": example.image_id,
        "file_name": example.file_name,
        "size": [example.height, example.width],
        "image_digest": hashlib.sha256(example.image).hexdigest()[:32],
        "categories": [PAD if a.crowd or a.ignore else a.category for a in example.annotations],
        "samples": [_line(sample) for sample in make_samples(example)],
        "refs": [_line(sample) for sample in make_ref_samples(example)],
    }


def _line(s: Sample) -> list[Any]:
    return [s.ann_id, s.ref_id, s.sentence_id, s.sentence, s.family, s.annotations, s.count, s.answer]


def _entry(line: bytes, categories: int, layout: str) -> IndexEntry:
    """An index line, read back. ValueError, KeyError or TypeError if it is not as `index_entry` makes it."""
    raw = json.loads(line)
    image, name, digest, (height, width) = raw["image_id"], raw["file_name"], raw["image_digest"], raw["size"]
    classes = tuple(raw["categories"])
    whole = all(type(number) is int and abs(number) < 1 << 62 for number in (image, height, width, *classes))
    if not (whole and type(name) is type(digest) is str and all(PAD <= c < categories for c in classes)):
        raise ValueError("an image of another kind")
    samples, refs = (tuple(_sample(image, name, row, len(classes)) for row in raw[key]) for key in ("samples", "refs"))
    return IndexEntry(image, name, height, width, digest, classes, samples, refs, coco_number(name, layout))


def _sample(image: int, name: str, row: list[Any], objects: int) -> Sample:
    ann, ref, number, text, family, at, count, answer = row
    whole = all(type(n) is int and abs(n) < 1 << 62 for n in (ann, ref, number, count, *at))
    if not (whole and type(text) is type(family) is type(answer) is str and all(0 <= place < objects for place in at)):
        raise ValueError("a sample of another kind")
    return Sample(image, name, ann, ref, number, text, family, tuple(at), count, text, answer)


def _metadata(path: Path) -> dict[str, Any]:
    """The content of METADATA, checked. UserError if it is not as `builders.prepare` writes it, or of another format."""
    found = read_json(path)
    number = found.get("format") if isinstance(found, dict) else None
    if number != FORMAT:
        raise UserError(f"{path.parent}: prepared in format {quoted(number)}, this version reads {FORMAT}; {AGAIN}")
    where = str(path)
    if field(found, "task", str, where) not in TASKS:
        raise UserError(f"{where}.task: unknown {quoted(found['task'])}")
    if not all(isinstance(name, str) for name in field(found, "categories", list, where)):
        raise UserError(f"{where}.categories: expected a list of names, got {quoted(found['categories'])}")
    things = field(found, "things", (list, type(None)), where)
    if things is not None and (len(things) != len(found["categories"]) or not all(isinstance(thing, bool) for thing in things)):
        raise UserError(f"{where}.things: expected a flag a category, got {quoted(things)}")
    field(found, "digest", str, where)
    layout = field(field(found, "request", dict, where), "layout", str, f"{where}.request")
    if layout not in LAYOUTS:
        raise UserError(f"{where}.request.layout: unknown {quoted(layout)}")
    if field(found, "tokenizer", (str, type(None)), where) not in (None, TOKENIZER):
        raise UserError(f"{where}.tokenizer: expected {TOKENIZER!r} or null, got {quoted(found['tokenizer'])}")
    shards = field(found, "shards", dict, where)
    if not field(found, "splits", dict, where):
        raise UserError(f"{where}.splits: holds no split; {AGAIN}")
    for split, counts in found["splits"].items():
        paths.check_name(split, f"{where}.splits")
        lengths = field(shards, split, list, f"{where}.shards")
        if not lengths or not all(type(length) is int and 0 < length < 1 << 31 for length in lengths):
            raise UserError(f"{where}.shards.{split}: expected the number of records of each shard, got {quoted(lengths)}")
        for key in ("images", "refs", "sentences", "samples"):
            field(counts, key, int, f"{where}.splits.{split}")
        if counts["images"] != sum(lengths):
            raise UserError(f"{where}.shards.{split}: {sum(lengths)} records, but {counts['images']} images")
    return found


class PreparedDataset:
    """An opened prepared data set; make one with `builders.prepare`.

    Attributes:
        directory: where it lies.
        task: what it teaches, one of `records.TASKS`.
        categories: category names; an annotation's category is an index into them.
        things: of each category, whether it is countable (a thing) or not (stuff); None where the source does not tell them
            apart. Where it does, no two objects of an image share a pixel.
        splits: split name -> {"images", "refs", "sentences", "samples"} counts.
        digest: SHA-256 of everything that is stored of its examples, of their splits and of what its categories are. Equal
            digests: equal numbers of the same model, by every protocol.
    """

    def __init__(self, directory: Path, metadata: Mapping[str, Any]):
        self.directory = directory
        self.metadata = metadata
        self.task: str = metadata["task"]
        self.categories: tuple[str, ...] = tuple(metadata["categories"])
        self.things: tuple[bool, ...] | None = None if metadata["things"] is None else tuple(metadata["things"])
        self.splits: dict[str, dict[str, int]] = metadata["splits"]
        self.digest: str = metadata["digest"]
        self._index: dict[str, list[IndexEntry]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to a worker process as where it lies: what was read of it is read again there if it is needed."""
        return PreparedDataset, (self.directory, self.metadata)

    @classmethod
    def open(cls, directory: str | Path) -> PreparedDataset:
        """Opens a directory that `prepare` wrote.

        Raises:
            UserError: it is missing, not a prepared data set, or one of another version.
        """
        directory = Path(directory)
        if not (directory / METADATA).exists():
            prepare = f"; make one with `flowseg data prepare --layout LAYOUT --source DIR --out {directory}`"
            raise UserError(f"{directory}: not a prepared data set (no {METADATA}){paths.made_by(directory) or prepare}")
        prepared = cls(directory, _metadata(directory / METADATA))
        prepared.check_files()
        return prepared

    @functools.cached_property
    def _checksums(self) -> dict[str, str]:
        return checksums.read(self.directory)

    def check_files(self) -> None:
        """Compares the checksums of all files but the shards, of which it looks whether they are there.

        Raises:
            UserError: a file is missing, has changed since the set was prepared, or has no checksum.
        """
        shards = {name for split, lengths in self.metadata["shards"].items() for name in shard_files(split, len(lengths))}
        needed = {METADATA, *map(index_file, self.splits)}
        if self.tokenizer_directory is not None and self.tokenizer_directory.is_dir():  # all that could be read there
            needed |= {f"{TOKENIZER}/{path.name}" for path in self.tokenizer_directory.iterdir() if path.name[0] != "."}
        checksums.check(self.directory, sorted({*self._checksums, *needed} - shards), self._checksums)
        for name in sorted(shards):
            checksums.expected(self.directory, name, self._checksums)
            if not (self.directory / name).is_file():
                raise UserError(f"{self.directory / name}: missing; {AGAIN}")

    def check_split(self, split: str) -> None:
        """Raises a `UserError` that lists the known splits unless `split` is one of them."""
        if split not in self.splits:
            raise UserError(
                f"{self.directory}: unknown split {split!r}{did_you_mean(split, self.splits)}; it has {', '.join(self.splits)}"
            )

    @property
    def tokenizer_directory(self) -> Path | None:
        """The tokenizer trained at preparation, if one was."""
        return self.directory / TOKENIZER if self.metadata["tokenizer"] else None

    def index(self, split: str) -> Sequence[IndexEntry]:
        """What each stored image asks, in stored order. UserError if the file is damaged."""
        self.check_split(split)
        if split not in self._index:
            self._index[split] = self._read_index(index_file(split), self.splits[split]["images"])
        return self._index[split]

    def _read_index(self, name: str, images: int) -> list[IndexEntry]:
        path, digest, entries = self.directory / name, hashlib.sha256(), []
        want = checksums.expected(self.directory, name, self._checksums)
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    try:
                        entries.append(_entry(line, len(self.categories), self.metadata["request"]["layout"]))
                    except (ValueError, KeyError, TypeError, RecursionError) as error:
                        raise UserError(f"{path}:{number}: damaged ({brief(error)}); {AGAIN}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None
        checksums.compare(path, digest.hexdigest(), want)
        if len(entries) != images:
            raise UserError(f"{path}: {len(entries)} lines, but {images} images; {AGAIN}")
        return entries

    def families(self, split: str) -> tuple[str, ...]:
        """The expression families that occur in the split."""
        return tuple(sorted({s.family for entry in self.index(split) for s in entry.samples}))

    def source(self, split: str) -> ExampleSource:
        """Random access to the split's examples, encoded image bytes included."""
        self.check_split(split)
        return ExampleSource(self.directory, split, self.metadata["shards"][split], len(self.categories), self._checksums)


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """A file of so many records as ArrayRecord's reader wants to know it, so that it need not open all files to count."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class ExampleSource:
    """The stored records of a split as a sequence of `Example`s; safe with threads.

    Args:
        directory: of the prepared set.
        split: which one.
        lengths: number of records of each of its shards.
        categories: number of categories of the set.
        sums: the checksums of its files.
    """

    def __init__(self, directory: Path, split: str, lengths: Sequence[int], categories: int, sums: Mapping[str, str]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource  # slow to import, only needed here

        self._directory, self._categories = directory, categories
        self._names = shard_files(split, len(lengths))
        self._sums = {name: checksums.expected(directory, name, sums) for name in self._names}
        self._ready: set[str] = set()
        self._ends = list(itertools.accumulate(lengths))
        files = [_WholeFile(str(directory / name), n, n) for name, n in zip(self._names, lengths, strict=True)]
        self._records = ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """Record `index`, from 0 on.

        Raises:
            UserError: its shard has changed since it was prepared, or the record is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        name = self._names[bisect.bisect_right(self._ends, index)]
        if name not in self._ready:
            checksums.check(self._directory, [name], self._sums)
            self._ready.add(name)
        where = f"{self._directory / name}: record {index}"
        try:
            record = self._records[index]
        except Exception as error:  # the reader of ArrayRecord raises several kinds
            raise UserError(f"{where}: cannot be read ({brief(error)}); {AGAIN}") from None
        return deserialize(record, self._categories, where)

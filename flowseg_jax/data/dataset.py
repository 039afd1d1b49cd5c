"""A prepared data set on disk: ArrayRecord data, an index of what each split asks, category names, a tokenizer.

Every file has a checksum. Those of the small files and of the index's rows are compared when the set is opened, a shard's
before its first record is read, an index line's when it is read. Whoever made a set may be hostile: nothing in it is imported,
run, or taken for a path, and all that is read is checked (`_metadata`, `index.parse_line`, `serialization.deserialize`).
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.data import checksums
from flowseg_jax.data.formats import LAYOUTS
from flowseg_jax.data.formats.reading import field, read_json
from flowseg_jax.data.index import Index, index_file, rows_file
from flowseg_jax.data.records import TASKS, Example
from flowseg_jax.data.serialization import AGAIN, deserialize
from flowseg_jax.errors import UserError, brief, did_you_mean, quoted
from flowseg_jax.system import paths

FORMAT = 7  # of the files below; raised when they change
METADATA = "metadata.json"
TOKENIZER = "tokenizer"
OPEN_SHARDS = 256  # of a split, at a time: systems often allow 1,024 files a process


def shard_files(split: str, count: int) -> list[str]:
    """The names of a split's shards, in the directory; they are those of a TFDS data set."""
    return [f"data/flowseg-{split}.array_record-{number:05d}-of-{count:05d}" for number in range(count)]


def _metadata(path: Path) -> dict[str, Any]:
    """The content of METADATA, checked. UserError if it is not as `prepare.prepare` writes it, or of another format."""
    found = read_json(path)
    number = found.get("format") if isinstance(found, dict) else None
    if number != FORMAT:
        old = path.parent
        remedy = f"write it anew with `flowseg data upgrade {old} NEW`" if number == FORMAT - 1 else AGAIN
        raise UserError(f"{old}: prepared in format {quoted(number)}, this version reads {FORMAT}; {remedy}")
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
    shards, families = field(found, "shards", dict, where), field(found, "families", dict, where)
    if not field(found, "splits", dict, where):
        raise UserError(f"{where}.splits: holds no split; {AGAIN}")
    for split, counts in found["splits"].items():
        paths.check_name(split, f"{where}.splits")
        lengths = field(shards, split, list, f"{where}.shards")
        if not lengths or not all(type(length) is int and 0 < length < 1 << 31 for length in lengths):
            raise UserError(f"{where}.shards.{split}: expected the number of records of each shard, got {quoted(lengths)}")
        for key in ("images", "refs", "sentences", "samples"):
            field(counts, key, int, f"{where}.splits.{split}")
        field(field(found, "index", dict, where), split, str, f"{where}.index")
        if not all(isinstance(name, str) for name in field(families, split, list, f"{where}.families")):
            raise UserError(f"{where}.families.{split}: expected a list of names, got {quoted(families[split])}")
        if counts["images"] != sum(lengths):
            raise UserError(f"{where}.shards.{split}: {sum(lengths)} records, but {counts['images']} images")
    return found


class PreparedDataset:
    """An opened prepared data set; make one with `prepare.prepare`.

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
        self._index: dict[str, Index] = {}

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
        """Compares the checksums of all files but shards and index lines, of which it looks whether they are there.

        Shards and lines are compared when they are read.

        Raises:
            UserError: a file is missing, has changed since the set was prepared, or has no checksum.
        """
        later = {name for split, lengths in self.metadata["shards"].items() for name in shard_files(split, len(lengths))}
        later |= {index_file(split) for split in self.splits}
        needed = {METADATA, *map(rows_file, self.splits)}
        if self.tokenizer_directory is not None and self.tokenizer_directory.is_dir():  # all that could be read there
            needed |= {f"{TOKENIZER}/{path.name}" for path in self.tokenizer_directory.iterdir() if path.name[0] != "."}
        checksums.check(self.directory, sorted({*self._checksums, *needed} - later), self._checksums)
        for split, wanted in self.metadata["index"].items():
            checksums.compare(
                self.directory / index_file(split),
                checksums.expected(self.directory, index_file(split), self._checksums),
                wanted,
            )
        for name in sorted(later):
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

    def index(self, split: str) -> Index:
        """What each stored image asks, in stored order. UserError if the files are damaged; lines are checked when read."""
        self.check_split(split)
        if split not in self._index:
            layout = self.metadata["request"]["layout"]
            self._index[split] = Index(self.directory, split, self.splits[split], len(self.categories), layout)
        return self._index[split]

    def families(self, split: str) -> tuple[str, ...]:
        """The expression families that occur in the split."""
        self.check_split(split)
        return tuple(self.metadata["families"][split])

    def source(self, split: str) -> ExampleSource:
        """Random access to the split's examples, encoded image bytes included."""
        self.check_split(split)
        return ExampleSource(self.directory, split, self.metadata["shards"][split], len(self.categories), self._checksums)


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
        self._directory, self._categories = directory, categories
        self._names = shard_files(split, len(lengths))
        self._sums = {name: checksums.expected(directory, name, sums) for name in self._names}
        self._ends = list(itertools.accumulate(lengths))
        self._reader = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def _open(self, name: str) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader  # slow to import, only needed here

        checksums.check(self._directory, [name], self._sums)
        # As its own data source opens it, which leaves every file open that was ever read from.
        return ArrayRecordReader(
            str(self._directory / name), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """Record `index`, from 0 on.

        Raises:
            UserError: its shard has changed since it was prepared, or the record is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        name, before = self._names[shard], self._ends[shard - 1] if shard else 0
        where = f"{self._directory / name}: record {index}"
        try:
            record = self._reader(name).read([index - before])[0]
        except UserError:
            raise
        except Exception as error:  # the reader of ArrayRecord raises several kinds
            raise UserError(f"{where}: cannot be read ({brief(error)}); {AGAIN}") from None
        return deserialize(record, self._categories, where)

"""The index of a split: what each stored image asks, known without reading the image.

Two files a split. `SPLIT.jsonl` has a line an image (JSON). `SPLIT.npy` has a row of numbers an image (`ROW`): where its line
lies, and what questions about the whole split are answered from. Both are read where they are needed, so opening an index takes
no memory that grows with the split. A line has its checksum in its row and is compared when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from flowseg_jax.data.array_file import CHUNK, ArrayFile, read_bytes
from flowseg_jax.data.leakage import ImageIdentity, coco_number, name_key
from flowseg_jax.data.records import Example, Sample, make_ref_samples, make_samples
from flowseg_jax.data.serialization import AGAIN
from flowseg_jax.errors import UserError, brief
from flowseg_jax.types import PAD

ROW = np.dtype(
    [
        ("line", "<i8"),  # where its line begins, bytes
        ("bytes", "<u4"),  # of the line, its end included
        ("checksum", "<u8"),  # of the line
        ("keys", "<u8", (3,)),  # the first of `key_numbers` of its content, of its COCO number or copy, and of its name
        ("height", "<i4"),
        ("width", "<i4"),
        ("objects", "<u4"),
        ("categories", "<u4"),  # that its objects have
        ("fewest", "<u4"),  # objects of one of these categories, 0 without one
        ("unions", "<u4"),  # groups of several objects that a sample refers to
        ("sample", "<i8"),  # number of its first sample, counted through the split
        ("samples", "<u4"),
    ]
)
LINES_AT_ONCE = 256  # that are read where all are looked at


def index_file(split: str) -> str:
    """The name of a split's lines, in the directory."""
    return f"index/{split}.jsonl"


def rows_file(split: str) -> str:
    """The name of a split's rows, in the directory."""
    return f"index/{split}.npy"


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

    @property
    def held_out_by(self) -> tuple[str, ...]:
        """The keys of which one is enough to hold the image out of training."""
        return (*self.identity.held_out_by, name_key(self.file_name))


def index_line(example: Example) -> dict[str, Any]:
    """The index line of an example (JSON)."""
    return {
        "image_id": example.image_id,
        "file_name": example.file_name,
        "size": [example.height, example.width],
        "image_digest": hashlib.sha256(example.image).hexdigest()[:32],
        "categories": [PAD if a.crowd or a.ignore else a.category for a in example.annotations],
        "samples": [_sample_line(sample) for sample in make_samples(example)],
        "refs": [_sample_line(sample) for sample in make_ref_samples(example)],
    }


def _sample_line(s: Sample) -> list[Any]:
    return [s.ann_id, s.ref_id, s.sentence_id, s.sentence, s.family, s.annotations, s.count, s.answer]


def key_numbers(text: str) -> tuple[int, int]:
    """The first 128 bits of the SHA-256 of a key of `leakage`: the 64 that a row has, and 64 that decide."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def line_checksum(line: bytes) -> int:
    """The first 64 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(line).digest()[:8], "little")


def index_row(entry: IndexEntry, line: bytes, at: int, sample: int) -> np.void:
    """The row of an entry whose line is written at byte `at`, and whose first sample is the split's number `sample`."""
    counts = Counter(c for c in entry.categories if c != PAD)
    unions = {s.annotations for s in entry.samples if len(s.annotations) > 1}
    keys = [key_numbers(key)[0] for key in entry.held_out_by]
    size = entry.height, entry.width
    numbers = len(entry.categories), len(counts), min(counts.values(), default=0), len(unions), sample, len(entry.samples)
    return np.array((at, len(line), line_checksum(line), keys, *size, *numbers), ROW)[()]


def parse_line(line: bytes, categories: int, layout: str) -> IndexEntry:
    """An index line, read back. ValueError, KeyError or TypeError if it is not as `index_line` makes it."""
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


class Index(Sequence[IndexEntry]):
    """What each stored image of a split asks, in stored order, read when it is asked for; safe with threads.

    Args:
        directory: of the prepared set.
        split: which one.
        counts: its "images" and "samples".
        categories: number of categories of the set.
        layout: that the set was made from.

    Attributes:
        rows: `ROW` of each image.

    Raises:
        UserError: a file is not as it was written; also where an entry is read.
    """

    def __init__(self, directory: Path, split: str, counts: Mapping[str, int], categories: int, layout: str):
        self._categories, self._layout = categories, layout
        self._path, self._rows_path = directory / index_file(split), directory / rows_file(split)
        self.rows = ArrayFile(self._rows_path, ROW, counts["images"], AGAIN)
        last = self.rows[len(self) - 1 :][0]
        end, samples = int(last["line"]) + int(last["bytes"]), int(last["sample"]) + int(last["samples"])
        if samples != counts["samples"]:
            raise UserError(f"{self._rows_path}: {samples} samples, but metadata.json has {counts['samples']}; {AGAIN}")
        try:
            self._file = self._path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror}); {AGAIN}") from None
        if (size := self._path.stat().st_size) != end:
            raise UserError(f"{self._path}: {size} bytes, but the lines of {len(self)} images have {end}; {AGAIN}")
        self._size, self._samples = size, samples

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> IndexEntry: ...
    @overload
    def __getitem__(self, place: slice) -> list[IndexEntry]: ...
    def __getitem__(self, place: int | slice) -> IndexEntry | list[IndexEntry]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            return list(self._read(start, stop)) if step == 1 else [self[at] for at in range(start, stop, step)]
        place = int(place)
        if not -len(self) <= place < len(self):
            raise IndexError(f"image {place} of {len(self)}")
        place %= len(self)
        return next(self._read(place, place + 1))

    def __iter__(self) -> Iterator[IndexEntry]:
        return self._read(0, len(self))

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """`ROW` [stop - start]. UserError unless lines and samples follow each other, inside of what there is."""
        rows = self.rows[start:stop]
        for at, count, most in (("line", "bytes", self._size), ("sample", "samples", self._samples)):
            ends = rows[at] + rows[count]
            if rows[at][0] < 0 or ends[-1] > most or (ends[:-1] != rows[at][1:]).any():
                raise UserError(f"{self._rows_path}: rows {start} to {stop} do not follow each other; {AGAIN}")
        return rows

    def columns(self, *names: str) -> np.ndarray:
        """int64 [images, names]: columns of `ROW`."""
        parts = (self.read_rows(at, min(at + CHUNK, len(self))) for at in range(0, len(self), CHUNK))
        return np.concatenate([np.stack([rows[name] for name in names], 1).astype(np.int64) for rows in parts])

    def _read(self, start: int, stop: int) -> Iterator[IndexEntry]:
        for first in range(start, stop, LINES_AT_ONCE):
            rows = self.read_rows(first, min(first + LINES_AT_ONCE, stop))
            begin, ends = int(rows["line"][0]), (rows["line"] + rows["bytes"]).tolist()
            lines = read_bytes(self._file.fileno(), begin, ends[-1] - begin, self._path, AGAIN)
            for number, (row, at, end) in enumerate(zip(rows, rows["line"].tolist(), ends, strict=True), first + 1):
                yield self._entry(lines[at - begin : end - begin], row, number)

    def _entry(self, line: bytes, row: np.void, number: int) -> IndexEntry:
        try:
            if line_checksum(line) != int(row["checksum"]):
                raise ValueError("its checksum differs")
            entry = parse_line(line, self._categories, self._layout)
            if (len(entry.categories), len(entry.samples)) != (row["objects"], row["samples"]):
                raise ValueError("its row tells of other objects or samples")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self._path}:{number}: damaged ({brief(error)}); {AGAIN}") from None
        return entry

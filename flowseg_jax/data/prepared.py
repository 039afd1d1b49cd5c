"""A prepared data set on disk: ArrayRecord data, an index of what each split asks, category names, a tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.data.batch import NONE
from flowseg_jax.data.leakage import Picture, coco_number
from flowseg_jax.data.records import Example, Sample, from_record, ref_samples, samples
from flowseg_jax.errors import UserError, suggest

FORMAT = 4  # of the files below; raised when they change
METADATA = "metadata.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the index knows of one stored image, without reading it.

    Attributes:
        image_id, file_name, height, width: the image.
        picture: a digest of the encoded image.
        categories: category of each object, NONE (-1) for a crowd region and where nothing has a category.
        samples: what can be asked, sorted.
        refs: the same with all sentences of a ref in one (`records.ref_samples`).
        number: COCO's number of the image, None for one that is not COCO's.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    picture: str
    categories: tuple[int, ...]
    samples: tuple[Sample, ...]
    refs: tuple[Sample, ...] = ()
    number: int | None = None

    @property
    def by_ref(self) -> Entry:
        """The entry whose samples are its refs."""
        return dataclasses.replace(self, samples=self.refs)

    @property
    def identity(self) -> Picture:
        """What the picture is in any data set."""
        return Picture(self.number, self.picture)


def index_entry(example: Example) -> dict[str, Any]:
    """The index line of an example (JSON)."""
    return {
        "image_id": example.image_id,
        "file_name": example.file_name,
        "size": [example.height, example.width],
        "picture": hashlib.sha256(example.image).hexdigest()[:32],
        "categories": [NONE if a.crowd or a.ignore else a.category for a in example.annotations],
        "samples": [_line(sample) for sample in samples(example)],
        "refs": [_line(sample) for sample in ref_samples(example)],
    }


def _line(s: Sample) -> list[Any]:
    return [s.ann_id, s.ref_id, s.sentence_id, s.sentence, s.family, s.annotations, s.count, s.answer]


def _entry(line: str, layout: str) -> Entry:
    raw = json.loads(line)
    name, image = raw["file_name"], raw["image_id"]
    asked, refs = (
        tuple(Sample(image, name, a, r, i, text, f, tuple(at), n, text, answer) for a, r, i, text, f, at, n, answer in raw[key])
        for key in ("samples", "refs")
    )
    number = coco_number(name, layout)
    return Entry(image, name, *raw["size"], raw["picture"], tuple(raw["categories"]), asked, refs, number)


class Prepared:
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
        self._index: dict[str, list[Entry]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to a worker process as where it lies: what was read of it is read again there if it is needed."""
        return Prepared, (self.directory, self.metadata)

    @classmethod
    def open(cls, directory: str | Path) -> Prepared:
        """Opens a directory that `prepare` wrote.

        Raises:
            UserError: it is missing, not a prepared data set, or one of another version.
        """
        directory = Path(directory)
        try:
            metadata = json.loads((directory / METADATA).read_text())
        except FileNotFoundError:
            raise UserError(
                f"{directory}: not a prepared data set (no {METADATA}); make one with "
                f"`python -m flowseg_jax.data prepare --layout LAYOUT --source DIR --out {directory}`"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{directory / METADATA}: cannot be read ({error})") from None
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{directory}: prepared in format {metadata.get('format')}, this version reads {FORMAT}; "
                "remove it and prepare it again"
            )
        return cls(directory, metadata)

    def check_split(self, split: str) -> None:
        """Raises a `UserError` that lists the known splits unless `split` is one of them."""
        if split not in self.splits:
            raise UserError(
                f"{self.directory}: unknown split {split!r}{suggest(split, self.splits)}; it has {', '.join(self.splits)}"
            )

    @property
    def tokenizer_directory(self) -> Path | None:
        """The tokenizer trained at preparation, if one was."""
        name = self.metadata["tokenizer"]
        return self.directory / name if name else None

    def index(self, split: str) -> Sequence[Entry]:
        """What each stored image asks, in stored order."""
        self.check_split(split)
        if split not in self._index:
            lines = (self.directory / "index" / f"{split}.jsonl").read_text().splitlines()
            self._index[split] = [_entry(line, self.metadata["request"]["layout"]) for line in lines]
        return self._index[split]

    def families(self, split: str) -> tuple[str, ...]:
        """The expression families that occur in the split."""
        return tuple(sorted({s.family for entry in self.index(split) for s in entry.samples}))

    @functools.cached_property
    def _builder(self):
        import tensorflow_datasets as tfds  # slow to import, and only needed here

        return tfds.builder_from_directory(self.directory / self.metadata["data"])

    def source(self, split: str) -> Records:
        """Random access to the split's examples, encoded image bytes included."""
        self.check_split(split)
        import tensorflow_datasets as tfds

        return Records(self._builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()}))


class Records:
    """A TFDS data source seen as a sequence of `Example`s."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return from_record(self._source[index])

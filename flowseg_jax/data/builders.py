"""An on-disk layout to a prepared data set: TFDS builder (ArrayRecord, no TensorFlow), index, tokenizer, metadata.

Everything is written into a hidden sibling directory that is renamed at the end, so a prepared data set is complete or absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from flowseg_jax.data.formats.refcoco import RefCoco
from flowseg_jax.data.prepared import FORMAT, METADATA, Prepared, index_entry
from flowseg_jax.data.prompts import training_text
from flowseg_jax.data.records import Example, Layout, to_record
from flowseg_jax.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from flowseg_jax.errors import UserError, suggest

LAYOUTS: dict[str, Callable[..., Layout]] = {"refcoco": RefCoco}
PROGRESS_SECONDS = 5.0
Log = Callable[[str], None]


def _say(text: str) -> None:
    print(text, flush=True)


with tfds.core.registered.skip_registration():

    class Referring(tfds.core.GeneratorBasedBuilder):
        """One record an image of a split: the encoded image, all of its objects, the expressions of the split.

        No sequence is nested: TFDS can write ragged features only with TensorFlow.
        """

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, examples: dict[str, Callable[[], Iterator[Example]]] | None = None, **kwargs: Any):
            self._examples = examples or {}
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            import numpy as np

            text, sequence = tfds.features.Text(), tfds.features.Sequence
            return tfds.core.DatasetInfo(
                builder=self,
                description="Referring expressions: objects of an image and sentences that refer to them.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, 3)),
                        "image_id": np.int64,
                        "height": np.int32,
                        "width": np.int32,
                        "file_name": text,
                        "ann_id": sequence(np.int64),
                        "ann_category": sequence(np.int32),
                        "ann_rle": sequence(text),
                        "ann_iscrowd": sequence(np.bool_),
                        "sentence_text": sequence(text),
                        "sentence_id": sequence(np.int64),
                        "sentence_ref": sequence(np.int64),
                        "sentence_ann": sequence(np.int32),
                        "sentence_family": sequence(text),
                    }
                ),
                disable_shuffling=True,  # stored order = reader's order = the index's order; training shuffles anyway
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._records(make) for split, make in self._examples.items()}

        def _generate_examples(self) -> Any:
            raise ValueError("splits generate their own examples")

        def _records(self, make: Callable[[], Iterator[Example]]) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, example in enumerate(make()):
                yield number, to_record(example)


class _Collector:
    """Passes examples on while it indexes, counts, digests and reports them."""

    def __init__(self, layout: Layout, index_dir: Path, log: Log):
        self._layout, self._dir, self._log = layout, index_dir, log
        self._digest = hashlib.sha256()
        self.counts: dict[str, dict[str, int]] = {}
        self.sentences: dict[str, list[str]] = {}
        self.error: UserError | None = None

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def examples(self, split: str) -> Iterator[Example]:
        try:
            yield from self._examples(split)
        except UserError as error:  # TFDS wraps what a generator raises; the first cause is kept here
            self.error = error
            raise

    def _examples(self, split: str) -> Iterator[Example]:
        total, last = self._layout.size(split), time.monotonic()
        refs: set[int] = set()
        count = dict.fromkeys(("images", "refs", "sentences", "samples"), 0)
        texts = self.sentences[split] = []
        self._log(f"{split}: {total} images")
        with (self._dir / f"{split}.jsonl").open("w") as index:
            for example in self._layout.examples(split):
                for expression in example.expressions:
                    for mark in SPECIAL_TOKENS:
                        if mark.lower() in expression.text.lower():
                            raise UserError(
                                f"{self._layout.source}: sentence {expression.id} of ref {expression.ref_id} "
                                f"contains the mark {mark!r}"
                            )
                    refs.add(expression.ref_id)
                    texts.append(expression.text.lower())
                line = index_entry(example)
                index.write(json.dumps(line) + "\n")
                self._digest.update(json.dumps(line, sort_keys=True).encode())
                self._digest.update("".join(a.rle for a in example.annotations).encode())
                self._digest.update(hashlib.sha256(example.image).digest())
                count["images"] += 1
                count["sentences"] += len(example.expressions)
                count["samples"] += len(line["samples"])
                if time.monotonic() - last > PROGRESS_SECONDS:
                    self._log(f"{split}: {count['images']} of {total} images")
                    last = time.monotonic()
                yield example
        count["refs"] = len(refs)
        self.counts[split] = count
        self._log(f"{split}: {count['images']} images, {count['refs']} refs, {count['sentences']} sentences; writing")


def _prepare_into(
    layout: Layout, root: Path, splits: Sequence[str], tokenizer_vocab: int | None, request: Any, log: Log
) -> None:
    """Writes a complete prepared data set into the existing directory `root`."""
    (root / "index").mkdir()
    stream = sys.stdout

    def report(text: str) -> None:
        with contextlib.redirect_stdout(stream):
            log(text)

    collector = _Collector(layout, root / "index", report)
    examples = {split: (lambda split=split: collector.examples(split)) for split in splits}
    tfds.disable_progress_bar()
    builder = Referring(examples=examples, data_dir=root / "data", file_format="array_record")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download and the temporary directory
            builder.download_and_prepare(download_dir=root / "downloads")
    except Exception:
        if collector.error is not None:
            raise collector.error from None
        raise
    shutil.rmtree(root / "downloads", ignore_errors=True)
    if tokenizer_vocab:
        texts = collector.sentences["train" if "train" in splits else splits[0]]
        prompts = training_text()
        prompts *= 1 + len(texts) // (4 * len(prompts))  # about as frequent beside the expressions as in what the model reads
        train_tokenizer([*prompts, *layout.categories, *texts], root / "tokenizer", vocab=tokenizer_vocab)
    for reason, number in layout.notes().items():
        log(f"left out: {number} {reason}")
    metadata = {
        "format": FORMAT,
        "source": layout.source,
        "request": request,
        "categories": list(layout.categories),
        "splits": {split: collector.counts[split] for split in splits},
        "left_out": dict(layout.notes()),
        "digest": collector.digest,
        "tokenizer": "tokenizer" if tokenizer_vocab else None,
        "data": str(Path(builder.data_dir).relative_to(root)),
    }
    (root / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")


@contextlib.contextmanager
def _atomic_directory(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` that becomes `out` when the block ends well and vanishes when it does not."""
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield temporary
        try:
            os.rename(temporary, out)
        except OSError as error:
            raise UserError(
                f"{out}: cannot be put in place ({error.strerror}); did another process write it meanwhile?"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    layout: str = "refcoco",
    split_by: str | None = None,
    images: str | Path | None = None,
    splits: Sequence[str] | None = None,
    tokenizer_vocab: int | None = None,
    log: Log = _say,
) -> Prepared:
    """Turns an on-disk layout into a prepared data set.

    Args:
        source: the layout's root.
        out: directory to make; must not exist (or be empty). Appears complete or not at all.
        layout: name of the layout (`LAYOUTS`).
        split_by: which refs file, e.g. "unc"; None for the only one.
        images: folder of the images; None for the usual places.
        splits: which splits; None for all.
        tokenizer_vocab: train a byte-level BPE of this many ids on the train split; None for no tokenizer.
        log: receives progress at least every 10 s.

    Raises:
        UserError: anything wrong with the source, naming file and field; nothing is left behind.
    """
    source, out = Path(source), Path(out)
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}{suggest(layout, LAYOUTS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it to prepare again")
    log(f"reading {source}")
    opened = LAYOUTS[layout](source, split_by=split_by, images=images)
    chosen = tuple(splits) if splits else opened.splits
    for split in chosen:
        opened.size(split)  # an unknown split is an error before anything is written
    with _atomic_directory(out) as temporary:
        _prepare_into(opened, temporary, chosen, tokenizer_vocab, {"layout": layout, "splits": list(chosen)}, log)
    log(f"prepared {out}")
    return Prepared.open(out)


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Holds an exclusive lock on a file; says so while another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        said = -PROGRESS_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said > PROGRESS_SECONDS:
                    log(f"waiting for another process to make {path.with_suffix('')}")
                    said = time.monotonic()
                time.sleep(0.2)
        yield


def ensure_shapes(
    directory: str | Path,
    images: int,
    seed: int,
    *,
    tokenizer_vocab: int = 512,
    workers: int | None = None,
    log: Log = _say,
    **options: Any,
) -> Prepared:
    """Opens the `shapes` benchmark in `directory`, generating and preparing it first if it is not there.

    Appears complete or not at all; of several processes that ask at once, one makes it and the others wait.

    Args:
        directory: holds `refcoco-like/` (the generated layout) and `prepared/`.
        images: number of images over all splits.
        seed: of the generator.
        tokenizer_vocab: ids of the tokenizer that is trained on it.
        workers: processes of the generator; None for the number of cores. Does not change the result.
        log: receives progress at least every 10 s.
        **options: passed to `shapes.generator.generate`.

    Raises:
        UserError: the directory holds a set that was made with other arguments, or something else.
    """
    from flowseg_jax.data.shapes.generator import generate

    directory = Path(directory)
    request = {"images": images, "seed": seed, "tokenizer_vocab": tokenizer_vocab, **options}
    request = json.loads(json.dumps(request))  # as it reads back: tuples become lists
    stamp = directory / "request.json"
    with _locked(directory.parent / f".{directory.name}.lock", log):
        if not directory.exists() or not any(directory.iterdir()):
            for left in directory.parent.glob(f".{directory.name}.*.partial"):  # of a killed process: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            log(f"making the shapes benchmark in {directory}: {images} images, seed {seed}")
            with _atomic_directory(directory) as temporary:
                layout = temporary / "refcoco-like"
                generate(layout, images, seed, workers=workers, report=log, **options)
                prepare(layout, temporary / "prepared", tokenizer_vocab=tokenizer_vocab, log=log)
                (temporary / stamp.name).write_text(json.dumps(request) + "\n")
    try:
        made_with = json.loads(stamp.read_text())
    except (OSError, ValueError):
        raise UserError(f"{directory}: exists but is not a shapes set made by this command; name another directory") from None
    if made_with != request:
        changed = sorted(k for k in {*made_with, *request} if made_with.get(k) != request.get(k))
        detail = ", ".join(f"{k} {made_with.get(k)} -> {request.get(k)}" for k in changed)
        raise UserError(f"{directory}: holds a shapes set made otherwise ({detail}); remove it or name another directory")
    return Prepared.open(directory / "prepared")

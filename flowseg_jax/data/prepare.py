"""An on-disk layout to a prepared data set: TFDS data (ArrayRecord, no TensorFlow), index, tokenizer, metadata.

A prepared data set is complete or absent: it is written into a hidden directory next to `out`, which is renamed at the end.
An interrupted preparation leaves that directory, and the same command continues after its finished shards.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowseg_jax.data import checksums, shards, workers
from flowseg_jax.data.dataset import FORMAT, METADATA, TOKENIZER, PreparedDataset
from flowseg_jax.data.formats import layout_name, open_layout
from flowseg_jax.data.index import index_file
from flowseg_jax.data.prompts import template_corpus
from flowseg_jax.data.records import DatasetReader, RecordErrors, damaged
from flowseg_jax.data.shards import Shard
from flowseg_jax.data.tokenizer import train_tokenizer
from flowseg_jax.errors import UserError, not_writable
from flowseg_jax.system import locks

if TYPE_CHECKING:
    from flowseg_jax.system.console import Progress

PROGRESS_SECONDS = 5.0
MIN_IMAGES_PER_PROCESS = 512  # reading and writing fewer takes less time than starting a process
REQUEST, PROBLEMS = "request.json", "problems.txt"
Log = Callable[[str], None]


def log_line(text: str) -> None:
    """Writes a line of progress to the console."""
    from flowseg_jax.system.console import log  # imported late: worker processes log nothing

    log(text)


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    layout: str = "refcoco",
    split_by: str | None = None,
    images: str | Path | None = None,
    file: str | None = None,
    max_characters: int | None = None,
    splits: Sequence[str] | None = None,
    tokenizer_vocab: int | None = None,
    on_error: str = "stop",
    processes: int | None = None,
    log: Log = log_line,
) -> PreparedDataset:
    """Turns an on-disk layout into a prepared data set.

    Args:
        source: the layout's root.
        out: directory to make; must not exist (or be empty). Appears complete or not at all.
        layout: name of the layout (`formats.LAYOUTS`).
        split_by: which refs file, e.g. "unc"; None for the only one.
        images: folder of the images; None for the usual places.
        file: which JSON of chats, where there are several.
        max_characters: that an expression, a question or an explanation may have; None for `checks.MAX_CHARACTERS`.
        splits: which splits; None for all.
        tokenizer_vocab: train a byte-level BPE of this many ids on the train split; None for no tokenizer.
        on_error: "stop" at the first damaged record; "record": list them all in `problems.txt` of `out` and leave them out.
        processes: that read and write; None for one per core, as far as memory goes. Does not change the result.
        log: receives progress.

    Raises:
        UserError: anything wrong with the source, naming file and field, or a split of which no example is left. Nothing is
            left but finished shards, after which the same command continues.
    """
    source, out = Path(source), Path(out)
    layout = layout_name(layout)
    if on_error not in ("stop", "record"):
        raise UserError(f"on_error is {on_error!r}: choose stop or record")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it to prepare again")
    log(f"reading {source}")
    options = {"split_by": split_by, "images": images, "file": file, "max_characters": max_characters}
    problems = RecordErrors(keep=on_error == "record")
    opened = open_layout(layout, source, problems, **options)
    chosen = tuple(splits) if splits else opened.splits
    sizes = {split: opened.size(split) for split in chosen}  # an unknown split is an error before anything is written
    request = {"layout": layout, "splits": list(chosen), "on_error": on_error, "max_characters": max_characters}
    fingerprint = request | {"files": _stamps(opened), "images": images and str(images), "format": FORMAT}
    with _resumable_directory(out, fingerprint, log) as root:
        todo = [shard for split in chosen for shard in shards.divide(root / "shards", layout, split, sizes[split])]
        reopen = functools.partial(_open_in_worker, layout, source, options, on_error == "record")
        _write(opened, todo, reopen, problems.keep, processes, log)
        metadata, found = _summary(opened, todo, problems, log)
        metadata["request"] = request
        metadata["tokenizer"] = TOKENIZER if tokenizer_vocab else None
        sums = shards.finish(todo, root)
        metadata["index"] = {split: sums[index_file(split)] for split in metadata["splits"]}
        if found:
            (root / PROBLEMS).write_text("".join(f"{problem}\n" for problem in found), encoding="utf-8")
        (root / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        checksums.write(root, _files(root), sums)
        if tokenizer_vocab:
            train_dataset_tokenizer(tokenizer_corpus(PreparedDataset.open(root)), root / TOKENIZER, tokenizer_vocab)
            checksums.write(root, _files(root), checksums.read(root))
    if found:  # logged last, when the list is where it says
        log(f"{out / PROBLEMS} lists the records that are left out{damaged(found)}")
    log(f"prepared {out}")
    return PreparedDataset.open(out)


def _files(root: Path) -> list[str]:
    """The names of all files of a prepared set, but for its checksums."""
    places = (root / METADATA, root / PROBLEMS, *(root / folder for folder in ("data", "index", TOKENIZER)))
    found = [path for place in places for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file()]
    return [path.relative_to(root).as_posix() for path in found]


def _stamps(layout: DatasetReader) -> list[list[Any]]:
    """What tells one version of the annotation files from another."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in map(Path, layout.annotation_files)]


_layout: DatasetReader | None = None  # of a worker process


def _open_in_worker(name: str, source: Path, options: Mapping[str, Any], keep: bool) -> None:
    global _layout
    workers.init_worker(signal.SIGINT)
    _layout = open_layout(name, source, RecordErrors(keep), **options)


def _write_in_worker(shard: Shard, keep: bool) -> dict[str, Any]:
    return shard.write(_layout, keep)


def _write(
    layout: DatasetReader, todo: Sequence[Shard], reopen: Callable[[], None], keep: bool, processes: int | None, log: Log
) -> None:
    """Writes the shards that are missing, in processes of their own where that is worth their start."""
    missing = [shard for shard in todo if not shard.is_whole()]
    if len(missing) < len(todo):
        log(f"continuing: {len(todo) - len(missing)} of {len(todo)} shards are written already")
    for split in dict.fromkeys(shard.split for shard in todo):
        log(f"{split}: {sum(s.stop - s.start for s in todo if s.split == split)} images")
    from flowseg_jax.system.console import progress  # not in the workers, which say nothing

    total = sum(s.stop - s.start for s in missing)
    count = min(processes or _default_processes(layout), len(missing))
    with progress("prepare", total, "images", every=PROGRESS_SECONDS) as bar:
        if count <= 1 or (processes is None and total < MIN_IMAGES_PER_PROCESS * count):
            done = 0
            for shard in missing:
                shard.write(layout, keep)
                done += shard.stop - shard.start
                bar.update(done)
            return
        _write_in_processes(missing, reopen, keep, count, bar)


def _write_in_processes(missing: Sequence[Shard], reopen: Callable[[], None], keep: bool, count: int, bar: Progress) -> None:
    with ProcessPoolExecutor(count, workers.Spawn(), initializer=reopen) as pool:
        try:
            running = {pool.submit(_write_in_worker, shard, keep): shard for shard in missing}
            for future in as_completed(running):
                future.result()
                bar.update(sum(s.stop - s.start for f, s in running.items() if f.done()))
        except BrokenProcessPool:
            raise UserError("a process died while it prepared, perhaps for want of memory: try fewer --num-workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _default_processes(layout: DatasetReader) -> int:
    """One process per core, as far as memory goes: each takes 0.5 GiB, and ten times the size of the annotation files."""
    size = sum(Path(path).stat().st_size for path in layout.annotation_files)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return max(1, min(os.cpu_count() or 1, free // (10 * size + (1 << 29)) if free else 1))


def _summary(
    layout: DatasetReader, todo: Sequence[Shard], problems: RecordErrors, log: Log
) -> tuple[dict[str, Any], list[str]]:
    """The metadata of complete shards, and the damaged records; logs counts and notes. UserError if a split has no example."""
    reports = [(shard.split, shard.report()) for shard in todo]
    counts = {split: Counter() for split, _ in reports}
    families: dict[str, set[str]] = {split: set() for split in counts}
    notes, found, digest = Counter(), list(problems.found), hashlib.sha256()
    things = getattr(layout, "things", None)  # of panoptic layouts alone
    digest.update(json.dumps([layout.task, layout.categories, things]).encode())
    for split, report in reports:
        counts[split].update(report["counts"])
        families[split].update(report["families"])
        notes.update(report["notes"])
        found += report["problems"]
        digest.update(json.dumps([split, report["digest"]]).encode())
    for split, count in counts.items():
        text = f"{count['refs']} refs, {count['sentences']} sentences" if layout.task != "chat" else "chats"
        log(f"{split}: {count['images']} images, {text}")
    for reason, number in sorted(notes.items()):
        log(f"note: {number} {reason}")
    for split, count in counts.items():
        if not count["images"]:
            others = " ".join(name for name, other in counts.items() if other["images"])
            remedy = f"; --splits {others} prepares the others" if others else ""
            raise UserError(f"split {split!r}: nothing is left of its examples{damaged(found)}{remedy}")
    metadata = {
        "format": FORMAT,
        "task": layout.task,
        "source": layout.source,
        "categories": list(layout.categories),
        "things": things,
        "splits": {split: dict(count) for split, count in counts.items()},
        "families": {split: sorted(names) for split, names in families.items()},
        "notes": dict(sorted(notes.items())),
        "problems": len(found),
        "shards": {
            split: [r["counts"]["images"] for s, r in reports if s == split and r["counts"]["images"]] for split in counts
        },
        "digest": digest.hexdigest(),
    }
    return metadata, found


def tokenizer_corpus(prepared: PreparedDataset) -> Iterator[str]:
    """The texts of a data set's training split (without one, in its first split): categories, sentences as often as its
    source has them, explanations, chats."""
    split = "train" if "train" in prepared.splits else next(iter(prepared.splits))
    yield from prepared.categories
    for entry in prepared.index(split):
        for sample in entry.samples:
            yield from [sample.sentence] * sample.count + [sample.answer] * bool(sample.answer)
    if prepared.task == "chat":  # not in the index
        source = prepared.source(split)
        for i in range(len(source)):
            yield from (text for turn in source[i].turns for text in (turn.question, turn.answer))


def train_dataset_tokenizer(texts: Iterable[str], directory: Path, vocab: int) -> None:
    """Trains a tokenizer on sentences, and on prompt templates about as often as the model reads them with sentences.

    Texts are read once and not kept: what takes memory is their different words.
    """

    def corpus() -> Iterator[str]:
        count, prompts = 0, template_corpus()
        for text in texts:
            count += 1
            yield text
        for _ in range(1 + count // (4 * len(prompts))):
            yield from prompts

    train_tokenizer(corpus(), directory, vocab=vocab)


@contextlib.contextmanager
def _resumable_directory(out: Path, request: Mapping[str, Any], log: Log) -> Iterator[Path]:
    """A hidden sibling of `out` that becomes `out` when the block ends well; what another request left there is removed.

    When the block fails, finished shards stay for the next try; without any, nothing stays.
    """
    root = out.parent / f".{out.name}.partial"
    try:
        with locks.held(out, beside=True):
            if out.is_dir() and any(out.iterdir()):
                raise UserError(f"{out}: another process has prepared it meanwhile")
            root.mkdir(exist_ok=True)
            stamp = root / REQUEST
            if not stamp.exists() or stamp.read_text(encoding="utf-8") != json.dumps(request):
                for left in root.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                stamp.write_text(json.dumps(request), encoding="utf-8")
            try:
                yield root
            except BaseException:
                if not any((root / "shards").glob("*.json")):
                    shutil.rmtree(root, ignore_errors=True)
                raise
            stamp.unlink()
            shutil.rmtree(root / "shards")
            try:
                os.rename(root, out)
            except OSError as error:
                raise UserError(
                    f"{out}: cannot be put in place ({error.strerror}); did another process write it meanwhile?"
                ) from None
    except Exception as error:
        if (why := not_writable(error)) is None and not isinstance(error, OSError):
            raise
        raise UserError(f"{out}: cannot be written ({why or error}); the same command continues") from None

"""From prepared data sets to static-shape training batches on the host, through Grain.

The order of training data is a pure function of (seed, step): batch `step` can be built without its predecessors, so that
resuming needs one integer and neither the number of threads, of workers nor of processes matters.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import multiprocessing.util
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from flowseg_jax.data import collate, workers
from flowseg_jax.data.array_file import CHUNK
from flowseg_jax.data.collate import TrainExample
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.mixture import MAX_PERMUTED, MixtureComponent, SampleOrder
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.data.train_examples import DecodedImage, TrainExampleBuilder, TrainOptions
from flowseg_jax.errors import UserError, listed
from flowseg_jax.types import Batch, BatchShape

_DEFAULT_OPTIONS = TrainOptions()


def open_tokenizer(prepared: PreparedDataset, prompts: PromptTemplates, directory: str | None = None) -> Tokenizer:
    """The tokenizer in `directory`, else the one trained when the data set was prepared."""
    place = directory or prepared.tokenizer_directory
    if place is None:
        raise UserError(
            f"{prepared.directory}: no tokenizer was trained for this data set; name the language model's tokenizer directory"
        )
    return load_tokenizer(place, needed=prompts.special_tokens)


class _Cache:
    """Least recently used decoded images, bounded by bytes; safe with threads."""

    def __init__(self, limit: int):
        self._limit, self._used = limit, 0
        self._items: collections.OrderedDict[tuple[int, int], tuple[DecodedImage, int]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], make: Callable[[], DecodedImage]) -> DecodedImage:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key][0]
        value = make()
        size = value.pixels.nbytes + 2000  # and the small Python objects around them, roughly
        if size <= self._limit:
            with self._lock:
                if key not in self._items:
                    self._items[key] = value, size
                    self._used += size
                while self._used > self._limit:
                    self._used -= self._items.popitem(last=False)[1][1]
        return value


class TrainDataset:
    """Training batches.

    Args:
        members: the data sets (`build_mixture`).
        shape: the static shape of the *global* batch.
        prompts: prompt template.
        seed: of order, phrases and prompt template.
        visual_tokens: slots that the image takes in the sequence (the model says how many).
        tokenizer: None for a model without language.
        options: `TrainOptions`.
        rows: which rows of each global batch this process builds, and in which order; None for all of them. What a row holds
            depends on (seed, step, row) alone, whoever builds it.

    Attributes:
        members: as given.
        epoch: images of one pass through the mixture.
        remarks: what whoever trains should know of the data sets, a line each.

    Raises:
        UserError: an image may need more text or masks than the shape has; an unknown family; sets that do not fit together.
        ValueError: a row twice, or one that the global batch does not have.
    """

    def __init__(
        self,
        members: Sequence[MixtureComponent],
        shape: BatchShape,
        prompts: PromptTemplates,
        seed: int,
        *,
        visual_tokens: int,
        tokenizer: Tokenizer | None,
        options: TrainOptions = _DEFAULT_OPTIONS,
        rows: Sequence[int] | None = None,
    ):
        if seed < 0:
            raise UserError(f"seed must not be negative, got {seed}")
        self.tokenizer, self.members = tokenizer, tuple(members)
        self._prompts, self._options, self._seed, self._visual_tokens = prompts, options, seed, visual_tokens
        self._global_batch, self._numbers = shape.batch, _check_rows(rows, shape.batch)
        self.shape = dataclasses.replace(shape, batch=len(self._numbers))
        self._rows = [
            TrainExampleBuilder(member, self.shape, prompts, tokenizer, visual_tokens, options) for member in self.members
        ]
        self.remarks = [rows.remark for rows in self._rows if rows.remark]
        options.check_families({family for rows in self._rows for family in rows.families})
        self._order = SampleOrder(self.members, seed)
        self.epoch = self._order.epoch
        self._open(options.cache_bytes)

    @property
    def digest(self) -> str:
        """Of everything that is trained on, in its order: the data sets, their images that are not held out, their slots."""
        found = hashlib.sha256()
        for member in self.members:
            found.update(f"{member.prepared.digest} {member.split} {member.samples_per_epoch} ".encode())
            for at in range(0, len(member.indices), CHUNK):
                found.update(np.asarray(member.indices[at : at + CHUNK], np.int64).tobytes())
            if member.partial:
                found.update(b"permuted")  # a run that began in stored order does not continue in this one
        if sum(member.samples_per_epoch for member in self.members) > MAX_PERMUTED:
            found.update(b"walked")  # nor one that began in a permutation in memory in one that is walked
        return found.hexdigest()

    @property
    def description(self) -> str:
        """What it consists of, for the card of the model: every data set's name and how many of its images are trained on."""
        return listed([f"{len(member.indices):,} images of {member.prepared.directory.name}" for member in self.members])

    def _open(self, cache_bytes: int) -> None:
        self._sources = [member.prepared.source(member.split) for member in self.members]
        self._cache = _Cache(cache_bytes)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker is sent: no locks, open files or images."""
        return {key: value for key, value in vars(self).items() if key not in ("_sources", "_cache", "_order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = SampleOrder(self.members, self._seed)
        self._open(self._options.cache_bytes // max(self._options.num_workers, 1))

    def _row(self, position: int, step: int) -> TrainExample:
        """Row at `position` of the endless stream of images."""
        number, record = self._order(position)
        rows, source = self._rows[number], self._sources[number]
        rng = np.random.default_rng((self._seed, 1, position))
        if rows.random_resize:
            decoded = rows.decode(source[record], rng)
        else:
            decoded = self._cache.get((number, record), lambda: rows.decode(source[record], rng))
        return rows.build(decoded, step, rng)

    def batch(self, step: int) -> Batch:
        """This process's rows of global batch `step`: row r is the image at position step * B + r of the stream."""
        rows = [self._row(step * self._global_batch + row, step) for row in self._numbers]
        return collate.collate(rows, self.shape, self._prompts, self.tokenizer, self._visual_tokens)

    def iterate(self, start_step: int = 0) -> BatchIterator:
        """Endless batches from `start_step` on, built ahead by threads or by workers; close it when done.

        Workers start with the first batch that is asked for. As they import the main module, it must be guarded by
        `if __name__ == "__main__"`.
        """
        threads, count = self._options.num_threads, self._options.num_workers
        # A worker's finished batches wait half in its queue and half in this process; it does not read ahead of them.
        ahead = threads if count else self._options.prefetch
        steps = grain.MapDataset.range(start_step, 1 << 40).map(self.batch)
        batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        if count:
            if not flags.FLAGS.is_parsed():  # Grain's flags have their defaults: our commands do not use absl's
                flags.FLAGS.mark_as_parsed()
            queue = max(self._options.prefetch // (2 * count), 1)
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(count, queue), worker_init_fn=_start_worker)
        return BatchIterator(iter(batches))


def _check_rows(rows: Sequence[int] | None, batch: int) -> tuple[int, ...]:
    rows = tuple(range(batch) if rows is None else rows)
    if not rows or len(set(rows)) < len(rows) or not set(rows) <= set(range(batch)):
        raise ValueError(f"rows must be distinct and among 0..{batch - 1}, the rows of the global batch; got {list(rows)}")
    return rows


def _start_worker(index: int, count: int) -> None:
    """Runs in each worker before it reads any data."""
    workers.init_worker(signal.SIGINT, signal.SIGTERM)
    jax.config.update("jax_platforms", "cpu")  # should anything here compute with JAX: the accelerators are the trainer's
    multiprocessing.util.Finalize(None, _leave, exitpriority=-10)  # after its queues, which deliver what they hold at -5


def _leave() -> None:
    # `close` waits for one worker after the other: none should finish what its threads have begun, nor take Python down first.
    if sys.exception() is None:
        os._exit(0)


class BatchIterator(Iterator[Batch]):
    """Batches that threads or workers build ahead; `close` ends those.

    What fails in a worker is raised here as it was raised there.

    Raises:
        UserError: a worker was killed.
    """

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches
        self._starting: contextlib.AbstractContextManager = workers.deaf()  # the first batch starts the workers

    def __next__(self) -> Batch:
        try:
            with self._starting:
                self._starting = contextlib.nullcontext()
                return next(self._batches)
        except RuntimeError as error:
            if died := re.match(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error)):
                raise UserError(
                    f"a data worker died with exit code {died[1]}; if it ran out of memory (-9) or of shared memory (-7), "
                    "set data.num_workers or data.prefetch lower, or make /dev/shm larger"
                ) from None
            raise

    def close(self) -> None:
        """Ends the threads or workers; safe to call twice."""
        self._batches.close()

"""Answers any number of images in batches, on all devices of all processes.

Each process answers its shards of the list (`shards`) on its own devices, so that none waits for another; a batch is jitted and
divided among the devices as in an evaluation (`evaluation.evaluator`). Images are read in threads, and the next batch is
dispatched before the last one's masks are read. An image that fails is listed and ends nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from flowseg_jax import sharding
from flowseg_jax.checkpoints.model_card import ModelCard
from flowseg_jax.data import collate, images
from flowseg_jax.data.collate import ProcessedImage, TokenizedConversation
from flowseg_jax.data.eval_plan import PHRASE_BUCKETS, bucket_shape
from flowseg_jax.data.prompts import check_expressions
from flowseg_jax.evaluation.benchmark import EvalModel
from flowseg_jax.evaluation.resumable import Records
from flowseg_jax.inference.image_list import ImageList
from flowseg_jax.inference.inputs import PredictionJob, failure_reason
from flowseg_jax.inference.selection import SelectionConfig, select_prediction, stored_no_target_threshold, unpack_candidates
from flowseg_jax.inference.shards import PredictionShards
from flowseg_jax.system import distributed
from flowseg_jax.system.console import duration, heartbeat, log
from flowseg_jax.types import BatchShape

MOST_WAITING = 3  # batches' worth of images that wait for others of their size
LARGE = 2048 * 2048  # pixels of a size bucket, from which on a device computes one image at a time
TOLD = 20  # failures that are printed one by one


@dataclasses.dataclass(frozen=True)
class BatchSummary:
    """What came of a run: images answered by this process now, images of the list, and of these all that failed."""

    answered: int
    total: int
    failed: int


@dataclasses.dataclass(frozen=True)
class FailedImage:
    """An image without an answer, and why."""

    place: int
    name: str
    reason: str

    @property
    def records(self) -> Records:
        return {self.place: [{"image": self.name, "failure": self.reason}]}


@dataclasses.dataclass(frozen=True)
class ReadImage:
    """An image that is ready for a batch.

    Attributes:
        place: in the list. job: its name and texts.
        size: (H, W). pixels: for the encoders.
        rounds: its tokenized texts, up to eight at a time.
    """

    place: int
    job: PredictionJob
    size: tuple[int, int]
    pixels: ProcessedImage
    rounds: list[list[TokenizedConversation]]

    @property
    def bucket(self) -> tuple[int, int]:
        return images.size_bucket(self.size[0]), images.size_bucket(self.size[1])

    @property
    def shape(self) -> tuple:
        """Images with the same one share a batch: their size bucket, and the room for texts of each round."""
        return self.bucket, tuple(bucket_shape(len(part), 1)[0] for part in self.rounds)


def selection(extra: Mapping[str, Any], directory: str | os.PathLike[str], **given: Any) -> SelectionConfig:
    """How the answer is chosen from one candidate, unless `given`, fields of `SelectionConfig`, says otherwise.

    Args:
        extra: of the model directory's config.json, whose no-target threshold holds where none is given.
        directory: the model's, for errors.
    """
    chosen_by = SelectionConfig(**{"top_k": 1, **given})
    if chosen_by.no_target_threshold is None:
        stored = stored_no_target_threshold(extra, directory)
        chosen_by = dataclasses.replace(chosen_by, no_target_threshold=stored)
    return chosen_by


@dataclasses.dataclass(frozen=True)
class BatchPredictor:
    """A model that answers lists of images.

    Attributes:
        model: on this process's devices.
        selection: what of the candidates is the answer.
        card: what the model knows.
        batch_size: images at a time; rounded up to a multiple of the devices.
        threads: that read images.
    """

    model: EvalModel
    selection: SelectionConfig
    card: ModelCard = dataclasses.field(default_factory=ModelCard)
    batch_size: int = 8
    threads: int = dataclasses.field(default_factory=lambda: min(16, 2 * (os.cpu_count() or 1)))

    @functools.cached_property
    def _prefix(self) -> np.ndarray:
        model = self.model
        return np.array(collate.encode_prefix(model.prompts, model.tokenizer, model.cfg.num_visual_tokens), np.int32)

    @functools.cached_property
    def _params(self) -> Any:
        return self.model.evaluator.place(self.model.params)

    def run(
        self, listed: ImageList, out: str | os.PathLike[str], *, kind: str = "jsonl", shard_size: int | None = None
    ) -> BatchSummary:
        """Answers all images of a list into `out` (`shards`), or goes on where an earlier start ended. All processes call it.

        Args:
            listed: the images and what is asked about them.
            out: a folder that all processes see.
            kind, shard_size: see `PredictionShards.open`.

        Raises:
            UserError: `out` holds something else, or cannot be written. What was answered is kept.
        """
        settings = {
            "list": listed.digest,
            "model": self.model.checkpoint["digest"],
            "selection": dataclasses.asdict(self.selection),
            "words": hashlib.sha256("\n".join(self.card.words).encode()).hexdigest() if self.card.words else None,
        }
        with PredictionShards.open(out, settings, total=len(listed), kind=kind, size=shard_size) as shards:
            answered = self._fill(listed, shards)
            distributed.collective_try(lambda: None, lambda error: None)  # until all processes are done
            summary = BatchSummary(answered, len(listed), shards.failures())
        many = f"; {summary.failed} failed: {Path(out) / 'failures-*.jsonl'}" if summary.failed else ""
        log(f"predict: {summary.total - summary.failed} of {summary.total} images are answered{many}")
        return summary

    def _fill(self, listed: ImageList, shards: PredictionShards) -> int:
        total, failed, done, begin, first = len(shards.places), 0, 0, time.monotonic(), None
        if total < shards.total:
            log(f"predict: {total} of {shards.total} images are to be answered by this process")
        with heartbeat(f"predict: 0/{total} images, reading and compiling") as beat:
            for found in self.answers(listed, shards.places):
                shards.add(found)
                done += len(found)
                for record in (r for records in found.values() for r in records if "failure" in r):
                    failed += 1
                    if failed <= TOLD:
                        log(f"failed: {record['failure']}" + ("; further ones are only listed" if failed == TOLD else ""))
                now = time.monotonic()
                first = first or (now, done)
                rate = (done - first[1]) / (now - first[0]) if done > first[1] else done / (now - begin)
                beat.message = (
                    f"predict: {done}/{total} images, {rate:.1f}/s, {duration((total - done) / rate)} left, {failed} failed"
                )
            seconds = time.monotonic() - begin
            beat.message = "predict"
        if total:
            rate = total / max(seconds, 1e-9)
            log(f"predict: {total} images in {duration(seconds)}, {rate:.1f}/s, compilation included; {failed} failed")
        return done - failed

    def answers(self, listed: ImageList, places: Sequence[int] | np.ndarray) -> Iterator[Records]:
        """Place -> its records, batch by batch, of all these places; the order is that in which batches become full."""
        last: tuple[list[ReadImage], Any] | None = None
        for group in self._groups(self._read_all(listed, places)):
            if isinstance(group, FailedImage):
                yield group.records
                continue
            running = group, self._dispatch(group)
            if last is not None:
                yield self._collect(*last)
            last = running
        if last is not None:
            yield self._collect(*last)

    def _read_all(self, listed: ImageList, places: Sequence[int] | np.ndarray) -> Iterator[ReadImage | FailedImage]:
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.batch_size)
        read = lambda number: self._read(listed, int(places[number]))  # noqa: E731
        return iter(grain.MapDataset.range(len(places)).map(read).to_iter_dataset(options)) if len(places) else iter(())

    def _read(self, listed: ImageList, place: int) -> ReadImage | FailedImage:
        name = f"image {place}"
        try:
            job = listed.job(place)
            name = os.fspath(job.image)
            check_expressions(job.texts, self.model.tokenizer, job.where)
            image = images.load(job.image, exif=True)
            shape = BatchShape(1, 0, PHRASE_BUCKETS[-1], 0, self.model.cfg.sam.image_size, self.model.cfg.siglip.image_size)
            pixels = collate.prepare_pixels(image, (), shape)
            most = PHRASE_BUCKETS[-1]
            parts = [job.texts[at : at + most] for at in range(0, len(job.texts), most)]
            said = [collate.encode_expressions(part, self.model.prompts, self.model.tokenizer, name) for part in parts]
        except Exception as error:
            return FailedImage(place, name, failure_reason(name, error))
        return ReadImage(place, job, (image.height, image.width), pixels, said)

    def _groups(self, read: Iterator[ReadImage | FailedImage]) -> Iterator[list[ReadImage] | FailedImage]:
        """Batches of images of one `shape`. Where too many wait for others of theirs, the longest row of them goes as it is."""
        waiting: dict[tuple, list[ReadImage]] = {}
        count = 0
        for image in read:
            if isinstance(image, FailedImage):
                yield image
                continue
            mine = waiting.setdefault(image.shape, [])
            mine.append(image)
            count += 1
            if len(mine) < self._rows(image.bucket):
                if count < MOST_WAITING * self.model.evaluator.round_up(self.batch_size):
                    continue
                mine = max(waiting.values(), key=len)
            count -= len(mine)
            yield waiting.pop(mine[0].shape)
        yield from waiting.values()

    def _rows(self, bucket: tuple[int, int]) -> int:
        """Images of a batch."""
        evaluator = self.model.evaluator
        return evaluator.devices if bucket[0] * bucket[1] > LARGE else evaluator.round_up(self.batch_size)

    def _dispatch(self, group: Sequence[ReadImage]) -> Any:
        """What is being computed of a batch, or why it cannot be."""
        model, rows = self.model, self._rows(group[0].bucket)
        sides = model.cfg.sam.image_size, model.cfg.siglip.image_size
        try:
            views = collate.collate_images([one.pixels for one in group], rows, sides)
            rounds = []
            for parts in zip(*(one.rounds for one in group), strict=True):
                tokens = max(sum(len(said.input_ids) for said in part) for part in parts)
                shape = (rows, *bucket_shape(max(map(len, parts)), tokens))
                names = [os.fspath(one.job.image) for one in group]
                rounds.append(collate.collate_queries(parts, shape, len(self._prefix), model.tokenizer.pad, names))
            return model.evaluator.predict_candidates(
                self._params,
                self._prefix,
                views,
                [one.size for one in group],
                group[0].bucket,
                rounds,
                self.selection.count,
            )
        except Exception as error:
            return error

    def _collect(self, group: Sequence[ReadImage], running: Any) -> Records:
        """The records of a batch; where it cannot be computed, those of its images one by one."""
        try:
            if isinstance(running, Exception):
                raise running
            computed = [sharding.to_local_numpy((c.query, c.score, masks, finite)) for c, masks, finite in running]
        except Exception as error:
            if len(group) > 1:
                return {place: r for one in group for place, r in self._collect([one], self._dispatch([one])).items()}
            (one,) = group
            name = os.fspath(one.job.image)
            return FailedImage(one.place, name, failure_reason(name, error)).records
        found: Records = {}
        for row, one in enumerate(group):
            name = os.fspath(one.job.image)
            try:
                found[one.place] = list(self._records(one, name, row, computed))
            except Exception as error:
                found |= FailedImage(one.place, name, failure_reason(name, error)).records
        return found

    def _records(self, one: ReadImage, name: str, row: int, computed: Sequence[Sequence[np.ndarray]]) -> Iterator[dict]:
        blank = np.broadcast_to(np.uint8(0), (*one.size, 3))  # a record has the image's size alone
        texts, most = one.job.texts, PHRASE_BUCKETS[-1]
        several = self.selection.top_k > 1 or self.selection.score_threshold is not None
        for k, text in enumerate(texts):
            candidates = unpack_candidates(name, *(array[row, k % most] for array in computed[k // most]), one.size)
            unknown = self.card.unknown_words(text)
            prediction = select_prediction(name, text, blank, candidates, self.selection, unknown_words=unknown)
            yield prediction.to_json(candidates=several)

"""Answers many images one by one: the next one is decoded while this one is computed; one that is damaged stops nothing."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from flowseg_jax.inference.inputs import PredictionJob, failure_reason
from flowseg_jax.inference.outputs import PredictionWriter, Unwritable
from flowseg_jax.inference.segmentor import EncodedImage, GeneratedAnswer, Prediction, PreprocessedImage, Segmentor
from flowseg_jax.system.console import duration, heartbeat, log

RUNS, ENOUGH = 5, 2.0  # a latency is the median of so many runs, or of as many as so many seconds hold

PredictFn = Callable[[EncodedImage, Sequence[str]], Sequence[Prediction | GeneratedAnswer]]


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What came of a run.

    Attributes:
        answered, failed: images.
        paths: files that were written.
        last: the last image that was answered and what was asked about it; None if there is none.
    """

    answered: int
    failed: int
    paths: list[Path]
    last: tuple[PreprocessedImage, Sequence[str]] | None


def run(
    segmentor: Segmentor, jobs: Sequence[PredictionJob], respond: PredictFn, writer: PredictionWriter, *, strict: bool = False
) -> RunSummary:
    """Answers all jobs and writes the predictions; says which images failed and, for several, how fast it went.

    Args:
        respond: how texts are answered: one of the segmentor's methods.
        writer: where predictions go.
        strict: an image that fails is an error.

    Whatever an image raises while it is decoded, answered, drawn or written is its own failure, unless nothing at all can be
    written.

    Raises:
        UserError: a text that cannot be asked, before anything is computed; a folder that cannot be written.
        Exception: with `strict`, what an image raises.
    """
    for job in jobs:
        segmentor.validate_texts(job.texts, job.where)
    failed, paths, last, started = 0, [], None, time.monotonic()
    with heartbeat(f"predict: 0/{len(jobs)} images, loading and compiling") as beat:
        for number, (job, ready) in enumerate(_preprocessed(segmentor, jobs), 1):
            try:
                predictions = _predictions(segmentor, job, ready, respond)
                written = [writer.write(prediction) for prediction in predictions]
                for prediction, mine in zip(predictions, written, strict=True):
                    log(f"{prediction.summary()}  {mine[0] if mine else ''}".rstrip())
                pictures = writer.write_pictures(predictions)
                for picture in pictures:
                    log(str(picture))
                paths += [path for mine in (*written, pictures) for path in mine]
                last = ready, job.texts
            except Unwritable:
                raise
            except Exception as error:
                if strict:
                    raise
                why = failure_reason(os.fspath(job.image), error)
                failed += 1
                log(f"failed: {why}")
                writer.fail(os.fspath(job.image), why)
            rate = number / max(time.monotonic() - started, 1e-9)
            beat.message = f"predict: {number}/{len(jobs)} images, {rate:.1f}/s"
        beat.message = "predict"
    answered = len(jobs) - failed
    if len(jobs) > 1:
        seconds = time.monotonic() - started
        log(
            f"predict: {answered} of {len(jobs)} images answered in {duration(seconds)}, compilation included"
            f" ({len(jobs) / max(seconds, 1e-9):.1f} images/s); {failed} failed"
        )
    return RunSummary(answered, failed, paths, last)


def _preprocessed(
    segmentor: Segmentor, jobs: Sequence[PredictionJob]
) -> Iterator[tuple[PredictionJob, PreprocessedImage | Exception]]:
    """Each job with its image, or with what is wrong with it; a thread is one image ahead."""

    def preprocess(job: PredictionJob) -> PreprocessedImage | Exception:
        try:
            return segmentor.preprocess(job.image)
        except Exception as error:
            return error

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(preprocess, jobs[0])
        for here, job in enumerate(jobs):
            ready = coming.result()
            if here + 1 < len(jobs):
                coming = thread.submit(preprocess, jobs[here + 1])
            yield job, ready


def _predictions(
    segmentor: Segmentor, job: PredictionJob, ready: PreprocessedImage | Exception, respond: PredictFn
) -> list[Prediction]:
    if isinstance(ready, Exception):
        raise ready
    for note in ready.notes:
        log(f"note: {ready.name}: {note}")
    encoded, predictions = segmentor.encode_image(ready), []
    for response in respond(encoded, job.texts):
        if isinstance(response, Prediction):
            predictions.append(response)
            continue
        cut = "" if response.complete else " ... (cut: --max-tokens)"
        log(f"{encoded.name}: {response.question}\n  {response.text}{cut}")
        if response.without_phrase:
            log(f"note: {response.without_phrase} <SEG> of this answer stands for no phrase <p>..</p>, so it has no mask")
        predictions += response.or_empty(encoded)
    return predictions


def latency(segmentor: Segmentor, ready: PreprocessedImage, texts: Sequence[str], respond: PredictFn) -> str:
    """A line with what an image and what an expression cost once everything is compiled.

    Encoding runs from the decoded and resized image to the end of what the expressions share. Predicting runs from the texts to
    masks at the original size in memory, all texts of the image together; each is charged its share.
    """
    encoded = segmentor.encode_image(ready)
    encoding = _median(lambda: jax.block_until_ready(segmentor.encode_image(ready).cache))
    each = _median(lambda: respond(encoded, texts)) / len(texts)
    return (
        f"warm latency: first expression {encoding + each:.1f} ms, each further one {each:.1f} ms;"
        f" encoding an image {encoding:.1f} ms (medians after compilation; {len(texts)} asked together)"
    )


def _median(call: Callable[[], object]) -> float:
    """Milliseconds of a call that is compiled."""
    times: list[float] = []
    while len(times) < RUNS and sum(times) < ENOUGH:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)

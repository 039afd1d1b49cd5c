"""Evaluates one split in jitted batches, whatever the task, and writes `<split>.json` and `<split>.jsonl`.

The next batch is dispatched before the last one's results are read, so decoding images on the host and computing overlap. What
is finished is kept in `<split>.partial.jsonl` as it comes: an evaluation that was interrupted, or that met a damaged image,
continues from there. Where there are several processes, each evaluates its share and the first one writes. The task (`tasks`)
decides what is predicted, what is counted and what the tables hold.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from flowseg_jax.checkpoints import storage
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.resumable import Records, ResumableRecords
from flowseg_jax.system import distributed, host, paths
from flowseg_jax.system.console import duration, log, progress

HEARTBEAT = 8.0  # seconds of silence until a line of progress


class EvalSource(Protocol):
    """What is evaluated: an iterable of this process's part of each batch (`EvalDataset`, `GenericDataset`).

    Every batch has `places`, where its images stand in the split.

    Attributes:
        samples: how many records there will be, all processes together.
    """

    samples: int

    def __iter__(self) -> Iterator[Any]: ...


class DatasetFactory(Protocol):
    """Opens the data of an evaluation, without the images at `skip`, or only with those at `only` (places in the split)."""

    def __call__(self, *, only: Collection[int] | None = None, skip: Collection[int] = ()) -> EvalSource: ...


class EvalTask(Protocol):
    """What is predicted for a batch, and how the records of all batches are summarised.

    Attributes:
        evaluator: the model's compiled functions.
        queries: what a split should hold, for the error that it holds none: "expression", "image".
        unit: what a record is of: "samples", "images".
    """

    evaluator: Evaluator
    queries: str
    unit: str

    def predict(self, params: Any, data: EvalSource, batch: Any) -> Any:
        """Dispatches a batch; the arrays that come may still be computing."""

    def records(self, batch: Any, predicted: Any) -> Records:
        """Place in the split -> its records, of this process's images of the batch."""

    def stored(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record as `<split>.jsonl` has it."""

    def summarise(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The tables of all records."""

    def describe(self, result: Mapping[str, Any]) -> Iterable[str]:
        """What the console says of them, line by line."""


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What a run over a split yields.

    Attributes:
        result: what stands in `<split>.json`.
        records: one mapping a sample or image in the split's order, what stands in `<split>.jsonl`.
        places: place in the split -> its records.
    """

    result: dict[str, Any]
    records: list[dict[str, Any]]
    places: Records


def evaluate(
    task: EvalTask,
    params: Any,
    data: DatasetFactory,
    *,
    name: str,
    out: Path | str | None = None,
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
    say: Callable[[str], None] = log,
) -> EvalResult:
    """Evaluates a split and writes its results. Every process calls it alike.

    Args:
        task: what is predicted, and how it is counted.
        params: the model's parameters, from `Evaluator.place`.
        data: opens the split.
        name: of the result files.
        out: folder of `<name>.json` and `<name>.jsonl`; None writes nothing. Both are replaced only when complete.
        about: written beside the numbers.
        settings: what the records depend on. Partial results of other settings are not continued.
        say: receives the lines about the result.

    Raises:
        UserError: the split holds nothing to evaluate, an image is damaged, or `out` cannot be written. What was finished is
            kept.
    """
    begin = time.monotonic()
    path = None if out is None else Path(out) / f"{paths.check_name(name, 'split')}.partial.jsonl"
    with ResumableRecords.open(path, settings) as partial:
        if partial.records:
            log(f"evaluate {name}: continuing after {len(partial.records)} images of an earlier start")
        kept = sum(map(len, partial.records.values()))
        _evaluate_missing(task, params, data(skip=partial.records.keys()), partial, name, kept)
        records = [record for place in sorted(partial.records) for record in partial.records[place]]
        if not records:
            raise UserError(f"split {name!r} holds no {task.queries} to evaluate; prepare it, or choose another split")
        result = task.summarise(records) | dict(about)
        records = [task.stored(record) for record in records]
        seconds = time.monotonic() - begin
        say(
            f"evaluate {name}: {len(records) - kept} {task.unit} in {duration(seconds)},"
            f" {(len(records) - kept) / max(seconds, 1e-9):.1f}/s; {host.memory_line()}"
        )
        for line in task.describe(result):
            say(f"evaluate {name}: {line}")
        if out is not None and distributed.is_primary():
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            storage.write_text_atomic(Path(out) / f"{name}.jsonl", lines)
            storage.write_text_atomic(Path(out) / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        partial.finish()
    return EvalResult(result, records, partial.records)


def predictions(
    task: EvalTask, params: Any, data: EvalSource, reading: Callable[[], None] = lambda: None
) -> Iterator[tuple[Any, Any]]:
    """Batches with what was predicted, one after what is being computed.

    A batch that one process cannot read stops all of them, after those before it.
    """
    batches, last = iter(data), None
    reason = lambda error: str(error) if isinstance(error, UserError) else None  # noqa: E731
    while True:
        batch, fault = distributed.collective_try(lambda: next(batches, None), reason)
        running = None
        if batch is not None:
            reading()
            running = batch, task.predict(params, data, batch)
        if last is not None:
            yield last
        if fault:
            raise UserError(fault)
        if running is None:
            return
        last = running


def _evaluate_missing(task: EvalTask, params: Any, data: EvalSource, partial: ResumableRecords, name: str, kept: int) -> None:
    """Evaluates what is missing, batch by batch into `partial`."""
    total = kept + data.samples

    with progress(f"evaluate {name}", total, task.unit, done=kept, doing="reading images", every=HEARTBEAT) as bar:

        def reading() -> None:
            bar.update(sum(map(len, partial.records.values())), "computing" if task.evaluator.computing else "compiling")

        try:
            for batch, predicted in predictions(task, params, data, reading):
                partial.add(task.records(batch, predicted))
        except UserError as error:
            raise UserError(f"{error}; {partial.progress_note()}") from None

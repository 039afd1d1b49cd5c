"""Evaluates one split in jitted batches and writes `<split>.json` and `<split>.jsonl`.

The next batch is dispatched before the last one's results are read, so decoding images on the host and computing overlap. What
is finished is kept in `<split>.partial.jsonl` as it comes: an evaluation that was interrupted, or that met a damaged image,
goes on from there. Where there are several processes, each evaluates its share and the first one writes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flowseg_jax import sharding
from flowseg_jax.checkpoints import storage
from flowseg_jax.data.masks import encode
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import examples, metrics, postprocess, protocols
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.examples import GallerySample
from flowseg_jax.evaluation.resumable import ResumableRecords
from flowseg_jax.system import distributed, host, paths
from flowseg_jax.system.console import duration, heartbeat, log
from flowseg_jax.types import PAD

HEARTBEAT = 8.0  # seconds of silence until a line of progress


class EvalSource(Protocol):
    """What is evaluated: `data.eval_dataset.EvalData`, an iterable of this process's part of each batch.

    Attributes:
        samples: how many there are, all processes together.
        prefix: int32 [P], what every conversation begins with.
    """

    samples: int
    prefix: np.ndarray

    def __iter__(self) -> Iterator[Any]: ...


class DatasetFactory(Protocol):
    """Opens the data of an evaluation, without the images at `skip`, or only with those at `only` (places in the split)."""

    def __call__(self, *, only: Collection[int] | None = None, skip: Collection[int] = ()) -> EvalSource: ...


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What a run over a split yields.

    Attributes:
        result: what stands in `<split>.json`.
        records: one mapping a sample in the split's order, what stands in `<split>.jsonl`.
        examples: kind ("good", "random", "failed") -> a few samples with their masks.
    """

    result: dict[str, Any]
    records: list[dict[str, Any]]
    examples: dict[str, list[GallerySample]]


def evaluate(
    evaluator: Evaluator,
    params: Any,
    data: DatasetFactory,
    *,
    split: str,
    out: Path | str | None = None,
    protocol: protocols.Protocol = protocols.XSAM,
    shuffle_text: bool = False,
    about: Mapping[str, Any] | None = None,
    no_target_threshold: float = 0.0,
    gallery: int = 0,
    save_masks: bool = False,
) -> EvalResult:
    """Evaluates a split and writes its results. Every process calls it alike.

    Args:
        evaluator: the model's compiled functions.
        params: its parameters.
        data: opens the split.
        split: names the result files.
        out: folder of `<split>.json` and `<split>.jsonl`; None writes nothing. Both are replaced only when complete.
        protocol: names the meaning of the numbers; gives thresholds and the IoU of an empty sample.
        shuffle_text: `data` is the shuffled-text control (`EvalData(control_seed=...)`): every image is asked another image's
            sentences while its truth stays. The files are called `<split>_shuffled`.
        about: written beside the numbers, the checkpoint's digest and step above all. Partial results of another `about` are
            not continued.
        no_target_threshold: a selected score below it means "no target" (protocol "grefcoco"); scores lie in [0, 1], so at 0
            this is never so.
        gallery: how many examples of each kind to return.
        save_masks: add the selected mask and the best candidate's to each line of `<split>.jsonl`, as COCO's compressed
            run-length codes `rle` and `best_rle`.

    Raises:
        UserError: the split holds no expression, an image is damaged, or `out` cannot be written. What was finished is kept.
        ValueError: `shuffle_text` says something else than the data.
    """
    name = f"{paths.check_name(split, 'split')}_shuffled" if shuffle_text else paths.check_name(split, "split")
    about = {"shuffled_text": shuffle_text, "no_target_threshold": no_target_threshold, **(about or {})}
    record_of = functools.partial(_record, protocol=protocol, no_target_threshold=no_target_threshold)
    params = evaluator.place(params)
    before, begin = evaluator.compiles.total(), time.monotonic()
    with ResumableRecords.open(
        None if out is None else Path(out) / f"{name}.partial.jsonl",
        about | {"protocol": protocol.name, "save_masks": save_masks},
    ) as partial:
        if partial.records:
            log(f"evaluate {name}: going on behind {len(partial.records)} images of an earlier start")
        remaining = data(skip=partial.records.keys())
        kept = sum(map(len, partial.records.values()))
        _fill(evaluator, params, remaining, partial, record_of, name, save_masks, kept + remaining.samples)
        records = [record for place in sorted(partial.records) for record in partial.records[place]]
        if not records:
            raise UserError(f"split {split!r} holds no expression to evaluate; prepare it, or choose another split")
        if shuffle_text != any(r["text"] != r["sentence"] for r in records):
            raise ValueError("shuffle_text and the data disagree: EvalData(control_seed=...) makes the shuffled-text control")
        result = metrics.summarise(records, protocol)
        result["also"] = metrics.other_protocols(records, protocol)
        result |= about
        _tell(name, result, len(records) - kept, time.monotonic() - begin, evaluator, before)
        chosen = examples.choose(records, gallery)
        shown = _illustrate(evaluator, params, data, partial.records, chosen) if gallery else {}
        if out is not None and distributed.is_primary():
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            storage.write_text_atomic(Path(out) / f"{name}.jsonl", lines)
            storage.write_text_atomic(Path(out) / f"{name}.json", json.dumps(result, indent=1) + "\n")
        partial.finish()
    return EvalResult(result, records, shown)


def _tell(name: str, result: Mapping[str, Any], samples: int, seconds: float, evaluator: Evaluator, before: int) -> None:
    """Speed and numbers, for the console."""
    compiled = ", ".join(f"{count} {what}" for what, count in evaluator.compiles.items())
    log(
        f"evaluate {name}: {samples} samples in {duration(seconds)}, {samples / max(seconds, 1e-9):.1f}/s;"
        f" {evaluator.compiles.total() - before} compilations (so far: {compiled}); {host.memory_line()}"
    )
    log(
        f"evaluate {name}: {result['protocol']}, {metrics.format_metrics(result)},"
        f" oracle cIoU {result['oracle_ciou']:.2f}, oracle gIoU {result['oracle_giou']:.2f},"
        f" selection gap {result['selection_gap']:.2f}, failed {result['failed']}"
        + "".join(f", {count} of them {reason}" for reason, count in result["failures"].items())
    )
    if first := result.get("first_text"):  # ReasonSeg's two ways to count
        for texts, table in (("all texts", result), ("first text", first)):
            parts = "; ".join(f"{family}: {metrics.format_metrics(row)}" for family, row in table["families"].items())
            log(f"evaluate {name}: {texts}: {metrics.format_metrics(table)}; {parts}")
    for other, figures in result["also"].items():
        log(f"evaluate {name}: {other}, {metrics.format_metrics(figures)}")


Round = tuple[Any, postprocess.SelectedMasks, postprocess.FullSizeMasks]


def _dispatched(
    evaluator: Evaluator, params: Any, data: EvalSource, reading: Callable[[], None] = lambda: None
) -> Iterator[tuple[Any, list[Round]]]:
    """Batches with their rounds, one behind what is being computed.

    A batch that one process cannot read stops all of them, behind those before it.
    """
    batches, last = iter(data), None
    reason = lambda error: str(error) if isinstance(error, UserError) else None  # noqa: E731
    while True:
        batch, fault = distributed.collective_try(lambda: next(batches, None), reason)
        running = None
        if batch is not None:
            reading()
            running = batch, list(evaluator(params, data.prefix, batch))
        if last is not None:
            yield last
        if fault:
            raise UserError(fault)
        if running is None:
            return
        last = running


def _fill(
    evaluator: Evaluator,
    params: Any,
    data: EvalSource,
    partial: ResumableRecords,
    record_of: Callable[..., dict[str, Any]],
    name: str,
    save_masks: bool,
    total: int,
) -> None:
    """Evaluates what is missing, batch by batch into `partial`."""

    def status() -> str:
        done = sum(map(len, partial.records.values()))
        return f"evaluate {name}: {done}/{total} samples, {'computing' if evaluator.compiles['restore'] else 'compiling'}"

    with heartbeat(f"evaluate {name}: 0/{total} samples, reading images", HEARTBEAT) as beat:

        def reading() -> None:
            beat.message = status()

        try:
            for batch, rounds in _dispatched(evaluator, params, data, reading):
                found: dict[int, list[dict[str, Any]]] = {place: [] for place in batch.places}
                for asked, chosen, restored in rounds:
                    _collect(found, batch, asked, chosen, restored, record_of, save_masks)
                partial.add(found)
        except UserError as error:
            raise UserError(f"{error}; {partial.progress_note()}") from None
        beat.message = f"evaluate {name}"


def _collect(
    found: dict[int, list[dict[str, Any]]],
    batch: Any,
    asked: Any,
    chosen: postprocess.SelectedMasks,
    restored: postprocess.FullSizeMasks,
    record_of: Callable[..., dict[str, Any]],
    save_masks: bool,
) -> None:
    """The records of one round of this process's rows."""
    query, score, rank = sharding.to_local_numpy((chosen.query, chosen.score, chosen.rank))
    counted = sharding.to_local_numpy(dataclasses.replace(restored, masks=restored.masks if save_masks else None))
    for b, samples in enumerate(asked.samples):
        for k, sample in enumerate(samples):
            numbers = {
                field.name: getattr(counted, field.name)[b, k] for field in dataclasses.fields(counted) if field.name != "masks"
            }
            record = record_of(sample, batch.sizes[b], query[b, k], score[b, k], rank[b, k], numbers)
            if save_masks:
                for name, packed in zip(("rle", "best_rle"), counted.masks[b, k], strict=True):
                    mask = postprocess.unpack_mask(packed, batch.sizes[b])
                    record[name] = {"size": list(batch.sizes[b]), "counts": encode(mask.astype(np.uint8))}
            found[batch.places[b]].append(record)


def _illustrate(
    evaluator: Evaluator,
    params: Any,
    data: DatasetFactory,
    records: Mapping[int, list[dict[str, Any]]],
    chosen: Mapping[str, list[int]],
) -> dict[str, list[GallerySample]]:
    """Evaluates the chosen samples' images once more, now with their masks.

    Args:
        records: of each place in the split.
        chosen: kind -> indices into all records in order.
    """
    order = [(place, k) for place in sorted(records) for k in range(len(records[place]))]
    wanted = {order[index] for indices in chosen.values() for index in indices}
    mine: dict[tuple[int, int], GallerySample] = {}
    for batch, rounds in _dispatched(evaluator, params, data(only={place for place, _ in wanted})):
        before = [0] * len(batch.places)
        for asked, _, restored in rounds:
            masks = None  # read only where an example is wanted
            for b, samples in enumerate(asked.samples):
                place = batch.places[b]
                for k in range(len(samples)):
                    if (place, before[b] + k) not in wanted:
                        continue
                    masks = sharding.to_local_numpy(restored.masks) if masks is None else masks
                    selected, best = (postprocess.unpack_mask(masks[b, k, n], batch.sizes[b]) for n in (0, 1))
                    record = records[place][before[b] + k]
                    truth = np.array(asked.truth[b][k])
                    mine[place, before[b] + k] = GallerySample(record, np.array(batch.images[b]), truth, selected, best)
                before[b] += len(samples)
    everyone = {}
    for part in distributed.all_gather_bytes(pickle.dumps(mine)):
        everyone |= pickle.loads(part)
    return {kind: [everyone[order[index]] for index in indices] for kind, indices in chosen.items()}


def _record(
    sample: Any,
    size: tuple[int, int],
    query: np.ndarray,
    score: np.ndarray,
    rank: np.ndarray,
    counted: Mapping[str, np.ndarray],
    *,
    protocol: protocols.Protocol,
    no_target_threshold: float,
) -> dict[str, Any]:
    """One line of the JSONL. Every array is [2]: the selected mask and the best candidate."""
    pairs = {
        raster: [(int(counted[f"{raster}intersection"][n]), int(counted[f"{raster}union"][n])) for n in (0, 1)]
        for raster in ("", "single_cover_")
    }
    (selected, best), (single_cover, best_single_cover) = pairs[""], pairs["single_cover_"]
    oracle = metrics.best_of(selected, best)
    oracle_single_cover = metrics.best_of(single_cover, best_single_cover)
    record = {
        "image_id": int(sample.image_id),
        "file_name": sample.file_name,
        "ann_id": int(sample.ann_id),
        "ref_id": int(sample.ref_id),
        "sentence_id": int(sample.sentence_id),
        "sentence": sample.sentence,
        "text": sample.prompt,
        "text_form": protocol.text,
        "family": sample.family,
        "count": int(sample.count),
        "height": int(size[0]),
        "width": int(size[1]),
        "intersection": selected[0],
        "union": selected[1],
        "single_cover_intersection": single_cover[0],
        "single_cover_union": single_cover[1],
        "query": int(query[0]),
        "score": _number(score[0]),
        "best_query": int(query[1]),
        "best_score": _number(score[1]),
        "best_rank": int(rank[1]),
        "best_intersection": best[0],
        "best_union": best[1],
        "oracle_intersection": oracle[0],
        "oracle_union": oracle[1],
        "oracle_single_cover_intersection": oracle_single_cover[0],
        "oracle_single_cover_union": oracle_single_cover[1],
        "area": int(counted["area"][0]),
        "truth_area": selected[0] + selected[1] - int(counted["area"][0]),
        "no_target_threshold": no_target_threshold,
        "failed": not bool(counted["finite"][0]),
        "failure": "" if counted["finite"][0] else "no <SEG>" if query[0] == PAD else "non-finite",
    }
    record["iou"] = metrics.sample_iou(record, protocol)
    both_empty = 0.0 if record["failed"] else protocol.both_empty
    record["best_iou"] = metrics.iou(*(best_single_cover if protocol.raster == "sum" else best), both_empty)
    record["oracle_iou"] = metrics.oracle_iou(record, protocol)
    return record


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None  # NaN is not JSON

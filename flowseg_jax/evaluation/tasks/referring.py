"""Referring and reasoning segmentation: the selected mask of every expression against its truth.

One record a sample, with its intersections and unions in integers; every table is a function of the records (`metrics`).
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowseg_jax import sharding
from flowseg_jax.data.eval_dataset import EvalBatch, QueryRound
from flowseg_jax.data.masks import encode
from flowseg_jax.evaluation import examples, metrics, postprocess, protocols, runner
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.examples import GallerySample
from flowseg_jax.evaluation.resumable import Records
from flowseg_jax.evaluation.runner import DatasetFactory, EvalResult, EvalSource, predictions
from flowseg_jax.system import distributed, paths
from flowseg_jax.system.console import log
from flowseg_jax.types import PAD

Round = tuple[QueryRound, postprocess.SelectedMasks, postprocess.FullSizeMasks]


@dataclasses.dataclass(frozen=True)
class ReferringTask:
    """Expressions, counted by a protocol; a `runner.EvalTask`.

    Attributes:
        evaluator: the model's compiled functions.
        protocol: names the meaning of the numbers; gives thresholds and the IoU of an empty sample.
        shuffle_text: the data is the shuffled-text control.
        no_target_threshold, save_masks: see `evaluate`.
    """

    evaluator: Evaluator
    protocol: protocols.Protocol = protocols.XSAM
    shuffle_text: bool = False
    no_target_threshold: float = 0.0
    save_masks: bool = False
    queries = "expression"
    unit = "samples"

    def predict(self, params: Any, data: EvalSource, batch: EvalBatch) -> list[Round]:
        return list(self.evaluator.predict_expressions(params, data.prefix, batch))

    def records(self, batch: EvalBatch, predicted: list[Round]) -> Records:
        found: Records = {place: [] for place in batch.places}
        for query_round, chosen, restored in predicted:
            self._collect(found, batch, query_round, chosen, restored)
        return found

    def _collect(
        self,
        found: Records,
        batch: EvalBatch,
        query_round: QueryRound,
        chosen: postprocess.SelectedMasks,
        restored: postprocess.FullSizeMasks,
    ) -> None:
        """The records of one round of this process's rows."""
        query, score, rank = sharding.to_local_numpy((chosen.query, chosen.score, chosen.rank))
        counted = sharding.to_local_numpy(dataclasses.replace(restored, masks=restored.masks if self.save_masks else None))
        names = [field.name for field in dataclasses.fields(counted) if field.name != "masks"]
        for b, samples in enumerate(query_round.samples):
            for k, sample in enumerate(samples):
                numbers = {name: getattr(counted, name)[b, k] for name in names}
                size = batch.sizes[b]
                record = self.record(sample, size, query[b, k], score[b, k], rank[b, k], numbers)
                if self.save_masks:
                    for name, packed in zip(("rle", "best_rle"), counted.masks[b, k], strict=True):
                        mask = postprocess.unpack_mask(packed, size)
                        record[name] = {"size": list(size), "counts": encode(mask.astype(np.uint8))}
                found[batch.places[b]].append(record)

    def record(
        self,
        sample: Any,
        size: tuple[int, int],
        query: np.ndarray,
        score: np.ndarray,
        rank: np.ndarray,
        counted: Mapping[str, np.ndarray],
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
            "text_form": self.protocol.text,
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
            "no_target_threshold": self.no_target_threshold,
            "failed": not bool(counted["finite"][0]),
            "failure": "" if counted["finite"][0] else "no <SEG>" if query[0] == PAD else "non-finite",
        }
        record["iou"] = metrics.sample_iou(record, self.protocol)
        both_empty = 0.0 if record["failed"] else self.protocol.both_empty
        record["best_iou"] = metrics.iou(*(best_single_cover if self.protocol.raster == "sum" else best), both_empty)
        record["oracle_iou"] = metrics.oracle_iou(record, self.protocol)
        return record

    def stored(self, record: dict[str, Any]) -> dict[str, Any]:
        return record

    def summarise(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        if self.shuffle_text != any(r["text"] != r["sentence"] for r in records):
            raise ValueError(
                "shuffle_text and the data disagree: EvalDataset(control_seed=...) makes the shuffled-text control"
            )
        return metrics.summarise(records, self.protocol) | {"also": metrics.other_protocols(records, self.protocol)}

    def describe(self, result: Mapping[str, Any]) -> Iterator[str]:
        yield (
            f"{result['protocol']}, {metrics.format_metrics(result)},"
            f" oracle cIoU {result['oracle_ciou']:.2f}, oracle gIoU {result['oracle_giou']:.2f},"
            f" selection gap {result['selection_gap']:.2f}, failed {result['failed']}"
            + "".join(f", {count} of them {reason}" for reason, count in result["failures"].items())
        )
        if first := result.get("first_text"):  # ReasonSeg's two ways to count
            for texts, table in (("all texts", result), ("first text", first)):
                parts = "; ".join(f"{family}: {metrics.format_metrics(row)}" for family, row in table["families"].items())
                yield f"{texts}: {metrics.format_metrics(table)}; {parts}"
        for other, figures in result["also"].items():
            yield f"{other}, {metrics.format_metrics(figures)}"


@dataclasses.dataclass(frozen=True)
class ReferringResult(EvalResult):
    """The result with a few samples to look at.

    Attributes:
        examples: kind ("good", "random", "failed", "fixed") -> samples with their masks.
    """

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
    fixed: int = 0,
    save_masks: bool = False,
    say: Callable[[str], None] = log,
) -> ReferringResult:
    """Evaluates a split of expressions and writes its results. Every process calls it alike.

    Args:
        evaluator: the model's compiled functions.
        params: its parameters.
        data: opens the split.
        split: names the result files.
        out: folder of `<split>.json` and `<split>.jsonl`; None writes nothing. Both are replaced only when complete.
        protocol: names the meaning of the numbers; gives thresholds and the IoU of an empty sample.
        shuffle_text: `data` is the shuffled-text control (`EvalDataset(control_seed=...)`): every image gets another
            image's sentences while its truth stays. The files are called `<split>_shuffled`.
        about: written beside the numbers, the checkpoint's digest and step above all. Partial results of another `about` are
            not continued.
        no_target_threshold: a selected score below it means "no target" (protocol "grefcoco"); scores lie in [0, 1], so at 0
            this is never so.
        gallery: how many examples of each kind to return.
        fixed: how many examples to return under "fixed", the same ones whatever the model answers.
        save_masks: add the selected mask and the best candidate's to each line of `<split>.jsonl`, as COCO's compressed
            run-length codes `rle` and `best_rle`.
        say: receives the lines about the result.

    Raises:
        UserError: the split holds no expression, an image is damaged, or `out` cannot be written. What was finished is kept.
        ValueError: `shuffle_text` says something else than the data.
    """
    name = f"{paths.check_name(split, 'split')}_shuffled" if shuffle_text else split
    about = {"shuffled_text": shuffle_text, "no_target_threshold": no_target_threshold, **(about or {})}
    settings = about | {"protocol": protocol.name, "save_masks": save_masks}
    task = ReferringTask(evaluator, protocol, shuffle_text, no_target_threshold, save_masks)
    params = evaluator.place(params)
    found = runner.evaluate(task, params, data, name=name, out=out, about=about, settings=settings, say=say)
    chosen = examples.choose(found.records, gallery) if gallery else {}
    chosen |= {"fixed": examples.spread(len(found.records), fixed)} if fixed else {}
    shown = _illustrate(task, params, data, found.places, chosen) if chosen else {}
    return ReferringResult(found.result, found.records, found.places, shown)


def _illustrate(
    task: ReferringTask,
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
    for batch, rounds in predictions(task, params, data(only={place for place, _ in wanted})):
        before = [0] * len(batch.places)
        for query_round, _, restored in rounds:
            masks = None  # read only where an example is wanted
            for b, samples in enumerate(query_round.samples):
                place = batch.places[b]
                for k in range(len(samples)):
                    if (place, before[b] + k) not in wanted:
                        continue
                    masks = sharding.to_local_numpy(restored.masks) if masks is None else masks
                    selected, best = (postprocess.unpack_mask(masks[b, k, n], batch.sizes[b]) for n in (0, 1))
                    record = records[place][before[b] + k]
                    truth = np.array(query_round.truth[b][k])
                    mine[place, before[b] + k] = GallerySample(record, np.array(batch.images[b]), truth, selected, best)
                before[b] += len(samples)
    everyone = {}
    for part in distributed.all_gather_bytes(pickle.dumps(mine)):
        everyone |= pickle.loads(part)
    return {kind: [everyone[order[index]] for index in indices] for kind, indices in chosen.items()}


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None  # NaN is not JSON

"""Evaluates one split in jitted batches and writes `<split>.json` and `<split>.jsonl`.

The model compiles once; only the two small functions that touch original-size pixels compile again for each size bucket. The
next batch is dispatched before the last one's results are read, so decoding images on the host and computing overlap.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from flowseg_jax import storage
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, postprocess, protocols
from flowseg_jax.evaluation.examples import Example, Gallery
from flowseg_jax.models import flowseg
from flowseg_jax.writers import duration, heartbeat, say

HEARTBEAT = 8.0  # seconds of silence until a line of progress


class Data(Protocol):
    """What is evaluated: `data.evaluation.EvalData`, an iterable of its `EvalBatch`es that knows its number of samples."""

    samples: int

    def __iter__(self) -> Iterator[Any]: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a run over a split yields.

    Attributes:
        result: what stands in `<split>.json`.
        records: one mapping a sample, what stands in `<split>.jsonl`.
        examples: kind ("good", "random", "failed") -> a few samples with their masks.
    """

    result: dict[str, Any]
    records: list[dict[str, Any]]
    examples: dict[str, list[Example]]


class Evaluator:
    """The jitted functions of one model. Reuse it over splits and parameters: nothing compiles twice.

    Attributes:
        compiles: function name -> number of compilations so far.
    """

    def __init__(self, graphdef: nnx.GraphDef):
        self.compiles: collections.Counter[str] = collections.Counter()

        def segment(params, batch, truth, inside):
            self.compiles["model"] += 1  # runs when traced, that is once a compilation
            model = flowseg.bind(graphdef, params)
            found = model.segment(batch)
            chosen = postprocess.choose(found.scores, found.mask_logits, truth, inside)
            b, k, n, *grid = chosen.logits.shape
            refined = model.refine(chosen.logits.reshape(b, k * n, *grid), found.mask_features)
            return dataclasses.replace(chosen, logits=refined.reshape(chosen.logits.shape))

        def truth_on_grid(truth, where):
            self.compiles["truth"] += 1
            return postprocess.truth_on_grid(truth, where), postprocess.image_on_grid(where)

        def restore(logits, where, truth):
            self.compiles["restore"] += 1
            return postprocess.restore(logits, where, truth)

        def grid(params, batch):
            return jax.eval_shape(lambda p, b: flowseg.bind(graphdef, p).segment(b).mask_logits, params, batch).shape[-2:]

        self._segment, self._truth_on_grid, self._restore = jax.jit(segment), jax.jit(truth_on_grid), jax.jit(restore)
        self._grid_of, self._grid = grid, None

    def __call__(self, params: Any, data: Any) -> tuple[postprocess.Chosen, postprocess.Restored]:
        """Dispatches one `EvalBatch`; the arrays that come back may still be computing."""
        if self._grid is None:
            self._grid = self._grid_of(params, data.batch)
        where = postprocess.geometry(
            data.batch.scaled_size, data.sizes, grid=self._grid, padded_size=data.batch.images.shape[1]
        )
        rows, phrases = data.batch.phrase_mask.shape
        pack = lambda masks, count: postprocess.pack_truth(masks, rows, count, where.bucket)  # noqa: E731
        truth = postprocess.Truth(pack(data.truth, phrases), pack(data.once, phrases), pack(data.ignored, 1))
        where, truth = jax.device_put((where, truth))
        chosen = self._segment(params, data.batch, *self._truth_on_grid(truth.union, where))
        return chosen, self._restore(chosen.logits, where, truth)


def evaluate(
    graphdef: nnx.GraphDef,
    params: Any,
    data: Data,
    *,
    split: str,
    out: Path | str | None = None,
    protocol: protocols.Protocol = protocols.XSAM,
    shuffle_text: bool = False,
    checkpoint: Mapping[str, Any] | None = None,
    gallery: int = 6,
    evaluator: Evaluator | None = None,
) -> Evaluation:
    """Evaluates `data` and writes its results.

    Args:
        graphdef, params: the model, graph definition and parameters at rest.
        data: the split.
        split: names the result files.
        out: folder of `<split>.json` and `<split>.jsonl`; None writes nothing. Both are replaced only when complete.
        protocol: names the meaning of the numbers; gives thresholds and the IoU of an empty sample.
        shuffle_text: `data` is the shuffled-text control (`EvalData(control_seed=...)`): every image is asked another image's
            sentences while its truth stays. The files are called `<split>_shuffled`.
        checkpoint: `digest` and `step` of the parameters, written beside the numbers.
        gallery: how many examples of each kind to keep.
        evaluator: the compiled functions of an earlier call with the same graphdef.

    Raises:
        UserError: the split holds no expression, or `out` cannot be written.
        ValueError: `shuffle_text` says something else than the data.
    """
    evaluator = evaluator or Evaluator(graphdef)
    name = f"{split}_shuffled" if shuffle_text else split
    records: list[dict[str, Any]] = []
    kept = Gallery(gallery)
    before, begin = evaluator.compiles.total(), time.monotonic()

    def status(doing: str) -> str:
        return f"evaluate {name}: {len(records)}/{data.samples} samples, {doing}"

    def collect(batch: Any, chosen: postprocess.Chosen, restored: postprocess.Restored) -> None:
        values = jax.device_get((chosen.query, chosen.score, chosen.rank, dataclasses.replace(restored, masks=None)))
        masks = None  # read only when an example is kept
        for b, samples in enumerate(batch.samples):
            for k, sample in enumerate(samples):
                at = jax.tree.map(lambda value: value[b, k], values)  # noqa: B023 (called at once)
                record = _record(sample, batch.sizes[b], *at, protocol=protocol)
                records.append(record)
                if kinds := kept.wants(record):
                    masks = jax.device_get(restored.masks) if masks is None else masks
                    selected, best = (postprocess.unpack_mask(masks[b, k, n], batch.sizes[b]) for n in (0, 1))
                    kept.add(Example(record, np.array(batch.images[b]), np.array(batch.truth[b][k]), selected, best), kinds)

    with heartbeat(status("reading images"), HEARTBEAT) as beat:
        last = None
        for batch in data:
            beat.message = status("computing" if evaluator.compiles["restore"] else "compiling")
            running = (batch, *evaluator(params, batch))
            if last:
                collect(*last)
            last = running
        if last:
            collect(*last)
        beat.message = f"evaluate {name}"

    if not records:
        raise UserError(f"split {split!r} holds no expression to evaluate; prepare it, or choose another split")
    if shuffle_text != any(r["text"] != r["sentence"] for r in records):
        raise ValueError("shuffle_text and the data disagree: EvalData(control_seed=...) makes the shuffled-text control")
    result = metrics.summarise(records, protocol)
    result["also"] = metrics.other_protocols(records, protocol)
    result["checkpoint"] = dict(checkpoint or {})
    result["shuffled_text"] = shuffle_text
    seconds = max(time.monotonic() - begin, 1e-9)
    compiled = ", ".join(f"{count} {what}" for what, count in evaluator.compiles.items())
    say(
        f"evaluate {name}: {len(records)} samples in {duration(seconds)}, {len(records) / seconds:.1f}/s;"
        f" {evaluator.compiles.total() - before} compilations (so far: {compiled})"
    )
    say(
        f"evaluate {name}: {protocol.name}, n {result['n']}, cIoU {result['ciou']:.2f}, gIoU {result['giou']:.2f},"
        f" oracle cIoU {result['oracle_ciou']:.2f}, selection gap {result['selection_gap']:.2f}, failed {result['failed']}"
    )
    for other, figures in result["also"].items():
        say(f"evaluate {name}: {other}, n {figures['n']}, cIoU {figures['ciou']:.2f}, gIoU {figures['giou']:.2f}")
    if out is not None:
        storage.replace_text(Path(out) / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        storage.replace_text(Path(out) / f"{name}.json", json.dumps(result, indent=1) + "\n")
    return Evaluation(result, records, kept.examples())


def _record(
    sample: Any,
    size: tuple[int, int],
    query: np.ndarray,
    score: np.ndarray,
    rank: np.ndarray,
    counted: postprocess.Restored,
    *,
    protocol: protocols.Protocol,
) -> dict[str, Any]:
    """One line of the JSONL. Every array is [2]: the selected mask and the best candidate."""
    selected, best = ((int(counted.intersection[n]), int(counted.union[n])) for n in (0, 1))
    once, best_once = ((int(counted.once_intersection[n]), int(counted.once_union[n])) for n in (0, 1))
    oracle, oracle_once = metrics.better(selected, best, protocol), metrics.better(once, best_once, protocol)
    record = {
        "image_id": int(sample.image_id),
        "file_name": sample.file_name,
        "ann_id": int(sample.ann_id),
        "ref_id": int(sample.ref_id),
        "sentence_id": int(sample.sentence_id),
        "sentence": sample.sentence,
        "text": sample.prompt,
        "family": sample.family,
        "count": int(sample.count),
        "height": int(size[0]),
        "width": int(size[1]),
        "intersection": selected[0],
        "union": selected[1],
        "once_intersection": once[0],
        "once_union": once[1],
        "query": int(query[0]),
        "score": _number(score[0]),
        "best_query": int(query[1]),
        "best_score": _number(score[1]),
        "best_rank": int(rank[1]),
        "best_intersection": best[0],
        "best_union": best[1],
        "oracle_intersection": oracle[0],
        "oracle_union": oracle[1],
        "oracle_once_intersection": oracle_once[0],
        "oracle_once_union": oracle_once[1],
        "failed": not bool(counted.finite[0]),
    }
    record["iou"] = metrics.sample_iou(record, protocol)
    record["best_iou"] = metrics.iou(*best, protocol.both_empty)
    record["oracle_iou"] = metrics.iou(*oracle, protocol.both_empty)
    return record


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None  # NaN is not JSON

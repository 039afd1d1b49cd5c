"""Generic segmentation: every pixel's category and every object's mask, whatever the image shows.

All categories of the data set are asked for (`category_scores`); what becomes of the candidates says `fusion`. One record an
image holds the counts of all three tasks, `panoptic`, `semantic` and `instance`; their tables are functions of the records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flowseg_jax import sharding
from flowseg_jax.data.generic_dataset import CategoryPrompts, GenericBatch
from flowseg_jax.data.records import Example
from flowseg_jax.evaluation import fusion, postprocess
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.fusion import MASK2FORMER, FusionOutput, Thresholds
from flowseg_jax.evaluation.resumable import Records
from flowseg_jax.evaluation.runner import EvalSource
from flowseg_jax.evaluation.tasks import category_tables, instance, panoptic, semantic


@dataclasses.dataclass(frozen=True)
class GenericTask:
    """All categories of a data set; a `runner.EvalTask`.

    Attributes:
        evaluator: the model's compiled functions.
        prompts: how the categories are asked for.
        things: which of them are things; None: no panoptic and no semantic segmentation, mask AP alone.
        thresholds: of the panoptic segmentation.
        save_masks: leave the objects with their masks in the records, from which mask AP can be made again.
    """

    evaluator: Evaluator
    prompts: CategoryPrompts
    things: tuple[bool, ...] | None
    thresholds: Thresholds = MASK2FORMER
    save_masks: bool = False
    queries = "image"
    unit = "images"

    def predict(self, params: Any, data: EvalSource, batch: GenericBatch) -> FusionOutput:
        threshold = None if self.things is None else self.thresholds.score
        return self.evaluator.predict_categories(params, batch, self.prompts, threshold)

    def records(self, batch: GenericBatch, predicted: FusionOutput) -> Records:
        found = sharding.to_local_numpy(predicted)
        rows = [jax.tree.map(lambda value, b=b: value[b], found) for b in range(len(batch.examples))]
        return {p: [self._record(e, row)] for p, e, row in zip(batch.places, batch.examples, rows, strict=True)}

    def _record(self, example: Example, found: FusionOutput) -> dict[str, Any]:
        """What an image leaves."""
        size, objects = (example.height, example.width), found.objects
        pairs = zip(objects.category.tolist(), objects.score.tolist(), objects.candidate.tolist(), strict=True)
        record = {
            "image_id": example.image_id,
            "file_name": example.file_name,
            "height": example.height,
            "width": example.width,
            "failed": not bool(found.finite),
            **instance.count_objects(example, pairs, lambda n: postprocess.unpack_mask(objects.masks[n], size)),
        }
        if self.things is None:
            return record
        truth = panoptic.Segments.of(example)
        labels = found.labels.semantic[: size[0], : size[1]] if found.finite else np.full(size, -1, np.int16)
        fused = fusion.fuse(found.labels, self.things, size, self.thresholds.overlap)
        return record | panoptic.count_segments(fused, truth) | semantic.count_pixels(labels, truth)

    def stored(self, record: dict[str, Any]) -> dict[str, Any]:
        return record if self.save_masks else {key: value for key, value in record.items() if key not in instance.OBJECTS}

    def summarise(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """A table a protocol, with its name and n: "panoptic" and "semantic" (if `things` are known) and "instance"."""
        categories = self.prompts.categories
        result = {"n": len(records), "failed": sum(r["failed"] for r in records), "categories": list(categories)}
        result["things"] = None if self.things is None else list(self.things)
        settings = {
            "panoptic": {"score_threshold": self.thresholds.score, "overlap_threshold": self.thresholds.overlap},
            "instance": {"predictions": fusion.TOP},
        }
        found = category_tables.tables(records, categories, self.things)
        return result | {name: {"protocol": name} | settings.get(name, {}) | table for name, table in found.items()}

    def describe(self, result: Mapping[str, Any]) -> list[str]:
        return [f"{line}, failed {result['failed']}" for line in category_tables.format_tables(result)]

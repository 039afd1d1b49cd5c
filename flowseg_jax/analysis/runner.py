"""The model and the samples of the diagnostics that run the model: the only place that knows how an evaluation feeds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flowseg_jax.data.records import Sample
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, postprocess, report
from flowseg_jax.evaluation.benchmark import ReferringEvaluation
from flowseg_jax.models import flowseg
from flowseg_jax.models.outputs import ImageCache
from flowseg_jax.ops.portable import without_kernels
from flowseg_jax.system.console import heartbeat
from flowseg_jax.types import ExpressionQueries

# (model, image cache, queries, truth on the grid [B, K, h, w], share of image [B, h, w])
# -> ({name: [B, K, ...]}, mask logits [B, K, N, h, w])
AnalysisFn = Callable[
    [flowseg.FlowSeg, ImageCache, ExpressionQueries, jax.Array, jax.Array], tuple[dict[str, jax.Array], jax.Array]
]


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """One sample of a diagnostic.

    Attributes:
        sample: the expression.
        values: what the diagnostic's function gave for it, without the leading [B, K].
        iou: [N] in [0, 1], at the original size; 0 for logits that are no numbers.
        masks: bool [N, H, W]. truth: bool [H, W]. ignored: bool [H, W]. image: uint8 [H, W, 3].
            All four are None in a sample whose pixels were let go of.
    """

    sample: Sample
    values: Mapping[str, np.ndarray]
    iou: np.ndarray
    masks: np.ndarray | None
    truth: np.ndarray | None
    ignored: np.ndarray | None
    image: np.ndarray | None

    def figures(self, **more: Any) -> SampleResult:
        """Without its pixels, which would fill the memory if all samples kept theirs, and with more values."""
        values = {**self.values, **more}
        return dataclasses.replace(self, values=values, masks=None, truth=None, ignored=None, image=None)


@dataclasses.dataclass(frozen=True)
class AnalysisRunner:
    """A model and the first images of a split.

    Attributes:
        evaluation: the model and the prepared data set.
        split: which split. images: how many of its images, None for all.
    """

    evaluation: ReferringEvaluation
    split: str
    images: int | None = None

    def __post_init__(self):
        self.evaluation.data.check_split(self.split)
        if self.images is not None and self.images < 1:
            raise UserError(f"--max-images must be at least 1, got {self.images}")

    @property
    def about(self) -> dict[str, Any]:
        """What was measured, as it stands in the JSON."""
        return {"checkpoint": dict(self.evaluation.model.checkpoint), "split": self.split, "images": self.images}

    @property
    def origin(self) -> list[str]:
        """The model and the data, as they stand at the end of a page."""
        model, data = self.evaluation.model, self.evaluation.data
        return [report.origin(model.name, {"checkpoint": model.checkpoint}), f"Data {data.directory}, {self.split}"]

    def measure(self, function: AnalysisFn, name: str) -> Iterator[SampleResult]:
        """Runs a diagnostic's function over all samples, jitted, and brings its masks to the original sizes.

        Args:
            function: see `AnalysisFn`; it is traced.
            name: of the diagnostic, for the line of progress.

        Raises:
            UserError: the split holds no expression.
        """
        model, data = self.evaluation.model, self.evaluation.open(self.split, images=self.images)
        return measure(flowseg.abstract_model(model.cfg)[0], model.params, data, function, name)


def measure(graphdef: Any, params: Any, data: Any, function: AnalysisFn, name: str) -> Iterator[SampleResult]:
    """`AnalysisRunner.measure` for any model and any data with the interface of `EvalDataset`."""
    if not data.samples:
        raise UserError("the split holds no expression to measure; prepare it, or choose another split")

    # Where there are several devices, the compiler divides these two, and it cannot divide a kernel.
    @jax.jit
    def encode_image(params, views, prefix):
        with without_kernels():
            return flowseg.bind_params(graphdef, params).prefill_image(views, prefix)

    @jax.jit
    def run(params, *inputs):
        with without_kernels():
            return function(flowseg.bind_params(graphdef, params), *inputs)

    on_grid = jax.jit(lambda truth, where: (postprocess.truth_on_grid(truth, where), postprocess.image_on_grid(where)))
    restore = jax.jit(postprocess.upsample_and_count)
    done = 0
    with heartbeat(f"analyze {name}: compiling") as beat:
        for batch in data:
            cache = encode_image(params, batch.views, data.prefix)
            rows, side = batch.views.sam_images.shape[:2]
            where = postprocess.geometry(
                batch.views.resized_hw, batch.sizes, grid=cache.mask_features.shape[1:3], padded_size=side, bucket=batch.bucket
            )
            for query_round in batch.rounds:
                pack = lambda masks, count: postprocess.pack_truth(masks, rows, count, where.bucket)  # noqa: B023, E731
                phrases = query_round.questions.query_valid.shape[1]
                truth = postprocess.GroundTruth(
                    pack(query_round.truth, phrases), pack(query_round.single_cover, phrases), pack(batch.ignored, 1)
                )
                values, logits = run(params, cache, query_round.questions, *on_grid(truth.union, where))
                values, restored = jax.device_get((values, restore(logits, where, truth)))
                for b, samples in enumerate(query_round.samples):
                    for k, sample in enumerate(samples):
                        yield SampleResult(
                            sample,
                            {key: value[b, k] for key, value in values.items()},
                            _ious(restored, (b, k)),
                            np.array([postprocess.unpack_mask(mask, batch.sizes[b]) for mask in restored.masks[b, k]]),
                            query_round.truth[b][k],
                            batch.ignored[b][0],
                            batch.images[b],
                        )
                done += sum(len(samples) for samples in query_round.samples)
            beat.message = f"analyze {name}: {done}/{data.samples} samples"


def _ious(restored: postprocess.FullSizeMasks, at: tuple[int, int]) -> np.ndarray:
    """[N] of one sample."""
    counted = zip(restored.intersection[at], restored.union[at], restored.finite[at], strict=True)
    return np.array([metrics.iou(*pair) if finite else 0.0 for *pair, finite in counted])

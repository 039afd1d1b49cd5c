"""The compiled functions of an evaluation, sharded over all devices.

An image is encoded once; every round of expressions about it runs against what was kept (`models.outputs.ImageCache`).
Everything runs inside `shard_map`: a device computes its own images by the program that one device alone would run, so the
numbers do not depend on how many there are. Functions that touch original-size pixels are apart from those that do not, so the
model compiles once for encoding and once for each shape of a round, however many image sizes there are.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowseg_jax import sharding
from flowseg_jax.data.eval_dataset import EvalBatch, QueryRound
from flowseg_jax.data.generic_dataset import CategoryPrompts, GenericBatch
from flowseg_jax.evaluation import category_scores, fusion, postprocess
from flowseg_jax.models import flowseg
from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.mask_decoder import LevelMemory
from flowseg_jax.models.outputs import ImageCache, MaskCandidates
from flowseg_jax.ops.portable import traced_for
from flowseg_jax.types import PAD, Batch, ExpressionQueries, ImageInputs, PromptQueries

BY_IMAGE, REPLICATED = PartitionSpec(sharding.BATCH_AXES), PartitionSpec()
CACHE = BY_IMAGE, PartitionSpec(None, sharding.BATCH_AXES)  # of the two parts below


def _split(cache: ImageCache) -> tuple[Any, Any]:
    """What has its images along the first axis, and what along the second, after the layers."""
    kv, levels = cache.kv_cache, [(level.values, level.mask_features) for level in cache.levels]
    return (cache.mask_features, levels, kv.position_ids, kv.segment_ids), (kv.keys, kv.values)


def _join(parts: tuple[Any, Any]) -> ImageCache:
    (mask_features, levels, *places), keys_values = parts
    return ImageCache(mask_features, tuple(LevelMemory(*level) for level in levels), KVCache(*keys_values, *places))


AnswerFn = Callable[[flowseg.FlowSeg, ImageCache, PromptQueries], tuple[MaskCandidates, jax.Array]]


class Evaluator:
    """The jitted functions of one model. Reuse it over splits and parameters: nothing compiles twice.

    Args:
        graphdef: the model's; from `sharding.mark_fsdp_axes` where `fsdp` shards its parameters.
        mesh: the devices; None: all there are, each with all parameters.
        partition: `PartitionSpec`s of the parameters, a prefix of their tree.
        answer: how the model answers questions without answers: (model, image cache, queries) -> candidates, and whether there
            is an answer with a mask (`models.generate.generate_and_segment`); None: there are none such.

    Attributes:
        compiles: function name -> number of compilations so far.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, mesh: Mesh | None = None, partition: Any = REPLICATED, answer: AnswerFn | None = None
    ):
        self.mesh = sharding.make_mesh({"data": -1}) if mesh is None else mesh
        self.compiles: collections.Counter[str] = collections.Counter()
        self._partition = partition

        def encode_image(params, inputs, prefix):
            self.compiles["encode_image"] += 1  # runs when traced, that is once a compilation
            return _split(flowseg.bind_params(graphdef, params).prefill_image(inputs, prefix))

        def predict(params, cache, queries, truth, inside):
            self.compiles["predict"] += 1
            model = flowseg.bind_params(graphdef, params)
            if isinstance(queries, PromptQueries):
                found, answered = answer(model, _join(cache), queries)
            else:
                found, answered = model.predict_cached(_join(cache), queries), queries.query_valid
            chosen = postprocess.select_masks(found.scores, found.mask_logits, truth, inside)
            query = jnp.where(answered[..., None], chosen.query, PAD)
            logits = postprocess.refine(model, chosen.logits, found.mask_features)
            return dataclasses.replace(chosen, query=query, logits=logits)

        def downsample_truth(truth, where):
            self.compiles["downsample_truth"] += 1
            return postprocess.truth_on_grid(truth, where), postprocess.image_on_grid(where)

        def upsample(logits, where, truth):
            self.compiles["upsample"] += 1
            return postprocess.upsample_and_count(logits, where, truth)

        @functools.cache
        def predict_top(count: int) -> Callable:
            def predict(params, cache, queries):
                self.compiles["predict_top"] += 1
                model = flowseg.bind_params(graphdef, params)
                return postprocess.top_candidates(model, model.predict_cached(_join(cache), queries), count)

            return self._sharded(predict, (partition, CACHE, BY_IMAGE), BY_IMAGE)

        def upsample_alone(logits, where):
            self.compiles["upsample"] += 1
            return postprocess.upsample(logits, where)

        self._predict_top = predict_top
        self._upsample_alone = self._sharded(upsample_alone, (BY_IMAGE, BY_IMAGE), BY_IMAGE)
        self._encode_image = self._sharded(encode_image, (partition, BY_IMAGE, REPLICATED), CACHE)
        self._predict = self._sharded(predict, (partition, CACHE, BY_IMAGE, BY_IMAGE, BY_IMAGE), BY_IMAGE)
        self._downsample_truth = self._sharded(downsample_truth, (BY_IMAGE, BY_IMAGE), BY_IMAGE)
        self._upsample = self._sharded(upsample, (BY_IMAGE, BY_IMAGE, BY_IMAGE), BY_IMAGE)

        @functools.cache
        def score_categories(prompts: CategoryPrompts) -> Callable:
            def score(params, batch):
                self.compiles["score_categories"] += 1
                return category_scores.score_categories(flowseg.bind_params(graphdef, params), batch, prompts)

            return self._sharded(score, (partition, BY_IMAGE), BY_IMAGE)

        @functools.cache
        def fuse(threshold: float | None) -> Callable:
            def restore(scores, logits, where):
                self.compiles["fuse"] += 1
                return fusion.restore(scores, logits, where, threshold)

            return self._sharded(restore, (BY_IMAGE, BY_IMAGE, BY_IMAGE), BY_IMAGE)

        self._score_categories, self._fuse = score_categories, fuse

    def _sharded(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        return jax.jit(traced_for(self.mesh.devices.flat[0].platform)(mapped))

    @property
    def devices(self) -> int:
        """What a number of images must be divisible by."""
        return self.mesh.size

    def round_up(self, batch: int) -> int:
        """The least number of images from `batch` on that all devices share evenly."""
        return -(-batch // self.devices) * self.devices

    @property
    def computing(self) -> bool:
        """Whether a batch has been computed whole, so that what takes long is not compiling."""
        return bool(self.compiles["upsample"] or self.compiles["fuse"])

    def place(self, params: Any) -> Any:
        """The parameters where they belong; do this once, not for every batch."""
        put = lambda spec, part: jax.device_put(part, NamedSharding(self.mesh, spec))  # noqa: E731
        return jax.tree.map(put, self._partition, params, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def lower(
        self, params: Any, views: ImageInputs, prefix: jax.ShapeDtypeStruct, queries: ExpressionQueries
    ) -> dict[str, jax.stages.Lowered]:
        """The encoding of a batch and a round of its expressions, for abstract arrays with shardings; nothing is computed."""
        cache = jax.eval_shape(self._encode_image, params, views, prefix)
        put = lambda spec, part: jax.tree.map(  # noqa: E731
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec)), part
        )
        cache = tuple(map(put, CACHE, cache))
        return {
            "encode_image": self._encode_image.lower(params, views, prefix),
            "round": self._predict_top(1).lower(params, cache, queries),
        }

    def _put(self, tree: Any) -> Any:
        return sharding.to_global_arrays(tree, self.mesh)

    def predict_expressions(
        self, params: Any, prefix: np.ndarray, batch: EvalBatch
    ) -> Iterator[tuple[QueryRound, postprocess.SelectedMasks, postprocess.FullSizeMasks]]:
        """Dispatches one batch round by round; the arrays that come may still be computing. `SelectedMasks.query` is PAD where
        the model wrote an answer without a mask.

        Args:
            params: from `place`.
            prefix: int32 [P], token ids that every conversation begins with.
            batch: this process's rows.
        """
        rows = len(batch.views.sam_images)
        cache, where = self._encode(params, prefix, batch.views, batch.sizes, batch.bucket)
        ignored = self._put(postprocess.pack_truth(batch.ignored, rows, 1, where.bucket))
        for query_round in batch.rounds:
            pack = lambda masks: self._put(  # noqa: E731
                postprocess.pack_truth(masks, rows, query_round.questions.query_valid.shape[1], where.bucket)  # noqa: B023 (called at once)
            )
            truth = postprocess.GroundTruth(pack(query_round.truth), pack(query_round.single_cover), ignored)
            chosen = self._predict(params, cache, self._put(query_round.questions), *self._downsample_truth(truth.union, where))
            yield query_round, chosen, self._upsample(chosen.logits, where, truth)

    def _encode(
        self,
        params: Any,
        prefix: np.ndarray,
        views: ImageInputs,
        sizes: Sequence[tuple[int, int]],
        bucket: tuple[int, int],
    ) -> tuple[Any, postprocess.ResizeMatrices]:
        """What is kept of a batch of images, and how the mask grid lies on them."""
        cache = self._encode_image(params, self._put(views), jax.device_put(prefix, sharding.replicated(self.mesh)))
        side, grid = views.sam_images.shape[1], cache[0][0].shape[1:3]
        where = postprocess.geometry(views.resized_hw, sizes, grid=grid, padded_size=side, bucket=bucket)
        return cache, self._put(where)

    def predict_candidates(
        self,
        params: Any,
        prefix: np.ndarray,
        views: ImageInputs,
        sizes: Sequence[tuple[int, int]],
        bucket: tuple[int, int],
        rounds: Sequence[ExpressionQueries],
        count: int,
    ) -> list[tuple[postprocess.SelectedMasks, jax.Array, jax.Array]]:
        """Dispatches one batch without truth: the `count` best candidates of every expression, best first.

        Args:
            params: from `place`.
            prefix: int32 [P], token ids that every conversation begins with.
            views: this process's images; sizes: their (H, W); bucket: padded (H, W).
            rounds: what is asked about them.
            count: candidates an expression.

        Returns:
            A round each: the candidates, and of `postprocess.upsample` the masks and whether they are of numbers. They may
            still be computing.
        """
        cache, where = self._encode(params, prefix, views, sizes, bucket)
        chosen = [self._predict_top(count)(params, cache, self._put(queries)) for queries in rounds]
        return [(one, *self._upsample_alone(one.logits, where)) for one in chosen]

    def predict_categories(
        self, params: Any, batch: GenericBatch, prompts: CategoryPrompts, threshold: float | None
    ) -> fusion.FusionOutput:
        """Dispatches one batch that asks for categories; the arrays that come may still be computing.

        Args:
            params: from `place`.
            batch: this process's rows.
            prompts: how the categories are asked for.
            threshold: `fusion.Thresholds.score`; None: no labels, masks alone.
        """
        scores, logits = self.score_categories(params, batch.inputs, prompts)
        inputs, grid = batch.inputs, logits.shape[-2:]
        where = postprocess.geometry(
            inputs.resized_hw, batch.sizes, grid=grid, padded_size=inputs.sam_images.shape[1], bucket=batch.bucket
        )
        return self._fuse(threshold)(scores, logits, self._put(where))

    def score_categories(self, params: Any, inputs: Batch, prompts: CategoryPrompts) -> tuple[jax.Array, jax.Array]:
        """Scores [B, N, C] and refined mask logits [B, N, h, w] of all candidates; see `category_scores`."""
        return self._score_categories(prompts)(params, self._put(inputs))

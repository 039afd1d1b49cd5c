"""The compiled functions of an evaluation, divided over all devices.

An image is seen once; every round of expressions about it is asked against what was kept (`models.flowseg.Seen`). Everything
runs inside `shard_map`: a device computes its own images by the program that one device alone would run, so the numbers do not
depend on how many there are. Functions that touch original-size pixels are apart from those that do not, so the model compiles
once for looking and once for each shape of a round, however many image sizes there are.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowseg_jax import sharding
from flowseg_jax.data.eval_dataset import EvalBatch, QueryRound
from flowseg_jax.evaluation import postprocess
from flowseg_jax.models import flowseg
from flowseg_jax.models.language import KVCache
from flowseg_jax.types import PAD, PromptQueries

ROWS, WHOLE = PartitionSpec(sharding.BATCH_AXES), PartitionSpec()
SEEN = ROWS, PartitionSpec(None, sharding.BATCH_AXES)  # of the two parts below


def _split(seen: flowseg.ImageCache) -> tuple[Any, Any]:
    """What has its images along the first axis, and what along the second, behind the layers."""
    cache = seen.kv_cache
    return (seen.mask_features, seen.multi_scale_features, cache.positions, cache.segment_ids), (cache.keys, cache.values)


def _join(parts: tuple[Any, Any]) -> flowseg.ImageCache:
    (mask_features, levels, *places), keys_values = parts
    return flowseg.ImageCache(mask_features, levels, KVCache(*keys_values, *places))


AnswerFn = Callable[[flowseg.FlowSeg, flowseg.ImageCache, PromptQueries], tuple[flowseg.MaskCandidates, jax.Array]]


class Evaluator:
    """The jitted functions of one model. Reuse it over splits and parameters: nothing compiles twice.

    Args:
        graphdef: the model's; from `parallel.divided` where `fsdp` divides its parameters.
        mesh: the devices; None: all there are, each with all parameters.
        partition: `PartitionSpec`s of the parameters, a prefix of their tree.
        answer: how the model answers questions without answers: (model, seen, asked) -> candidates, and whether there is an
            answer with a mask (`models.generate.answer`); None: it is not asked such.

    Attributes:
        compiles: function name -> number of compilations so far.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, mesh: Mesh | None = None, partition: Any = WHOLE, answer: AnswerFn | None = None
    ):
        self.mesh = sharding.make_mesh({"data": -1}) if mesh is None else mesh
        self.compiles: collections.Counter[str] = collections.Counter()
        self._partition = partition

        def see(params, views, prefix):
            self.compiles["see"] += 1  # runs when traced, that is once a compilation
            return _split(flowseg.bind_params(graphdef, params).prefill_image(views, prefix))

        def ask(params, seen, questions, truth, inside):
            self.compiles["ask"] += 1
            model = flowseg.bind_params(graphdef, params)
            if isinstance(questions, PromptQueries):
                found, answered = answer(model, _join(seen), questions)
            else:
                found, answered = model.predict_cached(_join(seen), questions), questions.query_valid
            chosen = postprocess.select_masks(found.scores, found.mask_logits, truth, inside)
            query = jnp.where(answered[..., None], chosen.query, PAD)
            logits = postprocess.refine(model, chosen.logits, found.mask_features)
            return dataclasses.replace(chosen, query=query, logits=logits)

        def truth_on_grid(truth, where):
            self.compiles["truth"] += 1
            return postprocess.truth_on_grid(truth, where), postprocess.image_on_grid(where)

        def restore(logits, where, truth):
            self.compiles["restore"] += 1
            return postprocess.upsample_and_count(logits, where, truth)

        self._see = self._divide(see, (partition, ROWS, WHOLE), SEEN)
        self._ask = self._divide(ask, (partition, SEEN, ROWS, ROWS, ROWS), ROWS)
        self._truth_on_grid = self._divide(truth_on_grid, (ROWS, ROWS), ROWS)
        self._restore = self._divide(restore, (ROWS, ROWS, ROWS), ROWS)

    def _divide(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        return jax.jit(mapped)

    @property
    def devices(self) -> int:
        """What a number of images must be divisible by."""
        return self.mesh.size

    def place(self, params: Any) -> Any:
        """The parameters where they belong; do this once, not for every batch."""
        put = lambda spec, part: jax.device_put(part, NamedSharding(self.mesh, spec))  # noqa: E731
        return jax.tree.map(put, self._partition, params, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def __call__(
        self, params: Any, prefix: np.ndarray, batch: EvalBatch
    ) -> Iterator[tuple[QueryRound, postprocess.SelectedMasks, postprocess.FullSizeMasks]]:
        """Dispatches one batch round by round; the arrays that come may still be computing. `Chosen.query` is NONE where the
        model wrote an answer without a mask.

        Args:
            params: from `place`.
            prefix: int32 [P], token ids that every conversation begins with.
            batch: this process's rows.
        """
        put = lambda tree: sharding.to_global_arrays(tree, self.mesh)  # noqa: E731
        rows, side = batch.views.sam_images.shape[:2]
        seen = self._see(params, put(batch.views), jax.device_put(prefix, sharding.replicated(self.mesh)))
        where = postprocess.geometry(
            batch.views.resized_hw, batch.sizes, grid=seen[0][0].shape[1:3], padded_size=side, bucket=batch.bucket
        )
        ignored = put(postprocess.pack_truth(batch.ignored, rows, 1, where.bucket))
        where = put(where)
        for asked in batch.rounds:
            pack = lambda masks: put(  # noqa: E731
                postprocess.pack_truth(masks, rows, asked.questions.query_valid.shape[1], where.bucket)  # noqa: B023 (called at once)
            )
            truth = postprocess.GroundTruth(pack(asked.truth), pack(asked.once), ignored)
            chosen = self._ask(params, seen, put(asked.questions), *self._truth_on_grid(truth.union, where))
            yield asked, chosen, self._restore(chosen.logits, where, truth)

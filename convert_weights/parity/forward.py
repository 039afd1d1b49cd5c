"""The forward pass, array by array: the product's modules run on a batch, everything they compute under X-SAM's names.

`FlowSeg.__call__` and `FlowSeg.predict` give what they return, and their intermediates on request.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from convert_weights.parity.fixture import Arrays, Run
from convert_weights.parity.preprocessing import RecordedSample
from convert_weights.parity.report import ParityReport
from flowseg_jax.evaluation import postprocess
from flowseg_jax.losses import next_token_loss
from flowseg_jax.models.conditions import pool_spans
from flowseg_jax.models.flowseg import FlowSeg, bind_params
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.ops.resize import resize
from flowseg_jax.types import PAD, Batch

COMPILE_FAST = {"xla_backend_optimization_level": 0}  # a program that runs once is not worth optimising
LOGIT_POSITIONS = 40  # llm/logits_at_labels holds the logits of that many last positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """Arrays under X-SAM's names, by what their first axes count.

    Attributes:
        images: one entry an image; maps are NCHW.
        tokens: [B, T, ...].
        passes: one entry a decoder pass, padded phrases included.
        columns: [P, ..., N], over conditions, padded phrases included; `class/cond_embeds` is [P, N, D].
    """

    images: dict[str, Array]
    tokens: dict[str, Array]
    passes: dict[str, Array]
    columns: dict[str, Array]


def channels_first(x: Array) -> Array:
    return jnp.moveaxis(x, -1, 1)


def observe(model: FlowSeg, batch: Batch) -> Observed:
    """Everything a forward pass over referring phrases computes: what the model returns, and its intermediates."""
    cfg, (b, k) = model.cfg, batch.phrase_target.shape
    out: dict[str, Any] = {}
    found = model(batch, out=out)
    images = {f"siglip/hidden_states_{i}": x for i, x in enumerate(out["siglip/hidden_states"])}
    images |= {f"sam/hidden_states_{i}": x for i, x in enumerate(out["sam/hidden_states"])}
    images["seg_projector/in"] = out["sam/hidden_states"][cfg.sam.num_hidden_layers - 1]
    images |= {f"{name}/out": out[name] for name in ("visual_projector", "seg_projector")}
    for place, j in enumerate(cfg.connector.low_to_high_order):
        images[f"seg_connector/out_{j}"] = channels_first(out["connector"][place])
    images |= _maps("pixel_decoder/input_projection", out["pixel_decoder/input_projections"])
    positions = out["pixel_decoder/positions"]
    images["pixel_decoder/encoder_position_embeddings"] = jnp.broadcast_to(positions, (b, *positions.shape))
    images |= {f"pixel_decoder/encoder_layer_{i}": x for i, x in enumerate(out["pixel_decoder/encoder_layers"])}
    images |= _maps("pixel_decoder/multi_scale", out["pixel_decoder/multi_scale_features"])
    images["pixel_decoder/mask_features"] = channels_first(found.mask_features)
    for i, level in enumerate(out["levels"]):
        images[f"decoder/memory_{i}"] = level.values.reshape(b, *level.positions.shape)
        images[f"decoder/memory_pos_{i}"] = jnp.broadcast_to(level.positions, (b, *level.positions.shape))

    states, projected = out["llm/hidden_states"], out["llm_projector"]
    tokens = {f"llm/hidden_states_{i}": x for i, x in enumerate(states)} | {"llm/inputs_embeds": states[0]}
    tokens["llm/logits_at_labels"] = found.hidden_states[:, -LOGIT_POSITIONS:] @ found.lm_head.weight.T
    tokens["llm_projector/out"] = projected
    total, count = next_token_loss(found.hidden_states, found.lm_head, batch.labels, found.hidden_states.shape[1])
    images["llm/loss"] = total / jnp.maximum(count, 1)

    segs = pool_spans(projected, batch.seg_ids, k + 1)[:, :k].reshape(-1, projected.shape[-1])
    query_init = out["query_init"]
    passes = {"decoder/seg_embeds": segs[:, None], "decoder/query_init": query_init}
    passes["decoder/query_pos"] = jnp.broadcast_to(out["query_pos"], query_init.shape)
    names = {"after_cross": "after_cross_attn", "after_self": "after_self_attn", "out": "after_mlp"}
    for i in range(cfg.mask_decoder.num_layers):
        passes |= {f"decoder/layer{i}_{theirs}": out[ours][i] for theirs, ours in names.items()}
        positions = len(out["levels"][i % cfg.mask_decoder.num_levels].positions)
        passes[f"decoder/layer{i}_attn_mask"] = ~out["attention_mask"][i][..., :positions]
    columns = {"class/cond_embeds": found.conditions.embeds}
    features = jnp.repeat(found.mask_features, k, 0)
    for j in range(cfg.mask_decoder.num_layers + 1):
        passes[f"decoder/pred{j}_query_ln"] = found.decoder_output.queries[j]
        passes[f"decoder/pred{j}_mask_logits"] = mask_logits(found.decoder_output.mask_embeds[j], features)
        columns[f"class/pred{j}_logits"] = found.decoder_output.class_logits[j]
    columns["out/class_logits"] = found.decoder_output.class_logits[-1]
    return Observed(images, tokens, passes, columns)


def _maps(name: str, maps: Iterable[Array]) -> dict[str, Array]:
    return {f"{name}_{i}": channels_first(x) for i, x in enumerate(maps)}


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
def run_model(graphdef: nnx.GraphDef, params: dict[str, Any], batch: Batch) -> Observed:
    return observe(bind_params(graphdef, params), batch)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
def run_evaluation(graphdef: nnx.GraphDef, params: dict[str, Any], batch: Batch) -> tuple[Array, postprocess.SelectedMasks]:
    """The evaluation path of the product: scores [B, K, Q], and the selected candidate of each phrase."""
    found = bind_params(graphdef, params).predict(batch)
    return found.scores, postprocess.top_k_masks(found, 1)


class ForwardComparison:
    """Compares what was observed in one run with what the fixture recorded.

    Args:
        run: the recorded run.
        recorded: its arrays.
        batch: the batch that was run.
        report: where rows go.
    """

    def __init__(self, run: Run, recorded: Arrays, batch: Batch, report: ParityReport):
        self.run, self.recorded, self.report = run, recorded, report
        # The passes of real phrases among all B * K, in X-SAM's order.
        self.passes = np.flatnonzero(np.asarray(batch.phrase_target).reshape(-1) != PAD)
        self.batch, self.used_tokens = batch, np.asarray(batch.segment_ids) != PAD
        self.image_of_pass = self.passes // batch.phrase_target.shape[1]
        # X-SAM main runs one pass an image and looks its <SEG> up without regard to the image: not the computation of ours
        # once there are several phrases.
        self.comparable = not run.pass_an_image or len(self.passes) == 1
        report.explain(run.file, "llm/attention_mask", "X-SAM's quirk of attending to text padding")
        report.explain(run.file, "meta/", "a remark on the recording")

    def add(
        self, name: str, ours: Any, kind: str = "activation", where: Bool[np.ndarray, "..."] | None = None, note: str = ""
    ) -> None:
        if name in self.recorded:
            self.report.compare(self.run.file, name, ours, self.recorded[name], kind, where=where, note=note)

    def observed(self, found: Observed) -> None:
        """All arrays of a forward pass."""
        for name, value in found.images.items():
            value = np.asarray(value)
            shape = np.shape(self.recorded.get(name, ()))
            if value.ndim and shape and shape[0] == len(self.passes) != value.shape[0]:
                value = value[self.image_of_pass]  # X-SAM repeats an image's features for its passes
            self.add(name, value, "loss" if name == "llm/loss" else "activation")
        for name, value in found.tokens.items():
            self.add(name, value, where=self.used_tokens[:, -value.shape[1] :], note=self._padding_note())
        self.add("llm/position_ids", self.batch.position_ids, "exact", self.used_tokens, self._padding_note())
        self.add("llm/labels", self.batch.labels, "exact")
        self.add("class/cond_embeds", self._condition_rows(found.columns["class/cond_embeds"]))
        if not self.comparable:
            self.report.explain(
                self.run.file,
                r"decoder/(seg|query_init|pred|layer)|class/|out/|post/|loss/|match/|points/|grad/",
                "after X-SAM main's <SEG> lookup, which mixes up the images and phrases of a batch (we do not copy it)",
            )
            return
        for name, value in found.passes.items():
            exact = value.dtype == bool
            self.add(name, np.asarray(value)[self.passes], "exact" if exact else "activation")
        for name, value in found.columns.items():
            if name != "class/cond_embeds":
                self.add(name, self._columns(np.asarray(value)[self.passes]))
        self._selection(found)

    def _padding_note(self) -> str:
        return "" if self.used_tokens.all() else "padding left out"

    def _columns(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        """Drops padded phrases: X-SAM has the phrases of the batch side by side, the background last."""
        rows = self.batch.phrase_target.size
        return np.take(x, [*self.passes, rows], axis)

    def _condition_rows(self, embeds: Array) -> np.ndarray:
        rows = self._columns(np.asarray(embeds)[self.passes], 1)
        if self.run.pass_an_image:  # every pass has the same rows
            rows = rows[[np.flatnonzero(self.image_of_pass == b)[0] for b in np.unique(self.image_of_pass)]]
        return rows

    def _selection(self, found: Observed) -> None:
        """Scores without the background; for pass p the best query for phrase p, and its mask at the encoder's size."""
        logits = self._columns(np.asarray(found.columns["out/class_logits"])[self.passes])
        scores = np.asarray(jax.nn.softmax(jnp.asarray(logits), -1))[..., :-1]
        self.add("out/scores", scores)
        best = np.array([scores[p, :, p].argmax() for p in range(len(scores))])
        self.add("out/top_query", best, "exact")
        last = max(int(m[1]) for name in found.passes if (m := re.match(r"decoder/pred(\d+)_mask", name)))
        masks = np.asarray(found.passes[f"decoder/pred{last}_mask_logits"])[self.passes]
        side = self.batch.sam_images.shape[1]
        masks = resize(jnp.asarray(masks[np.arange(len(best)), best]), (side, side))
        self.add("out/top_mask_logits_padded", masks)

    def evaluation(self, scores: Array, chosen: postprocess.SelectedMasks, samples: list[RecordedSample]) -> None:
        """What the product's evaluation makes of one phrase an image: selection, and the exact mask at the original size."""
        k = self.batch.phrase_target.shape[1]
        if not self.comparable or len(self.passes) != len(samples) * k or k != 1:
            self.report.explain(self.run.file, "post/", "X-SAM's post-processing is for one phrase an image")
            return
        sizes = [sample.size for sample in samples]
        where = postprocess.geometry(
            np.asarray(self.batch.resized_hw), sizes, grid=chosen.logits.shape[-2:], padded_size=self.batch.sam_images.shape[1]
        )
        truth = [np.zeros((1, *s.size), bool) if s.truth is None else s.truth.astype(bool) for s in samples]
        packed = postprocess.pack_truth(truth, len(samples), 1, where.bucket)
        restored = jax.device_get(
            jax.jit(postprocess.upsample_and_count)(chosen.logits, where, postprocess.GroundTruth.plain(packed))
        )
        for i, size in enumerate(sizes):
            mask = postprocess.unpack_mask(restored.masks[i, 0, 0], size)
            self.add(f"post/segmentation_{i}", np.where(mask, np.uint8(1), np.uint8(255)), "exact")
            self.add(f"post/score_{i}", np.asarray(chosen.score)[i, 0, 0])
            if samples[i].truth is not None:
                overlap = np.array([restored.intersection[i, 0, 0], restored.union[i, 0, 0]])
                self.add(f"post/iou_{i}", overlap, "exact")

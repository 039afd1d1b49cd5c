"""The forward pass, array by array: the product's modules run on a batch, everything they compute under X-SAM's names.

`FlowSeg.__call__` and `FlowSeg.segment` give what they return. What they keep to themselves is observed by running the same
modules step by step.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from convert_weights.parity.fixture import Arrays, Run
from convert_weights.parity.preprocessing import Sample
from convert_weights.parity.report import Report
from flowseg_jax.evaluation import postprocess
from flowseg_jax.losses import next_token_loss
from flowseg_jax.models.connectors import pad_to_multiple, pixel_shuffle
from flowseg_jax.models.flowseg import FlowSeg, bind_params, normalize_sam_images, normalize_siglip_images, pool_spans
from flowseg_jax.models.language import rope_cos_sin
from flowseg_jax.models.mask_decoder import MaskDecoder, mask_logits
from flowseg_jax.models.pixel_decoder import PixelDecoder, reference_points
from flowseg_jax.models.semantic_flow import Conditions
from flowseg_jax.models.stack import scan_layers
from flowseg_jax.ops.attention import causal_mask
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


def observe_images(model: FlowSeg, batch: Batch) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """Encoders, projectors, connector and pixel decoder; also the encoded levels."""
    cfg, seen = model.cfg, {}
    vision = model.siglip(normalize_siglip_images(batch.siglip_images), layers=0)
    _, later = scan_layers(model.siglip.layers, lambda layer, x, _: (layer(x),) * 2, vision)
    vision = [vision, *later]
    seen |= {f"siglip/hidden_states_{i}": x for i, x in enumerate(vision)}
    seen["visual_projector/out"] = model.visual_projector(vision[cfg.siglip.num_hidden_layers - 1])

    states = model.sam(normalize_sam_images(batch.sam_images, batch.resized_hw), tuple(range(cfg.sam.num_hidden_layers + 1)))
    seen |= {f"sam/hidden_states_{i}": x for i, x in enumerate(states)}
    seen["seg_projector/in"] = states[cfg.sam.num_hidden_layers - 1]
    shuffled = pixel_shuffle(pad_to_multiple(states[cfg.sam.num_hidden_layers - 1]), 0.5)
    seen["seg_projector/out"] = model.seg_projector(shuffled.reshape(shuffled.shape[0], -1, shuffled.shape[-1]))

    maps = model.connector(tuple(states[i] for i in cfg.connector_hidden_layers))
    for place, j in enumerate(cfg.connector.low_to_high_order):
        seen[f"seg_connector/out_{j}"] = channels_first(maps[place])
    found, levels = observe_pixel_decoder(model.pixel_decoder, maps)
    return seen | found, levels


def observe_pixel_decoder(decoder: PixelDecoder, maps: tuple[Array, ...]) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """The encoder layer by layer."""
    projected = [project(x) for project, x in zip(decoder.projections, maps, strict=False)]
    seen = {f"pixel_decoder/input_projection_{i}": channels_first(x) for i, x in enumerate(projected)}
    shapes = tuple(x.shape[1:3] for x in projected)
    positions, reference = decoder.positions(shapes), reference_points(shapes)
    seen["pixel_decoder/encoder_position_embeddings"] = jnp.broadcast_to(positions, (maps[0].shape[0], *positions.shape))
    x = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in projected], 1)
    _, layers = scan_layers(decoder.layers, lambda layer, x, _: (layer(x, positions, reference, shapes),) * 2, x)
    seen |= {f"pixel_decoder/encoder_layer_{i}": y for i, y in enumerate(layers)}
    levels = decoder.encode(tuple(projected))
    seen |= {f"pixel_decoder/multi_scale_{i}": channels_first(level) for i, level in enumerate(levels)}
    return seen, levels


def observe_language(model: FlowSeg, batch: Batch, visual: Array) -> dict[str, Array]:
    """The LLM's input and its layers; the last hidden state is the model's own."""
    llm, embeds = model.llm, model.merge_visual_tokens(batch.input_ids, visual)
    cos, sin = rope_cos_sin(batch.position_ids, llm.cfg.head_dim, llm.cfg.rope_theta)
    rule = causal_mask(batch.segment_ids, batch.position_ids, llm.cfg.sliding_window)
    _, layers = scan_layers(llm.layers, lambda layer, x, _: (layer(x, cos, sin, rule)[0],) * 2, embeds)
    states = [embeds, *layers[:-1]]
    return {"llm/inputs_embeds": embeds} | {f"llm/hidden_states_{i}": x for i, x in enumerate(states)}


def observe_decoder(
    decoder: MaskDecoder, mask_features: Array, levels: tuple[Array, ...], passes: int, conditions: Conditions, segs: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The query decoder layer by layer: (per image, per pass)."""
    cfg, b = decoder.cfg, mask_features.shape[0]
    x = decoder.init_queries(b * passes, segs, mask_features.dtype)
    position = decoder.query_position[...]
    memories = [decoder.prepare_level(i, level, mask_features) for i, level in enumerate(levels)]
    images = {f"decoder/memory_{i}": memory.values for i, memory in enumerate(memories)}
    for i, memory in enumerate(memories):
        images[f"decoder/memory_pos_{i}"] = jnp.broadcast_to(memory.positions, (b, *memory.positions.shape))
    seen = {"decoder/query_init": x, "decoder/query_pos": jnp.broadcast_to(position, x.shape)}
    embeds = conditions.embeds
    graphdef, stacked = nnx.split(decoder.layers)
    for i in range(cfg.num_layers):
        layer = nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], nnx.to_pure_dict(stacked)))
        memory = memories[i % cfg.num_levels]
        allowed = decoder.attention_mask(decoder.prediction_heads(x, embeds, conditions)[1], memory)
        q_vis = layer.cross_attention_block(x, position, memory.values, memory.positions, allowed)
        found = layer.refine_and_self_attend(q_vis, position, embeds, conditions)
        x, embeds = layer.feed_forward_and_refine_conditions(found, embeds, conditions)
        steps = {"attn_mask": ~allowed, "after_cross": q_vis, "after_self": found, "out": x}
        seen |= {f"decoder/layer{i}_{name}": value for name, value in steps.items()}
    return images, seen


def observe(model: FlowSeg, batch: Batch) -> Observed:
    """Everything a forward pass over referring phrases computes."""
    cfg, k = model.cfg, batch.phrase_target.shape[1]
    out = model(batch)
    images, levels = observe_images(model, batch)
    images["pixel_decoder/mask_features"] = channels_first(out.mask_features)
    visual = jnp.concatenate([images["visual_projector/out"], images["seg_projector/out"]], 1)
    tokens = observe_language(model, batch, visual)
    tokens[f"llm/hidden_states_{cfg.llm.num_hidden_layers}"] = out.hidden_states
    tokens["llm/logits_at_labels"] = out.hidden_states[:, -LOGIT_POSITIONS:] @ out.lm_head.weight.T
    tokens["llm_projector/out"] = projected = model.llm_projector(out.hidden_states)
    total, count = next_token_loss(out.hidden_states, out.lm_head, batch.labels, out.hidden_states.shape[1])
    images["llm/loss"] = total / jnp.maximum(count, 1)

    segs = pool_spans(projected, batch.seg_ids, k + 1)[:, :k].reshape(-1, projected.shape[-1])
    more, passes = observe_decoder(model.decoder, out.mask_features, levels, k, out.conditions, segs)
    passes["decoder/seg_embeds"] = segs[:, None]
    columns = {"class/cond_embeds": out.conditions.embeds}
    features = jnp.repeat(out.mask_features, k, 0)
    for j in range(cfg.mask_decoder.num_layers + 1):
        passes[f"decoder/pred{j}_query_ln"] = out.decoder_output.queries[j]
        passes[f"decoder/pred{j}_mask_logits"] = mask_logits(out.decoder_output.mask_embeds[j], features)
        columns[f"class/pred{j}_logits"] = out.decoder_output.class_logits[j]
    columns["out/class_logits"] = out.decoder_output.class_logits[-1]
    return Observed(images | more, tokens, passes, columns)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
def run_model(graphdef: nnx.GraphDef, params: dict[str, Any], batch: Batch) -> Observed:
    return observe(bind_params(graphdef, params), batch)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
def run_evaluation(graphdef: nnx.GraphDef, params: dict[str, Any], batch: Batch) -> tuple[Array, postprocess.SelectedMasks]:
    """The evaluation path of the product: scores [B, K, Q], and the selected candidate of each phrase."""
    found = bind_params(graphdef, params).predict(batch)
    return found.scores, postprocess.top_k_masks(found.scores, found.mask_logits, 1)


def existing_passes(batch: Batch) -> Int[np.ndarray, " p"]:
    """Indices of the passes of real phrases among all B * K, in X-SAM's order."""
    return np.flatnonzero(np.asarray(batch.phrase_target).reshape(-1) != PAD)


class Comparison:
    """Compares what was observed in one run with what the fixture recorded.

    Args:
        run: the recorded run.
        recorded: its arrays.
        batch: the batch that was run.
        report: where rows go.
    """

    def __init__(self, run: Run, recorded: Arrays, batch: Batch, report: Report):
        self.run, self.recorded, self.report = run, recorded, report
        self.passes = existing_passes(batch)
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

    def observed(self, seen: Observed) -> None:
        """All arrays of a forward pass."""
        for name, value in seen.images.items():
            value = np.asarray(value)
            shape = np.shape(self.recorded.get(name, ()))
            if value.ndim and shape and shape[0] == len(self.passes) != value.shape[0]:
                value = value[self.image_of_pass]  # X-SAM repeats an image's features for its passes
            self.add(name, value, "loss" if name == "llm/loss" else "activation")
        for name, value in seen.tokens.items():
            self.add(name, value, where=self.used_tokens[:, -value.shape[1] :], note=self._padding_note())
        self.add("llm/position_ids", self.batch.position_ids, "exact", self.used_tokens, self._padding_note())
        self.add("llm/labels", self.batch.labels, "exact")
        self.add("class/cond_embeds", self._condition_rows(seen.columns["class/cond_embeds"]))
        if not self.comparable:
            self.report.explain(
                self.run.file,
                r"decoder/(seg|query_init|pred|layer)|class/|out/|post/|loss/|match/|points/|grad/",
                "behind X-SAM main's <SEG> lookup, which mixes up the images and phrases of a batch (we do not copy it)",
            )
            return
        for name, value in seen.passes.items():
            exact = value.dtype == bool
            self.add(name, np.asarray(value)[self.passes], "exact" if exact else "activation")
        for name, value in seen.columns.items():
            if name != "class/cond_embeds":
                self.add(name, self._columns(np.asarray(value)[self.passes]))
        self._selection(seen)

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

    def _selection(self, seen: Observed) -> None:
        """Scores without the background; for pass p the best query for phrase p, and its mask at the encoder's size."""
        logits = self._columns(np.asarray(seen.columns["out/class_logits"])[self.passes])
        scores = np.asarray(jax.nn.softmax(jnp.asarray(logits), -1))[..., :-1]
        self.add("out/scores", scores)
        best = np.array([scores[p, :, p].argmax() for p in range(len(scores))])
        self.add("out/top_query", best, "exact")
        last = max(int(m[1]) for name in seen.passes if (m := re.match(r"decoder/pred(\d+)_mask", name)))
        masks = np.asarray(seen.passes[f"decoder/pred{last}_mask_logits"])[self.passes]
        side = self.batch.sam_images.shape[1]
        masks = resize(jnp.asarray(masks[np.arange(len(best)), best]), (side, side))
        self.add("out/top_mask_logits_padded", masks)

    def evaluation(self, scores: Array, chosen: postprocess.SelectedMasks, samples: list[Sample]) -> None:
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

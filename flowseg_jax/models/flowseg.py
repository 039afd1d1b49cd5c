"""FlowSeg, the whole model. Read this file first.

    image  -> SAM ----> connector -> pixel decoder -> mask features F, multi-scale features
          \\-> SigLIP -> projector --+
           SAM (penultimate) -> pixel shuffle -> projector -> visual tokens
    prompt + visual tokens -> LLM -> projector -> C (one per <p>..</p> span), S (one per <SEG>)
    queries + S, multi-scale features, C -> mask decoder (SR + CR in every layer) -> masks, scores -> BAR on the masks in use

The module objects describe the network; its parameters are a plain nested dict (`params_dict`, `bind_params`). Everything is
batched and has static shapes. An image has K referring phrases, and each is one decoder pass. Training adds up to two passes
over all objects of an image, which teach the queries to propose: the open-vocabulary pass, whose conditions are the objects'
names, and the closed-vocabulary pass, whose classes are those of a linear head.

Methods that take `out`, a dict, put the intermediates into it under the names of their components (see `FlowSeg.__call__`);
without it nothing is computed for them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from flowseg_jax.models.boundary import BoundaryRefinement
from flowseg_jax.models.conditions import (
    append_background,
    interleave_passes,
    pad_conditions,
    pool_spans,
    referring_conditions,
)
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import MlpProjector, SegConnector, pad_to_multiple, pixel_shuffle
from flowseg_jax.models.language import LanguageModel
from flowseg_jax.models.layers import Linear, make_param, normal_init, shapes_only
from flowseg_jax.models.mask_decoder import LevelMemory, MaskDecoder
from flowseg_jax.models.outputs import ImageCache, ImageFeatures, MaskCandidates, TextFeatures, TrainingOutput
from flowseg_jax.models.pixel_decoder import PixelDecoder
from flowseg_jax.models.sam import SamImageEncoder
from flowseg_jax.models.semantic_flow import Conditions
from flowseg_jax.models.siglip import SiglipVisionEncoder
from flowseg_jax.ops.collectives import SINGLE_DEVICE, DataParallelGroup
from flowseg_jax.types import IMAGE_TOKEN_INDEX, Batch, ExpressionQueries, ImageInputs

# ImageNet's, of RGB values in [0, 1].
SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# An image's prefix of at least so many blocks of tokens is padded to whole ones: accelerators move no part of a block.
BLOCK, MIN_BLOCKS = 128, 8

Out = dict[str, Any] | None


def normalize_sam_images(images: UInt8[Array, "b s s 3"], resized_hw: Int[Array, "b 2"]) -> Float[Array, "b s s 3"]:
    """SAM's input in float32. Padding is the mean colour, because X-SAM pads after normalising."""
    side = jnp.arange(images.shape[1])
    inside = (side < resized_hw[:, :1])[:, :, None] & (side < resized_hw[:, 1:])[:, None, :]
    pixels = (images.astype(jnp.float32) / 255 - jnp.array(SAM_MEAN)) / jnp.array(SAM_STD)
    return jnp.where(inside[..., None], pixels, 0)


def normalize_siglip_images(images: UInt8[Array, "b v v 3"]) -> Float[Array, "b v v 3"]:
    """SigLIP's input in float32: mean and standard deviation 0.5."""
    return images.astype(jnp.float32) / 127.5 - 1


class FlowSeg(nnx.Module):
    """The whole network; `cfg` decides every size and switch."""

    def __init__(self, cfg: FlowSegConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        width = cfg.mask_decoder.embed_dim
        self.sam = SamImageEncoder(cfg.sam, rngs=rngs)
        if cfg.has_language_model:
            self.siglip = SiglipVisionEncoder(cfg.siglip, rngs=rngs)
            self.llm = LanguageModel(cfg.llm, rngs=rngs)
            self.visual_projector = MlpProjector(cfg.siglip.hidden_size, cfg.llm.hidden_size, cfg.llm.hidden_size, rngs=rngs)
            # The pixel shuffle stacks the channels of 2 x 2 patches.
            self.seg_projector = MlpProjector(4 * cfg.sam.hidden_size, cfg.llm.hidden_size, cfg.llm.hidden_size, rngs=rngs)
        if cfg.has_language_model and cfg.has_mask_decoder:
            self.llm_projector = MlpProjector(cfg.llm.hidden_size, width, width, rngs=rngs)
        if cfg.has_mask_decoder:
            self.connector = SegConnector(cfg.connector, rngs=rngs)
            self.pixel_decoder = PixelDecoder(cfg.pixel_decoder, rngs=rngs)
            self.mask_decoder = MaskDecoder(cfg.mask_decoder, cfg.semantic_flow, rngs=rngs)
            refines = cfg.boundary.enabled
            self.boundary = BoundaryRefinement(cfg.pixel_decoder.mask_dim, cfg.boundary, rngs=rngs) if refines else None
        if cfg.has_language_model and cfg.has_mask_decoder:
            self.background_embed = make_param(rngs, normal_init(1.0), (1, width), (None, None))
        self.category_head = Linear(width, cfg.num_classes + 1, rngs=rngs) if cfg.num_classes and cfg.has_mask_decoder else None

    def encode_image(self, images: Batch | ImageInputs, out: Out = None) -> ImageFeatures:
        """Runs all that reads the image alone, once per image: encoders, projectors, connector, pixel decoder, levels.

        Args:
            images: the images; of a batch, its images.
            out: if given, gets the intermediates.
        """
        *features, penultimate = self.sam_hidden_states(images, out)
        visual_tokens = self.project_visual_tokens(images, penultimate, out) if self.cfg.has_language_model else None
        if not self.cfg.has_mask_decoder:
            return ImageFeatures(visual_tokens, None, ())
        mask_features, multi_scale_features = self.pixel_features(tuple(features), out)
        with jax.named_scope("mask_decoder"):
            levels = self.mask_decoder.prepare_levels(mask_features, multi_scale_features)
        if out is not None:
            out["levels"] = levels
        return ImageFeatures(visual_tokens, mask_features, levels)

    def sam_hidden_states(self, images: Batch | ImageInputs, out: Out = None) -> tuple[Float[Array, "b _ _ c"], ...]:
        """SAM's hidden states: those that the connector reads, if there is one, then the penultimate one."""
        cfg = self.cfg
        select = (*(cfg.connector_hidden_layers if cfg.has_mask_decoder else ()), cfg.sam.num_hidden_layers - 1)
        with jax.named_scope("sam"):
            pixels = normalize_sam_images(images.sam_images, images.resized_hw).astype(cfg.dtype)
            return self.sam(pixels, select, out)

    def project_visual_tokens(
        self, images: Batch | ImageInputs, penultimate: Float[Array, "b y x c"], out: Out = None
    ) -> Float[Array, "b v e"]:
        """Visual tokens for the LLM: SigLIP's, then those made from SAM's penultimate hidden state."""
        cfg = self.cfg
        with jax.named_scope("siglip"):
            pixels = normalize_siglip_images(images.siglip_images).astype(cfg.dtype)
            vision = self.siglip(pixels, layers=cfg.siglip.num_hidden_layers - 1, out=out)
        with jax.named_scope("projectors"):
            b = penultimate.shape[0]
            shuffled = pixel_shuffle(pad_to_multiple(penultimate), 0.5)
            tokens = {
                "visual_projector": self.visual_projector(vision),
                "seg_projector": self.seg_projector(shuffled.reshape(b, -1, shuffled.shape[-1])),
            }
            if out is not None:
                out.update(tokens)
            return jnp.concatenate(list(tokens.values()), 1)

    def pixel_features(
        self, features: tuple[Float[Array, "b y x c"], ...], out: Out = None
    ) -> tuple[Float[Array, "b h w f"], tuple[Float[Array, "b _ _ d"], ...]]:
        """Mask features and multi-scale features from SAM's hidden states, shallow to deep: connector and pixel decoder."""
        with jax.named_scope("connector"):
            maps = self.connector(features)
        if out is not None:
            out["connector"] = maps
        with jax.named_scope("pixel_decoder"):
            return self.pixel_decoder(maps, out)

    def merge_visual_tokens(self, input_ids: Int[Array, "b t"], visual_tokens: Float[Array, "b v e"]) -> Float[Array, "b t e"]:
        """The LLM's input: embedded text, with an image's visual tokens in its slots, which are one run or none.

        Only the text is looked up, at most T - V tokens: a row without an image has padding at its end.
        """
        length, v = input_ids.shape[1], visual_tokens.shape[1]
        is_visual = input_ids == IMAGE_TOKEN_INDEX
        start = jnp.where(is_visual.any(1), is_visual.argmax(1), length)
        before = jnp.arange(length) < start[:, None]
        text = jnp.where(before[:, : length - v], input_ids[:, : length - v], input_ids[:, v:])
        text = self.llm.embed(text, visual_tokens.dtype)
        # Every part is moved as a whole: reading row by row would make the gradient a scatter.
        put = lambda x, start: jax.lax.dynamic_update_slice(jnp.zeros((length, x.shape[1]), x.dtype), x, (start, 0))  # noqa: E731
        images = jax.vmap(put)(visual_tokens, start)
        text = jnp.where(before[..., None], jnp.pad(text, ((0, 0), (0, v), (0, 0))), jnp.pad(text, ((0, 0), (v, 0), (0, 0))))
        return jnp.where(is_visual[..., None], images, text)

    def run_llm(self, batch: Batch, visual_tokens: Float[Array, "b v e"], out: Out = None) -> Float[Array, "b t e"]:
        """Runs the LLM over the prompts, with the visual tokens in their slots."""
        with jax.named_scope("llm"):
            inputs_embeds = self.merge_visual_tokens(batch.input_ids, visual_tokens)
            return self.llm(inputs_embeds, batch.position_ids, batch.segment_ids, out)

    def encode_text(self, batch: Batch, visual_tokens: Float[Array, "b v e"], out: Out = None) -> TextFeatures:
        """Runs the LLM and pools C and S from its last hidden states."""
        hidden = self.run_llm(batch, visual_tokens, out)
        projected = self.llm_projector(hidden)
        if out is not None:
            out["llm_projector"] = projected
        k, g = batch.phrase_target.shape[1], batch.name_valid.shape[1]
        return TextFeatures(hidden, pool_spans(projected, batch.phrase_ids, k + g), pool_spans(projected, batch.seg_ids, k + 1))

    def __call__(self, batch: Batch, devices: DataParallelGroup = SINGLE_DEVICE, out: Out = None) -> TrainingOutput:
        """The teacher-forced forward pass of training.

        Args:
            batch: this device's part of the batch.
            devices: the devices among which the batch is sharded.
            out: if given, gets what the components compute on the way. "sam/hidden_states", "siglip/hidden_states" and
                "llm/hidden_states" count as Hugging Face does. "visual_projector", "seg_projector", "connector" and
                "llm_projector" are these components' outputs, "levels" what the mask decoder attends to.
                `PixelDecoder.__call__` and `MaskDecoder.__call__` describe the rest.
        """
        features = self.encode_image(batch, out)
        if not self.cfg.has_mask_decoder:
            hidden = self.run_llm(batch, features.visual_tokens, out)
            return TrainingOutput(hidden, self.llm.lm_head_weight(hidden.dtype), None, None, None, None)
        text = self.encode_text(batch, features.visual_tokens, out) if self.cfg.has_language_model else None
        return self.decode_training_passes(batch, features, text, devices, out)

    def decode_training_passes(
        self,
        batch: Batch,
        features: ImageFeatures,
        text: TextFeatures | None,
        devices: DataParallelGroup = SINGLE_DEVICE,
        out: Out = None,
    ) -> TrainingOutput:
        """All passes of the mask decoder that training supervises.

        Without a language model (`text` is None) that is the closed-vocabulary pass alone.
        """
        cfg = self.cfg
        b, k = batch.phrase_target.shape
        if text is None:
            with jax.named_scope("mask_decoder"):
                decoded = self.mask_decoder(features.levels, 1, out=out)
            categories = self.category_head(decoded.queries).astype(jnp.float32)
            return TrainingOutput(None, None, features.mask_features, decoded, None, categories)
        size = cfg.negatives_group_size
        phrases, targets = (devices.gather_group(x, size) for x in (text.condition_embeds[:, :k], batch.phrase_target))
        referring = referring_conditions(phrases, self.background_embed[...], targets, size, cfg.exclude_same_target)
        # A group larger than this device's part lies on several devices: the rows of its own images begin at `first`.
        first = devices.batch_offset(b) % size * k if b % size else 0
        conditions = [jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, b * k), referring)]
        segs = [text.seg_embeds[:, :k].reshape(b * k, -1)]
        if cfg.generic_pass != "off":
            exists = batch.name_valid
            generic = append_background(text.condition_embeds[:, k:], exists, exists, self.background_embed[...])
            if cfg.generic_pass == "without_flow":
                generic = dataclasses.replace(generic, attend_mask=jnp.zeros_like(generic.attend_mask))
            conditions.append(generic)
            segs.append(text.seg_embeds[:, k])
        if self.category_head is not None:
            none = jnp.zeros((b, 1), bool)  # one blank condition that nothing attends to: the pass has no language
            blank = jnp.zeros((b, 1, text.condition_embeds.shape[-1]), text.condition_embeds.dtype)
            conditions.append(Conditions(blank, none, ~none))
            segs.append(jnp.zeros_like(text.seg_embeds[:, k]))
        rows = max(each.attend_mask.shape[1] for each in conditions)
        conditions = interleave_passes([pad_conditions(each, rows) for each in conditions], b)
        seg_embeds = interleave_passes(segs, b)
        passes = conditions.attend_mask.shape[0] // b
        with jax.named_scope("mask_decoder"):
            decoded = self.mask_decoder(features.levels, passes, conditions, seg_embeds, out=out)
        categories = None
        if self.category_head is not None:
            by_image = decoded.queries.reshape(decoded.queries.shape[0], b, passes, *decoded.queries.shape[2:])
            categories = self.category_head(by_image[:, :, -1]).astype(jnp.float32)
        lm_head = self.llm.lm_head_weight(text.hidden_states.dtype)
        return TrainingOutput(text.hidden_states, lm_head, features.mask_features, decoded, conditions, categories)

    def predict(self, batch: Batch, out: Out = None) -> MaskCandidates:
        """All candidates of every phrase, in one pass over the rows that training reads."""
        features = self.encode_image(batch, out)
        text = self.encode_text(batch, features.visual_tokens, out)
        k = batch.phrase_target.shape[1]
        return self.decode_masks(
            features.mask_features, features.levels, text.condition_embeds[:, :k], text.seg_embeds[:, :k], out
        )

    def prefill_image(self, images: ImageInputs, prefix: Int[Array, " p"]) -> ImageCache:
        """Encodes images once, and runs the LLM over the prompt's prefix.

        Args:
            images: the images.
            prefix: the token ids that every conversation begins with; the image's slots are at the end
                (`data.collate.encode_prefix`).
        """
        features = self.encode_image(images)
        b, length = images.sam_images.shape[0], prefix.shape[0]
        padding = -length % BLOCK if length >= MIN_BLOCKS * BLOCK else 0
        place = jnp.broadcast_to(jnp.arange(length + padding, dtype=jnp.int32), (b, length + padding))
        with jax.named_scope("llm"):
            embeds = self.merge_visual_tokens(jnp.broadcast_to(prefix, (b, length)), features.visual_tokens)
            embeds = jnp.pad(embeds, ((0, 0), (0, padding), (0, 0)))
            _, kv_cache = self.llm.prefill(embeds, place, jnp.where(place < length, 0, -1))
        return ImageCache(features.mask_features, features.levels, kv_cache)

    def predict_cached(self, image_cache: ImageCache, queries: ExpressionQueries, out: Out = None) -> MaskCandidates:
        """All candidates of every phrase about encoded images; the numbers are those of `predict`."""
        texts = self.encode_text_cached(image_cache, queries)
        return self.decode_masks(image_cache.mask_features, image_cache.levels, *texts, out)

    def encode_text_cached(
        self, image_cache: ImageCache, queries: ExpressionQueries
    ) -> tuple[Float[Array, "b k d"], Float[Array, "b k d"]]:
        """C(0) and S of every phrase; the LLM reads on from the image."""
        k = queries.query_valid.shape[1]
        with jax.named_scope("llm"):
            embeds = self.llm.embed(queries.input_ids, image_cache.kv_cache.keys.dtype)
            hidden, _ = self.llm.extend(image_cache.kv_cache, embeds, queries.position_ids, queries.segment_ids)
        projected = self.llm_projector(hidden)
        return pool_spans(projected, queries.phrase_ids, k), pool_spans(projected, queries.seg_ids, k)

    def decode_masks(
        self,
        mask_features: Float[Array, "b h w f"],
        levels: tuple[LevelMemory, ...],
        condition_embeds: Float[Array, "b k d"],
        seg_embeds: Float[Array, "b k d"],
        out: Out = None,
    ) -> MaskCandidates:
        """All candidates of phrases; `condition_embeds` (C) and `seg_embeds` (S) belong together one by one.

        A phrase is scored against the background alone: a conversation is its own group. `out`, if given, gets the
        decoder's intermediates (`MaskDecoder.__call__`) and its predictions after every layer, "decoder_output".
        """
        b, k, _ = condition_embeds.shape
        yes = jnp.ones((b * k, 1), bool)
        conditions = append_background(condition_embeds.reshape(b * k, 1, -1), yes, yes, self.background_embed[...])
        with jax.named_scope("mask_decoder"):
            decoded = self.mask_decoder(levels, k, conditions, seg_embeds.reshape(b * k, -1), out=out)
        if out is not None:
            out["decoder_output"] = decoded
        scores = jax.nn.softmax(decoded.class_logits[-1], -1)[..., 0].reshape(b, k, -1)
        embeds = decoded.mask_embeds[-1]
        return MaskCandidates(scores, embeds.reshape(*scores.shape, embeds.shape[-1]), mask_features)

    def refine_masks(self, masks: Float[Array, "b n h w"], mask_features: Float[Array, "b h w f"]) -> Float[Array, "b n h w"]:
        """Boundary-aware refinement (BAR) of mask logits; without it, the masks as they are."""
        if self.boundary is None:
            return masks
        with jax.named_scope("boundary"):
            return self.boundary(masks, mask_features)


def params_dict(tree: Any) -> dict[str, Any]:
    """An NNX state as the plain nested dict in which checkpoints store parameters: its keys are strings only."""

    def keyed(node: Any) -> Any:
        return {str(key): keyed(value) for key, value in node.items()} if isinstance(node, dict) else node

    return keyed(nnx.to_pure_dict(tree))


def bind_params(graphdef: nnx.GraphDef, params: dict[str, Any]) -> FlowSeg:
    """The network with these parameters, for use inside a traced function."""
    return nnx.merge(graphdef, nnx.restore_int_paths(params))


def init_model(cfg: FlowSegConfig, seed: int = 0) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The network's description and freshly initialised parameters (a nested dict of float32 arrays)."""
    graphdef, state = nnx.split(FlowSeg(cfg, rngs=nnx.Rngs(params=jax.random.key(seed, impl="rbg"))))
    return graphdef, params_dict(state)


def abstract_model(cfg: FlowSegConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The network's description and abstract parameters with their logical axes; nothing is allocated."""
    return nnx.split(nnx.clone(_abstract_network(cfg)))


@functools.lru_cache(maxsize=16)
def _abstract_network(cfg: FlowSegConfig) -> FlowSeg:
    """Traced once: a run asks for it several times, and tracing takes seconds. Who asks is given a copy."""
    with shapes_only():
        return nnx.eval_shape(lambda: FlowSeg(cfg, rngs=nnx.Rngs(0)))

"""FlowSeg, the whole model. Read this first.

    image  -> SAM ----> connector -> pixel decoder -> mask features F, memory levels
          \\-> SigLIP -> projector --+
           SAM (last but one) -> pixel shuffle -> projector -> visual tokens
    prompt + visual tokens -> LLM -> projector -> C (one per <p>..</p> span), S (one per <SEG>)
    queries + S, memory, C -> decoder (SR + CR in every layer) -> masks, scores -> BAR on the masks that are used

The modules describe; parameters at rest are a plain nested dict (`at_rest`, `bind`). Everything is batched and static: an
image has K referring phrases, each its own decoder pass, and in training one or two passes over all objects on top (by name,
by category), which teach the queries to propose.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from flowseg_jax.models.boundary import BoundaryRefinement
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import MlpProjector, SegConnector, pad_to_multiple, pixel_shuffle
from flowseg_jax.models.language import KVCache, LanguageModel
from flowseg_jax.models.layers import Linear, make_param, normal_init
from flowseg_jax.models.mask_decoder import DecoderOutput, MaskDecoder, mask_logits
from flowseg_jax.models.pixel_decoder import PixelDecoder
from flowseg_jax.models.sam import SamImageEncoder
from flowseg_jax.models.semantic_flow import Conditions
from flowseg_jax.models.siglip import SiglipVisionEncoder
from flowseg_jax.ops.collectives import SINGLE_DEVICE, DataParallelGroup
from flowseg_jax.ops.dot import einsum
from flowseg_jax.ops.vocabulary import ShardedEmbedding
from flowseg_jax.types import IMAGE_TOKEN_INDEX, PAD, Batch, ExpressionQueries, ImageInputs

SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """What one look at the images gives.

    Attributes:
        tokens: [B, V, W], visual tokens for the LLM: SigLIP's, then SAM's; None without an LLM.
        mask_features: [B, h, w, F]; None without a mask decoder.
        levels: memory maps [B, y, x, D], low to high resolution.
    """

    visual_tokens: Float[Array, "b v e"] | None
    mask_features: Float[Array, "b h w f"] | None
    multi_scale_features: tuple[Float[Array, "b _ _ d"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """What the LLM makes of the prompts.

    Attributes:
        hidden: [B, T, W], after the final norm (the language loss reads it).
        phrases: [B, K + G, D]: C(0) of the K referring phrases, then of the G names of the generic conversation; zeros if
            absent.
        segs: [B, K + 1, D]: S of each referring phrase, then of the generic conversation; zeros if absent.
    """

    hidden_states: Float[Array, "b t e"]
    condition_embeds: Float[Array, "b n d"]
    seg_embeds: Float[Array, "b s d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingOutput:
    """Everything the losses read; None is what a model of fewer parts does not have.

    Attributes:
        hidden: [B, T, W] of the LLM.
        vocabulary: of the language head, in the dtype of `hidden`.
        mask_features: [B, h, w, F].
        decoder: all passes, image by image: K referring (with an LLM), then one by name (if `named`), one by category (if the
            model has classes).
        conditions: of all passes; None without an LLM.
        category_logits: [J, B, Q, classes + 1] of the pass by category, or None.
    """

    hidden_states: Float[Array, "b t e"] | None
    lm_head: ShardedEmbedding | None
    mask_features: Float[Array, "b h w f"] | None
    decoder_output: DecoderOutput | None
    conditions: Conditions | None
    category_logits: Float[Array, "j b q c"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageCache:
    """Images that have been looked at: all that any number of expressions about them shares.

    Attributes:
        mask_features: [B, h, w, F].
        levels: memory maps [B, y, x, D], low to high resolution.
        cache: of the LLM behind the prefix, which the image ends.
    """

    mask_features: Float[Array, "b h w f"]
    multi_scale_features: tuple[Float[Array, "b _ _ d"], ...]
    kv_cache: KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskCandidates:
    """Candidates of every phrase.

    Attributes:
        scores: float32 [B, K, Q]: softmax over [phrase, background], the background dropped.
        mask_logits: float32 [B, K, Q, h, w], not refined.
        mask_features: [B, h, w, F], what `FlowSeg.refine` needs.
    """

    scores: Float[Array, "b k q"]
    mask_logits: Float[Array, "b k q h w"]
    mask_features: Float[Array, "b h w f"]


def normalize_sam_images(images: UInt8[Array, "b s s 3"], scaled_size: Int[Array, "b 2"]) -> Float[Array, "b s s 3"]:
    """The mask encoder's input in float32: padding is the mean colour, as X-SAM pads after normalising."""
    side = jnp.arange(images.shape[1])
    inside = (side < scaled_size[:, :1])[:, :, None] & (side < scaled_size[:, 1:])[:, None, :]
    pixels = (images.astype(jnp.float32) / 255 - jnp.array(SAM_MEAN)) / jnp.array(SAM_STD)
    return jnp.where(inside[..., None], pixels, 0)


def normalize_siglip_images(images: UInt8[Array, "b v v 3"]) -> Float[Array, "b v v 3"]:
    """The vision encoder's input in float32: mean and standard deviation 0.5."""
    return images.astype(jnp.float32) / 127.5 - 1


def pool_spans(x: Float[Array, "b t d"], ids: Int[Array, "b t"], count: int) -> Float[Array, "b {count} d"]:
    """Mean over the tokens of each id 0..count-1, zeros for an absent one; a product, so that it shards as everything else."""
    member = (ids[:, None, :] == jnp.arange(count)[:, None]).astype(x.dtype)
    total = einsum("bnt,btd->bnd", member, x)
    return (total / jnp.maximum(member.sum(-1, dtype=jnp.float32), 1)[..., None]).astype(x.dtype)


def referring_conditions(
    phrases: Float[Array, "b k d"],
    background: Float[Array, "1 d"],
    phrase_mask: Int[Array, "b k"],
    group: int,
    exclude_same_target: bool,
) -> Conditions:
    """Conditions of the B * K referring passes: all phrases of a group of images are each other's negatives.

    Args:
        phrases: C(0) [B, K, D].
        background: the learned background row.
        phrase_mask: [B, K], the mask a phrase refers to, NONE for a padded phrase.
        group: number of images that share their phrases (it divides B); 1 keeps to the image's own.
        exclude_same_target: another phrase for the same object is no negative.

    Returns:
        Rows [B * K, group * K + 1, D], the background last.
    """
    b, k, d = phrases.shape
    if b % group:
        raise ValueError(f"{b} images do not split into groups of {group} that share their phrases")
    rows = group * k
    exists = (phrase_mask != PAD).reshape(b // group, 1, rows)
    image = jnp.repeat(jnp.arange(group), k)
    same = image[:, None] == image[None, :]
    own = jnp.eye(rows, dtype=bool)
    valid = jnp.broadcast_to(exists, (b // group, rows, rows))
    if exclude_same_target:
        target = phrase_mask.reshape(b // group, rows)
        valid = valid & ~(same & ~own & (target[:, :, None] == target[:, None, :]))
    valid = valid | own  # a padded phrase keeps its own row: its pass is computed, and ignored
    embeds = jnp.broadcast_to(phrases.reshape(b // group, 1, rows, d), (b // group, rows, rows, d)).reshape(b * k, rows, d)
    own = jnp.broadcast_to(own, (b // group, rows, rows)).reshape(b * k, rows)
    return append_background(embeds, own, valid.reshape(b * k, rows), background)


def append_background(
    embeds: Float[Array, "p n d"], own: Bool[Array, "p n"], valid: Bool[Array, "p n"], background: Float[Array, "1 d"]
) -> Conditions:
    """Appends the learned background row: every pass owns it, and it always exists."""
    p, _, d = embeds.shape
    row = jnp.broadcast_to(background.astype(embeds.dtype), (p, 1, d))
    yes = jnp.ones((p, 1), bool)
    return Conditions(jnp.concatenate([embeds, row], 1), jnp.concatenate([own, yes], 1), jnp.concatenate([valid, yes], 1))


def pad_conditions(conditions: Conditions, rows: int) -> Conditions:
    """Inserts rows that do not exist before the background, so that passes of different kinds share one decoder call."""
    missing = rows - conditions.attend_mask.shape[1]
    embeds, flags = ((0, 0), (0, missing), (0, 0)), ((0, 0), (0, missing))

    def insert(x: Array, padding: tuple) -> Array:
        return jnp.concatenate([jnp.pad(x[:, :-1], padding), x[:, -1:]], 1)

    return Conditions(
        insert(conditions.embeds, embeds), insert(conditions.attend_mask, flags), insert(conditions.valid_mask, flags)
    )


def interleave_passes(parts: list[Any], images: int) -> Any:
    """Concatenates per-image runs of passes: leaves [B * r_i, ...] -> [B * sum(r_i), ...], image by image."""

    def join(*leaves: Array) -> Array:
        split = [x.reshape(images, x.shape[0] // images, *x.shape[1:]) for x in leaves]
        joined = jnp.concatenate(split, 1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *parts)


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

    def encode_image(self, batch: Batch | ImageInputs, out: dict[str, Any] | None = None) -> ImageFeatures:
        """Runs both encoders, both projectors, the connector and the pixel decoder, as far as there are: once an image."""
        *features, before_last = self.sam_hidden_states(batch, out)
        tokens = self.project_visual_tokens(batch, before_last, out) if self.cfg.has_language_model else None
        mask_features, levels = self.pixel_features(tuple(features), out) if self.cfg.has_mask_decoder else (None, ())
        return ImageFeatures(tokens, mask_features, levels)

    def sam_hidden_states(
        self, batch: Batch | ImageInputs, out: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "b _ _ c"], ...]:
        """SAM's hidden states: those that the connector reads, if there is one, then the last but one; all in `out`."""
        cfg = self.cfg
        select = (*(cfg.connector_hidden_layers if cfg.has_mask_decoder else ()), cfg.sam.num_hidden_layers - 1)
        with jax.named_scope("sam"):
            images = normalize_sam_images(batch.sam_images, batch.resized_hw).astype(cfg.dtype)
            if out is None:
                return self.sam(images, select)
            out["sam/hidden_states"] = self.sam(images, tuple(range(cfg.sam.num_hidden_layers + 1)))
            return tuple(out["sam/hidden_states"][i] for i in select)

    def project_visual_tokens(
        self, batch: Batch | ImageInputs, before_last: Float[Array, "b y x c"], out: dict[str, Any] | None = None
    ) -> Float[Array, "b v e"]:
        """SigLIP's tokens for the LLM, then SAM's, from its last hidden state but one."""
        cfg = self.cfg
        with jax.named_scope("siglip"):
            images = normalize_siglip_images(batch.siglip_images).astype(cfg.dtype)
            vision = self.siglip(images, layers=cfg.siglip.num_hidden_layers - 1, out=out)
        with jax.named_scope("projectors"):
            b = before_last.shape[0]
            shuffled = pixel_shuffle(pad_to_multiple(before_last), 0.5)
            tokens = [self.visual_projector(vision), self.seg_projector(shuffled.reshape(b, -1, shuffled.shape[-1]))]
            if out is not None:
                out["visual_projector"], out["seg_projector"] = tokens
            return jnp.concatenate(tokens, 1)

    def pixel_features(
        self, features: tuple[Float[Array, "b y x c"], ...], out: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "b h w f"], tuple[Float[Array, "b _ _ d"], ...]]:
        """SAM's hidden states, shallow to deep, to mask features and memory maps: the connector and the pixel decoder."""
        with jax.named_scope("connector"):
            maps = self.connector(features)
        if out is not None:
            out["connector"] = maps
        with jax.named_scope("pixel_decoder"):
            return self.pixel_decoder(maps, out)

    def merge_visual_tokens(self, tokens: Int[Array, "b t"], visual: Float[Array, "b v e"]) -> Float[Array, "b t e"]:
        """The LLM's input: embedded tokens, with an image's visual tokens in its slots, which are one run or none.

        Only the text is looked up, at most T - V tokens: a row without an image has padding behind them.
        """
        length, v = tokens.shape[1], visual.shape[1]
        is_visual = tokens == IMAGE_TOKEN_INDEX
        start = jnp.where(is_visual.any(1), is_visual.argmax(1), length)
        before = jnp.arange(length) < start[:, None]
        text = jnp.where(before[:, : length - v], tokens[:, : length - v], tokens[:, v:])
        text = self.llm.embed(text, visual.dtype)
        # Every part is moved as a whole: reading row by row would make the gradient a scatter.
        put = lambda x, start: jax.lax.dynamic_update_slice(jnp.zeros((length, x.shape[1]), x.dtype), x, (start, 0))  # noqa: E731
        images = jax.vmap(put)(visual, start)
        text = jnp.where(before[..., None], jnp.pad(text, ((0, 0), (0, v), (0, 0))), jnp.pad(text, ((0, 0), (v, 0), (0, 0))))
        return jnp.where(is_visual[..., None], images, text)

    def run_llm(self, batch: Batch, visual: Float[Array, "b v e"], out: dict[str, Any] | None = None) -> Float[Array, "b t e"]:
        """Runs the LLM over the prompts with the visual tokens spliced in."""
        with jax.named_scope("llm"):
            return self.llm(self.merge_visual_tokens(batch.input_ids, visual), batch.position_ids, batch.segment_ids, out)

    def encode_text(self, batch: Batch, visual: Float[Array, "b v e"], out: dict[str, Any] | None = None) -> TextFeatures:
        """Runs the LLM, and pools C and S from its last hidden states."""
        hidden = self.run_llm(batch, visual, out)
        projected = self.llm_projector(hidden)
        if out is not None:
            out["llm_projector"] = projected
        k, g = batch.phrase_target.shape[1], batch.name_valid.shape[1]
        return TextFeatures(hidden, pool_spans(projected, batch.phrase_ids, k + g), pool_spans(projected, batch.seg_ids, k + 1))

    def __call__(
        self, batch: Batch, peers: DataParallelGroup = SINGLE_DEVICE, out: dict[str, Any] | None = None
    ) -> TrainingOutput:
        """The teacher-forced forward of training.

        Args:
            batch: examples.
            peers: the devices that have the other parts of the batch.
            out: if given, gets what the components compute on the way, under their names; nothing is computed for it
                otherwise. `sam/hidden_states`, `siglip/hidden_states` and `llm/hidden_states` count as Hugging Face does;
                `visual_projector`, `seg_projector`, `connector`, `llm_projector` are outputs; the rest is described where it is
                made (`PixelDecoder.__call__`, `MaskDecoder.__call__`).
        """
        features = self.encode_image(batch, out)
        if not self.cfg.has_mask_decoder:
            hidden = self.run_llm(batch, features.visual_tokens, out)
            return TrainingOutput(hidden, self.llm.lm_head_weight(hidden.dtype), None, None, None, None)
        reading = self.encode_text(batch, features.visual_tokens, out) if self.cfg.has_language_model else None
        return self.decode_training_passes(batch, features, reading, peers, out)

    def decode_training_passes(
        self,
        batch: Batch,
        features: ImageFeatures,
        reading: TextFeatures | None,
        peers: DataParallelGroup = SINGLE_DEVICE,
        out: dict[str, Any] | None = None,
    ) -> TrainingOutput:
        """All passes of the mask decoder that training supervises; without an LLM (no `reading`) the pass by category alone."""
        cfg = self.cfg
        b, k = batch.phrase_target.shape
        if reading is None:
            with jax.named_scope("mask_decoder"):
                decoded = self.mask_decoder(features.mask_features, features.multi_scale_features, 1, out=out)
            categories = self.category_head(decoded.queries).astype(jnp.float32)
            return TrainingOutput(None, None, features.mask_features, decoded, None, categories)
        group = cfg.negatives_group_size
        phrases, phrase_mask = (peers.gather_group(x, group) for x in (reading.condition_embeds[:, :k], batch.phrase_target))
        referring = referring_conditions(phrases, self.background_embed[...], phrase_mask, group, cfg.exclude_same_target)
        mine = peers.batch_offset(b) % group * k if b % group else 0
        parts = [jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, mine, b * k), referring)]
        segs = [reading.seg_embeds[:, :k].reshape(b * k, -1)]
        if cfg.generic_pass != "off":
            exists = batch.name_valid
            named = append_background(reading.condition_embeds[:, k:], exists, exists, self.background_embed[...])
            if cfg.generic_pass == "without_flow":
                named = dataclasses.replace(named, attend_mask=jnp.zeros_like(named.attend_mask))
            parts.append(named)
            segs.append(reading.seg_embeds[:, k])
        if self.category_head is not None:
            none = jnp.zeros((b, 1), bool)
            blank = jnp.zeros((b, 1, reading.condition_embeds.shape[-1]), reading.condition_embeds.dtype)
            parts.append(Conditions(blank, none, ~none))
            segs.append(jnp.zeros_like(reading.seg_embeds[:, k]))
        rows = max(part.attend_mask.shape[1] for part in parts)
        conditions = interleave_passes([pad_conditions(part, rows) for part in parts], b)
        passes = conditions.attend_mask.shape[0] // b
        with jax.named_scope("mask_decoder"):
            decoded = self.mask_decoder(
                features.mask_features, features.multi_scale_features, passes, conditions, interleave_passes(segs, b), out
            )
        categories = None
        if self.category_head is not None:
            by_image = decoded.queries.reshape(decoded.queries.shape[0], b, passes, *decoded.queries.shape[2:])
            categories = self.category_head(by_image[:, :, -1]).astype(jnp.float32)
        vocabulary = self.llm.lm_head_weight(reading.hidden_states.dtype)
        return TrainingOutput(reading.hidden_states, vocabulary, features.mask_features, decoded, conditions, categories)

    def predict(self, batch: Batch) -> MaskCandidates:
        """All candidates of every phrase, in one pass over the rows that training sees."""
        features = self.encode_image(batch)
        reading = self.encode_text(batch, features.visual_tokens)
        k = batch.phrase_target.shape[1]
        return self.decode_masks(
            features.mask_features, features.multi_scale_features, reading.condition_embeds[:, :k], reading.seg_embeds[:, :k]
        )

    def prefill_image(self, views: ImageInputs, prefix: Int[Array, " p"]) -> ImageCache:
        """Looks at images once: both encoders, the pixel decoder, and the LLM over the prefix.

        Args:
            views: the images.
            prefix: token ids that every conversation begins with, the image's slots at the end (`batching.encode_prefix`).
        """
        features = self.encode_image(views)
        b, length = views.sam_images.shape[0], prefix.shape[0]
        place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
        with jax.named_scope("llm"):
            embeds = self.merge_visual_tokens(jnp.broadcast_to(prefix, (b, length)), features.visual_tokens)
            _, cache = self.llm.prefill(embeds, place, jnp.zeros_like(place), length)
        return ImageCache(features.mask_features, features.multi_scale_features, cache)

    def predict_cached(
        self, seen: ImageCache, questions: ExpressionQueries, out: dict[str, Any] | None = None
    ) -> MaskCandidates:
        """All candidates of every phrase about encoded images, the numbers of `predict`; `out` as in `decode_masks`."""
        texts = self.encode_text_cached(seen, questions)
        return self.decode_masks(seen.mask_features, seen.multi_scale_features, *texts, out)

    def encode_text_cached(
        self, seen: ImageCache, questions: ExpressionQueries
    ) -> tuple[Float[Array, "b k d"], Float[Array, "b k d"]]:
        """C(0) and S of every phrase: the LLM reads on behind the image."""
        k = questions.query_valid.shape[1]
        with jax.named_scope("llm"):
            embeds = self.llm.embed(questions.input_ids, seen.kv_cache.keys.dtype)
            hidden, _ = self.llm.extend(seen.kv_cache, embeds, questions.position_ids, questions.segment_ids)
        projected = self.llm_projector(hidden)
        return pool_spans(projected, questions.phrase_ids, k), pool_spans(projected, questions.seg_ids, k)

    def decode_masks(
        self,
        mask_features: Float[Array, "b h w f"],
        levels: tuple[Float[Array, "b _ _ d"], ...],
        phrases: Float[Array, "b k d"],
        segs: Float[Array, "b k d"],
        out: dict[str, Any] | None = None,
    ) -> MaskCandidates:
        """All candidates of phrases (C) and outputs (S) that belong together one by one.

        A phrase is scored against the background alone: a conversation is its own group. `out`, if given, gets the decoder's
        intermediates (`MaskDecoder.__call__`) and its predictions after every layer, `decoder_output`.
        """
        b, k, _ = phrases.shape
        yes = jnp.ones((b * k, 1), bool)
        conditions = append_background(phrases.reshape(b * k, 1, -1), yes, yes, self.background_embed[...])
        with jax.named_scope("mask_decoder"):
            found = self.mask_decoder(mask_features, levels, k, conditions, segs.reshape(b * k, -1), out)
        if out is not None:
            out["decoder_output"] = found
        scores = jax.nn.softmax(found.class_logits[-1], -1)[..., 0].reshape(b, k, -1)
        embeds = found.mask_embeds[-1].reshape(b, -1, found.mask_embeds.shape[-1])
        masks = mask_logits(embeds, mask_features)
        return MaskCandidates(scores, masks.reshape(*scores.shape, *masks.shape[2:]), mask_features)

    def refine_masks(self, masks: Float[Array, "b n h w"], mask_features: Float[Array, "b h w f"]) -> Float[Array, "b n h w"]:
        """BAR on mask logits; the identity without it."""
        if self.boundary is None:
            return masks
        with jax.named_scope("boundary"):
            return self.boundary(masks, mask_features)


def params_dict(tree: Any) -> dict[str, Any]:
    """An NNX state as the plain nested dict that parameters are at rest: string keys only, as checkpoints have them."""

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
    return nnx.split(nnx.eval_shape(lambda: FlowSeg(cfg, rngs=nnx.Rngs(0))))

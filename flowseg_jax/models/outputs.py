"""What the parts of the model return: frozen dataclasses of arrays that pass through `jax.jit`.

Dimensions: B images, T tokens, V visual tokens, E the language model's width, D the decoder's width, F the width of the mask
features (h x w), K referring phrases per image, G names of the generic conversation, Q queries, J = decoder layers + 1
predictions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.mask_decoder import DecoderOutput, LevelMemory, mask_logits
from flowseg_jax.models.semantic_flow import Conditions
from flowseg_jax.ops.vocabulary import ShardedEmbedding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """What `FlowSeg.encode_image` computes.

    Attributes:
        visual_tokens: [B, V, E] for the language model: SigLIP's tokens, then SAM's; None without a language model.
        mask_features: [B, h, w, F]; None without a mask decoder.
        levels: what the mask decoder attends to, low to high resolution.
    """

    visual_tokens: Float[Array, "b v e"] | None
    mask_features: Float[Array, "b h w f"] | None
    levels: tuple[LevelMemory, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """What `FlowSeg.encode_text` computes.

    Attributes:
        hidden_states: [B, T, E], after the final norm; the language loss reads them.
        condition_embeds: [B, K + G, D]: C(0) of the K referring phrases, then of the G names of the generic conversation;
            zeros where there is none.
        seg_embeds: [B, K + 1, D]: S of each referring phrase, then of the generic conversation; zeros where there is none.
    """

    hidden_states: Float[Array, "b t e"]
    condition_embeds: Float[Array, "b n d"]
    seg_embeds: Float[Array, "b s d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingOutput:
    """Everything the losses read. A field is None where the model has not the component that computes it.

    Attributes:
        hidden_states: [B, T, E] of the language model, after the final norm.
        lm_head: the matrix of the language head, in the dtype of `hidden_states`.
        mask_features: [B, h, w, F].
        decoder_output: of all passes, image by image: K referring passes (with a language model), then the open-vocabulary
            pass (unless `generic_pass` is off), then the closed-vocabulary pass (if the model has classes).
        conditions: of all passes; None without a language model.
        category_logits: [J, B, Q, classes + 1] of the closed-vocabulary pass, or None.
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
    """Images that have been encoded: all that any number of expressions about them shares.

    Attributes:
        mask_features: [B, h, w, F].
        levels: what the mask decoder attends to, low to high resolution.
        kv_cache: of the language model after the prompt's prefix, which ends with the image.
    """

    mask_features: Float[Array, "b h w f"]
    levels: tuple[LevelMemory, ...]
    kv_cache: KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskCandidates:
    """The Q candidate masks of every phrase.

    Attributes:
        scores: float32 [B, K, Q]: softmax over [phrase, background], of which the phrase's share is kept.
        mask_embeds: [B, K, Q, F]; a mask is the product of its embedding with the mask features.
        mask_features: [B, h, w, F], which `FlowSeg.refine_masks` needs, too.
    """

    scores: Float[Array, "b k q"]
    mask_embeds: Float[Array, "b k q f"]
    mask_features: Float[Array, "b h w f"]

    @property
    def mask_logits(self) -> Float[Array, "b k q h w"]:
        """Float32 [B, K, Q, h, w]: all masks, before boundary refinement."""
        return self._products(self.mask_embeds)

    def mask_logits_of(self, query: Int[Array, "b k n"]) -> Float[Array, "b k n h w"]:
        """Float32 [B, K, N, h, w]: the masks of these candidates alone."""
        return self._products(jnp.take_along_axis(self.mask_embeds, query[..., None], 2))

    def _products(self, embeds: Float[Array, "b k n f"]) -> Float[Array, "b k n h w"]:
        b, k, n, f = embeds.shape
        masks = mask_logits(embeds.reshape(b, k * n, f), self.mask_features)
        return masks.reshape(b, k, n, *masks.shape[2:])

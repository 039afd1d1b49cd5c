"""The mask decoder: Mask2Former's masked-attention layers with the semantic flow inside each of them.

A decoder pass is one image with its queries and with conditions of its own. The R passes of an image share its multi-scale
features: their queries attend as one long query axis, and keys and values are projected once per image.

Masks are linear in the mask features, which this module uses twice. The attention mask of a layer is the product with features
resized to that layer's level; the full-resolution masks of all queries are never resized. And callers get mask embeddings, from
which they compute only the masks they need (`mask_logits`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from flowseg_jax.errors import UserError
from flowseg_jax.models.layers import LayerNorm, Linear, MultiHeadAttention, make_param, normal_init
from flowseg_jax.models.pixel_decoder import sine_position_embedding
from flowseg_jax.models.semantic_flow import ConditionRefinement, Conditions, SemanticFlowConfig, SemanticRefinement
from flowseg_jax.models.stack import remat, stack_layers
from flowseg_jax.ops.dot import einsum
from flowseg_jax.ops.resize import resize


@dataclasses.dataclass(frozen=True)
class MaskDecoderConfig:
    """Sizes of the mask decoder (X-SAM's defaults: Mask2Former, 200 queries, 9 layers).

    Attributes:
        embed_dim: D, the width of queries, conditions and levels.
        num_queries: Q.
        num_layers: number of decoder layers; layer i reads level i mod L.
        num_heads: attention heads of every attention of a layer.
        mlp_dim: hidden width of the feed-forward network.
        num_levels: L, the number of levels.
        mask_dim: width of the mask features; None: that of the queries.
        query_init_std: standard deviation of the learned queries' and their positions' initial values (X-SAM 0.02). S is
            added to the queries: trained from scratch, queries much smaller than S start out all alike.
        mask_init_std: standard deviation of the initial matrices of the mask embedder (X-SAM 0.02). Trained from scratch at a
            small width, three such matrices in a row leave masks and gradients near zero.
        logit_scale: initial value of the learned log scale of the cosine class head; ln(1 / 0.07), as in CLIP.
        logit_clamp: class logits are clipped to plus or minus this (X-SAM main 50, AAAI 500).
        remat: rematerialisation policy of a layer.
    """

    embed_dim: int = 256
    num_queries: int = 200
    num_layers: int = 9
    num_heads: int = 8
    mlp_dim: int = 2048
    num_levels: int = 3
    mask_dim: int | None = None
    query_init_std: float = 0.02
    mask_init_std: float = 0.02
    logit_scale: float = 2.6593
    logit_clamp: float = 50.0
    remat: str = "attention"

    def __post_init__(self):
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise UserError(
                f"mask_decoder.embed_dim {self.embed_dim} must be a multiple of 4 and of num_heads ({self.num_heads})"
            )

    @classmethod
    def tiny(cls) -> MaskDecoderConfig:
        return cls(
            embed_dim=64,
            num_queries=16,
            num_layers=3,
            num_heads=2,
            mlp_dim=256,
            query_init_std=1.0,
            mask_init_std=0.12,
            remat="none",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """Predictions before the first layer and after each layer (J = layers + 1, the last is the prediction).

    Attributes:
        queries: [J, P, Q, D], after the decoder's shared LayerNorm.
        mask_embeds: [J, P, Q, F]; a mask is their product with the mask features.
        class_logits: float32 [J, P, Q, N] against C(j), or None without conditions.
    """

    queries: Float[Array, "j p q d"]
    mask_embeds: Float[Array, "j p q f"]
    class_logits: Float[Array, "j p q n"] | None


def mask_logits(mask_embeds: Float[Array, "b n d"], features: Float[Array, "b h w d"]) -> Float[Array, "b n h w"]:
    """Mask logits of N embeddings per image at the resolution of the mask features, in float32."""
    return einsum("bnd,bhwd->bnhw", mask_embeds, features)


def cosine_logits(
    queries: Float[Array, "p q d"],
    conditions: Float[Array, "p n d"],
    valid_mask: Bool[Array, "p n"],
    log_scale: Float[Array, "1"],
    clamp: float,
) -> Float[Array, "p q n"]:
    """exp(log_scale) * cos(query, condition), clipped to +-clamp; rows that do not exist get -1e6. In float32."""

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        # max(norm, eps) with a gradient that is finite at zero
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))

    logits = einsum("pqd,pnd->pqn", unit(queries), unit(conditions)) * jnp.exp(log_scale)
    return jnp.where(valid_mask[:, None, :], jnp.clip(logits, -clamp, clamp), -1e6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LevelMemory:
    """One level as the mask decoder reads it, whatever it is asked: computed once an image.

    Attributes:
        values: [B, y, x, D], the encoded level plus its learned embedding.
        mask_features: [B, y, x, F], the mask features at this level's size, without gradient: what attention masks are made
            from.
    """

    values: Float[Array, "b y x d"]
    mask_features: Float[Array, "b y x f"]

    @property
    def positions(self) -> Float[Array, "s d"]:
        """[S, D], what is added to the keys; S = y * x, row by row."""
        _, y, x, d = self.values.shape
        return sine_position_embedding(y, x, d).reshape(y * x, d).astype(self.values.dtype)


class DecoderLayer(nnx.Module):
    """Post-norm: visual cross-attention, SR, self-attention, feed-forward, CR."""

    def __init__(self, cfg: MaskDecoderConfig, flow: SemanticFlowConfig, *, rngs: nnx.Rngs):
        self.cross_attn = MultiHeadAttention(cfg.embed_dim, cfg.num_heads, rngs=rngs)
        self.cross_attn_layer_norm = LayerNorm(cfg.embed_dim, rngs=rngs)
        width, heads = cfg.embed_dim, cfg.num_heads
        self.semantic_refinement = SemanticRefinement(width, heads, flow, rngs=rngs) if flow.has_sr else None
        self.self_attn = MultiHeadAttention(cfg.embed_dim, cfg.num_heads, rngs=rngs, fused_init=False)
        self.self_attn_layer_norm = LayerNorm(cfg.embed_dim, rngs=rngs)
        self.fc1 = Linear(cfg.embed_dim, cfg.mlp_dim, rngs=rngs)
        self.fc2 = Linear(cfg.mlp_dim, cfg.embed_dim, rngs=rngs)
        self.final_layer_norm = LayerNorm(cfg.embed_dim, rngs=rngs)
        self.condition_refinement = ConditionRefinement(width, heads, flow, rngs=rngs) if flow.has_cr else None

    def cross_attention_block(
        self,
        x: Float[Array, "p q d"],
        query_pos: Float[Array, "q d"],
        memory: Float[Array, "b s d"],
        memory_pos: Float[Array, "s d"],
        allowed: Bool[Array, "p q s"],
        out: dict[str, Any] | None = None,
    ) -> Float[Array, "p q d"]:
        """Q_vis: masked cross-attention of all passes of an image to one level; `out` gets "visual_attention" [P, Q, D]."""
        b, (p, q, d) = memory.shape[0], x.shape
        flat = (x + query_pos).reshape(b, p // b * q, d)
        mask = allowed.reshape(b, 1, p // b * q, -1)
        attended = self.cross_attn(flat, memory + memory_pos, memory, mask=mask).reshape(p, q, d)
        if out is not None:
            out["visual_attention"] = attended
        return self.cross_attn_layer_norm(x + attended)

    def refine_and_self_attend(
        self,
        q_vis: Float[Array, "p q d"],
        query_pos: Float[Array, "q d"],
        embeds: Float[Array, "p n d"] | None,
        conditions: Conditions | None,
        out: dict[str, Any] | None = None,
    ) -> Float[Array, "p q d"]:
        """Q_s: SR, then self-attention among the queries of a pass; `out` as `SemanticRefinement`."""
        x = q_vis
        if conditions is not None and self.semantic_refinement is not None:
            x = self.semantic_refinement(x, query_pos, embeds, conditions.attend_mask, out)
        return self.self_attn_layer_norm(x + self.self_attn(x + query_pos, x + query_pos, x))

    def feed_forward_and_refine_conditions(
        self,
        q_s: Float[Array, "p q d"],
        embeds: Float[Array, "p n d"] | None,
        conditions: Conditions | None,
    ) -> tuple[Float[Array, "p q d"], Float[Array, "p n d"] | None]:
        """Feed-forward network, and CR from Q_s; returns the queries and the refined conditions."""
        x = self.final_layer_norm(q_s + self.fc2(jax.nn.relu(self.fc1(q_s))))
        if conditions is not None and self.condition_refinement is not None:
            embeds = self.condition_refinement(
                embeds, q_s, conditions.valid_mask & conditions.attend_mask.any(-1, keepdims=True)
            )
        return x, embeds


class MaskDecoder(nnx.Module):
    """All layers, the shared prediction heads and the learned queries (X-SAM's Mask2Former decoder)."""

    def __init__(self, cfg: MaskDecoderConfig, flow: SemanticFlowConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        query, mask = normal_init(cfg.query_init_std), normal_init(cfg.mask_init_std)
        self.queries_features = make_param(rngs, query, (cfg.num_queries, cfg.embed_dim), (None, None))
        self.queries_embedder = make_param(rngs, query, (cfg.num_queries, cfg.embed_dim), (None, None))
        self.level_embed = make_param(rngs, normal_init(0.02), (cfg.num_levels, cfg.embed_dim), (None, None))
        self.layers = stack_layers(lambda r: DecoderLayer(cfg, flow, rngs=r), cfg.num_layers, rngs)
        self.layernorm = LayerNorm(cfg.embed_dim, rngs=rngs)
        widths = (cfg.embed_dim, cfg.embed_dim, cfg.mask_dim or cfg.embed_dim)
        self.mask_embedder = nnx.List([Linear(cfg.embed_dim, width, rngs=rngs, init=mask) for width in widths])
        self.logit_scale = make_param(rngs, nnx.initializers.constant(cfg.logit_scale), (1,), (None,))

    def mask_embed(self, queries: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        """An MLP of three layers over normalised queries; a mask is its product with the mask features."""
        first, second, third = self.mask_embedder
        return third(jax.nn.relu(second(jax.nn.relu(first(queries)))))

    def prepare_levels(
        self, mask_features: Float[Array, "b h w f"], multi_scale_features: tuple[Float[Array, "b _ _ d"], ...]
    ) -> tuple[LevelMemory, ...]:
        """What all passes of an image read, from the pixel decoder's output; the levels come from low to high resolution.

        Raises:
            ValueError: another number of levels than configured.
        """
        if len(multi_scale_features) != self.cfg.num_levels:
            raise ValueError(f"the mask decoder expects {self.cfg.num_levels} levels, got {len(multi_scale_features)}")
        return tuple(
            LevelMemory(
                level + embed.astype(level.dtype),
                jax.lax.stop_gradient(self.resize_features(mask_features, level.shape[1:3])),
            )
            for level, embed in zip(multi_scale_features, self.level_embed[...], strict=True)
        )

    def init_queries(self, passes: int, seg_embeds: Float[Array, "p d"] | None, dtype: jnp.dtype) -> Float[Array, "p q d"]:
        """The queries before the first layer: learned content plus S."""
        x = jnp.broadcast_to(self.queries_features[...].astype(dtype), (passes, self.cfg.num_queries, self.cfg.embed_dim))
        return x if seg_embeds is None else x + seg_embeds.astype(dtype)[:, None]

    def prediction_heads(
        self, x: Float[Array, "p q d"], embeds: Float[Array, "p n d"] | None, conditions: Conditions | None
    ) -> tuple[Float[Array, "p q d"], Float[Array, "p q f"], Float[Array, "p q n"] | None]:
        """Normalised queries, their mask embeddings and class logits against C (None without conditions)."""
        queries, logits = self.layernorm(x), None
        if conditions is not None:
            logits = cosine_logits(queries, embeds, conditions.valid_mask, self.logit_scale[...], self.cfg.logit_clamp)
        return queries, self.mask_embed(queries), logits

    @staticmethod
    def attention_mask(mask_embeds: Float[Array, "p q f"], memory: LevelMemory) -> Bool[Array, "p q s"]:
        """Where each query may attend: inside its predicted mask, or everywhere if that is empty at this level's size."""
        b, y, x, e = memory.mask_features.shape
        flat = jax.lax.stop_gradient(mask_embeds).reshape(b, -1, e)
        allowed = einsum("bqe,bse->bqs", flat, memory.mask_features.reshape(b, y * x, e)) >= 0
        allowed = allowed | ~allowed.any(-1, keepdims=True)
        return allowed.reshape(*mask_embeds.shape[:2], y * x)

    def __call__(
        self,
        levels: Sequence[LevelMemory],
        passes: int,
        conditions: Conditions | None = None,
        seg_embeds: Float[Array, "p d"] | None = None,
        out: dict[str, Any] | None = None,
    ) -> DecoderOutput:
        """Decodes `passes` passes per image (P = B * passes, the passes of an image adjacent).

        Args:
            levels: of the images, from `prepare_levels`.
            passes: R, decoder passes per image.
            conditions: of all P passes; None for a call without language.
            seg_embeds: S, added to every query of its pass; zeros for a pass without.
            out: if given, it gets what the layers compute on the way (L layers, J = L + 1):
                "query_init" [P, Q, D] and "query_pos" [Q, D]: the queries before the first layer, and their positions;
                "conditions" [J, P, N, D]: C before the first layer and after each layer, if there are conditions;
                "attention_mask" [L, P, Q, S']: where the queries of each layer may attend; S' counts the pixels of the
                largest level, and those that the layer's level does not have are False;
                "after_cross_attn", "after_self_attn", "after_mlp" [L, P, Q, D]: the queries in and after each layer;
                "text_attention", "q_sem", "gate" [L, P, Q, D]: of SR (`SemanticRefinement`), with SR and conditions.
        """
        cfg, b, dtype = self.cfg, levels[0].values.shape[0], levels[0].values.dtype
        query_pos = self.queries_embedder[...].astype(dtype)
        x = query_init = self.init_queries(b * passes, seg_embeds, dtype)
        embeds = None if conditions is None else conditions.embeds.astype(dtype)
        graphdef, stacked = nnx.split(self.layers)
        positions = [level.positions for level in levels]
        largest = max(map(len, positions))

        def body(carry, inputs):
            x, embeds = carry
            index, params = inputs
            layer = nnx.merge(graphdef, params)
            prediction = self.prediction_heads(x, embeds, conditions)
            kept: dict[str, Array] | None = None if out is None else {}

            def attend(level: LevelMemory, memory_pos: Array) -> tuple[Array, Array | None]:
                allowed = self.attention_mask(prediction[1], level)
                memory = level.values.reshape(b, *memory_pos.shape)
                q_vis = layer.cross_attention_block(x, query_pos, memory, memory_pos, allowed)
                missing = largest - allowed.shape[-1]
                return q_vis, None if kept is None else jnp.pad(allowed, ((0, 0), (0, 0), (0, missing)))

            branches = [functools.partial(attend, *each) for each in zip(levels, positions, strict=True)]
            q_vis, allowed = jax.lax.switch(index % len(branches), branches)
            q_s = layer.refine_and_self_attend(q_vis, query_pos, embeds, conditions, kept)
            carry = layer.feed_forward_and_refine_conditions(q_s, embeds, conditions)
            if kept is not None:
                kept |= {"attention_mask": allowed, "after_cross_attn": q_vis, "after_self_attn": q_s, "after_mlp": carry[0]}
                kept |= {} if embeds is None else {"conditions": embeds}
            return carry, (prediction, kept)

        steps = (jnp.arange(cfg.num_layers), nnx.to_pure_dict(stacked))
        (x, embeds), (predictions, kept) = jax.lax.scan(remat(body, cfg.remat), (x, embeds), steps)
        last = self.prediction_heads(x, embeds, conditions)
        append = lambda ys, y: jnp.concatenate([ys, y[None]])  # noqa: E731
        queries, mask_embeds, logits = jax.tree.map(append, predictions, last)
        if out is not None:
            out |= kept | {"query_init": query_init, "query_pos": query_pos}
            if embeds is not None:
                out["conditions"] = append(kept["conditions"], embeds)
        return DecoderOutput(queries, mask_embeds, logits)

    @staticmethod
    def resize_features(features: Float[Array, "b h w f"], size: tuple[int, int]) -> Float[Array, "b y x f"]:
        """Mask features resized bilinearly: masks are linear in them, so their masks are the resized masks."""
        if features.shape[1:3] == size:
            return features
        return jnp.moveaxis(resize(jnp.moveaxis(features, -1, 1), size), 1, -1)

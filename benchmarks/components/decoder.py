"""A layer of the mask decoder, without language as Mask2Former has it, and boundary refinement."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from transformers.models.mask2former import modeling_mask2former as mask2former

from benchmarks import peer
from benchmarks.components import Call, Pair, Wrap
from benchmarks.components.inputs import bind, exported, inference, load, module, parameters, placed, random, to_torch
from benchmarks.components.msda import shapes_of
from benchmarks.components.sizes import Sizes
from convert_weights.families import Mask2FormerConfig
from flowseg_jax.models.boundary import BoundaryRefinement
from flowseg_jax.models.stack import scan_layers

MASKS = 8  # that boundary refinement gets


class _Layer:
    """One layer in both frameworks, and its inputs: queries, their positions, the finest level and its positions, a mask."""

    def __init__(self, sizes: Sizes):
        decoder = dataclasses.replace(sizes.model.mask_decoder, num_layers=1)
        cfg = Mask2FormerConfig(dataclasses.replace(sizes.model.pixel_decoder, num_layers=1), decoder, 1)
        params, width = parameters("mask2former", cfg), decoder.embed_dim
        with torch.device("meta"):
            layer = mask2former.Mask2FormerMaskedAttentionDecoderLayer(peer.mask2former_config(cfg.pixel_decoder, decoder))
        self.layer = load(layer, exported("mask2former", params, cfg), "model.transformer_module.decoder.layers.0.")
        self.heads = decoder.num_heads
        pixels = shapes_of(sizes)[-1][0] ** 2
        self.inputs = random(1, decoder.num_queries, width), random(1, pixels, width, seed=1)
        self.places = random(decoder.num_queries, width, seed=2), random(pixels, width, seed=3)
        self.allowed = random(1, decoder.num_queries, pixels, seed=4) > 0
        self.params = placed(params["mask_decoder"]["layers"])
        self._graphdef = nnx.split(bind(module("mask2former", cfg), params).mask_decoder.layers)[0]

    def ours(self, params: Any, x: jax.Array, memory: jax.Array) -> jax.Array:
        def body(layer, x, _):
            vision = layer.cross_attention_block(x, self.places[0], memory, self.places[1], self.allowed)
            return layer.feed_forward_and_refine_conditions(
                layer.refine_and_self_attend(vision, self.places[0], None, None), None, None
            )[0], None

        return scan_layers(nnx.merge(self._graphdef, params), body, x)[0]

    def theirs(self, wrap: Wrap) -> tuple[Call, list[torch.Tensor]]:
        """The call, [1, Q, D], and the tensors that have gradients, the inputs first."""
        layer = wrap(self.layer)
        x, memory = (to_torch(value).transpose(0, 1).contiguous().requires_grad_() for value in self.inputs)
        position, place = (to_torch(value)[:, None] for value in self.places)
        blocked = ~to_torch(self.allowed).repeat_interleave(self.heads, 0)

        def call() -> torch.Tensor:
            out = layer(
                x,
                level_index=0,
                position_embeddings=[place],
                query_position_embeddings=position,
                encoder_hidden_states=[memory],
                encoder_attention_mask=blocked,
            )
            return out[0].transpose(0, 1)

        return call, [x, memory, *self.layer.parameters()]


def decoder_layer(sizes: Sizes, dtype: str) -> Pair:
    layer = _Layer(sizes)
    ours = jax.jit(layer.ours)
    return Pair(lambda: ours(layer.params, *layer.inputs), lambda wrap: inference(layer.theirs(wrap)[0]), 1e-4)


def decoder_layer_grad(sizes: Sizes, dtype: str) -> Pair:
    layer = _Layer(sizes)
    cotangent = random(*layer.inputs[0].shape, seed=5)

    @jax.jit
    def ours(cotangent, *inputs):
        out, backward = jax.vjp(layer.ours, *inputs)
        return out, backward(cotangent)

    def theirs(wrap: Wrap) -> Call:
        (call, leaves), given = layer.theirs(wrap), to_torch(cotangent)

        def both() -> tuple:
            out = call()
            return out, torch.autograd.grad(out, leaves, given)

        return both

    def our_output(result) -> dict:
        out, (params, x, memory) = result
        norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params)))
        return {"out": out, "x": x, "memory": memory, "parameters": norm}

    def peer_output(result) -> dict:
        out, (x, memory, *params) = result
        norm = torch.stack([leaf.square().sum() for leaf in params]).sum().sqrt()
        return {"out": out, "x": x.transpose(0, 1), "memory": memory.transpose(0, 1), "parameters": norm}

    return Pair(lambda: ours(cotangent, layer.params, *layer.inputs), theirs, 1e-4, our_output, peer_output)


def bar(sizes: Sizes, dtype: str) -> Pair:
    """Smooth masks, whose boundaries are a small part of them. A pixel exactly on the threshold of the band may fall either
    way; there is none."""
    cfg, width, side = sizes.model.boundary, sizes.model.pixel_decoder.mask_dim, shapes_of(sizes)[-1][0]
    rng = jax.random.key(0)
    coarse = 8 * jax.random.normal(rng, (1, MASKS, max(4, side // 16), max(4, side // 16)))
    masks = jax.image.resize(coarse, (1, MASKS, side, side), "linear")
    features = random(1, side, side, width)
    graphdef, state = nnx.split(BoundaryRefinement(width, cfg, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    params["alpha"] = jnp.ones(1)
    ours = jax.jit(lambda params, masks, features: nnx.merge(graphdef, params)(masks, features))

    def theirs(wrap: Wrap) -> Call:
        boundary = peer.Boundary(width, cfg)
        for name, convolution in (("feature_proj", boundary.compress), ("refine_conv", boundary.refine)):
            convolution.weight.data = to_torch(params[name]["kernel"]).permute(3, 2, 0, 1).contiguous()
            convolution.bias.data = to_torch(params[name]["bias"])
        boundary.alpha.data = to_torch(params["alpha"])
        refine, given = wrap(boundary), (to_torch(masks)[0], to_torch(features).permute(0, 3, 1, 2).contiguous())
        return inference(lambda: refine(*given)[None])

    return Pair(lambda: ours(params, masks, features), theirs, 1e-5)

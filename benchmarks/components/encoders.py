"""Single blocks of the three components, in inference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import torch
from transformers import DynamicCache
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.sam import modeling_sam as sam_model
from transformers.models.siglip import modeling_siglip as siglip_model

from benchmarks import peer
from benchmarks.components import Call, Pair, Wrap
from benchmarks.components.inputs import bind, exported, inference, load, module, parameters, placed, random, to_torch
from benchmarks.components.sizes import Sizes
from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.stack import scan_layers

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def _sam(cfg: SamConfig, stack: str, dtype: str) -> Pair:
    params = parameters("sam", cfg)
    tensors = exported("sam", params, cfg)
    with torch.device("meta"):
        layer = sam_model.SamVisionLayer(peer.sam_config(cfg), 0 if cfg.global_attn_indexes else cfg.window_size)
    layer = load(layer, tensors, "vision_encoder.layers.0.", dtype)
    x = random(1, cfg.grid_size, cfg.grid_size, cfg.hidden_size, dtype=dtype)
    y, weights, graphdef = to_torch(x), placed(params, dtype), module("sam", cfg)

    @jax.jit
    def ours(params, x):
        return scan_layers(getattr(bind(graphdef, params), stack), lambda layer, x, _: (layer(x), None), x)[0]

    def theirs(wrap: Wrap) -> Call:
        block = wrap(layer)
        return inference(lambda: block(y))

    return Pair(lambda: ours(weights, x), theirs, TOLERANCES[dtype])


def sam_window(sizes: Sizes, dtype: str) -> Pair:
    return _sam(dataclasses.replace(sizes.model.sam, num_hidden_layers=1, global_attn_indexes=()), "window_layers", dtype)


def sam_global(sizes: Sizes, dtype: str) -> Pair:
    return _sam(dataclasses.replace(sizes.model.sam, num_hidden_layers=1, global_attn_indexes=(0,)), "global_layers", dtype)


def siglip(sizes: Sizes, dtype: str) -> Pair:
    cfg = dataclasses.replace(sizes.model.siglip, num_hidden_layers=1)
    params = parameters("siglip2", cfg)
    with torch.device("meta"):
        layer = siglip_model.SiglipEncoderLayer(peer.siglip_config(cfg))
    layer = load(layer, exported("siglip2", params, cfg), "vision_model.encoder.layers.0.", dtype)
    x = random(1, cfg.num_patches, cfg.hidden_size, dtype=dtype)
    y, weights, graphdef = to_torch(x), placed(params, dtype), module("siglip2", cfg)

    @jax.jit
    def ours(params, x):
        return scan_layers(bind(graphdef, params).layers, lambda layer, x, _: (layer(x), None), x)[0]

    def theirs(wrap: Wrap) -> Call:
        block = wrap(layer)
        return inference(lambda: block(y, None))

    return Pair(lambda: ours(weights, x), theirs, TOLERANCES[dtype])


class _Qwen:
    """One layer of Qwen3 with its final norm, in both frameworks."""

    def __init__(self, sizes: Sizes, dtype: str):
        self.cfg: LanguageConfig = dataclasses.replace(sizes.model.llm, num_hidden_layers=1, vocab_size=8)
        params = parameters("qwen3", self.cfg)
        tensors, config = exported("qwen3", params, self.cfg), peer.qwen3_config(self.cfg)
        with torch.device("meta"):
            layer = qwen3.Qwen3DecoderLayer(config, 0)
            norm = qwen3.Qwen3RMSNorm(self.cfg.hidden_size, self.cfg.rms_norm_eps)
        self.layer = load(layer, tensors, "model.layers.0.", dtype)
        self.norm = load(norm, tensors, "model.norm.", dtype)
        self.rotary = qwen3.Qwen3RotaryEmbedding(config)
        self.weights, self.graphdef = placed(params, dtype), module("qwen3", self.cfg)


def llm_prefill(sizes: Sizes, dtype: str) -> Pair:
    qwen, length = _Qwen(sizes, dtype), sizes.prompt
    x = random(1, length, qwen.cfg.hidden_size, dtype=dtype)
    positions, segments = jnp.arange(length)[None], jnp.zeros((1, length), int)

    @jax.jit
    def ours(params, x):
        return bind(qwen.graphdef, params)(x, positions, segments)

    def theirs(wrap: Wrap) -> Call:
        y, layer = to_torch(x), wrap(qwen.layer)
        angles = qwen.rotary(y, torch.arange(length)[None])
        return inference(lambda: qwen.norm(layer(y, position_embeddings=angles)))

    return Pair(lambda: ours(qwen.weights, x), theirs, TOLERANCES[dtype])


def llm_decode(sizes: Sizes, dtype: str) -> Pair:
    """The cache is full, so that a call leaves it as it was: ours has no slot for the new token, theirs is cut back."""
    qwen, past = _Qwen(sizes, dtype), sizes.prompt
    cfg = qwen.cfg
    keys, values = (random(1, past, cfg.num_key_value_heads, cfg.head_dim, seed=i, dtype=dtype) for i in (1, 2))
    x = random(1, 1, cfg.hidden_size, dtype=dtype)
    here = jnp.full((1, 1), past)
    flat = (x.reshape(1, 1, past, -1) for x in (keys, values))
    cache = KVCache(*flat, jnp.arange(past)[None], jnp.zeros((1, past), int))

    def step(params, cache, x):
        return bind(qwen.graphdef, params).extend(cache, x, here, jnp.zeros((1, 1), int))

    step = jax.jit(step, donate_argnums=1)
    state = [cache]

    def ours():
        hidden, state[0] = step(qwen.weights, state[0], x)
        return hidden

    def theirs(wrap: Wrap) -> Call:
        y, layer, cache = to_torch(x), wrap(qwen.layer), DynamicCache()
        cache.update(*(to_torch(z).transpose(1, 2).contiguous() for z in (keys, values)), 0)
        angles = qwen.rotary(y, torch.full((1, 1), past))

        def call() -> torch.Tensor:
            hidden = qwen.norm(layer(y, position_embeddings=angles, cache=cache))
            cache.crop(-1)
            return hidden

        return inference(call)

    return Pair(ours, theirs, TOLERANCES[dtype])

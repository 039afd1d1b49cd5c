"""Deformable attention, alone and inside a layer of the pixel decoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.mask2former import modeling_mask2former as mask2former

from benchmarks import peer
from benchmarks.components import Call, Pair, Wrap
from benchmarks.components.inputs import bind, exported, inference, load, module, parameters, placed, random, to_torch
from benchmarks.components.sizes import Sizes
from convert_weights.families import Mask2FormerConfig
from flowseg_jax.models.pixel_decoder import reference_points
from flowseg_jax.models.stack import scan_layers
from flowseg_jax.ops.msda import msda as attend

Shapes = tuple[tuple[int, int], ...]
Inputs = tuple[jax.Array, jax.Array, jax.Array]


def shapes_of(sizes: Sizes) -> Shapes:
    """(height, width) of the levels, low to high resolution: half SAM's grid, the grid, twice the grid."""
    grid = sizes.model.sam.grid_size
    return tuple((side, side) for side in (grid // 2, grid, 2 * grid))


def _core(sizes: Sizes) -> tuple[Shapes, Inputs]:
    """Values, locations and weights. Points lie a few pixels around their query, some outside the map, and none on a pixel's
    centre, where the derivative jumps and either side is right."""
    cfg, shapes = sizes.model.pixel_decoder, shapes_of(sizes)
    rng = np.random.default_rng(0)
    n, heads, levels, points = sum(h * w for h, w in shapes), cfg.num_heads, len(shapes), cfg.num_points
    size = np.array([(w, h) for h, w in shapes])[:, None]
    pixel = np.asarray(reference_points(shapes))[:, None, None, None] * size + rng.normal(0, 3, (n, heads, levels, points, 2))
    whole = np.floor(pixel)
    locations = (whole + np.clip(pixel - whole, 0.02, 0.98) + 0.5) / size
    weights = rng.random((1, n, heads, levels, points), np.float32)
    weights /= weights.sum((3, 4), keepdims=True)
    value = random(1, n, heads, cfg.embed_dim // heads, seed=1)
    return shapes, (value, jnp.asarray(locations[None], jnp.float32), jnp.asarray(weights))


def msda(sizes: Sizes, dtype: str) -> Pair:
    shapes, inputs = _core(sizes)
    tensors = [to_torch(x) for x in inputs]
    ours = jax.jit(lambda *inputs: attend(inputs[0], shapes, *inputs[1:]))

    def theirs(wrap: Wrap) -> Call:
        core = wrap(mask2former.multi_scale_deformable_attention)
        return inference(lambda: core(tensors[0], list(shapes), *tensors[1:]))

    return Pair(lambda: ours(*inputs), theirs, 1e-5)


def msda_grad(sizes: Sizes, dtype: str) -> Pair:
    shapes, inputs = _core(sizes)
    width = sizes.model.pixel_decoder.embed_dim
    cotangent = random(1, inputs[0].shape[1], width, seed=2)

    @jax.jit
    def ours(cotangent, *inputs):
        out, backward = jax.vjp(lambda value, *places: attend(value, shapes, *places), *inputs)
        return out, backward(cotangent)

    def theirs(wrap: Wrap) -> Call:
        core, given = wrap(mask2former.multi_scale_deformable_attention), to_torch(cotangent)
        leaves = [to_torch(x).requires_grad_() for x in inputs]

        def call() -> tuple:
            out = core(leaves[0], list(shapes), *leaves[1:])
            return out, torch.autograd.grad(out, leaves, given)

        return call

    return Pair(lambda: ours(cotangent, *inputs), theirs, 1e-4)


def pixel_decoder_layer(sizes: Sizes, dtype: str) -> Pair:
    cfg = dataclasses.replace(sizes.model.pixel_decoder, num_layers=1)
    whole = Mask2FormerConfig(cfg, dataclasses.replace(sizes.model.mask_decoder, num_layers=1), 1)
    params, shapes = parameters("mask2former", whole), shapes_of(sizes)
    with torch.device("meta"):
        layer = mask2former.Mask2FormerPixelDecoderEncoderLayer(peer.mask2former_config(cfg, whole.decoder))
    layer = load(layer, exported("mask2former", params, whole), "model.pixel_level_module.decoder.encoder.layers.0.")
    n = sum(h * w for h, w in shapes)
    x, positions, reference = random(1, n, cfg.embed_dim), random(n, cfg.embed_dim, seed=1), reference_points(shapes)
    weights, graphdef = placed(params), module("mask2former", whole)

    @jax.jit
    def ours(params, x):
        layers = bind(graphdef, params).pixel_decoder.layers
        return scan_layers(layers, lambda layer, x, _: (layer(x, positions, reference, shapes), None), x)[0]

    def theirs(wrap: Wrap) -> Call:
        block, y, places = wrap(layer), to_torch(x), to_torch(positions)[None]
        points = to_torch(reference)[None, :, None].expand(1, n, len(shapes), 2)
        given = {"position_embeddings": places, "reference_points": points, "spatial_shapes_list": list(shapes)}
        return inference(lambda: block(y, None, **given)[0])

    return Pair(lambda: ours(weights, x), theirs, 1e-4)

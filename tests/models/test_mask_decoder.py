"""The query decoder without language against Hugging Face's `Mask2FormerTransformerModule` (weights through the converter)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Mask2FormerConfig as HfConfig
from transformers.models.mask2former import modeling_mask2former as hf

from convert_weights.convert import import_params
from convert_weights.families import Mask2Former, Mask2FormerConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig, mask_logits
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from tests.helpers import hf_convert

WIDTH, MASK_WIDTH, QUERIES, LAYERS, CLASSES = 32, 20, 7, 5, 4
CHANNELS = (12, 10, 6)
CFG = Mask2FormerConfig(
    PixelDecoderConfig.mask2former(CHANNELS, embed_dim=WIDTH, mask_dim=MASK_WIDTH, num_layers=1, num_heads=2, mlp_dim=28),
    MaskDecoderConfig(embed_dim=WIDTH, num_queries=QUERIES, num_layers=LAYERS, num_heads=2, mlp_dim=44, mask_dim=MASK_WIDTH),
    CLASSES,
)
LEVELS = ((3, 4), (5, 7), (10, 13))  # the last has the masks' size; five layers read the levels 0 1 2 0 1
BATCH = 2
PREFIXES = {"pixel": "model.pixel_level_module.decoder.", "decoder": "model.transformer_module.", "head": "class_predictor."}


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def to_ours(read, modules) -> dict:
    """Weights or gradients (the maps are linear) of all modules as our parameters; ours alone has a scale of class logits."""
    tensors = {PREFIXES[part] + name: x for part, module in modules.items() for name, x in read(module).items()}
    params = import_params("mask2former", tensors, CFG)
    params["mask_decoder"]["logit_scale"] = np.zeros_like(params["mask_decoder"]["logit_scale"])
    return params


@functools.cache
def run_both():
    """Values of every prediction, and gradients of a random projection of them all, by name: (ours, theirs)."""
    config = HfConfig(
        feature_size=WIDTH,
        hidden_dim=WIDTH,
        mask_feature_size=MASK_WIDTH,
        encoder_layers=1,
        encoder_feedforward_dim=28,
        num_attention_heads=2,
        dim_feedforward=44,
        decoder_layers=LAYERS + 1,
        num_queries=QUERIES,
        dropout=0.0,
    )
    modules = {
        "pixel": hf.Mask2FormerPixelDecoder(config, list(CHANNELS[::-1])),
        "decoder": hf.Mask2FormerTransformerModule(WIDTH, config),
        "head": torch.nn.Linear(WIDTH, CLASSES + 1),
    }
    for i, module in enumerate(modules.values()):
        hf_convert.randomise(module, seed=i, scale=0.3)
    torch.manual_seed(0)
    levels = [torch.randn(BATCH, WIDTH, *size, requires_grad=True) for size in LEVELS]
    # What all pixels share makes some masks negative everywhere: they block everything, hence nothing.
    features = (torch.randn(BATCH, MASK_WIDTH, *LEVELS[-1]) + torch.randn(MASK_WIDTH, 1, 1)).requires_grad_()
    theirs = modules["decoder"](levels, features)
    queries = torch.stack([x.transpose(0, 1) for x in theirs.intermediate_hidden_states])
    masks = torch.stack(theirs.masks_queries_logits)
    expected = {"queries": queries, "masks": masks, "classes": modules["head"](queries)}
    at_level = torch.nn.functional.interpolate(masks[0], size=LEVELS[0], mode="bilinear")
    empty = (at_level < 0).flatten(2).all(-1)
    assert empty.any() and not empty.all()

    probes = {name: torch.randn_like(x) for name, x in expected.items()}
    sum((x * probes[name]).sum() for name, x in expected.items()).backward()
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Mask2Former(CFG, rngs=nnx.Rngs(0))))

    def forward(params, features, levels):
        model = nnx.merge(graphdef, params)
        out = model.mask_decoder(model.mask_decoder.prepare_levels(features, levels), 1)
        masks = jnp.stack([mask_logits(embeds, features) for embeds in out.mask_embeds])
        return {"queries": out.queries, "masks": masks, "classes": model.category_head(out.queries)}

    def loss(*inputs):
        values = forward(*inputs)
        return sum((x * probes[name].numpy()).sum() for name, x in values.items()), values

    inputs = (to_ours(hf_convert.weights, modules), jnp.asarray(nhwc(features)), tuple(jnp.asarray(nhwc(x)) for x in levels))
    gradients, actual = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    half = jax.jit(forward)(inputs[0], *jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs[1:]))
    theirs = (to_ours(hf_convert.gradients, modules), nhwc(features.grad), tuple(nhwc(x.grad) for x in levels))
    return {name: x.detach().numpy() for name, x in expected.items()}, actual, half, gradients, theirs


@pytest.mark.parametrize("name", ["queries", "masks", "classes"])
def test_every_prediction_equals_hugging_face(name):
    expected, actual, *_ = run_both()
    assert len(actual[name]) == LAYERS + 1
    for j, (a, e) in enumerate(zip(actual[name], expected[name], strict=True)):
        assert hf_convert.error(a, e) < 1e-5, f"prediction {j}"


def test_gradients_equal_hugging_face():
    *_, actual, expected = run_both()
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    actual, expected = jax.tree.map(np.array, (actual, expected))
    for gradients in (actual, expected):
        for part in ("cross_attn", "self_attn"):
            # A key bias shifts all scores of a query alike: its gradient is zero, and what is found there is rounding.
            bias = gradients[0]["mask_decoder"]["layers"][part]["k_proj"].pop("bias")
            assert np.abs(bias).max() < 1e-6 * largest
    worst = hf_convert.tree_error(dict(enumerate(actual)), dict(enumerate(expected)))
    assert worst[0] < 1e-4, worst


def test_bfloat16_stays_bfloat16_and_near():
    """The first prediction only: after it, a mask that is rounded across zero moves what a query attends to."""
    expected, _, half, *_ = run_both()
    assert half["queries"].dtype == jnp.bfloat16 and half["masks"].dtype == jnp.float32
    errors = [hf_convert.error(h, e) for h, e in zip(half["masks"], expected["masks"], strict=True)]
    print("bfloat16 errors of the masks:", *(f"{error:.1e}" for error in errors))
    assert errors[0] < 0.05
    assert np.isfinite(errors).all()

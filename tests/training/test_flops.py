"""The analytic FLOPs: the published sizes, the products that tracing the modules finds, and what a backward pass takes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.losses import LossConfig
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import SegConnector
from flowseg_jax.models.language import LanguageModel
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoder
from flowseg_jax.models.pixel_decoder import PixelDecoder, PixelDecoderConfig
from flowseg_jax.models.sam import SamImageEncoder
from flowseg_jax.models.semantic_flow import Conditions
from flowseg_jax.models.siglip import SiglipVisionEncoder
from flowseg_jax.ops.portable import without_kernels
from flowseg_jax.training import flops
from flowseg_jax.training.flops import FlopCount
from flowseg_jax.types import BatchShape
from tests.helpers import small
from tests.helpers.counting import products

FULL = FlowSegConfig.full(LanguageConfig.qwen3_4b())
SHAPE = BatchShape(4, 1920, 4, 16, 1024, 384)


def test_known_sizes_in_gflop_an_image():
    """The roofline of X-SAM at 896 tokens, from its layer sizes; its pixel decoder ends at a quarter of the image."""
    pyramid = PixelDecoderConfig.mask2former((2048, 1024, 512, 256), num_levels=3)
    decoder = flops.mask_decoder(FULL.mask_decoder, "off", flops.levels(FULL), 1, 1)
    whole_masks = 10 * 2 * 200 * 256**2 * 256  # X-SAM computes every query's mask after every layer
    found = {
        "sam": flops.sam(FULL.sam, 24).forward,
        "siglip": flops.siglip(FULL.siglip, 27).forward,
        "qwen3_4b": flops.language(LanguageConfig.qwen3_4b(), 896).forward,
        "qwen3_1b7": flops.language(LanguageConfig.qwen3_1b7(), 896).forward,
        "phi3_mini": flops.language(LanguageConfig.phi3_mini(), 896).forward,
        "pixel_decoder": flops.pixel_decoder(pyramid, (32**2, 64**2, 128**2, 256**2)).forward,
        "decoder": decoder.param_products + decoder.activation_products + whole_masks,
    }
    known = {
        "sam": 2986,
        "siglip": 666,
        "qwen3_4b": 6748,
        "qwen3_1b7": 2618,
        "phi3_mini": 6652,
        "pixel_decoder": 286,
        "decoder": 104,
    }
    assert {part: value / 1e9 for part, value in found.items()} == pytest.approx(known, rel=0.02)


def traced(make, call, *shapes) -> float:
    """FLOPs of the products in `call(module, *arrays)`, of which only the shapes exist; as plain JAX, whose products show."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with without_kernels():
        return products(jax.make_jaxpr(lambda state, *xs: call(nnx.merge(graphdef, state), *xs))(state, *arrays).jaxpr)


def test_the_encoders_multiply_what_is_counted():
    cfg = FULL.siglip
    found = traced(lambda r: SiglipVisionEncoder(cfg, rngs=r), lambda m, x: m(x, layers=26), (1, 384, 384, 3))
    assert found == pytest.approx(flops.siglip(cfg, 26).forward, rel=1e-6)

    cfg = FULL.sam
    found = traced(lambda r: SamImageEncoder(cfg, rngs=r), lambda m, x: m(x, (12, 18, 24, 23)), (1, 1024, 1024, 3))
    # The program has the position of a key in its scores as 2 * size more columns, which the mathematics does not ask for; in
    # the global layers not on a CPU, which is one of two branches, and with columns of zeros up to 256.
    folded = 2 * cfg.num_attention_heads * (20 * 70**2 * 14**2 * 28 + 4 * 64**2 * 64**2 * (256 - 64) / 2)
    assert found == pytest.approx(flops.sam(cfg, 24).forward + folded, rel=2e-3)


def test_the_language_model_multiplies_what_is_counted():
    cfg, tokens = LanguageConfig.qwen3_4b(), 1920
    ids = np.zeros((1, tokens), np.int32)
    found = traced(lambda r: LanguageModel(cfg, rngs=r), lambda m, x: m(x, ids, ids), (1, tokens, cfg.hidden_size))
    work = flops.language(cfg, tokens)
    masked_away = (
        work.activation_products * (tokens - 1) / (tokens + 1)
    )  # the program multiplies all pairs and masks those that come later
    assert found == pytest.approx(work.forward + masked_away, rel=1e-6)
    window = dataclasses.replace(cfg, sliding_window=100)
    seen = sum(min(i + 1, 100) for i in range(tokens))
    assert flops.language(window, tokens).activation_products == pytest.approx(
        work.activation_products * seen / (tokens * (tokens + 1) / 2)
    )


def test_connector_and_pixel_decoder_multiply_what_is_counted():
    found = traced(lambda r: SegConnector(FULL.connector, rngs=r), lambda m, *x: m(x), *[(1, 64, 64, 1024)] * 3)
    assert found == pytest.approx(flops.connector(FULL.connector, 64).forward, rel=1e-6)

    cfg, levels = FULL.pixel_decoder, flops.levels(FULL)
    assert levels == (32**2, 64**2, 128**2)
    shapes = [(1, side, side, c) for side, c in zip((32, 64, 128), cfg.channels, strict=True)]
    found = traced(lambda r: PixelDecoder(cfg, rngs=r), lambda m, *x: m(x), *shapes)
    assert found == pytest.approx(flops.pixel_decoder(cfg, levels).forward, rel=0.02)  # sampling is left out


@pytest.mark.parametrize("mode", ["off", "sr", "cr", "sr_cr"])
def test_the_mask_decoder_multiplies_what_is_counted(mode):
    cfg, passes, rows = FULL.mask_decoder, 5, 17
    flow = dataclasses.replace(FULL.semantic_flow, mode=mode)
    yes = np.ones((passes, rows), bool)

    def call(decoder, features, low, middle, high, embeds):
        levels = decoder.prepare_levels(features, (low, middle, high))
        return decoder(levels, passes, Conditions(embeds, yes, yes))

    shapes = [(1, side, side, 256) for side in (128, 32, 64, 128)]
    found = traced(lambda r: MaskDecoder(cfg, flow, rngs=r), call, *shapes, (passes, rows, 256))
    assert found == pytest.approx(flops.mask_decoder(cfg, mode, flops.levels(FULL), passes, rows).forward, rel=0.02)


described = functools.cache(lambda cfg: flatten_params(flowseg.params_dict(flowseg.abstract_model(cfg)[1])))


def parameters(cfg: FlowSegConfig, frozen: tuple[str, ...]):
    """Abstract (trainable, frozen) with the paths that start with one of `frozen` in the latter."""
    flat = described(cfg)
    rests = {path: x for path, x in flat.items() if path.startswith(frozen)}
    return unflatten_params({path: x for path, x in flat.items() if path not in rests}), unflatten_params(rests)


def cost(cfg: FlowSegConfig, *frozen: str) -> dict[str, float]:
    """Training FLOPs by part over those of the forward pass."""
    shape = dataclasses.replace(SHAPE, text_length=cfg.num_visual_tokens + 40, batch=4)
    works = flops.forward(cfg, shape, LossConfig())
    found = flops.step_flops(cfg, shape, LossConfig(), *parameters(cfg, frozen))
    assert found.keys() == works.keys()
    return {part: found[part] / (4 * (works[part].forward - works[part].no_grad_products) or 1) for part in works}


def test_training_costs_three_forward_passes_where_everything_learns():
    ratios = cost(small.config())
    ratios.pop("masks")
    decisions = ratios.pop("mask_decoder")
    assert ratios == pytest.approx(dict.fromkeys(ratios, 3.0))
    assert decisions > 3  # attention masks are computed once more


def test_a_frozen_part_costs_what_its_gradients_take():
    cfg = small.config()
    work = flops.language(cfg.llm, cfg.num_visual_tokens + 40)
    attention_share = work.activation_products / work.forward
    ratios = cost(cfg, "llm/")  # after projectors that learn: gradients pass through it
    assert ratios["llm"] == pytest.approx(2 + attention_share)
    assert ratios["head"] == pytest.approx(2)  # tied to the frozen table
    assert ratios["sam"] == ratios["visual_projector"] == pytest.approx(3)

    ratios = cost(cfg, "sam", "siglip")
    assert ratios["sam"] == ratios["siglip"] == pytest.approx(1)  # nothing before them asks for a gradient
    assert ratios["seg_projector"] == pytest.approx(3)
    assert ratios["llm"] == pytest.approx(3)

    ratios = cost(cfg, "sam", "siglip", "visual_projector", "seg_projector", "llm/")
    assert ratios["llm"] == pytest.approx(1)
    assert ratios["llm_projector"] == pytest.approx(3)


def test_a_table_that_learns_sends_gradients_through_a_frozen_language_model():
    untied = dataclasses.replace(small.config(), llm=dataclasses.replace(small.config().llm, tie_word_embeddings=False))
    rest = ("sam", "siglip", "visual_projector", "seg_projector", "llm/layers", "llm/norm", "llm/lm_head")
    assert cost(untied, *rest)["llm"] > 2
    assert cost(untied, *rest, "llm/embed_tokens")["llm"] == pytest.approx(1)


def test_what_a_batch_asks_for_is_counted():
    cfg = dataclasses.replace(FULL, num_classes=10, generic_pass="with_flow", negatives_group_size=2)
    base = flops.forward(cfg, SHAPE, LossConfig())
    more_text = flops.forward(cfg, dataclasses.replace(SHAPE, text_length=SHAPE.text_length + 167), LossConfig())
    assert base["head"].forward * 2 == pytest.approx(more_text["head"].forward)  # 167 tokens after the visual ones
    assert base["llm"].forward < more_text["llm"].forward
    assert flops.forward(cfg, SHAPE, LossConfig(language_weight=0.0))["head"] == FlopCount()
    more_phrases = flops.forward(cfg, dataclasses.replace(SHAPE, max_phrases=10), LossConfig())  # 6 passes become 12
    assert more_phrases["mask_decoder"].no_grad_products == pytest.approx(2 * base["mask_decoder"].no_grad_products)
    assert more_phrases["sam"] == base["sam"]
    half = flops.forward(cfg, SHAPE, LossConfig(num_points=6272))
    assert half["masks"].no_grad_products * 2 == pytest.approx(base["masks"].no_grad_products)

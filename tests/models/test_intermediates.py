"""What the mask decoder gives on request: asking changes nothing, and what comes is what the layers compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowseg_jax.models.boundary import BoundaryConfig, BoundaryRefinement
from flowseg_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig
from flowseg_jax.models.semantic_flow import Conditions, SemanticFlowConfig

WIDTH, IMAGES, PASSES, ROWS = 12, 2, 3, 4
CFG = MaskDecoderConfig(embed_dim=WIDTH, num_queries=5, num_layers=4, num_heads=3, mlp_dim=20, query_init_std=1.0, remat="none")
FLOWS = pytest.mark.parametrize(
    "flow", [("sr_cr", "post"), ("sr", "residual"), ("cr", "post"), ("off", "post")], ids=lambda flow: "-".join(flow)
)


def decoder_and_arguments(flow, rng):
    decoder = MaskDecoder(CFG, SemanticFlowConfig(*flow), rngs=nnx.Rngs(0))
    for _, node in nnx.iter_graph(decoder):
        if isinstance(node, nnx.Variable):
            node[...] = node[...] + jnp.asarray(0.3 * rng.normal(size=node.shape), jnp.float32)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    features, levels = draw(IMAGES, 8, 10, WIDTH), tuple(draw(IMAGES, y, y + 1, WIDTH) for y in (2, 4, 8))
    passes = IMAGES * PASSES
    own, valid = rng.random((2, passes, ROWS)) < 0.6
    own[:, 0], own[0] = True, False  # the first pass is language-free
    conditions = Conditions(draw(passes, ROWS, WIDTH), jnp.asarray(own), jnp.asarray(valid | own))
    return decoder, (decoder.prepare_levels(features, levels), PASSES, conditions, draw(passes, WIDTH))


@FLOWS
def test_asking_for_intermediates_changes_nothing(flow, rng):
    decoder, arguments = decoder_and_arguments(flow, rng)
    conditions, passes = arguments[2], IMAGES * PASSES
    expected = decoder(*arguments)
    out: dict = {}
    found = decoder(*arguments, out)
    for name in ("queries", "mask_embeds", "class_logits"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert out["conditions"].shape == (CFG.num_layers + 1, passes, ROWS, WIDTH)
    np.testing.assert_array_equal(out["conditions"][0], conditions.embeds)
    moved = np.abs(np.diff(out["conditions"], axis=0)).max((0, 2, 3)) > 1e-3
    assert moved[1:].all() == moved[1:].any() == (flow[0] in ("cr", "sr_cr"))
    assert ("gate" in out) == (flow[0] in ("sr", "sr_cr"))
    if "gate" in out:
        gate = np.asarray(out["gate"])
        assert gate.shape == (CFG.num_layers, passes, CFG.num_queries, WIDTH)
        assert ((gate > 0) & (gate < 1)).all() and gate.std() > 1e-3


@FLOWS
def test_intermediates_are_what_each_layer_computes(flow, rng):
    """Every layer run by itself, from what came out of the one before."""
    decoder, arguments = decoder_and_arguments(flow, rng)
    levels, conditions, out = arguments[0], arguments[2], {}
    found = decoder(*arguments, out)
    graphdef, stacked = nnx.split(decoder.layers)
    x, position = out["query_init"], out["query_pos"]
    for i in range(CFG.num_layers):
        layer = nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], nnx.to_pure_dict(stacked)))
        level, embeds = levels[i % CFG.num_levels], out["conditions"][i]
        positions = len(level.positions)
        allowed = out["attention_mask"][i]
        np.testing.assert_array_equal(allowed[..., :positions], decoder.attention_mask(found.mask_embeds[i], level))
        assert not np.asarray(allowed[..., positions:]).any()
        memory = level.values.reshape(IMAGES, positions, WIDTH)
        q_vis = layer.cross_attention_block(x, position, memory, level.positions, allowed[..., :positions])
        kept: dict = {}
        mixed = layer.refine_and_self_attend(q_vis, position, embeds, conditions, kept)
        x, embeds = layer.feed_forward_and_refine_conditions(mixed, embeds, conditions)
        want = {"after_cross_attn": q_vis, "after_self_attn": mixed, "after_mlp": x, **kept}
        for name, value in want.items():
            np.testing.assert_allclose(out[name][i], value, rtol=1e-4, atol=1e-5, err_msg=f"layer {i}: {name}")
        np.testing.assert_allclose(out["conditions"][i + 1], embeds, rtol=1e-4, atol=1e-5)


def test_the_gate_is_the_one_that_mixes(rng):
    """Where the gate is at vision, SR changes nothing; where it is at language, Q_vis has no part but through the attention."""
    decoder = MaskDecoder(CFG, SemanticFlowConfig(), rngs=nnx.Rngs(0))
    semantic = jax.tree.map(lambda w: w[2], nnx.to_pure_dict(nnx.split(decoder.layers.semantic_refinement)[1]))
    semantic = nnx.merge(nnx.split(decoder.layers.semantic_refinement)[0], semantic)
    q_vis, embeds = (jnp.asarray(rng.normal(size=(2, n, WIDTH)), jnp.float32) for n in (5, ROWS))
    position, yes = jnp.asarray(rng.normal(size=(5, WIDTH)), jnp.float32), jnp.ones((2, ROWS), bool)
    values = {}
    for name, bias in (("vision", 1e9), ("language", -1e9), ("even", 0.0)):
        semantic.gate.bias[...] = jnp.full(WIDTH, bias)
        out: dict = {}
        values[name] = np.asarray(semantic(q_vis, position, embeds, yes, out))
        assert np.unique(out["gate"]).tolist() == [{"vision": 1, "language": 0, "even": 0.5}[name]]
    np.testing.assert_allclose(values["vision"], q_vis, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["even"], (values["vision"] + values["language"]) / 2, rtol=1e-5, atol=1e-6)


def test_the_band_is_where_masks_change(rng):
    """The band is 1 in a strip along the outline, and only there BAR changes a logit."""
    bar = BoundaryRefinement(6, BoundaryConfig(), rngs=nnx.Rngs(0))
    bar.alpha[...] = jnp.full(1, 3.0)
    masks = jnp.where(jnp.arange(16) < 7, 9.0, -9.0) * jnp.ones((1, 2, 12, 16))
    features = jnp.asarray(rng.normal(size=(1, 12, 16, 6)), jnp.float32)
    band = np.asarray(bar.band(masks))
    assert band[0, 0].any(0).nonzero()[0].tolist() == [6, 7] and band[..., 6:8].all()
    changed = np.asarray(bar(masks, features) != masks)
    assert changed.any() and not (changed & ~(band > 0)).any()

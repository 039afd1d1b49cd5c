"""Models of fewer components: stage 1 without language, stage 2 without masks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig, denominators, loss_terms, normalize_terms
from flowseg_jax.models import flowseg
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from tests.helpers import small

LOSSES = LossConfig(num_points=24, logits_chunk_size=16)
LANGUAGE = {"llm", "siglip", "visual_projector", "seg_projector"}
MASKS = {"connector", "pixel_decoder", "mask_decoder", "boundary", "category_head"}


@pytest.fixture(scope="module")
def whole():
    """A model that has everything, but neither semantic flow nor an open-vocabulary pass, and what it makes of a batch."""
    cfg = dataclasses.replace(small.config(), semantic_flow=SemanticFlowConfig(mode="off"), generic_pass="off")
    params = small.params(cfg)
    return cfg, params, small.batch(cfg), losses_of(cfg, params, small.batch(cfg))


def losses_of(cfg, params, batch):
    graphdef, _ = flowseg.abstract_model(cfg)

    @jax.jit
    def forward(params, batch):
        net = flowseg.bind_params(graphdef, params)
        keys = jax.vmap(jax.random.key)(jnp.arange(len(batch.input_ids), dtype=jnp.uint32))
        terms, watched = loss_terms(net, batch, net(batch), keys, LOSSES)
        return normalize_terms(terms), normalize_terms(watched), {name: count for name, (_, count) in terms.items()}

    return forward(params, batch)


def params_of(params, cfg):
    """Those of the parameters that a model of fewer components has."""
    mine = flatten_params(flowseg.params_dict(flowseg.abstract_model(cfg)[1]))
    return unflatten_params({path: leaf for path, leaf in flatten_params(params).items() if path in mine}), {
        p.split("/")[0] for p in mine
    }


@pytest.mark.parametrize("components", ["segmentor", "vlm"])
def test_a_component_computes_what_it_computes_in_the_whole(whole, components):
    cfg, params, batch, (losses, *_) = whole
    part = dataclasses.replace(cfg, components=components)
    kept, names = params_of(params, part)
    assert names == {"sam"} | (LANGUAGE if components == "vlm" else MASKS)
    if components == "segmentor":  # no text is read
        batch = dataclasses.replace(batch, input_ids=batch.input_ids[:, :4], **without_text(batch, 4))
    found, seen, counts = losses_of(part, kept, batch)
    wanted = {"language"} if components == "vlm" else {f"closed_vocab_{kind}" for kind in ("class", "mask", "dice")}
    assert set(found) == wanted and set(seen) == ({"closed_vocab"} if components == "segmentor" else set())
    for name in wanted:
        np.testing.assert_allclose(found[name], losses[name], rtol=2e-6, err_msg=name)
    # The denominators that the step divides by are known beforehand, from the batch alone.
    before = denominators(part, batch, LOSSES)
    assert set(before) == wanted
    for name, count in counts.items():
        np.testing.assert_allclose(before[name], count, rtol=1e-6, err_msg=name)


def without_text(batch, length):
    names = ("position_ids", "segment_ids", "labels", "phrase_ids", "seg_ids")
    return {name: np.full_like(getattr(batch, name)[:, :length], -1) for name in names}


def test_what_does_not_fit_together_is_refused():
    cfg = small.config()
    with pytest.raises(ValueError, match="components is 'half': choose full, segmentor or vlm"):
        dataclasses.replace(cfg, components="half")
    with pytest.raises(ValueError, match="needs num_classes for its linear head, generic_pass off and semantic_flow.mode off"):
        dataclasses.replace(cfg, components="segmentor")
    with pytest.raises(
        UserError, match=r"m: holds only the components 'vlm' of a model.*\(init_from\); it answers no expressions"
    ):
        dataclasses.replace(cfg, components="vlm").require_full_model("m")
    cfg.require_full_model("m")


def test_a_segmentor_has_no_visual_tokens(whole):
    cfg, *_ = whole
    assert dataclasses.replace(cfg, components="segmentor").num_visual_tokens == 0
    assert dataclasses.replace(cfg, components="vlm").num_visual_tokens == cfg.num_visual_tokens > 0

"""The whole model: padding, switches, warm start, parameter budget."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig, loss_terms, normalize_terms
from flowseg_jax.models import flowseg
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.conditions import referring_conditions
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.types import ExpressionQueries, ImageInputs
from tests.helpers import small

LOSSES = LossConfig(num_points=24, logits_chunk_size=16)
OFF = SemanticFlowConfig(mode="off")


@pytest.fixture(scope="module")
def model():
    cfg = small.config()
    graphdef, _ = flowseg.abstract_model(cfg)
    params = jax.tree.map(jnp.asarray, small.params(cfg, 1))
    return cfg, graphdef, params


@pytest.fixture(scope="module")
def run(model):
    """(values of all loss terms, referring class logits, segmentation) of a batch."""
    _, graphdef, params = model

    @jax.jit
    def forward(batch):
        net = flowseg.bind_params(graphdef, params)
        out = net(batch)
        keys = jax.vmap(jax.random.key)(jnp.arange(batch.input_ids.shape[0], dtype=jnp.uint32))
        terms, _ = loss_terms(net, batch, out, keys, LOSSES)
        return normalize_terms(terms), out, net.predict(batch)

    return forward


@pytest.fixture(scope="module")
def batch(model):
    """One shape for all tests: each would compile the whole model."""
    return small.batch(model[0], phrases=3)


def close(a, b, tolerance=2e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tolerance * max(np.abs(a).max(), 1e-6)


def test_padding_changes_nothing(model, run, batch):
    """More text, phrases, masks and images than there are: every real example keeps its numbers."""
    cfg, *_ = model
    k, images = batch.phrase_target.shape[1], len(batch.input_ids)
    none = small.batch(cfg, phrases=3, seed=9)
    empty = {
        name: np.full_like(getattr(none, name), fill)
        for name, fill in (
            ("segment_ids", -1),
            ("labels", -100),
            ("phrase_target", -1),
            ("object_category", -1),
            ("object_name", -1),
            ("name_valid", 0),
        )
    }
    none = dataclasses.replace(none, **empty)
    more = small.pad(jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, none), text=5, phrases=2, masks=2, names=3)
    terms, out, found = run(batch)
    terms2, out2, found2 = run(more)
    close(found.scores, found2.scores[:images, :k])
    close(found.mask_logits, found2.mask_logits[:images, :k])
    # The mask terms draw their points per padded mask slot; the class terms and the language term must be the same numbers.
    for name in ("language", "referring_class", "generic_class", "closed_vocab_class"):
        close(terms[name], terms2[name])
    split = lambda x, n: np.asarray(x).reshape(x.shape[0], n, -1, *x.shape[2:])  # noqa: E731
    queries, queries2 = split(out.decoder_output.queries, images), split(out2.decoder_output.queries, 2 * images)[:, :images]
    close(queries[:, :, :k], queries2[:, :, :k])
    close(queries[:, :, k:], queries2[:, :, k + 2 :])


def queries_of(batch, prefix, phrases, text=0):
    """The queries of `batch` after its prefix of so many tokens: phrases of `phrases`, and padding up to K of the batch."""
    k = batch.phrase_target.shape[1]
    take = lambda x: x[:, prefix:]  # noqa: E731
    kept = np.isin(take(batch.segment_ids), [p + 1 for p in phrases])
    fields = {
        name: np.pad(np.where(kept, take(getattr(batch, name)), fill), ((0, 0), (0, text)), constant_values=fill)
        for name, fill in (("input_ids", 7), ("position_ids", 3), ("segment_ids", -1), ("phrase_ids", -1), ("seg_ids", -1))
    }
    return ExpressionQueries(**fields, query_valid=np.broadcast_to(np.isin(np.arange(k), phrases), (len(batch.input_ids), k)))


def test_predictions_from_an_image_cache_are_those_of_one_pass(monkeypatch, model, run, batch):
    """One pass over everything, and a cached image with all phrases at once or with some of them: the same numbers.

    The cached prefix is padded to whole blocks, as long ones are.
    """
    cfg, graphdef, params = model
    prefix = 1 + cfg.num_visual_tokens
    monkeypatch.setattr(flowseg, "BLOCK", prefix - 3)
    monkeypatch.setattr(flowseg, "MIN_BLOCKS", 1)
    batch = dataclasses.replace(
        batch, input_ids=np.concatenate([batch.input_ids[:1, :1].repeat(2, 0), batch.input_ids[:, 1:]], 1)
    )
    whole = run(batch)[2]
    net = flowseg.bind_params(graphdef, params)
    cache = jax.jit(net.prefill_image)(
        ImageInputs(batch.sam_images, batch.resized_hw, batch.siglip_images), batch.input_ids[0, :prefix]
    )
    assert cache.kv_cache.segment_ids.tolist() == [[0] * prefix + [-1] * (prefix - 6)] * len(batch.input_ids)
    predict = jax.jit(net.predict_cached)
    for phrases, text in (((0, 1, 2), 0), ((1,), 0), ((0, 2), 9)):
        found = predict(cache, queries_of(batch, prefix, phrases, text))
        close(found.scores[:, phrases], whole.scores[:, phrases])
        close(found.mask_logits[:, phrases], whole.mask_logits[:, phrases], 5e-6)
        at = np.asarray(phrases)
        np.testing.assert_array_equal(found.scores[:, at].argmax(-1), whole.scores[:, at].argmax(-1))
    assert np.abs(np.asarray(found.scores - whole.scores)[:, 1]).max() > 1e-4  # a phrase that is not queried has no answer


def test_phrases_of_an_image_do_not_see_each_other(run, batch):
    found = run(batch)[2]
    tokens = np.where((batch.segment_ids == 1) & (batch.phrase_ids == 0), 5, batch.input_ids)
    other = run(dataclasses.replace(batch, input_ids=tokens))[2]
    assert np.abs(np.asarray(found.scores - other.scores)[:, 0]).max() > 1e-4
    close(found.scores[:, 1], other.scores[:, 1])


def test_mode_off_has_no_parameters_of_the_semantic_flow():
    names = lambda cfg: set(flatten_params(flowseg.params_dict(flowseg.abstract_model(cfg)[1])))  # noqa: E731
    on, off = names(small.config()), names(small.config(semantic_flow=OFF, boundary=BoundaryConfig(enabled=False)))
    extra = {name.split("/")[1] if name.startswith("boundary") else name.split("/")[2] for name in on - off}
    assert extra == {"semantic_refinement", "condition_refinement", "feature_proj", "refine_conv", "alpha"}
    assert not off - on
    sr = names(small.config(semantic_flow=SemanticFlowConfig(mode="sr")))
    assert {n.split("/")[2] for n in on - sr} == {"condition_refinement"}
    cr = names(small.config(semantic_flow=SemanticFlowConfig(mode="cr")))
    assert {n.split("/")[2] for n in on - cr} == {"semantic_refinement"} and not cr - on


@pytest.fixture(scope="module")
def fresh():
    """A config, and what training with it starts from."""
    flow = small.config(semantic_flow=SemanticFlowConfig(norm="residual"))
    return flow, *flowseg.init_model(flow, 3)


def test_every_parameter_starts_as_it_always_did(fresh):
    """Mean and deviation of each, as recorded: Xavier's bounds, normal deviations, zeros, ones and grids of offsets."""
    recorded = json.loads((Path(__file__).parent.parent / "golden" / "initial_values.json").read_text())
    found = flatten_params(fresh[2])
    assert found.keys() == recorded.keys()
    for name, (mean, deviation) in recorded.items():
        x = np.asarray(found[name], np.float64)
        noise = 5 * deviation / x.size**0.5  # of a mean of other draws
        assert abs(x.mean() - mean) <= noise + 1e-6, name
        assert abs(x.std() - deviation) <= noise + 1e-6, name


def test_residual_with_zero_outputs_starts_as_plain_xsam(fresh):
    flow, graphdef, params = fresh
    plain = small.config(semantic_flow=OFF)
    plain_graphdef, described = flowseg.abstract_model(plain)
    kept = {
        name: value
        for name, value in flatten_params(params).items()
        if "/semantic_refinement/" not in name and "/condition_refinement/" not in name
    }
    assert kept.keys() == flatten_params(flowseg.params_dict(described)).keys()
    batch = small.batch(flow)
    forward = lambda graph: jax.jit(lambda p: flowseg.bind_params(graph, p)(batch).decoder_output)  # noqa: E731
    a, b = forward(graphdef)(params), forward(plain_graphdef)(unflatten_params(kept))
    close(b.class_logits, a.class_logits, 1e-6)
    close(b.mask_embeds, a.mask_embeds, 1e-6)


def test_the_semantic_flow_reads_its_own_phrase_only(run, batch):
    """SR attends to the pass's own rows: another image's phrase is a negative of the classification and nothing else."""
    a = run(batch)[1]
    tokens = batch.input_ids.copy()
    tokens[1] = np.where(batch.phrase_ids[1] == 0, 5, tokens[1])
    b = run(dataclasses.replace(batch, input_ids=tokens))[1]
    passes = a.conditions.attend_mask.shape[0] // 2
    close(a.decoder_output.queries[:, :passes], b.decoder_output.queries[:, :passes])
    assert np.abs(np.asarray(a.decoder_output.class_logits - b.decoder_output.class_logits)[:, 0]).max() > 1e-4


def test_same_target_is_no_negative():
    phrase_mask = jnp.array([[0, 0, 1], [0, 1, -1]])
    embeds = jnp.arange(2 * 3 * 4, dtype=jnp.float32).reshape(2, 3, 4)
    conditions = referring_conditions(embeds, jnp.ones((1, 4)), phrase_mask, 2, True)
    valid = np.asarray(conditions.valid_mask).astype(int).tolist()
    assert valid[0] == [1, 0, 1, 1, 1, 0, 1]  # phrase 1 names the same object; the last of the other image does not exist
    assert valid[2] == [1, 1, 1, 1, 1, 0, 1]
    assert valid[3] == [1, 1, 1, 1, 1, 0, 1]
    assert np.asarray(conditions.attend_mask).astype(int).tolist()[4] == [0, 0, 0, 0, 1, 0, 1]
    kept = referring_conditions(embeds, jnp.ones((1, 4)), phrase_mask, 2, False)
    assert np.asarray(kept.valid_mask).astype(int).tolist()[0] == [1, 1, 1, 1, 1, 0, 1]


def count(cfg: FlowSegConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in flatten_params(flowseg.params_dict(flowseg.abstract_model(cfg)[1])).values())


def test_the_papers_parameter_budget():
    """BSF + BAR add 5.93 M parameters to the full-size decoder, whatever the language model."""
    cfg = FlowSegConfig.full(LanguageConfig.qwen3_1b7())
    plain = dataclasses.replace(cfg, semantic_flow=OFF, boundary=BoundaryConfig(enabled=False))
    added = count(cfg) - count(plain)
    assert added == 9 * 658_176 + 4_267
    assert round(added / 1e6, 2) == 5.93


# Values in X-SAM's state dicts, and rows of the vocabulary that a tied head lists twice.
XSAM = [
    (LanguageConfig.qwen3_4b(), 5_204_961_025, 151_672 * 2560),
    (LanguageConfig.qwen3_1b7(), 2_818_008_321, 151_672 * 2048),
    (LanguageConfig.phi3_mini(), 4_624_248_065, 0),
]
SAM_NECK = 1024 * 256 + 512 + 256 * 256 * 9 + 512
PROMPT_EMBEDDING = 2 * 128
SIGLIP_HEAD = 1152 + 4 * (1152 * 1152 + 1152) + 2304 + 2 * 4304 * 1152 + 4304 + 1152
POST_LAYERNORM = 2304


@pytest.mark.parametrize(("llm", "listed", "twice"), XSAM, ids=["qwen3-4b", "qwen3-1.7b", "phi3-mini"])
def test_full_size_presets_count_what_xsam_counts(llm, listed, twice):
    """Without semantic flow and BAR, to the last parameter: X-SAM's totals less what it carries along and never uses."""
    cfg = FlowSegConfig.full(llm)
    plain = dataclasses.replace(cfg, semantic_flow=OFF, boundary=BoundaryConfig(enabled=False))
    assert count(plain) == listed - twice - SAM_NECK - PROMPT_EMBEDDING - SIGLIP_HEAD - POST_LAYERNORM


def test_config_survives_json_and_refuses_typos():
    cfg = FlowSegConfig.tiny()
    values = cfg.to_dict()
    assert FlowSegConfig.from_dict(values) == cfg
    with pytest.raises(UserError, match=r"model.mask_decoder.layer: unknown key \(did you mean 'num_layers'"):
        FlowSegConfig.from_dict(values | {"mask_decoder": values["mask_decoder"] | {"layer": 3}})
    with pytest.raises(UserError, match="generic_pass is 'yes'"):
        FlowSegConfig.from_dict(values | {"generic_pass": "yes"})
    with pytest.raises(UserError, match="levels"):
        FlowSegConfig.from_dict(values | {"mask_decoder": values["mask_decoder"] | {"num_levels": 4}})
    del values["sam"]
    with pytest.raises(UserError, match="missing sam"):
        FlowSegConfig.from_dict(values)


@pytest.mark.parametrize("size", [(5, 8), (8, 3), (1, 8)])
def test_padding_is_the_mean_colour_at_the_bottom_and_the_right_of_a_picture_that_is_not_square(size):
    """Height and width are not exchanged: two pictures of one batch, one the other turned."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    sizes = np.array([size, size[::-1]], np.int32)
    got = np.asarray(flowseg.normalize_sam_images(pixels, sizes))
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    for picture, (h, w), found in zip(pixels, sizes, got, strict=True):
        np.testing.assert_allclose(found[:h, :w], (picture[:h, :w] - mean) / deviation, atol=2e-5)
        assert not found[h:].any() and not found[:, w:].any() and found[:h, :w].any(axis=-1).mean() > 0.9

"""What learns how fast, and what the rest rests in."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.training.optimizer import (
    SCHEDULES,
    OptimizerConfig,
    cast_frozen,
    decay_by_layer,
    lr_multipliers,
    lr_schedule,
    make_optimizer,
    merge_trainable,
    split_trainable,
)
from tests.helpers import small


def test_optimizer_table_is_ordered_and_complete():
    rates = lr_multipliers(["sam/a", "llm/b"], (("sam/.*", None), (".*", 0.5)))
    assert rates == {"sam/a": None, "llm/b": 0.5}
    trainable, frozen = split_trainable({"sam": {"a": 1}, "llm": {"b": 2}}, rates)
    assert (trainable, frozen) == ({"llm": {"b": 2}}, {"sam": {"a": 1}})
    with pytest.raises(UserError, match="no regular expression"):
        lr_multipliers(["a"], (("(", 1.0),))


def test_learning_rate_warms_up_and_ends_at_zero():
    rate = lr_schedule(OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1), 100)
    assert float(rate(0)) == pytest.approx(1e-5, rel=1e-2)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-7)


def test_frozen_towers_rest_in_bfloat16_without_a_change_where_they_compute_in_it():
    cfg = small.config()
    params = {name: jnp.asarray(x) for name, x in flatten_params(small.params(cfg)).items()}
    rested = flatten_params(cast_frozen(unflatten_params(params), "bfloat16"))
    half = {name for name, x in rested.items() if x.dtype == jnp.bfloat16}
    assert {
        "llm/embed_tokens",
        "llm/layers/self_attn/q_proj/kernel",
        "sam/window_layers/mlp/lin1/kernel",
        "siglip/patch_embedding/kernel",
    } <= half
    # What is computed with in float32 stays: norms, biases, positions, and everything outside the components.
    assert not [
        name for name in half if not name.endswith(("kernel", "embed_tokens")) or name.startswith(("mask_decoder", "pixel"))
    ]
    graphdef, _ = flowseg.abstract_model(cfg)
    whole, resting = (flowseg.bind_params(graphdef, unflatten_params(x)) for x in (params, rested))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.bfloat16)
    assert np.array_equal(whole.siglip(images), resting.siglip(images))
    tokens = jnp.arange(6)[None]
    read = lambda model: model.llm(model.llm.embed(tokens, jnp.dtype("bfloat16")), tokens, jnp.zeros_like(tokens))  # noqa: E731
    assert np.array_equal(read(whole), read(resting))


def test_the_smallest_values_that_there_may_be():
    assert (
        OptimizerConfig(grad_accum_steps=1).grad_accum_steps,
        OptimizerConfig(max_skipped_updates=0).max_skipped_updates,
    ) == (1, 0)
    for wrong in ({"grad_accum_steps": 0}, {"max_skipped_updates": -1}):
        with pytest.raises(UserError, match="must be at least 1, max_skipped_updates=-?[0-9]+ at least 0"):
            OptimizerConfig(**wrong)
    with pytest.raises(UserError, match="frozen_dtype is 'float16': choose float32, bfloat16, int8"):
        OptimizerConfig(frozen_dtype="float16")
    assert OptimizerConfig(frozen_dtype="bfloat16") != OptimizerConfig()


def test_the_defaults_are_those_of_xsam():
    assert OptimizerConfig() == OptimizerConfig(
        4e-5,
        0.03,
        0.05,
        1.0,
        0.9,
        0.999,
        1e-8,
        ((".*", 1.0),),
        grad_accum_steps=1,
        max_skipped_updates=10,
        frozen_dtype="float32",
    )


def test_the_first_expression_that_matches_the_whole_path_counts():
    rates = lr_multipliers(["llm/a", "llm/ab", "x/llm/a"], (("llm/a", None), ("llm/.*", 0.0), (".*", 2.0)))
    assert rates == {"llm/a": None, "llm/ab": 0.0, "x/llm/a": 2.0}
    with pytest.raises(UserError, match=r"covers no group for b/x, c; end the table"):
        lr_multipliers(["a", "b/x", "c"], (("a|b", 1.0),))
    trainable, frozen = split_trainable({"a": 1, "b": 2}, {"a": 0.0, "b": None})  # a rate of 0 still has moments
    assert (trainable, frozen) == ({"a": 1}, {"b": 2})
    assert merge_trainable({"a": 1, "c": {"x": 3}}, {"c": {"y": 4}}) == {"a": 1, "c": {"x": 3, "y": 4}}


@pytest.mark.parametrize(("steps", "share", "peak"), [(3, 0.0, 1), (10, 0.04, 1), (100, 0.256, 26), (1, 1.0, 1), (4, 1.0, 4)])
def test_where_the_learning_rate_peaks(steps, share, peak):
    rate = lr_schedule(OptimizerConfig(learning_rate=2.0, warmup_fraction=share), steps)
    assert float(rate(0)) == pytest.approx(2e-5, rel=1e-2)
    assert float(rate(peak)) == pytest.approx(2.0)
    assert float(rate(peak + 1)) < 1.9999
    assert float(rate(max(steps, peak + 1))) == pytest.approx(0.0, abs=1e-6)


def test_three_updates_are_those_of_adamw_by_hand():
    """Clipping, moments, decay that Adam does not see, multipliers on both, the schedule; every number its own."""
    cfg = OptimizerConfig(
        learning_rate=0.3, warmup_fraction=0.4, weight_decay=0.07, max_grad_norm=2.0, b1=0.8, b2=0.6, eps=0.05
    )  # fmt: skip
    rates = {"a": 0.5, "b/x": 2.0, "b/frozen": None}
    optimizer, rate = make_optimizer(cfg, 5, rates), lr_schedule(cfg, 5)
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=3), "b": {"x": rng.normal(size=(2, 2))}}
    state = optimizer.init(jax.tree.map(jnp.asarray, params))
    own = {name: [np.array(x), 0.0, 0.0] for name, x in flatten_params(params).items()}
    theirs = jax.tree.map(jnp.asarray, params)
    for step, size in enumerate((0.1, 3.0, 5.0)):  # below the largest norm, and above it
        gradients = jax.tree.map(lambda x, size=size: (size * rng.normal(size=x.shape)).astype(np.float32), params)
        updates, state = optimizer.update(gradients, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        norm = np.sqrt(sum(np.square(g).sum() for g in flatten_params(gradients).values()))
        for name, gradient in flatten_params(gradients).items():
            x, first, second = own[name]
            gradient = gradient * min(1.0, 2.0 / norm)
            first, second = 0.8 * first + 0.2 * gradient, 0.6 * second + 0.4 * gradient**2
            adam = first / (1 - 0.8 ** (step + 1)) / (np.sqrt(second / (1 - 0.6 ** (step + 1))) + 0.05)
            own[name] = [x - float(rate(step)) * rates[name] * (adam + 0.07 * x), first, second]
    for name, x in flatten_params(theirs).items():
        np.testing.assert_allclose(x, own[name][0], rtol=1e-4, atol=1e-6, err_msg=name)


def updates_of(cfg, gradients, steps=1, rates=None):
    """The updates of the last of so many equal steps from zero, without schedule and clipping."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), gradients)
    optimizer = make_optimizer(cfg, 100, rates or dict.fromkeys(flatten_params(gradients), 1.0))
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradients, state, params)
    return updates, state


PLAIN = dict(learning_rate=1.0, warmup_fraction=0.01, weight_decay=0.0, max_grad_norm=1e9, schedule="constant")


def test_every_optimizer_goes_the_way_that_it_is_known_for():
    rng = np.random.default_rng(0)
    gradients = {"x": {"kernel": jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)}, "embed": jnp.asarray([[3.0, -2.0]])}
    lion, _ = updates_of(OptimizerConfig(name="lion", **PLAIN), gradients, 2)
    assert jax.tree.all(jax.tree.map(lambda u, g: np.array_equal(u, -jnp.sign(g)), lion, gradients))
    muon, _ = updates_of(OptimizerConfig(name="muon", **PLAIN), gradients, 2)
    for layer in muon["x"]["kernel"]:  # each layer of a stack is nearly orthogonal, and as large as an update of Adam
        values = np.linalg.svd(np.asarray(layer), compute_uv=False) / (0.2 * 8**0.5)
        assert 0.6 < values.min() and values.max() < 1.3
    adam, _ = updates_of(OptimizerConfig(**PLAIN), gradients, 2)
    np.testing.assert_allclose(muon["embed"], adam["embed"], rtol=1e-6)
    assert not np.allclose(muon["x"]["kernel"], adam["x"]["kernel"], rtol=0.1)
    large = {"x": {"kernel": jnp.asarray(rng.normal(size=(2, 130, 140)), jnp.float32)}}
    updates, state = updates_of(OptimizerConfig(name="adafactor", **PLAIN), large, 2)
    sizes = sorted(x.size for x in jax.tree.leaves(state))
    assert sizes[-2:] == [2 * 130, 2 * 140]  # rows and columns of each layer, and nothing of the size of the weight
    assert np.sqrt(np.square(updates["x"]["kernel"]).mean()) == pytest.approx(1, rel=0.05)


def test_schedules_by_name():
    rates = {
        name: lr_schedule(OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1, schedule=name), 100) for name in SCHEDULES
    }
    at = lambda name: [round(float(rates[name](step)), 4) for step in (0, 5, 10, 55, 80, 90, 100)]  # noqa: E731
    assert at("cosine")[2:] == [1.0, 0.5, 0.117, 0.0302, 0.0]
    assert at("linear") == [0.0, 0.5, 1.0, 0.5, 0.2222, 0.1111, 0.0]
    assert at("constant") == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert at("wsd") == [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    more = lr_schedule(OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1, schedule="wsd"), 150)
    assert [float(more(step)) for step in (30, 80, 120)] == [1.0, 1.0, 1.0]  # the constant part goes on as it was


def test_layers_learn_the_slower_the_deeper_they_lie():
    cfg = small.config()
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, num_hidden_layers=3))
    rates = {
        "llm/layers/mlp/up_proj/kernel": 0.5, "llm/embed_tokens": 1.0, "llm/norm/scale": 1.0, "sam/window_layers/x": 1.0,
        "sam/global_layers/x": 2.0, "siglip/patch_embedding/kernel": 1.0, "siglip/layers/x": None, "mask_decoder/layers/x": 1.0,
    }  # fmt: skip
    found = {
        name: rate if rate is None else np.asarray(rate).tolist() for name, rate in decay_by_layer(rates, cfg, 0.5).items()
    }
    assert found == rates | {
        "llm/layers/mlp/up_proj/kernel": [0.125, 0.25, 0.5], "llm/embed_tokens": 0.125, "sam/window_layers/x": [0.5],
        "sam/global_layers/x": [2.0], "siglip/patch_embedding/kernel": 0.25,
    }  # fmt: skip
    assert decay_by_layer(rates, cfg, 1.0) == rates
    gradients = {"llm": {"layers": {"x": jnp.ones((3, 2, 2))}}}
    one = updates_of(OptimizerConfig(name="lion", **PLAIN), gradients, 2, {"llm/layers/x": np.array([0.25, 0.5, 1.0])})[0]
    assert one["llm"]["layers"]["x"][:, 0, 0].tolist() == [-0.25, -0.5, -1.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "adam"}, r"optimizer\.name is 'adam': choose adamw, lion, adafactor, muon"),
        ({"schedule": "cos"}, r"optimizer\.schedule is 'cos': choose cosine, linear, wsd, constant"),
        ({"layer_decay": 1.1}, r"optimizer\.layer_decay is 1\.1: it must be above 0 and at most 1"),
        ({"decay_fraction": 0.0}, r"optimizer\.decay_fraction is 0\.0: it must be above 0 and at most 1"),
    ],
)
def test_names_and_shares_that_are_none_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**wrong)

"""What learns how fast, and what the rest rests in."""

from __future__ import annotations

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import small

from flowseg_jax.errors import UserError
from flowseg_jax.manifest import flatten, nest
from flowseg_jax.models import flowseg
from flowseg_jax.training.loop import moved_rate
from flowseg_jax.training.optimizer import OptimizerConfig, multipliers, rest, schedule, split


def test_optimizer_table_is_ordered_and_complete():
    rates = multipliers(["sam/a", "llm/b"], (("sam/.*", None), (".*", 0.5)))
    assert rates == {"sam/a": None, "llm/b": 0.5}
    trainable, frozen = split({"sam": {"a": 1}, "llm": {"b": 2}}, rates)
    assert (trainable, frozen) == ({"llm": {"b": 2}}, {"sam": {"a": 1}})
    with pytest.raises(UserError, match="no regular expression"):
        multipliers(["a"], (("(", 1.0),))


def test_learning_rate_warms_up_and_ends_at_zero():
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup=0.1), 100)
    assert float(rate(0)) == pytest.approx(1e-5, rel=1e-2)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-7)


def test_another_number_of_steps_says_what_it_does_to_the_learning_rate():
    """Held against the cosine's own formula: a run of 100 steps without much of a warm-up, extended to 200 behind its end."""
    optimizer = OptimizerConfig(learning_rate=1.0, warmup=0.0)
    line = moved_rate(optimizer, 100, 200, 100)
    new, old = map(float, re.search(r"learning rate of step 101 is (\S+), it would have been (\S+)$", line).groups())
    assert line.startswith("steps is 200 and was 100: the schedule is that of 200 steps from here on")
    assert (new, old) == (pytest.approx(0.5 * (1 + math.cos(math.pi * 99 / 199)), rel=1e-2), pytest.approx(0, abs=1e-6))
    assert moved_rate(optimizer, 100, 100, 50) == ""  # the same number
    assert moved_rate(optimizer, 200, 100, 100) == ""  # nothing is left to train
    assert moved_rate(optimizer, "x", 100, 50) == ""


def test_frozen_towers_rest_in_bfloat16_without_a_change_where_they_compute_in_it():
    cfg = small.config()
    params = {name: jnp.asarray(x) for name, x in flatten(small.params(cfg)).items()}
    rested = flatten(rest(nest(params), "bfloat16"))
    half = {name for name, x in rested.items() if x.dtype == jnp.bfloat16}
    assert {"llm/table", "llm/layers/q/kernel", "sam/window_layers/up/kernel", "siglip/patch/kernel"} <= half
    # What is computed with in float32 stays: norms, biases, positions, and everything outside the towers.
    assert not [name for name in half if not name.endswith(("kernel", "table")) or name.startswith(("decoder", "pixel"))]
    graphdef, _ = flowseg.describe(cfg)
    whole, resting = (flowseg.bind(graphdef, nest(x)) for x in (params, rested))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.bfloat16)
    assert np.array_equal(whole.siglip(images), resting.siglip(images))
    tokens = jnp.arange(6)[None]
    read = lambda model: model.llm(model.llm.embed(tokens, jnp.dtype("bfloat16")), tokens, jnp.zeros_like(tokens))  # noqa: E731
    assert np.array_equal(read(whole), read(resting))

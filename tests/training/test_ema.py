from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax.errors import UserError
from flowseg_jax.training.ema import EmaConfig, update


def test_the_average_warms_up_to_its_decay():
    params, average = {"a": jnp.ones(2)}, {"a": jnp.zeros(2)}
    for step, stays in ((0, 0.1), (8, 0.5), (1000, 0.9)):
        assert update(EmaConfig(0.9), average, params, jnp.int32(step))["a"].tolist() == pytest.approx([1 - stays] * 2)
    assert update(EmaConfig(0.75, warmup=False), average, params, jnp.int32(0))["a"].tolist() == [0.25, 0.25]
    assert np.array_equal(update(EmaConfig(0.9), params, params, jnp.int32(3))["a"], params["a"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(UserError, match=rf"ema\.decay is {decay}: it must be at least 0 \(no average\) and below 1"):
        EmaConfig(decay)

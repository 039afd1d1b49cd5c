"""BAR: identity at the start, a band and nothing else afterwards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowseg_jax.models.boundary import BoundaryConfig, BoundaryRefinement


def make(**changes) -> BoundaryRefinement:
    return BoundaryRefinement(6, BoundaryConfig(hidden_channels=3, **changes), rngs=nnx.Rngs(0))


def inputs(rng):
    masks = np.full((2, 3, 12, 12), -8.0, np.float32)
    masks[:, :, 3:9, 2:8] = 8.0
    return jnp.asarray(masks), jnp.asarray(rng.normal(size=(2, 12, 12, 6)), jnp.float32)


@pytest.mark.parametrize("identity", ["alpha", "conv"])
def test_starts_as_the_identity_with_a_gradient(rng, identity):
    module = make(identity_init=identity)
    masks, features = inputs(rng)
    np.testing.assert_array_equal(np.asarray(module(masks, features)), np.asarray(masks))
    graphdef, state = nnx.split(module)
    gradient = nnx.to_pure_dict(jax.grad(lambda s: nnx.merge(graphdef, s)(masks, features)[:, :, 2:4].sum())(state))
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3


def test_outside_the_band_nothing_changes_inside_it_does(rng):
    module = make(identity_init="conv")
    module.refine_conv.kernel[...] = jnp.asarray(rng.normal(size=module.refine_conv.kernel.shape), jnp.float32)
    masks, features = inputs(rng)
    refined = np.asarray(module(masks, features))
    band = np.zeros((12, 12), bool)
    band[2:10, 1:9] = True
    band[4:8, 3:7] = False
    changed = refined != np.asarray(masks)
    assert not changed[:, :, ~band].any()  # bit for bit
    assert changed[:, :, band].mean() > 0.95
    assert np.abs(refined - np.asarray(masks)).max() <= 1.0 + 1e-6  # alpha * tanh


def test_equals_the_plain_formula(rng):
    """One convolution of [mask || compressed features], as the paper writes it, for every mask on its own."""
    module = make(identity_init="conv")
    module.refine_conv.kernel[...] = jnp.asarray(rng.normal(size=module.refine_conv.kernel.shape), jnp.float32)
    module.refine_conv.bias[...] = jnp.asarray([0.3], jnp.float32)
    module.alpha[...] = jnp.asarray([0.7], jnp.float32)
    masks = jnp.asarray(rng.normal(size=(2, 3, 12, 12)), jnp.float32)
    features = inputs(rng)[1]
    compressed = module.feature_proj(features)
    refined = np.asarray(module(masks, features))
    for b in range(2):
        for n in range(3):
            joined = jnp.concatenate([masks[b, n][..., None], compressed[b]], -1)[None]
            delta = 0.7 * jnp.tanh(module.refine_conv(joined)[0, ..., 0])
            changed = refined[b, n] != np.asarray(masks)[b, n]
            np.testing.assert_allclose(refined[b, n][changed], np.asarray(masks[b, n] + delta)[changed], atol=1e-5)


def test_the_band_has_no_gradient(rng):
    """B is a decision: only M_raw itself and the correction carry gradients."""
    module = make()
    masks, features = inputs(rng)
    gradient = jax.grad(lambda m: module(m, features).sum())(masks)
    np.testing.assert_array_equal(np.asarray(gradient), 1.0)


@pytest.mark.parametrize(("change", "message"), [({"kernel_size": 4}, "odd"), ({"identity_init": "both"}, "alpha or conv")])
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BoundaryConfig(**change)

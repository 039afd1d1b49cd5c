from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import SiglipVisionConfig, SiglipVisionModel

from flowseg_jax.errors import UserError
from flowseg_jax.models.siglip import SiglipConfig, SiglipVisionEncoder
from tests.helpers import hf_convert

# No two sizes agree, and 45 pixels hold 6 patches of 7 with a remainder.
HF = dict(hidden_size=24, intermediate_size=52, num_hidden_layers=3, num_attention_heads=3, image_size=45, patch_size=7)


@pytest.fixture(scope="module")
def reference():
    return hf_convert.randomise(SiglipVisionModel(SiglipVisionConfig(**HF, attn_implementation="eager")), seed=1)


@pytest.fixture(scope="module")
def cfg(reference):
    return SiglipConfig.from_hf(reference.config.to_dict())


@pytest.fixture(scope="module")
def params(reference, cfg):
    return hf_convert.siglip(hf_convert.weights(reference), cfg.num_hidden_layers)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, 45, 45, 3)).astype(np.float32)


def run_reference(reference, images):
    pixels = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
    return pixels, reference(pixels, output_hidden_states=True).hidden_states


def test_hidden_states_equal_hugging_face(reference, cfg, params, images):
    model = hf_convert.build(lambda: SiglipVisionEncoder(cfg, rngs=nnx.Rngs(0)), params)
    _, hidden = run_reference(reference, images)
    assert len(hidden) == cfg.num_hidden_layers + 1
    actual = jax.jit(lambda x: [model(x, layers=i) for i in (*range(cfg.num_hidden_layers + 1), None)])(images)
    for i, (a, e) in enumerate(zip(actual, (*hidden, hidden[-1]), strict=True)):
        assert hf_convert.error(a, e.detach().numpy()) < 1e-5, f"layer {i}"


@pytest.mark.parametrize("remat", ["none", "full", "attention", "dots"])
def test_gradients_equal_hugging_face(reference, cfg, params, images, remat):
    pixels, hidden = run_reference(reference, images)
    probe = np.random.default_rng(1).normal(size=hidden[-2].shape).astype(np.float32)
    reference.zero_grad()
    (hidden[-2] * torch.tensor(probe)).sum().backward()
    make = lambda: SiglipVisionEncoder(dataclasses.replace(cfg, remat=remat), rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, _ = nnx.split(nnx.eval_shape(make))
    loss = lambda p, x: (nnx.merge(graphdef, p)(x, layers=cfg.num_hidden_layers - 1) * probe).sum()  # noqa: E731
    by_params, by_images = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(images))
    assert hf_convert.error(by_images, pixels.grad.permute(0, 2, 3, 1).numpy()) < 1e-4
    worst = hf_convert.tree_error(by_params, hf_convert.siglip(hf_convert.gradients(reference), cfg.num_hidden_layers))
    assert worst[0] < 1e-4, worst


def test_bfloat16_stays_bfloat16_and_near(reference, cfg, params, images):
    model = hf_convert.build(lambda: SiglipVisionEncoder(cfg, rngs=nnx.Rngs(0)), params)
    half = jax.jit(model.__call__)(jnp.asarray(images, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    _, hidden = run_reference(reference, images)
    error = hf_convert.error(half.astype(jnp.float32), hidden[-1].detach().numpy())
    print(f"bfloat16 error: {error:.1e}")
    assert error < 0.05


def test_preset_has_the_checkpoints_parameters():
    cfg = SiglipConfig.so400m_14_384()
    state = nnx.state(nnx.eval_shape(lambda: SiglipVisionEncoder(cfg, rngs=nnx.Rngs(0))))
    w, mlp = 1152, 4304
    layer = 4 * (w * w + w) + (w * mlp + mlp) + (mlp * w + w) + 2 * 2 * w
    assert cfg.num_patches == 729
    assert sum(x.size for x in jax.tree.leaves(state)) == 14 * 14 * 3 * w + w + 729 * w + 27 * layer == 412_984_944


def test_every_parameter_names_its_axes():
    state = nnx.state(nnx.eval_shape(lambda: SiglipVisionEncoder(SiglipConfig.tiny(), rngs=nnx.Rngs(0))))
    for path, p in nnx.to_flat_state(state):
        assert len(p.get_metadata()["logical_axes"]) == len(p.shape), path


def test_from_hf_falls_back_to_the_class_defaults():
    cfg = SiglipConfig.from_hf({"vision_config": {"image_size": 384}})
    assert (
        cfg.image_size,
        cfg.patch_size,
        cfg.hidden_size,
        cfg.num_hidden_layers,
        cfg.num_attention_heads,
        cfg.intermediate_size,
    ) == (384, 16, 768, 12, 12, 3072)


def test_wrong_use_is_refused(cfg, params):
    with pytest.raises(UserError, match="hidden_act"):
        SiglipConfig.from_hf({"hidden_act": "quick_gelu"})
    with pytest.raises(UserError, match="num_attention_heads=5"):
        dataclasses.replace(cfg, num_attention_heads=5)
    with pytest.raises(UserError, match="patch_size"):
        dataclasses.replace(cfg, patch_size=64)
    model = hf_convert.build(lambda: SiglipVisionEncoder(cfg, rngs=nnx.Rngs(0)), params)
    with pytest.raises(ValueError, match="image_size 45"):
        model(jnp.zeros((1, 48, 48, 3)))
    with pytest.raises(ValueError, match="has 3 layers, not 4"):
        model(jnp.zeros((1, 45, 45, 3)), layers=4)

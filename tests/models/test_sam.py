from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from flowseg_jax.errors import UserError
from flowseg_jax.models import layers
from flowseg_jax.models.sam import SamConfig, SamImageEncoder
from flowseg_jax.ops.attention import grid
from flowseg_jax.ops.attention import xla as attention_module
from tests.helpers import hf_convert

# 58 pixels hold 9 patches of 6 with a remainder; windows of 4 leave 3 rows of padding.
HF = dict(hidden_size=24, mlp_dim=52, num_attention_heads=3, image_size=58, patch_size=6, window_size=4)
PATTERNS = {
    "periodic": (6, (2, 5)),
    "irregular": (5, (0, 3)),
    "window tail": (4, (1,)),
    "windows only": (3, ()),
    "global only": (3, (0, 1, 2)),
}


def build_reference(layers, global_layers, **sizes):
    config = SamVisionConfig(**(HF | sizes), num_hidden_layers=layers, global_attn_indexes=list(global_layers))
    config._attn_implementation = "eager"
    return hf_convert.randomise(SamVisionEncoder(config), seed=layers)


def run_reference(reference, images):
    """All hidden states, 0 = with the position embedding, read by hooks."""
    states = []
    hooks = [reference.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    for layer in reference.layers:
        hooks.append(layer.register_forward_hook(lambda _, args, out: states.append(out)))
    pixels = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
    reference(pixels)
    for hook in hooks:
        hook.remove()
    return pixels, states


def run(model, images, select):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, select))(nnx.to_pure_dict(state), jnp.asarray(images))


def equations(jaxpr):
    """All equations, those of inner computations too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def images_of(side, seed=0):
    return np.random.default_rng(seed).normal(size=(2, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_hidden_state_equals_hugging_face(pattern):
    layers, global_layers = PATTERNS[pattern]
    reference = build_reference(layers, global_layers)
    cfg = SamConfig.from_hf(reference.config.to_dict())
    assert cfg.grid_size == 9 and cfg.global_attn_indexes == global_layers
    model = hf_convert.build(lambda: SamImageEncoder(cfg, rngs=nnx.Rngs(0)), hf_convert.sam(hf_convert.weights(reference), cfg))
    images = images_of(58)
    _, states = run_reference(reference, images)
    for select in [tuple(range(layers + 1)), (-2, -1)]:
        for i, actual in zip(select, run(model, images, select), strict=True):
            assert hf_convert.error(actual, states[i].detach().numpy()) < 1e-5, f"state {i} of {select}"


@pytest.mark.parametrize("window", [3, 11])
def test_window_dividing_and_larger_than_the_grid(window):
    reference = build_reference(2, (1,), window_size=window)
    cfg = SamConfig.from_hf(reference.config.to_dict())
    model = hf_convert.build(lambda: SamImageEncoder(cfg, rngs=nnx.Rngs(0)), hf_convert.sam(hf_convert.weights(reference), cfg))
    images = images_of(58)
    _, states = run_reference(reference, images)
    assert hf_convert.error(run(model, images, (2,))[0], states[2].detach().numpy()) < 1e-5


def test_equal_blocks_run_as_one_scan_with_the_same_numbers(monkeypatch):
    select = (4, 2, 3)
    model = SamImageEncoder(SamConfig.tiny(), rngs=nnx.Rngs(0))
    images = jnp.asarray(images_of(96))

    def scans() -> int:
        eqns = jax.make_jaxpr(lambda x: model(x, select))(images).eqns
        inner = [e.params["call_jaxpr"].eqns for e in eqns if e.primitive.name == "custom_vjp_call"]  # a part of a stack
        return sum(e.primitive.name == "scan" for e in itertools.chain(eqns, *inner))

    assert scans() == 1
    blocks = run(model, images, select)
    monkeypatch.setattr(SamImageEncoder, "_period", lambda self, select: None)
    assert scans() == 4
    for actual, expected in zip(blocks, run(model, images, select), strict=True):
        assert hf_convert.error(actual, expected) < 1e-6


def test_layers_after_the_deepest_state_do_not_run():
    cfg = SamConfig.tiny()
    graphdef, state = nnx.split(SamImageEncoder(cfg, rngs=nnx.Rngs(0)))
    images = jnp.asarray(images_of(96))
    loss = lambda p: nnx.merge(graphdef, p)(images, (1, 3))[1].std()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(nnx.to_pure_dict(state))
    norms = {name: np.abs(gradient[name]["mlp"]["lin2"]["kernel"]).max((1, 2)) for name in ("window_layers", "global_layers")}
    assert (norms["window_layers"] > 0).all() and norms["global_layers"][0] > 0 and norms["global_layers"][1] == 0


@pytest.mark.parametrize(("pattern", "remat"), [("periodic", "none"), ("periodic", "full"), ("irregular", "dots")])
def test_gradients_equal_hugging_face(pattern, remat):
    layers, global_layers = PATTERNS[pattern]
    reference = build_reference(layers, global_layers)
    cfg = dataclasses.replace(SamConfig.from_hf(reference.config.to_dict()), remat=remat)
    params = hf_convert.sam(hf_convert.weights(reference), cfg)
    images = images_of(58)
    pixels, states = run_reference(reference, images)
    select = (layers - 1, layers)
    probes = [np.random.default_rng(i).normal(size=states[i].shape).astype(np.float32) for i in select]
    sum((states[i] * torch.tensor(p)).sum() for i, p in zip(select, probes, strict=True)).backward()
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: SamImageEncoder(cfg, rngs=nnx.Rngs(0))))

    def loss(p, x):
        return sum((y * w).sum() for y, w in zip(nnx.merge(graphdef, p)(x, select), probes, strict=True))

    by_params, by_images = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(images))
    assert hf_convert.error(by_images, pixels.grad.permute(0, 2, 3, 1).numpy()) < 1e-4
    worst = hf_convert.tree_error(by_params, hf_convert.sam(hf_convert.gradients(reference), cfg))
    assert worst[0] < 1e-4, worst


def test_global_attention_never_holds_scores_or_bias_of_all_queries(monkeypatch):
    """With chunked attention no array of the whole component is as large as all scores: the relative positions add none."""
    cfg = dataclasses.replace(SamConfig.tiny(), num_hidden_layers=1, num_attention_heads=4, global_attn_indexes=(0,))
    largest = cfg.num_attention_heads * cfg.grid_size**4
    monkeypatch.setattr(attention_module, "WHOLE_BYTES", largest)
    monkeypatch.setattr(attention_module, "CHUNK_BYTES", largest)
    monkeypatch.setattr(grid, "CHUNK_BYTES", largest)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: SamImageEncoder(cfg, rngs=nnx.Rngs(0))))
    loss = lambda p, x: nnx.merge(graphdef, p)(x, (1,))[0].sum()  # noqa: E731
    trace = jax.make_jaxpr(jax.grad(loss))(nnx.to_pure_dict(state), jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32))
    sizes = [v.aval.size for e in equations(trace.jaxpr) for v in e.outvars if hasattr(v.aval, "size")]
    assert largest // 8 < max(sizes) < largest


def test_bfloat16_stays_bfloat16_and_near():
    reference = build_reference(2, (1,))
    cfg = SamConfig.from_hf(reference.config.to_dict())
    model = hf_convert.build(lambda: SamImageEncoder(cfg, rngs=nnx.Rngs(0)), hf_convert.sam(hf_convert.weights(reference), cfg))
    images = images_of(58)
    _, states = run_reference(reference, images)
    for i, half in enumerate(run(model, images.astype(jnp.bfloat16), (1, 2)), start=1):
        assert half.dtype == jnp.bfloat16
        error = hf_convert.error(half.astype(jnp.float32), states[i].detach().numpy())
        print(f"bfloat16 error, state {i}: {error:.1e}")
        assert error < 0.05


def test_preset_has_the_checkpoints_parameters():
    cfg = SamConfig.vit_large()
    state = nnx.state(nnx.eval_shape(lambda: SamImageEncoder(cfg, rngs=nnx.Rngs(0))))
    w, mlp, e = 1024, 4096, 64
    layer = 4 * (w * w + w) + (w * mlp + mlp) + (mlp * w + w) + 2 * 2 * w
    relative = 20 * 2 * 27 * e + 4 * 2 * 127 * e
    expected = 16 * 16 * 3 * w + w + 64 * 64 * w + 24 * layer + relative
    assert cfg.grid_size == 64
    assert sum(x.size for x in jax.tree.leaves(state)) == expected == 307_425_280


def test_every_parameter_names_its_axes():
    state = nnx.state(nnx.eval_shape(lambda: SamImageEncoder(SamConfig.tiny(), rngs=nnx.Rngs(0))))
    for path, p in nnx.to_flat_state(state):
        assert len(p.get_metadata()["logical_axes"]) == len(p.shape), path


def test_from_hf_falls_back_to_the_class_defaults():
    cfg = SamConfig.from_hf({"vision_config": {}})
    assert (cfg.hidden_size, cfg.num_hidden_layers, cfg.mlp_dim, cfg.window_size, cfg.global_attn_indexes) == (
        768,
        12,
        3072,
        14,
        (2, 5, 8, 11),
    )
    assert SamConfig.from_hf({"window_size": 0, "num_hidden_layers": 3, "hidden_size": 24}).global_attn_indexes == (0, 1, 2)


def test_wrong_use_is_refused():
    cfg = SamConfig.tiny()
    with pytest.raises(UserError, match="use_rel_pos=False"):
        SamConfig.from_hf({"use_rel_pos": False})
    for change, field in [
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"window_size": 0}, "window_size=0"),
        ({"patch_size": 97}, "patch_size=97"),
    ]:
        with pytest.raises(UserError, match=field):
            dataclasses.replace(cfg, **change)
    with pytest.raises(UserError, match="names layer 4"):
        dataclasses.replace(cfg, global_attn_indexes=(1, 4))
    model = SamImageEncoder(cfg, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="image_size 96"):
        model(jnp.zeros((1, 96, 88, 3)), (4,))
    for select in [(), (5,), (-6,)]:
        with pytest.raises(ValueError, match="hidden states 0 to 4"):
            model(jnp.zeros((1, 96, 96, 3)), select)


def test_gelu_is_the_exact_one_and_keeps_what_it_read():
    x = np.linspace(-9, 9, 4001)
    wanted = torch.tensor(x, requires_grad=True)
    torch.nn.functional.gelu(wanted).sum().backward()
    value, pull = jax.vjp(layers.gelu, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, torch.nn.functional.gelu(torch.tensor(x)), atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(value))[0], wanted.grad, atol=1e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    exact = torch.nn.functional.gelu(torch.tensor(np.asarray(half, np.float64)))
    value, pull = jax.vjp(layers.gelu, half)
    assert value.dtype == pull(value)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value.astype(jnp.float32), exact, rtol=2**-8, atol=2e-6)
    assert [kept.dtype for kept in jax.tree.leaves(pull) if kept.size == x.size] == [jnp.bfloat16]

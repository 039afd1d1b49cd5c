"""The pixel decoder against X-SAM's arrays and against Hugging Face's `Mask2FormerPixelDecoder`."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as hf

from flowseg_jax.errors import UserError
from flowseg_jax.models.layers import GroupNorm
from flowseg_jax.models.pixel_decoder import (
    PixelDecoder,
    PixelDecoderConfig,
    init_sampling_offsets,
    reference_points,
    sine_position_embedding,
)
from flowseg_jax.models.stack import scan_layers
from flowseg_jax.ops.portable import traced_for

GOLDEN = Path(__file__).parents[1] / "golden"


def error(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def from_torch(cfg: PixelDecoderConfig, weights: dict[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays under Hugging Face's names -> arrays under ours, `/`-separated. Serves weights and gradients alike."""

    def conv_norm(ours: str, theirs: str) -> dict[str, np.ndarray]:
        out = {f"{ours}/conv/kernel": weights[f"{prefix}{theirs}.0.weight"].transpose(2, 3, 1, 0)}
        if f"{prefix}{theirs}.0.bias" in weights:
            out[f"{ours}/conv/bias"] = weights[f"{prefix}{theirs}.0.bias"]
        out[f"{ours}/norm/scale"] = weights[f"{prefix}{theirs}.1.weight"]
        return out | {f"{ours}/norm/bias": weights[f"{prefix}{theirs}.1.bias"]}

    out = {"level_embed": weights[f"{prefix}level_embed"]}
    for i in range(cfg.encoder_levels):
        out |= conv_norm(f"input_projections/{i}", f"input_projections.{i}")
    for i in range(cfg.fpn_stages):  # theirs are numbered from the finest map
        out |= conv_norm(f"lateral_convs/{i}", f"adapter_{cfg.fpn_stages - i}")
        out |= conv_norm(f"output_convs/{i}", f"layer_{cfg.fpn_stages - i}")
    matrices = [f"self_attn.{name}" for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")]
    norms = ["self_attn_layer_norm", "final_layer_norm"]
    for theirs in (*matrices, "fc1", "fc2", *norms):
        for kind in ("weight", "bias"):
            names = [f"{prefix}encoder.layers.{i}.{theirs}.{kind}" for i in range(cfg.num_layers)]
            value = np.stack([weights[name].T for name in names])
            leaf = "bias" if kind == "bias" else "scale" if theirs in norms else "kernel"
            out[f"layers/{theirs.replace('.', '/')}/{leaf}"] = value
    out["mask_projection/kernel"] = weights[f"{prefix}mask_projection.weight"].transpose(2, 3, 1, 0)
    out["mask_projection/bias"] = weights[f"{prefix}mask_projection.bias"]
    return out


def flatten(tree) -> dict[str, jax.Array]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in paths}


def build(cfg: PixelDecoderConfig, weights: dict[str, np.ndarray], prefix: str = "") -> tuple[nnx.GraphDef, dict]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: PixelDecoder(cfg, rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(state)
    mapped = from_torch(cfg, weights, prefix)
    assert sorted(mapped) == sorted(flatten(params))
    used = {name for name in weights if name.startswith(prefix)}
    assert sum(mapped[name].size for name in mapped) == sum(weights[name].size for name in used)

    def take(path, leaf):
        value = mapped["/".join(str(key.key) for key in path)]
        assert value.shape == leaf.shape
        return jnp.asarray(value)

    return graphdef, jax.tree_util.tree_map_with_path(take, params)


# ---------------------------------------------------------------------------------------------------------------- X-SAM


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "xsam_pyramid.npz"))


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def test_sine_positions_are_xsams():
    theirs = np.load(GOLDEN / "xsam_connector_units.npz")["sine_pos/out_nchw_8ch_3x5"]
    assert error(sine_position_embedding(3, 5, 8)[None], nhwc(theirs)) <= 1e-6
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_position_embedding(3, 5, 6)


def test_every_stage_is_xsams(golden):
    cfg = PixelDecoderConfig.mask2former((96, 48, 24), embed_dim=64, mask_dim=64, num_layers=2, num_heads=4, mlp_dim=96)
    weights = {k: v for k, v in golden.items() if k.startswith("weights/pixel_decoder.")}
    graphdef, params = build(cfg, weights, "weights/pixel_decoder.")
    features = tuple(jnp.asarray(nhwc(golden[f"seg_connector/{j}"])) for j in (2, 1, 0))

    @jax.jit
    def stages(params, features):
        model = nnx.merge(graphdef, params)
        projected = tuple(project(x) for project, x in zip(model.input_projections, features, strict=True))
        shapes = tuple(x.shape[1:3] for x in projected)
        positions, reference = model.positions(shapes), reference_points(shapes)
        x = jnp.concatenate([x.reshape(1, -1, 64) for x in projected], axis=1)
        x, _ = scan_layers(model.layers, lambda layer, x, _: (layer(x, positions, reference, shapes), None), x, stop=1)
        return projected, positions, x, *model(features)

    projected, positions, first, mask_features, levels = stages(params, features)
    for i, x in enumerate(projected):
        assert error(x[..., ::8], nhwc(golden[f"pixel_decoder/input_projection_{i}"])) <= 1e-5
    assert error(positions[None, ::8], golden["pixel_decoder/positions"]) <= 1e-5
    assert error(first[:, ::8], golden["pixel_decoder/encoder_layer_0"]) <= 1e-5
    assert error(mask_features[..., ::4], nhwc(golden["pixel_decoder/mask_features"])) <= 1e-5
    assert len(levels) == 3
    for i, level in enumerate(levels):
        assert error(level[..., ::4], nhwc(golden[f"pixel_decoder/multi_scale_{i}"])) <= 1e-5


# --------------------------------------------------------------------------------------------------------- Hugging Face


class FourLevels(hf.Mask2FormerPixelDecoder):
    """X-SAM's four-level variant: Hugging Face fixes the number of encoded levels at three."""

    def __init__(self, config, channels):
        super().__init__(config, channels)
        d = config.feature_size
        self.num_feature_levels, self.num_fpn_levels = 4, 0
        del self.adapter_1, self.layer_1
        self.level_embed = torch.nn.Parameter(torch.zeros(4, d))
        self.input_projections = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Conv2d(c, d, 1), torch.nn.GroupNorm(32, d)) for c in channels[::-1]
        )
        for layer in self.encoder.layers:
            layer.self_attn = type(layer.self_attn)(d, config.num_attention_heads, n_levels=4, n_points=4)


SIZES = ((3, 4), (5, 7), (9, 14), (13, 22))  # low to high; no common ratio, none square
CASES = {
    # case: (channels low to high, our config's changes, HF class, HF common_stride)
    "xsam_three_levels": ((28, 20, 12), {}, hf.Mask2FormerPixelDecoder, 4),
    "xsam_four_levels": ((28, 20, 12, 16), {}, FourLevels, 4),
    "mask2former_four_maps": ((28, 20, 12, 16), {"num_levels": 3}, hf.Mask2FormerPixelDecoder, 4),
    "two_fpn_stages": ((28, 20, 12, 16), {"num_levels": 3, "common_stride": 2}, hf.Mask2FormerPixelDecoder, 2),
}


@functools.cache
def run_both(case: str):
    """Values and gradients of ours and theirs for the same random weights, features and cotangents."""
    channels, changes, make, common_stride = CASES[case]
    width, mask_width = 96, 40
    torch.manual_seed(len(channels))
    sizes = {"feature_size": width, "mask_feature_size": mask_width, "hidden_dim": width, "encoder_layers": 2}
    hf_config = Mask2FormerConfig(
        **sizes, encoder_feedforward_dim=56, num_attention_heads=3, dropout=0.0, common_stride=common_stride
    )
    theirs = make(hf_config, list(channels[::-1]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            scale = 1.0 if "sampling_offsets.bias" in name else 0.4 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            offset = 1.0 if parameter.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * scale + offset)
    cfg = PixelDecoderConfig.mask2former(
        channels, embed_dim=width, mask_dim=mask_width, num_layers=2, num_heads=3, mlp_dim=56, remat="full", **changes
    )
    graphdef, params = build(cfg, {name: p.detach().numpy() for name, p in theirs.named_parameters()})

    features = [torch.randn(2, c, h, w) for c, (h, w) in zip(channels, SIZES, strict=False)]
    for x in features:
        x.requires_grad_()
    out = theirs(features[::-1])
    outputs = [out.mask_features, *out.multi_scale_features]
    cotangents = [torch.randn_like(x) for x in outputs]
    sum((x * g).sum() for x, g in zip(outputs, cotangents, strict=True)).backward()

    def ours(params, features):
        mask_features, levels = nnx.merge(graphdef, params)(features)
        outputs = (mask_features, *levels)
        return sum((x * nhwc(g.numpy())).sum() for x, g in zip(outputs, cotangents, strict=True)), outputs

    maps = tuple(jnp.asarray(nhwc(x.detach().numpy())) for x in features)
    gradients, values = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(params, maps)
    values = {f"output {i}": (x, nhwc(y.detach().numpy())) for i, (x, y) in enumerate(zip(values, outputs, strict=True))}
    expected = from_torch(cfg, {name: p.grad.numpy() for name, p in theirs.named_parameters()})
    pairs = {name: (x, expected[name]) for name, x in flatten(gradients[0]).items()}
    pairs |= {f"map {i}": (x, nhwc(features[i].grad.numpy())) for i, x in enumerate(gradients[1])}
    return values, pairs


@pytest.mark.parametrize("case", CASES)
def test_values_are_hugging_faces(case):
    values, _ = run_both(case)
    errors = {name: error(*pair) for name, pair in values.items()}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_hugging_faces(case):
    _, gradients = run_both(case)
    errors = {name: error(*pair) for name, pair in gradients.items()}
    assert max(errors.values()) <= 1e-4, {name: e for name, e in errors.items() if e > 1e-4}


def test_four_maps_give_masks_the_size_of_the_finest():
    values, _ = run_both("mask2former_four_maps")
    assert values["output 0"][0].shape == (2, *SIZES[3], 40)
    assert [values[f"output {i}"][0].shape[1:3] for i in (1, 2, 3)] == list(SIZES[:3])


# ------------------------------------------------------------------------------------------------------------ our own


SMALL = PixelDecoderConfig(
    channels=(12, 8),
    strides=(16, 8),
    embed_dim=64,
    mask_dim=20,
    num_layers=3,
    num_heads=4,
    num_points=3,
    mlp_dim=40,
    remat="none",
)


@pytest.fixture(scope="module")
def small_params() -> dict:
    random = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: PixelDecoder(SMALL, rngs=nnx.Rngs(0)))))
    return jax.tree.map(lambda x: random.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def small_features() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(1)
    return tuple(random.normal(size=(2, *size)).astype(np.float32) for size in ((3, 4, 12), (6, 5, 8)))


def apply(cfg: PixelDecoderConfig):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: PixelDecoder(cfg, rngs=nnx.Rngs(0))))
    return lambda params, features: nnx.merge(graphdef, params)(features)


def test_remat_policies_agree(small_params, small_features):
    results = {}
    for policy in ("none", "full"):
        forward = apply(dataclasses.replace(SMALL, remat=policy))

        def loss(params, features, forward=forward):
            mask_features, levels = forward(params, features)
            return jnp.square(mask_features).sum() + sum(jnp.abs(x).sum() for x in levels)

        traced = jax.jit(jax.grad(loss)).trace(small_params, small_features)
        jaxpr = str(traced.jaxpr)
        assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (policy != "none")
        assert "scan" in jaxpr
        results[policy] = flatten(traced.lower().compile()(small_params, small_features))
    errors = {name: error(x, results["none"][name]) for name, x in results["full"].items()}
    assert max(errors.values()) <= 1e-5, errors


def test_layers_are_stacked_and_axes_are_named():
    model = nnx.eval_shape(lambda: PixelDecoder(SMALL, rngs=nnx.Rngs(0)))
    assert model.layers.fc1.kernel.get_value().shape == (3, 64, 40)
    assert model.layers.fc1.kernel.get_metadata()["logical_axes"] == ("layers", "embed", "mlp")
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            assert len(node.get_metadata()["logical_axes"]) == len(node.get_value().shape)


def test_bfloat16_features_stay_bfloat16(small_params, small_features):
    forward = jax.jit(apply(SMALL))
    exact, exact_levels = forward(small_params, small_features)
    half, half_levels = forward(small_params, tuple(jnp.asarray(x, jnp.bfloat16) for x in small_features))
    assert half.dtype == jnp.bfloat16 and all(x.dtype == jnp.bfloat16 for x in half_levels)
    errors = [error(x, y) for x, y in zip((half, *half_levels), (exact, *exact_levels), strict=True)]
    print(f"bfloat16 error: {max(errors):.1e}")
    assert max(errors) <= 0.03


def test_images_of_a_batch_are_independent(small_params, small_features):
    forward = jax.jit(apply(SMALL))
    both, _ = forward(small_params, small_features)
    other, _ = forward(small_params, tuple(np.stack([np.zeros_like(x[1]), x[1]]) for x in small_features))
    assert error(both[1], other[1]) <= 1e-6


def test_initial_values():
    cfg = PixelDecoderConfig(
        channels=(48, 40, 36), strides=(32, 16, 8), embed_dim=64, mask_dim=24, num_layers=2, num_heads=8, mlp_dim=96
    )
    params = flatten(jax.jit(lambda: nnx.to_pure_dict(nnx.state(PixelDecoder(cfg, rngs=nnx.Rngs(0)))))())
    for name, x in params.items():
        x = np.asarray(x)
        if name.endswith("kernel"):
            *window, fan_in, fan_out = x.shape[1:] if name.startswith("layers") else x.shape
            bound = math.sqrt(6 / (fan_in + fan_out) / math.prod(window))
            assert 0.95 * bound < np.abs(x).max() <= bound, name
        elif name.endswith("scale"):
            assert np.abs(x - 1).max() == 0, name
        elif "sampling_offsets" not in name:
            assert np.abs(x).max() == 0, name
    layers = np.asarray(params["layers/self_attn/value_proj/kernel"])
    assert np.abs(layers[0] - layers[1]).max() > 0  # layers do not share their random numbers

    theirs = hf.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(64, 8, 3, 4)
    hf.Mask2FormerPreTrainedModel(Mask2FormerConfig())._init_weights(theirs)
    bias = theirs.sampling_offsets.bias.detach().numpy()
    np.testing.assert_allclose(init_sampling_offsets(8, 3, 4), bias, atol=1e-5)
    np.testing.assert_allclose(params["layers/self_attn/sampling_offsets/bias"], np.stack([bias, bias]), atol=1e-5)


def test_reference_points_are_pixel_centres():
    points = np.asarray(reference_points(((1, 2), (2, 2))))
    np.testing.assert_allclose(points, [[0.25, 0.5], [0.75, 0.5], [0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])


def test_full_size_has_hugging_faces_parameters():
    with torch.device("meta"):
        theirs = hf.Mask2FormerPixelDecoder(Mask2FormerConfig(), [512, 1024, 2048])
    model = nnx.eval_shape(lambda: PixelDecoder(PixelDecoderConfig.mask2former(), rngs=nnx.Rngs(0)))
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    assert ours == sum(p.numel() for p in theirs.parameters())


def test_four_encoded_levels_have_no_fpn():
    cfg = PixelDecoderConfig.mask2former((28, 20, 12, 16))
    assert cfg.encoder_levels == 4 and cfg.fpn_stages == 0
    assert PixelDecoderConfig.tiny().fpn_stages == PixelDecoderConfig.mask2former().fpn_stages == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strides": (32, 16)}, "3 channels"),
        ({"strides": (8, 16, 32)}, "low to high"),
        ({"embed_dim": 96, "num_heads": 7}, "multiple"),
        ({"embed_dim": 80}, "norm_groups"),
        ({"num_levels": 4}, "num_levels is 4"),
        ({"strides": (256, 128, 64)}, "FPN stages"),
        ({"deformable_attention_impl": "gahter"}, "deformable_attention_impl is 'gahter'.*gather.*known are auto, gather"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(UserError, match=message):
        PixelDecoderConfig(**{"channels": (12, 8, 6), "strides": (32, 16, 8), **fields})


def test_maps_that_differ_from_the_config(small_params, small_features):
    with pytest.raises(ValueError, match="configured for"):
        apply(SMALL)(small_params, small_features[::-1])


@pytest.mark.parametrize("platform", ["cpu", "any"])
def test_group_norm_is_torchs_in_the_form_of_each_platform(rng, platform):
    x, scale, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 3, 12), (12,), (12,)))
    norm = GroupNorm(12, 4, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    theirs = torch.nn.functional.group_norm(torch.tensor(x).permute(0, 3, 1, 2), 4, *map(torch.tensor, (scale, bias)))
    with traced_for(platform):
        assert error(norm(jnp.asarray(x)), theirs.permute(0, 2, 3, 1)) < 1e-5

"""Projectors, pixel shuffle and the segmentation connector against X-SAM's arrays and against torch."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flowseg_jax.errors import UserError
from flowseg_jax.models.connectors import ConnectorConfig, MlpProjector, SegConnector, pad_to_multiple, pixel_shuffle

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def units() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "xsam_connector_units.npz"))


@pytest.fixture(scope="module")
def pyramid() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "xsam_pyramid.npz"))


def assert_close(ours, theirs, limit=1e-5):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
    assert error <= limit, f"relative error {error:.2e}"


def assign(parameter, value):
    assert parameter[...].shape == value.shape
    parameter[...] = jnp.asarray(value)


def run(module, x):
    """One compiled call: several times faster than compiling every operation by itself."""
    return nnx.jit(lambda module, x: module(x))(module, x)


def empty(make):
    """A module with zeros for parameters, to be filled."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.to_pure_dict(state)))


def load_level(level, weights: dict[str, np.ndarray], prefix: str):
    """Copies one connector layer: convolutions are entries 0, 2, 4 of X-SAM's Sequential, norms 1, 3, 5."""
    for i, conv in enumerate((level.conv1, level.conv2, level.conv3)):
        assign(conv.kernel, weights[f"{prefix}{2 * i}.weight"].transpose(2, 3, 1, 0))
    for i, norm in enumerate((level.norm1, level.norm2, level.norm3)):
        assign(norm.scale, weights[f"{prefix}{2 * i + 1}.weight"])
        assign(norm.bias, weights[f"{prefix}{2 * i + 1}.bias"])


@pytest.mark.parametrize("scale", [0.5, 1, 2, 4])
def test_pixel_shuffle_is_xsams(units, scale):
    x = units["pixel_shuffle/in_nhwc"]
    if scale == 4:
        x = np.concatenate([x, 2 * x], axis=-1)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(x), scale), units[f"pixel_shuffle/out_nhwc_scale{scale}"])


def two_reshapes(x: np.ndarray, scale: float) -> np.ndarray:
    """The reshape-and-swap recipe that defines the permutation for any scale."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, round(w * scale), round(c / scale)).swapaxes(1, 2)
    return x.reshape(b, round(w * scale), round(h * scale), round(c / scale**2)).swapaxes(1, 2)


@pytest.mark.parametrize("scale", [1 / 3, 0.25, 0.5, 1, 2, 3])
def test_pixel_shuffle_other_scales_and_non_square(scale):
    x = np.random.default_rng(0).normal(size=(2, 12, 24, 36)).astype(np.float32)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(x), scale), two_reshapes(x, scale))


def test_pixel_shuffle_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="pad it first"):
        pixel_shuffle(jnp.zeros((1, 5, 6, 4)), 0.5)
    with pytest.raises(ValueError, match="channels"):
        pixel_shuffle(jnp.zeros((1, 4, 6, 6)), 2)
    with pytest.raises(UserError, match="scale 1.5"):
        pixel_shuffle(jnp.zeros((1, 4, 6, 6)), 1.5)


def test_padding_of_odd_sizes(units):
    np.testing.assert_array_equal(pad_to_multiple(jnp.asarray(units["maybe_pad/in_nhwc"])), units["maybe_pad/out_nhwc"])
    even = jnp.ones((1, 4, 6, 2))
    assert pad_to_multiple(even) is even
    assert pad_to_multiple(jnp.ones((1, 5, 8, 2)), 4).shape == (1, 8, 8, 2)


@pytest.mark.parametrize("scale", [0.5, 2])
def test_one_level_with_odd_sizes_is_xsams(units, scale):
    prefix = f"conv_connector/scale{scale}/"
    cfg = ConnectorConfig(channels=(8,), hidden_channels=6, scales=(scale,))
    connector = empty(lambda: SegConnector(cfg, rngs=nnx.Rngs(0)))
    load_level(connector.levels[0], units, f"{prefix}model.")
    (out,) = run(connector, (jnp.asarray(units[f"{prefix}in_nhwc"]),))
    assert_close(out, units[f"{prefix}out_nchw"].transpose(0, 2, 3, 1))


def test_connector_is_xsams(pyramid):
    cfg = ConnectorConfig(channels=(48, 48, 48), hidden_channels=24)
    connector = empty(lambda: SegConnector(cfg, rngs=nnx.Rngs(0)))
    for j in range(3):
        load_level(connector.levels[j], pyramid, f"weights/seg_connector.model.{j}.model.")
    out = run(connector, tuple(jnp.asarray(pyramid[f"sam/{i}"]) for i in (2, 3, 4)))
    assert cfg.out_channels == tuple(x.shape[-1] for x in out) == (96, 48, 24)
    for x, j in zip(out, (2, 1, 0), strict=True):  # X-SAM lists the highest resolution first
        assert_close(x, pyramid[f"seg_connector/{j}"].transpose(0, 2, 3, 1))


def test_seg_projector_is_xsams(pyramid):
    projector = empty(lambda: MlpProjector(4 * 48, 64, 64, rngs=nnx.Rngs(0)))
    for layer, i in ((projector.linear_1, 0), (projector.linear_2, 2)):
        assign(layer.kernel, pyramid[f"weights/seg_projector.model.{i}.weight"].T)
        assign(layer.bias, pyramid[f"weights/seg_projector.model.{i}.bias"])
    x = pixel_shuffle(jnp.asarray(pyramid["sam/3"]), 0.5)
    out = run(projector, x.reshape(1, -1, x.shape[-1]))
    assert_close(out[:, ::2], pyramid["seg_projector/out"])


def test_projector_values_and_gradients_against_torch():
    projector = MlpProjector(6, 10, 4, rngs=nnx.Rngs(3))
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 4))
    with torch.no_grad():
        for layer, linear in ((projector.linear_1, theirs[0]), (projector.linear_2, theirs[2])):
            linear.weight.copy_(torch.tensor(np.asarray(layer.kernel[...]).T))
            linear.bias.copy_(torch.tensor(np.asarray(layer.bias[...])))
    x = np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32) * 3
    x_torch = torch.tensor(x, requires_grad=True)
    out = theirs(x_torch)
    out.square().sum().backward()
    assert_close(run(projector, jnp.asarray(x)), out.detach())
    gradient = jax.jit(jax.grad(lambda x: jnp.square(projector(x)).sum()))
    assert_close(gradient(jnp.asarray(x)), x_torch.grad, 1e-4)


def test_widths_and_sizes_that_all_differ():
    """Four maps of different widths, given in no particular order of scale, on an odd non-square grid."""
    cfg = ConnectorConfig(channels=(8, 12, 20, 16), hidden_channels=10, scales=(0.5, 4, 1, 2))
    connector = empty(lambda: SegConnector(cfg, rngs=nnx.Rngs(0)))
    maps = tuple(jnp.ones((2, 5, 7, c), jnp.bfloat16) for c in cfg.channels)
    out = jax.eval_shape(connector, maps)
    assert [x.shape for x in out] == [(2, 3, 4, 16), (2, 6, 8, 20), (2, 12, 16, 8), (2, 24, 32, 3)]
    assert tuple(x.shape[-1] for x in out) == cfg.out_channels
    assert all(x.dtype == jnp.bfloat16 for x in out)
    with pytest.raises(ValueError, match="3 maps for 4 levels"):
        connector(maps[:3])


def test_levels_stay_aligned_when_one_needs_more_padding():
    """With a scale of 1/4 every map is padded to a multiple of 4, so that all levels cover the same area."""
    cfg = ConnectorConfig(channels=(8, 8), hidden_channels=6, scales=(1, 0.25))
    out = jax.eval_shape(empty(lambda: SegConnector(cfg, rngs=nnx.Rngs(0))), (jnp.ones((1, 6, 5, 8)),) * 2)
    assert [x.shape for x in out] == [(1, 2, 2, 32), (1, 8, 8, 8)]


def test_initial_values_and_names():
    connector = SegConnector(ConnectorConfig(channels=(64, 64, 64), hidden_channels=48), rngs=nnx.Rngs(0))
    for level in connector.levels:
        for conv in (level.conv1, level.conv2, level.conv3):
            assert conv.bias is None
            assert float(conv.kernel[...].std()) == pytest.approx(0.02, rel=0.1)
        assert float(level.norm3.scale[...].min()) == 1 and level.norm3.eps == 1e-6
    projector = MlpProjector(100, 60, 80, rngs=nnx.Rngs(0))
    for layer, bound in ((projector.linear_1, 0.1), (projector.linear_2, 60**-0.5)):
        for value in (layer.kernel[...], layer.bias[...]):
            assert 0.9 * bound < float(jnp.abs(value).max()) <= bound
    for _, node in nnx.iter_graph((connector, projector)):
        if isinstance(node, nnx.Variable):
            assert len(node.get_metadata()["logical_axes"]) == node[...].ndim


def test_full_size_has_xsams_shapes():
    state = nnx.state(nnx.eval_shape(lambda: SegConnector(ConnectorConfig.sam_large(), rngs=nnx.Rngs(0))))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))
    level = 512 * 1024 + 512 * 512 * 9 + 2 * 2 * 512
    assert count == sum(level + 512 * c + 2 * c for c in (2048, 1024, 512))
    assert ConnectorConfig.sam_large().out_channels == (2048, 1024, 512)
    assert ConnectorConfig.tiny().out_channels == (192, 96, 48)


@pytest.mark.parametrize(
    "fields", [{"channels": (8, 8), "scales": (1,)}, {"channels": (8,), "scales": (0.3,)}, {"channels": (7,), "scales": (2,)}]
)
def test_config_errors(fields):
    with pytest.raises(UserError):
        ConnectorConfig(hidden_channels=4, **fields)

"""Starting from earlier models and components: what is read, what stays fresh, and that an upgraded X-SAM predicts as
before."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax import sharding
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import save_pretrained, save_pretrained_streaming
from flowseg_jax.checkpoints.streaming import LazyArray
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig, loss_terms, normalize_terms
from flowseg_jax.models import flowseg
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.models.semantic_flow import Conditions, SemanticFlowConfig
from flowseg_jax.training.initialization import initial_params
from tests.helpers import small

PLAIN = small.lean(semantic_flow=SemanticFlowConfig(mode="off"), boundary=BoundaryConfig(enabled=False))
FLOW = dataclasses.replace(PLAIN, semantic_flow=SemanticFlowConfig(norm="residual"), boundary=BoundaryConfig())


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def plain_params():
    """Random numbers: drawing real initial values op by op takes longer than everything else here."""
    rng = np.random.default_rng(0)
    shapes = flowseg.params_dict(flowseg.abstract_model(PLAIN)[1])
    params = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    params["pixel_decoder"]["mask_projection"]["kernel"] *= 10  # masks that have edges, or BAR would have nothing to refine
    return params


@pytest.fixture(scope="module")
def plain_directory(plain_params, tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    (root / "tokenizer").mkdir()
    return save_pretrained(root / "model", plain_params, PLAIN.to_dict(), root / "tokenizer", dtype=None)


@pytest.fixture(scope="module")
def upgraded(plain_directory, mesh):
    return initial_params(FLOW, 6, (str(plain_directory),), mesh)[0]


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_a_part_of_a_model_and_a_tower_take_their_places(plain_directory, plain_params, tmp_path, mesh, capsys):
    stored = {name: np.asarray(2 * x) for name, x in flatten_params(plain_params["llm"]).items()}
    lazy = {name: LazyArray(x.shape, x.dtype, lambda x=x: x) for name, x in stored.items()}
    component = save_pretrained_streaming(tmp_path / "llm", lazy, None, None, component={"family": "qwen3", "config": {}})
    parts = (f"sam={plain_directory}", f"background_embed={plain_directory}", f"llm={component}")
    found = flatten_params(initial_params(PLAIN, 3, parts, mesh)[0])
    fresh, plain = flatten_params(flowseg.init_model(PLAIN, 3)[1]), flatten_params(plain_params)
    for name, x in found.items():
        if name.startswith("llm/"):
            assert same(x, stored[name.removeprefix("llm/")]), name
        elif name.startswith("sam/") or name == "background_embed":
            assert same(x, plain[name]), name
        else:
            np.testing.assert_allclose(x, fresh[name], rtol=1e-6, atol=1e-7, err_msg=name)
    said = capsys.readouterr().out
    assert f"init_from llm={component}: {len(stored)} parameters" in said
    assert "siglip/patch_embedding/{bias,kernel}" in said.split("not found, initialised afresh: ")[1]


def test_an_upgrade_names_what_is_new(upgraded, plain_params, plain_directory, mesh, capsys):
    initial_params(FLOW, 6, (str(plain_directory),), mesh)
    fresh = capsys.readouterr().out.split("not found, initialised afresh: ")[1]
    assert {part.split("/")[0] for part in fresh.split(", ")} == {"boundary", "mask_decoder"}
    found = flatten_params(upgraded)
    assert all(same(found[name], x) for name, x in flatten_params(plain_params).items())


def predictions(cfg, params, features, levels, conditions, segs):
    """What the two models do differently: all predictions of the decoder, and refined masks."""
    model = flowseg.bind_params(flowseg.abstract_model(cfg)[0], params)
    out = model.mask_decoder(model.mask_decoder.prepare_levels(features, levels), 2, conditions, segs)
    masks = mask_logits(out.mask_embeds[-1].reshape(len(features), -1, features.shape[-1]), features)
    return out.class_logits, out.mask_embeds, model.refine_masks(masks, features)


def test_an_upgraded_xsam_predicts_as_before(upgraded, plain_params):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    own, valid = jnp.array([[True, False, True]] * 2), jnp.array([[True, True, True], [True, False, True]])
    inputs = draw(1, 8, 8, 16), (draw(1, 4, 4, 16),)
    inputs += Conditions(draw(2, 3, 16), own, valid), draw(2, 16)
    with jax.disable_jit():
        before, after = predictions(PLAIN, plain_params, *inputs), predictions(FLOW, upgraded, *inputs)
    assert all(same(a, b) for a, b in zip(before, after, strict=True))
    before = jax.jit(functools.partial(predictions, PLAIN))(plain_params, *inputs)
    after = jax.jit(functools.partial(predictions, FLOW))(upgraded, *inputs)
    for a, b in zip(before, after, strict=True):
        real = np.abs(np.asarray(a)) < 1e5  # -1e6 marks conditions that do not exist
        assert np.abs(np.asarray(a) - np.asarray(b))[real].max() <= 1e-6 * np.abs(np.asarray(a)[real]).max()
    assert same(before[-1] > 0, after[-1] > 0)


def test_everything_new_learns_by_the_second_step(upgraded):
    """But key biases: a softmax does not change when all its scores do."""
    graphdef, _ = flowseg.abstract_model(FLOW)
    batch = small.batch(FLOW)

    @jax.jit
    def gradient(params):
        def loss(params):
            model = flowseg.bind_params(graphdef, params)
            keys = jax.random.split(jax.random.key(0), len(batch.input_ids))
            return sum(normalize_terms(loss_terms(model, batch, model(batch), keys, LossConfig(num_points=0))[0]).values())

        return jax.grad(loss)(params)

    first = gradient(upgraded)
    second = flatten_params(gradient(jax.tree.map(lambda w, g: w - 1e-3 * jnp.sign(g), upgraded, first)))
    new = [
        n
        for n in second
        if n.startswith("boundary/") or n.split("/")[2:3] in (["semantic_refinement"], ["condition_refinement"])
    ]
    assert len(new) > 20
    still = [n for n in new if not np.abs(np.asarray(second[n])).max() > 1e-9 and not n.endswith("k_proj/bias")]
    assert not still


def test_what_does_not_fit_is_refused_before_anything_is_read(plain_directory, plain_params, tmp_path, mesh):
    def refused(cfg, *entries):
        with pytest.raises(UserError) as error:
            initial_params(cfg, 0, entries, mesh)
        return str(error.value)

    assert "no part 'samm' (did you mean 'sam'?)" in refused(PLAIN, f"samm={plain_directory}")
    assert "no model directory" in refused(PLAIN, str(tmp_path / "nowhere"))
    wider = dataclasses.replace(PLAIN, mask_decoder=dataclasses.replace(PLAIN.mask_decoder, mlp_dim=30))
    assert "mask_decoder/layers/fc2/bias" not in refused(wider, str(plain_directory))
    assert "mask_decoder/layers/fc1/bias is (2, 24), the model's is (2, 30)" in refused(wider, str(plain_directory))
    (tmp_path / "tokenizer").mkdir()
    more = unflatten_params({**flatten_params(plain_params), "llm/extra": np.zeros(3, np.float32)})
    other = save_pretrained(tmp_path / "more", more, PLAIN.to_dict(), tmp_path / "tokenizer")
    assert "no place for llm/extra (3,)" in refused(PLAIN, str(other))
    assert "holds no boundary" in refused(FLOW, f"boundary={plain_directory}")
    component = save_pretrained_streaming(
        tmp_path / "sam", {"x": LazyArray((1,), np.dtype("float32"), lambda: np.zeros(1, np.float32))}, None, None,
        component={"family": "sam", "config": {}},
    )  # fmt: skip
    assert "is a sam component and belongs to sam" in refused(PLAIN, f"llm={component}")

"""int8 and bfloat16 weights: what is rounded, by how much, and that a model computes with exactly what is stored."""

from __future__ import annotations

import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from flowseg_jax.checkpoints.find import SHIPPED_MODEL
from flowseg_jax.checkpoints.manifest import flatten_params, manifest, unflatten_params
from flowseg_jax.checkpoints.pretrained import read_model_config, save_pretrained
from flowseg_jax.checkpoints.quantized import load_for_inference
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError
from flowseg_jax.inference.loading import load
from flowseg_jax.models import quantization
from flowseg_jax.models.flowseg import abstract_model, bind_params, params_dict
from flowseg_jax.system.paths import ROOT
from tests.helpers import hf_convert, small


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model directory in bfloat16, its parameters as float32, and its config."""
    cfg = small.lean()
    params = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), small.params(cfg))
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    path = save_pretrained(tmp_path_factory.mktemp("model") / "small", params, cfg.to_dict(), tokenizer, dtype=None)
    return path, {name: x.astype(np.float32) for name, x in flatten_params(params).items()}, cfg


@pytest.fixture(scope="module")
def loaded(stored):
    path, _, cfg = stored
    graphdef, abstract = quantization.abstract_model(cfg, "int8")
    params = load_for_inference(path, cfg, params_dict(abstract), "int8").params
    assert manifest(params) == manifest(params_dict(abstract))
    return graphdef, params


def test_only_matrices_of_the_language_model_and_of_sam_are_rounded(stored, loaded):
    _, plain, _ = stored
    flat = flatten_params(loaded[1])
    rounded = {name for name, x in flat.items() if x.dtype == np.int8}
    assert rounded == {
        *(f"llm/layers/self_attn/{name}_proj/kernel" for name in "qkvo"),
        *(f"llm/layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
        *(
            f"sam/{stack}_layers/attn/{name}/kernel"
            for stack in ("window", "global")
            for name in ("q_proj", "k_proj", "v_proj", "proj")
        ),
        *(f"sam/{stack}_layers/mlp/lin{i}/kernel" for stack in ("window", "global") for i in (1, 2)),
    }
    for name, x in plain.items():
        if name not in rounded:
            assert np.array_equal(flat[name], x), name
            continue
        scale = np.asarray(flat[f"{name}_scale"])
        assert scale.shape == (x.shape[0], x.shape[2])
        assert np.abs(flat[name] * scale[:, None] - x).max() <= 0.5001 * scale.max()
        assert (np.abs(flat[name]).max(1) == 127).all()  # every column reaches its largest number
    assert set(flat) - set(plain) == {f"{name}_scale" for name in rounded}


def test_the_model_computes_with_what_is_stored(stored, loaded):
    _, plain, cfg = stored
    graphdef, params = loaded
    flat = flatten_params(params)
    back = {n: flat[n] * np.asarray(flat[f"{n}_scale"])[:, None] if f"{n}_scale" in flat else flat[n] for n in plain}
    ours, expected = bind_params(graphdef, params), bind_params(abstract_model(cfg)[0], unflatten_params(back))
    rng = np.random.default_rng(0)
    tokens, positions = rng.integers(0, small.VOCAB, (1, 5)), np.arange(5)[None]
    pixels = rng.normal(size=(1, cfg.sam.image_size, cfg.sam.image_size, 3)).astype(np.float32)
    for run in (
        lambda model: model.llm(model.llm.embed(tokens), positions, np.zeros_like(positions)),
        lambda model: model.sam(pixels, (-1,))[0],
    ):
        assert hf_convert.error(run(ours), np.asarray(run(expected))) < 1e-5


def test_bfloat16_halves_the_matrices_and_changes_nothing_that_is_computed_in_bfloat16(stored):
    path, plain, cfg = stored
    graphdef, abstract = quantization.abstract_model(cfg, "bfloat16")
    flat = flatten_params(load_for_inference(path, cfg, params_dict(abstract), "bfloat16").params)
    assert flat.keys() == plain.keys()
    halved = {name for name, x in flat.items() if x.dtype == ml_dtypes.bfloat16}
    assert halved == {name for name in plain if name.endswith(("/kernel", "/embed_tokens", "/lm_head"))}
    models = (bind_params(graphdef, unflatten_params(params)) for params in (flat, plain))
    tokens, positions = np.arange(5)[None] % small.VOCAB, np.arange(5)[None]
    ours, expected = (
        model.llm(model.llm.embed(tokens, np.dtype(ml_dtypes.bfloat16)), positions, np.zeros_like(positions))
        for model in models
    )
    assert ours.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(ours, expected)


def test_a_column_of_zeros_stays_zero_and_what_is_no_number_is_refused():
    name, matrix = "llm/layers/mlp/up_proj/kernel", np.zeros((1, 3, 2), np.float32)
    matrix[0, :, 1] = [1, -2, 0.5]
    made = quantization.quantized(name, matrix)
    assert made[name].tolist() == [[[0, 64], [0, -127], [0, 32]]]
    assert made[f"{name}_scale"].tolist() == [[1.0, np.float32(2 / 127)]]
    matrix[0, 0, 0] = np.nan
    with pytest.raises(UserError, match=f"^{name} has values that are no numbers, which int8 cannot hold$"):
        quantization.quantized(name, matrix)


def test_other_kinds_are_refused(stored):
    with pytest.raises(UserError, match=r"^quantize='int4' \(did you mean 'int8'\?\)$"):
        quantization.abstract_model(stored[2], "int4")
    with pytest.raises(UserError, match="argument --quantize: invalid choice: 'nf4'"):
        flowseg(["eval", "--quantize=nf4"])


@pytest.mark.slow
def test_the_shipped_model_finds_the_same_in_int8():
    scene, texts = ROOT / "examples" / "scenes" / "06.png", ["green triangle", "the square that is not yellow"]
    plain, rounded = load(), load(quantize="int8")
    layers = re.compile(r"(llm/layers|sam/(window|global)_layers)/.*/kernel")  # nothing else is rounded
    shapes = [shape for name, (shape, _) in read_model_config(SHIPPED_MODEL)["manifest"].items() if layers.fullmatch(name)]
    assert shapes and plain.nbytes - rounded.nbytes == sum(3 * math.prod(shape) - 4 * shape[0] * shape[2] for shape in shapes)
    for ours, other in zip(rounded.segment(scene, texts), plain.segment(scene, texts), strict=True):
        assert (ours.mask & other.mask).sum() > 0.97 * (ours.mask | other.mask).sum()
        assert ours.score == pytest.approx(other.score, abs=0.02)

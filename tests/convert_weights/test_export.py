"""Exports at their limits: when a shard is full, what the index says, what a model directory gives besides its parameters."""

from __future__ import annotations

import json
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert_weights import directory, export
from convert_weights.convert import get_family
from convert_weights.families import FAMILIES
from convert_weights.sources import ArraySource
from flowseg_jax.checkpoints.manifest import unflatten_params
from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from tests.helpers import tiny_checkpoints as tiny

BF16 = np.dtype(ml_dtypes.bfloat16)


def view(**arrays):
    source = ArraySource(arrays)
    return types.SimpleNamespace(entries=source.entries, in_order=lambda: iter(arrays), read=source.read)


THREE = {"b": np.arange(10, dtype=np.float32), "a": np.ones((2, 5), np.float32), "c": np.zeros(3, np.float32)}


def write(path, limit, monkeypatch, dtype=None, arrays=THREE):
    monkeypatch.setattr(export, "MAX_SHARD", limit)
    path.mkdir()
    said = []
    export.write_safetensors(path, view(**arrays), dtype, said.append)
    assert said == list(arrays)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    held = {file: set(safetensors.numpy.load_file(path / file)) for file in files}
    assert all((path / file).stat().st_mode & 0o777 == 0o644 for file in files)
    index = path / "model.safetensors.index.json"
    return held, json.loads(index.read_text()) if index.exists() else None


def test_a_shard_may_be_full_to_the_last_byte(tmp_path, monkeypatch):
    assert export.MAX_SHARD == 1_073_741_824
    held, index = write(tmp_path / "one", 92, monkeypatch)
    assert (held, index) == ({"model.safetensors": {"a", "b", "c"}}, None)
    held, index = write(tmp_path / "two", 91, monkeypatch)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert held == {first: {"a", "b"}, second: {"c"}}
    assert index == {"metadata": {"total_size": 92}, "weight_map": {"a": first, "b": first, "c": second}}
    assert list(index["weight_map"]) == ["a", "b", "c"]
    held, index = write(tmp_path / "three", 79, monkeypatch)
    assert [len(names) for names in held.values()] == [1, 2]
    assert index["metadata"]["total_size"] == 92
    held, _ = write(tmp_path / "each", 1, monkeypatch)  # a tensor larger than a shard is a shard
    assert list(held.values()) == [{"b"}, {"a"}, {"c"}]
    held, index = write(tmp_path / "half", 46, monkeypatch, "bfloat16")  # sizes are those of what is written
    assert (len(held), index) == (1, None)
    found = safetensors.numpy.load_file(tmp_path / "half" / "model.safetensors")
    assert {x.dtype for x in found.values()} == {BF16} and found["b"].tolist() == list(range(10))


def test_the_format_is_said_as_transformers_wants_it(tmp_path, monkeypatch):
    write(tmp_path / "x", 92, monkeypatch)
    with safetensors.safe_open(tmp_path / "x" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny whole model of counting numbers, with a tokenizer."""
    root = tmp_path_factory.mktemp("whole")
    tiny.save_tokenizer(root / "tokens")
    cfg = FlowSegConfig.tiny()
    rng = np.random.default_rng(0)
    flat = {name: rng.standard_normal(shape, np.float32) for name, shape in FAMILIES["flowseg"].shapes(cfg).items()}
    save_pretrained(root / "model", unflatten_params(flat), cfg.to_dict(), root / "tokens", {}, None)
    return root / "model", flat, cfg


def test_a_component_of_a_whole_model(whole):
    path, flat, cfg = whole
    for family, prefix, component in (("siglip2", "siglip/", cfg.siglip), ("sam", "sam/", cfg.sam), ("qwen3", "llm/", cfg.llm)):
        if family == "qwen3" and cfg.llm.model_type != family:
            family = cfg.llm.model_type
        found = directory.ModelDirectory(path, get_family(family))
        assert found.cfg == component
        assert found.tokenizer == (path / "tokenizer" if prefix == "llm/" else None)
        assert set(found.entries) == {name.removeprefix(prefix) for name in flat if name.startswith(prefix)}
        for name in list(found.entries)[:3]:
            assert np.array_equal(found.read(name), flat[prefix + name])
            assert found.entries[name] == (flat[prefix + name].shape, np.float32)
    found = directory.ModelDirectory(path, get_family("flowseg"))
    assert (found.cfg, found.tokenizer, set(found.entries)) == (cfg, path / "tokenizer", set(flat))
    name = "llm/embed_tokens"
    assert np.array_equal(found.read(name, 3, 7), flat[name][3:7])


def test_what_is_not_in_a_whole_model(whole):
    path, _, cfg = whole
    other = "phi3" if cfg.llm.model_type != "phi3" else "llama"
    with pytest.raises(UserError) as caught:
        directory.ModelDirectory(path, get_family(other))
    kind = cfg.llm.model_type
    assert str(caught.value) == f"{path} holds a whole model, its language model is {kind}: {other} cannot be taken out of it"
    with pytest.raises(UserError) as caught:
        directory.ModelDirectory(path, get_family("mask2former"))
    assert str(caught.value) == f"{path} holds a whole model: mask2former cannot be taken out of it"


def test_damage_is_the_first_line_of_its_reason(whole, monkeypatch):
    path, _, _ = whole
    found = directory.ModelDirectory(path, get_family("sam"))
    found.entries |= {"pos_embed": found.entries["pos_embed"]._replace(shape=(1, 2))}
    with pytest.raises(
        UserError, match=r" is damaged at sam/pos_embed: its shape is \(12, 12, 96\), config.json says \(1, 2\)$"
    ):
        found.read("pos_embed")

    def fail(*args):
        raise ValueError("x" * 300 + "\nmore")

    monkeypatch.setattr(directory, "verify", fail)
    with pytest.raises(UserError) as caught:
        directory.ModelDirectory(path, get_family("sam")).read("pos_embed")
    assert str(caught.value) == f"{path} is damaged at sam/pos_embed: {'x' * 200}"

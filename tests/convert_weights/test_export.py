"""Exports at their limits: when a shard is full, what the index says, what a model directory gives besides its parameters."""

from __future__ import annotations

import json
import types
import weakref

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from convert_weights import directory, export
from convert_weights.convert import TorchView, get_family, import_params
from convert_weights.families import FAMILIES
from convert_weights.sources import ArraySource
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import abstract_model, bind_params
from tests.helpers import hf_convert
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
    """A tiny whole model of random numbers, with a tokenizer."""
    root = tmp_path_factory.mktemp("whole")
    tiny.save_tokenizer(root / "tokens")
    cfg = FlowSegConfig.tiny()
    rng = np.random.default_rng(0)
    flat = {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in FAMILIES["flowseg"].shapes(cfg).items()}
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


def test_an_export_reads_every_stack_once_and_holds_those_of_one_tensor(whole):
    _, flat, cfg = whole
    given = ArraySource({name.removeprefix("llm/"): x for name, x in flat.items() if name.startswith("llm/")})
    read, alive = [], []

    def copy(name):
        x = np.array(given.read(name))
        read.append(name)
        alive.append(weakref.ref(x))
        return x

    view = TorchView(FAMILIES["qwen3"], cfg.llm, types.SimpleNamespace(name="it", entries=given.entries, read=copy))
    held = []
    for name in view.in_order():
        view.read(name)
        held.append(sum(x() is not None for x in alive))
    assert sorted(read) == sorted(given.entries) and max(held) == 1


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


CLASSES = {
    "language_model": transformers.Qwen3ForCausalLM,
    "siglip": transformers.SiglipVisionModel,
    "sam": transformers.SamVisionModel,
}
NOT_OURS = {"language_model": (), "siglip": ("post_layernorm.",), "sam": ("neck.",)}  # what our hidden states do not depend on


@pytest.fixture(scope="module")
def for_huggingface(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "out"
    assert flowseg(["export", f"--checkpoint={whole[0]}", f"--out={out}", "--format=hf"]) == 0
    return out


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_each_component_and_computes_the_same(whole, for_huggingface, name):
    _, flat, cfg = whole
    theirs, said = CLASSES[name].from_pretrained(
        for_huggingface / name, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not said["unexpected_keys"] and not said["mismatched_keys"]
    assert all(any(part in key for part in NOT_OURS[name]) for key in said["missing_keys"]), said["missing_keys"]
    ours = bind_params(abstract_model(cfg)[0], unflatten_params(flat))
    rng, out = np.random.default_rng(1), {}
    if name == "language_model":
        tokens = rng.integers(0, cfg.llm.vocab_size, (1, 6))
        positions = np.arange(6)[None]
        ours.llm(ours.llm.embed(tokens), positions, np.zeros_like(positions), out)
        states, found = theirs(torch.tensor(tokens), output_hidden_states=True).hidden_states, out["llm/hidden_states"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(for_huggingface / name)
        assert len(tokenizer) <= cfg.llm.vocab_size and tokenizer.eos_token_id == theirs.config.eos_token_id
    else:
        side = getattr(cfg, name).image_size
        pixels = rng.normal(size=(1, side, side, 3)).astype(np.float32)
        states = theirs(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
        getattr(ours, name)(pixels, **({"hidden_states": (-1,)} if name == "sam" else {}), out=out)
        found = out[f"{name}/hidden_states"]
    assert len(found) == len(states)
    for mine, other in zip(found, states, strict=True):
        assert hf_convert.error(mine, other.detach().numpy()) < 1e-5


def test_beside_them_stands_the_whole_model_under_the_names_of_xsam(whole, for_huggingface):
    _, flat, cfg = whole
    assert sorted(path.name for path in for_huggingface.iterdir()) == ["language_model", "sam", "siglip", "xsam"]
    again = flatten_params(
        import_params("flowseg", safetensors.numpy.load_file(for_huggingface / "xsam/model.safetensors"), cfg)
    )
    assert again.keys() == flat.keys() and all(np.array_equal(again[name], flat[name]) for name in flat)


def test_an_export_goes_to_the_hub_with_the_card_of_its_model(whole, tmp_path, monkeypatch):
    said = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private) == ("org/name", False)

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            said[path_in_repo] = path_or_fileobj.decode()

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            said["folder"] = folder_path, allow_patterns
            return "https://hub/org/name"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("convert_weights.export.export_for_huggingface", lambda source, out, dtype: tmp_path)
    flowseg(["export", f"--checkpoint={whole[0]}", f"--out={tmp_path}/x", "--format=hf", "--push-to-hub=org/name"])
    assert said["folder"] == (str(tmp_path), None)
    assert said["README.md"].startswith("---\nlibrary_name: transformers") and 'subfolder="sam"' in said["README.md"]


def test_flags_belong_to_a_format(whole, tmp_path):
    for flags, message in (
        (["--dtype=bfloat16"], "--dtype belongs to --format=hf, not to --format=jax"),
        (["--format=hf", "--batch=2"], "--batch belongs to --format=jax, not to --format=hf"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            flowseg(["export", f"--checkpoint={whole[0]}", f"--out={tmp_path}/x", *flags])
    with pytest.raises(UserError, match="exists: remove it"):
        flowseg(["export", f"--checkpoint={whole[0]}", f"--out={whole[0]}", "--format=hf"])

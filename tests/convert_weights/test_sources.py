"""Files as sources: what is read is what was saved, and every damage is one clear error."""

from __future__ import annotations

import json
import os
import pickle

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from convert_weights import configs_from_hf, job
from convert_weights.convert import export_params, import_params
from convert_weights.files import open_source
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.models.language_config import LanguageConfig
from tests.helpers import tiny_checkpoints as tiny

BF16 = np.dtype(ml_dtypes.bfloat16)


def tensors(rng):
    return {
        "a.weight": rng.standard_normal((7, 3)).astype(np.float32),
        "b": rng.standard_normal((4, 2, 5)).astype(BF16),
        "c.scale": rng.standard_normal(6).astype(np.float16),
        "d": np.array(1.5, np.float32),
        "e.empty": np.zeros((0, 4), np.float32),
    }


def check_reads(source, expected):
    assert {n: (e.shape, e.dtype) for n, e in source.entries.items()} == {n: (x.shape, x.dtype) for n, x in expected.items()}
    for name, x in expected.items():
        assert np.array_equal(source.read(name), x)
        assert source.read(name).flags.writeable
    assert np.array_equal(source.read("a.weight", 2, 5), expected["a.weight"][2:5])
    assert np.array_equal(source.read("b", 3), expected["b"][3:])


def shard(directory, parts):
    """Shards with their index, as Hugging Face writes them."""
    names = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        safetensors.numpy.save_file(part, directory / file)
        names |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def torch_state(expected):
    bits = {n: torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16) for n, x in expected.items() if x.dtype == BF16}
    return {n: bits[n] if n in bits else torch.from_numpy(x.copy()) for n, x in expected.items()}


def test_safetensors(tmp_path, rng):
    expected = tensors(rng)
    file = tmp_path / "any name.safetensors"
    safetensors.numpy.save_file(expected, file)
    check_reads(open_source(file), expected)
    check_reads(open_source(tmp_path), expected)


def test_shards(tmp_path, rng):
    expected = tensors(rng)
    names = list(expected)
    shard(tmp_path, [{n: expected[n] for n in names[:2]}, {n: expected[n] for n in names[2:]}])
    check_reads(open_source(tmp_path), expected)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 shards: model-00002-of-00002.safetensors; download them again"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds shards without their index"):
        open_source(tmp_path)


def test_an_index_that_promises_too_much(tmp_path, rng):
    expected = tensors(rng)
    shard(tmp_path, [expected])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names 1 tensors that its shards do not hold: more; download"):
        open_source(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(tmp_path, rng, nested, zipped):
    expected = tensors(rng)
    state = torch_state(expected)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": state} if nested else state, file, _use_new_zipfile_serialization=zipped)
    check_reads(open_source(tmp_path), expected)


def test_a_view_into_a_larger_storage(tmp_path):
    big = torch.arange(40000, dtype=torch.float32).reshape(200, 200)
    torch.save({"a": big[:, 3:7], "b": big[5], "c": big}, tmp_path / "x.pth")
    source = open_source(tmp_path / "x.pth")
    for _ in range(2):  # the pages that were given back are read again
        assert np.array_equal(source.read("a"), big[:, 3:7].numpy())
        assert np.array_equal(source.read("b"), big[5].numpy())
        assert np.array_equal(source.read("c", 7, 190), big[7:190].numpy())


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("how", ["torch", "pickle", "old"])
def test_a_pickle_that_executes_is_refused_and_does_not(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"a": Evil()}))
    else:
        torch.save({"a": torch.zeros(3), "b": Evil()}, file, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(UserError, match=r"pytorch_model.bin (is refused: it is a pickle|cannot be read)") as caught:
        open_source(file)
    assert "\n" not in str(caught.value)
    if how == "torch":
        assert "(it asks for posix.system)" in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_pytorch_files_that_are_no_checkpoints(tmp_path):
    torch.save({"a": torch.zeros(3), "step": 7}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds 1 other things than tensors: step"):
        open_source(tmp_path / "a.pth")
    torch.save([torch.zeros(3)], tmp_path / "b.pth")
    with pytest.raises(UserError, match="holds a list, not a dict of tensors"):
        open_source(tmp_path / "b.pth")
    torch.save({"a": torch.zeros(3000)}, tmp_path / "c.pth")
    os.truncate(tmp_path / "c.pth", 6000)
    with pytest.raises(UserError, match=r"c.pth (cannot be read|is refused)"):
        open_source(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[:-9], r"no complete safetensors file \(\d+ bytes; incomplete metadata.*\): download it again"),
        (lambda b: b[:100], "no complete safetensors file"),
        (lambda b: b[:3], "no complete safetensors file"),
        (lambda b: b"", "no complete safetensors file"),
        (lambda b: b[:8] + b"?" * (len(b) - 8), r"\(500 bytes; invalid JSON in header"),
        (lambda b: b.replace(b"[7,3]", b"[7,4]"), r"\(500 bytes; invalid shape, data type, or offset for tensor\)"),
        (lambda b: b.replace(b'"F16"', b'"F8X"'), "unknown variant `F8X`"),
        (lambda b: b + b"more", "incomplete metadata, file not fully covered"),
    ],
)
def test_damaged_safetensors(tmp_path, rng, spoil, message):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors(rng), file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        open_source(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, rng):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors(rng), file)
    source = open_source(file)
    os.truncate(file, file.stat().st_size - 200)
    with pytest.raises(UserError, match=r"x.safetensors cannot be read any more \(.*\): download it again"):
        for name in source.entries:
            source.read(name)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint files"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="no such file or directory$"):
        open_source(tmp_path / "nope")
    (tmp_path / "a.safetensors").write_text("")
    (tmp_path / "b.pth").write_text("")
    with pytest.raises(UserError, match=r"holds 2 checkpoint files: a.safetensors, b.pth; name one of them"):
        open_source(tmp_path)
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(UserError, match=r"weights.txt is no checkpoint: expected .safetensors"):
        open_source(tmp_path / "weights.txt")
    with pytest.raises(
        UserError, match=r"Qwen/Qwen3-4B: no such file or directory, and no download from the hub .*its directory"
    ):
        open_source("Qwen/Qwen3-4B")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama as llama.cpp writes it, one matrix quantised to eight bits, with a SmolLM2-like tokenizer."""
    model = tiny.huggingface("llama", hidden_size=32, intermediate_size=64, head_dim=8)
    cfg = LanguageConfig.from_hf(model.config.to_dict())
    arrays = export_params("llama", import_params("llama", tiny.state(model), cfg), cfg, layout="gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "ab", "1"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    quantised = "blk.1.ffn_down.weight"
    for name, x in arrays.items():
        if name == quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x.astype(np.float16) if name == "blk.0.attn_q.weight" else x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, arrays, cfg, quantised


def test_gguf(gguf_file, tmp_path):
    path, arrays, cfg, quantised = gguf_file
    source = open_source(path)
    read = configs_from_hf.component_config("llama", source.config())
    assert read == cfg
    assert source.entries["blk.0.attn_q.weight"].dtype == np.float16
    for name, x in arrays.items():
        found = source.read(name)
        assert found.shape == x.shape
        assert np.abs(found.astype(np.float32) - x).max() <= (0.01 * np.abs(x).max() if name == quantised else 1e-4)
    assert np.array_equal(source.read(quantised, 5, 9), source.read(quantised)[5:9])
    ours = import_params("llama", source, cfg)
    assert np.array_equal(flatten_params(ours)["layers/mlp/up_proj/kernel"][2], arrays["blk.2.ffn_up.weight"].T)
    source.save_tokenizer(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.encode("<|im_start|>ab b11<|im_end|>") == [1, 6, 5, 4, 7, 7, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, "<|im_end|>")


def test_damaged_gguf(gguf_file, tmp_path):
    whole = gguf_file[0].read_bytes()
    for part in (whole[: len(whole) // 2], whole[:10], b"nonsense" * 9):
        (tmp_path / "x.gguf").write_bytes(part)
        with pytest.raises(UserError, match=r"x.gguf cannot be read, it is damaged or truncated"):
            open_source(tmp_path / "x.gguf")


def test_a_gguf_is_no_part_and_says_what_it_lacks(gguf_file, monkeypatch):
    for path in (gguf_file[0], gguf_file[0].parent):
        with pytest.raises(UserError, match=r"convert a GGUF by itself first \(flowseg convert llama \.\.\.\), then give its"):
            job._llm_family(path)
    source = open_source(gguf_file[0])
    found = type(source)._field
    monkeypatch.setattr(type(source), "_field", lambda self, name: None if "block" in name else found(self, name))
    with pytest.raises(UserError, match=r"tiny\.gguf lacks llama\.block_count$"):
        source.config()

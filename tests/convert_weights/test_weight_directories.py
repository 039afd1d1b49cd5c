"""What lies beside the weights: which set is taken, what is said of the others, and what must never be taken for a model."""

from __future__ import annotations

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from convert_weights import torch_source
from convert_weights.files import open_source
from flowseg_jax.cli import convert
from flowseg_jax.errors import UserError
from tests.helpers import tiny_checkpoints as tiny

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 4967215360\n"
A, B, C, D = (np.full((2, 3), i, np.float32) for i in range(4))
LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((4, 24), np.float32)}


def save(directory, name, x):
    """One of the four sets of weights that transformers knows, with x as its tensor `w`."""
    if name.endswith(".safetensors"):
        safetensors.numpy.save_file({"w": x}, directory / name)
    elif name.endswith(".bin"):
        torch.save({"w": torch.from_numpy(x)}, directory / name)
    else:
        stem, kind = ("model", "safetensors") if "safetensors" in name else ("pytorch_model", "bin")
        save(directory, f"{stem}-00001-of-00001.{kind}", x)
        (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": {"w": f"{stem}-00001-of-00001.{kind}"}}))


SETS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("there", [(0, 1, 2, 3), (1, 2, 3), (2, 3), (3,), (0, 2), (1, 3)])
def test_the_set_that_transformers_takes(tmp_path, there):
    for i in there:
        save(tmp_path, SETS[i], (A, B, C, D)[i])
    source = open_source(tmp_path)
    assert source.read("w")[0, 0] == min(there)
    others = [SETS[i] for i in there[1:]]
    assert len(source.notes) == bool(others)
    assert all(name in source.notes[0] for name in others)
    if others:
        assert source.notes[0].startswith(f"taken: {SETS[min(there)]}; not used beside it: ")


def test_the_order_is_that_of_the_installed_transformers(tmp_path, monkeypatch):
    """Against the files that its own loading resolves, which goes no further here."""
    import transformers
    from transformers import modeling_utils

    resolved = []

    def stop(*args, **kwargs):
        resolved.extend(original(*args, **kwargs)[0])
        raise InterruptedError

    original = modeling_utils._get_resolved_checkpoint_files
    monkeypatch.setattr(modeling_utils, "_get_resolved_checkpoint_files", stop)
    tiny.huggingface("qwen3").config.save_pretrained(tmp_path)
    for i, name in enumerate(SETS):
        save(tmp_path, name, (A, B, C, D)[i])
    for i, name in enumerate(SETS):
        resolved.clear()
        with pytest.raises(InterruptedError):
            transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
        (file,) = resolved
        theirs = safetensors.numpy.load_file(file) if file.endswith("safetensors") else torch.load(file)
        assert np.array(theirs["w"])[0, 0] == open_source(tmp_path).read("w")[0, 0] == i
        (tmp_path / name).unlink()


def test_what_trainers_leave_beside_a_model(tmp_path):
    safetensors.numpy.save_file({"w": A}, tmp_path / "own.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        (tmp_path / name).write_bytes(b"no model")
    assert open_source(tmp_path).notes == []
    (tmp_path / "global_step20").mkdir()
    assert open_source(tmp_path).notes == ["taken: own.safetensors; not used beside it: global_step20"]
    (tmp_path / "own.safetensors").rename(tmp_path / "model.safetensors")
    save(tmp_path, "other.safetensors", B)
    (note,) = open_source(tmp_path).notes
    assert note == "taken: model.safetensors; not used beside it: other.safetensors, global_step20"


def test_an_adapter_is_never_left_out_without_a_word(tmp_path):
    save(tmp_path, "model.safetensors", A)
    (tmp_path / "adapter_config.json").write_text("{}")
    safetensors.numpy.save_file(LORA, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model.safetensors\) beside model.safetensors, .*: merge the adapter first"):
        open_source(tmp_path)
    source = open_source(tmp_path / "model.safetensors")  # who names the file means it
    assert "adapter_config.json, adapter_model.safetensors" in source.notes[0]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json, .*\) and no model: merge the adapter first"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="and no model: merge the adapter first"):
        convert.main(["flowseg", f"llm={tmp_path}", "siglip=x", "sam=y", "--check"])
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="and no model: merge the adapter first"):
        convert.main(["qwen3", str(tmp_path), "--check"])


@pytest.fixture
def qwen(tmp_path):
    """A tiny Qwen3 in Hugging Face's form, its tensors changed by a function before they are saved."""

    def make(change=lambda tensors: tensors, config=None):
        model = tiny.huggingface("qwen3")
        model.config.save_pretrained(tmp_path)
        tiny.save_tokenizer(tmp_path)
        safetensors.numpy.save_file(change(tiny.state(model)), tmp_path / "model.safetensors")
        if config:
            values = json.loads((tmp_path / "config.json").read_text())
            (tmp_path / "config.json").write_text(json.dumps(values | config))
        return tmp_path

    return make


@pytest.mark.parametrize("inside", ["base_layer.weight", "lora_A.default.weight", "modules_to_save.default.weight"])
def test_an_adapter_by_its_names(qwen, inside):
    path = qwen(lambda t: t | {f"base_model.model.model.layers.0.self_attn.q_proj.{inside}": A})
    with pytest.raises(UserError, match=r"holds an adapter \(1 of 36 tensors: .*\): merge the adapter first"):
        convert.main(["qwen3", str(path), "--check"])


@pytest.mark.parametrize("beside", ["qweight", "SCB", "weight_scale_inv", "absmax", "quant_state.bitsandbytes__nf4", "g_idx"])
def test_quantised_weights_by_their_names(qwen, beside):
    name = f"model.layers.0.self_attn.q_proj.{'weight.' if 'quant' in beside or 'abs' in beside else ''}{beside}"
    path = qwen(lambda t: t | {name: np.zeros(3, np.uint8)})
    with pytest.raises(UserError, match=r"holds quantised weights \(1 of 36 tensors: .*\): dequantise it first"):
        convert.main(["qwen3", str(path), "--check"])


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}},
    ],
)
def test_quantised_weights_by_their_config(qwen, config):
    path = qwen(config=config)
    with pytest.raises(UserError, match=r"quantization_config \(bitsandbytes\) says .* dequantise it first"):
        convert.main(["qwen3", str(path), "--check"])


def test_zero_shards_and_distributed_checkpoints_have_their_remedy(tmp_path):
    run = tmp_path / "run"
    (run / "global_step50").mkdir(parents=True)
    (run / "latest").write_text("global_step50")
    (run / "zero_to_fp32.py").write_text("")
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save({"module": {}}, run / "global_step50" / name)
    for path in (run, run / "global_step50", run / "global_step50" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        with pytest.raises(UserError, match=rf"ZeRO shards .*: python zero_to_fp32.py {run} DIR"):
            open_source(path)
    dcp = tmp_path / "dcp"
    (dcp / "pytorch_model_fsdp_0").mkdir(parents=True)
    (dcp / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"")
    (dcp / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"")
    for path in (dcp, dcp / "pytorch_model_fsdp_0", dcp / "pytorch_model_fsdp_0" / "__0_0.distcp"):
        with pytest.raises(UserError, match=rf"format_utils dcp_to_torch {dcp}/pytorch_model_fsdp_0 model.pth"):
            open_source(path)


def test_placeholders_of_zero_3_have_their_remedy(qwen):
    path = qwen(lambda tensors: {name: np.zeros(0, np.float32) for name in tensors})
    with pytest.raises(UserError, match=r"most of its tensors are empty: DeepSpeed's ZeRO-3 .* zero_to_fp32.py") as caught:
        convert.main(["qwen3", str(path), "--check"])
    assert str(caught.value).count("expected") == 10
    assert "; and 3 more such lines, 35 tensors in all" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_git_lfs_pointers(qwen, name):
    path = qwen()
    if name.endswith("index.json"):
        (path / "model.safetensors").unlink()
    (path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`"):
        convert.main(["qwen3", str(path), "--check"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "model.pth", "model-00001-of-00001.safetensors"])
def test_git_lfs_pointers_of_other_weights(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    if "-of-" in name:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["/{0}/out.safetensors", "../out.safetensors", "a/../../out.safetensors", "", ".", "a\0.safetensors", "..\\out.bin"],
)
def test_an_index_never_leads_out_of_its_folder(tmp_path, shard):
    save(tmp_path, "out.safetensors", A)
    inside = tmp_path / "in"
    (inside / "a").mkdir(parents=True)
    shard = shard.format(tmp_path)
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(UserError, match=r"names the shard .*: a shard is a file beside its index, no other path") as caught:
        open_source(inside)
    assert str(caught.value).isprintable()


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path):
    save(tmp_path, "blob.safetensors", A)
    (tmp_path / "snapshot").mkdir()
    os.symlink("../blob.safetensors", tmp_path / "snapshot" / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "snapshot" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(open_source(tmp_path / "snapshot").read("w"), A)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"w": 7}}', '{"weight_map": {}}', "[" * 10**5]
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model.safetensors.index.json (is no index|cannot be read|holds no JSON object)"):
        open_source(tmp_path)


def test_parameters_that_require_grad(tmp_path):
    model = tiny.huggingface("qwen3")
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        torch.save(dict(model.to(kind).named_parameters()), tmp_path / "x.pth")
        source = open_source(tmp_path / "x.pth")
        for name, x in model.named_parameters():
            found = source.read(name)
            assert str(found.dtype) == str(kind).removeprefix("torch.")
            assert np.array_equal(found.astype(np.float32), x.detach().float().numpy())


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(2, 3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(2, 3).to(torch.float8_e5m2), "float8_e5m2"),
        (torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8), "qint8"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_tensors_that_are_no_plain_arrays(tmp_path, tensor, kind):
    torch.save({"a": torch.zeros(2), "b": tensor}, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=rf"x.pth(: 1 tensors have the dtype {kind}, .*: b| is refused| cannot be read)"
    ) as caught:
        open_source(tmp_path / "x.pth")
    assert ("quantised" in str(caught.value)) == (kind[:2] in ("fl", "qi"))


def test_a_tensor_larger_than_its_storage_gives_nothing_away(tmp_path, monkeypatch):
    """Its pages are given back after reading: only its own ones, whatever it says of its size."""
    own = torch.ones(5000)
    torch.save({"a": own.expand(3000, 5000), "b": own.new_full((2048, 512), 7.0)}, tmp_path / "x.pth")
    source = open_source(tmp_path / "x.pth")
    given = []

    class Library:
        def __init__(self, name):
            pass

        def madvise(self, first, length, advice):
            given.append((first.value, first.value + length.value))

    monkeypatch.setattr(torch_source.ctypes, "CDLL", Library)
    assert source.read("a").min() == 1
    assert source.read("b").min() == 7
    storages = [source._tensors[name].untyped_storage() for name in ("a", "b")]
    assert len(given) == 2
    for (first, end), storage in zip(given, storages, strict=True):
        assert storage.data_ptr() <= first < end <= storage.data_ptr() + storage.nbytes()


def test_what_lay_beside_the_weights_is_said(tmp_path):
    torch.save({"model": {"w": torch.zeros(2)}, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "x.pth")
    (note,) = open_source(tmp_path / "x.pth").notes
    assert note.endswith("x.pth: the weights were taken, not optimizer, epoch beside them")


def test_names_that_are_no_texts(tmp_path):
    torch.save({1: torch.zeros(2), (2, 3): torch.zeros(2), "step": 7}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds 3 other things than tensors: a int, a tuple, step; save its weights alone"):
        open_source(tmp_path / "x.pth")


def test_float8_in_both_formats_is_said_alike(tmp_path):
    safetensors.numpy.save_file({"b": np.zeros(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x.safetensors: 1 tensors have the dtype F8_E4M3, .*: b; the checkpoint is quantised"):
        open_source(tmp_path)

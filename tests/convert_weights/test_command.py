"""`flowseg convert` from files to a model directory and back; nothing is left of what fails."""

from __future__ import annotations

import dataclasses
import errno
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorstore as ts
import torch
import transformers
from safetensors.numpy import save_file

from convert_weights import export
from convert_weights.convert import get_family, import_params
from flowseg_jax import sharding
from flowseg_jax.checkpoints import pretrained, streaming
from flowseg_jax.checkpoints.manifest import checksums, flatten_params, manifest
from flowseg_jax.cli import convert
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import LanguageConfig
from tests.helpers import tiny_checkpoints as tiny

BF16 = np.dtype(ml_dtypes.bfloat16)
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "hidden_size": 32}
SIGLIP |= {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
LLM = {"model_type": "qwen3", "vocab_size": 264, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
LLM |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
LLM |= {"tie_word_embeddings": True}
XSAM_FLAGS = ["--set", "pixel_decoder.num_heads=4", "--set", "pixel_decoder.num_points=4", "--set", "mask_decoder.num_heads=4"]


def equal(a, b) -> bool:
    a, b = flatten_params(a), flatten_params(b)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


@pytest.fixture
def hf(tmp_path):
    """Makes a directory of a tiny Hugging Face model in bfloat16, a language model's with tokenizer."""

    def make(family: str):
        directory = tmp_path / f"hf_{family}"
        tiny.huggingface(family).to(torch.bfloat16).save_pretrained(directory)
        if family in ("qwen3", "phi3", "llama"):
            tiny.save_tokenizer(directory)
        return directory

    return make


@pytest.fixture
def xsam(tmp_path):
    """A directory with an X-SAM checkpoint as its authors write it, and the configs of its components."""
    state = {name: torch.from_numpy(x).to(torch.bfloat16) for name, x in tiny.xsam_tensors().items()}
    (tmp_path / "xsam").mkdir()
    torch.save({"state_dict": state}, tmp_path / "xsam" / "pytorch_model.bin")
    for name, config in (("siglip", SIGLIP), ("llm", LLM)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    tiny.save_tokenizer(tmp_path / "llm")
    flags = ["--llm", str(tmp_path / "llm"), "--siglip", str(tmp_path / "siglip"), *XSAM_FLAGS]
    return tmp_path / "xsam", {name: x.view(torch.uint16).numpy().view(BF16) for name, x in state.items()}, flags


def run(*arguments) -> int:
    return convert.main([str(argument) for argument in arguments])


def leftovers(tmp_path):
    return [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_a_language_model_with_our_marks(tmp_path, hf, capsys):
    source = hf("qwen3")
    run("qwen3", source, tmp_path / "out")
    loaded = pretrained.load_pretrained(tmp_path / "out", dtype=None, allow_component=True)
    cfg = LanguageConfig.from_hf(json.loads((source / "config.json").read_text()))
    cfg = dataclasses.replace(cfg, vocab_size=262)  # 259 ids and the three special tokens, though the table has 280 rows
    assert loaded.component == {"family": "qwen3", "config": dataclasses.asdict(cfg)}
    tensors = {
        name: x.view(torch.uint16).numpy().view(BF16)
        for name, x in tiny.huggingface("qwen3").to(torch.bfloat16).state_dict().items()
    }
    assert equal(loaded.params, import_params("qwen3", tensors, cfg))
    tokenizer = load_tokenizer(loaded.tokenizer_dir)
    assert (tokenizer.seg, tokenizer.phrase_start, tokenizer.phrase_end, tokenizer.vocab) == (259, 260, 261, 262)
    printed = capsys.readouterr().out
    assert "embed_tokens (262, 24) bfloat16 <- model.embed_tokens.weight" in printed
    assert "layers/self_attn/q_proj/kernel (3, 24, 32) bfloat16 <- model.layers.{0-2}.self_attn.q_proj.weight" in printed
    assert "resized embed_tokens: 280 rows in the checkpoint, 262 here" in printed
    assert "peak memory" in printed
    stored = pretrained.read_model_config(tmp_path / "out", allow_component=True)
    assert stored["checksums"] == checksums(loaded.params)
    assert stored["manifest"] == manifest(loaded.params)
    with pytest.raises(UserError, match=r"out holds a component \(qwen3\), not a whole model: build one"):
        pretrained.load_pretrained(tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]


def test_check_does_everything_but_write(tmp_path, hf, capsys):
    run("sam", hf("sam"), "--check")
    printed = capsys.readouterr().out
    assert "global_layers/attn/q_proj/kernel (2, 24, 24) bfloat16 <- vision_encoder.layers.{0,3}.attn.qkv.weight" in printed
    assert "checked: " in printed
    assert leftovers(tmp_path) == []


def test_export_and_back(tmp_path, hf):
    source = hf("phi3")
    run("phi3", source, tmp_path / "out1")
    run("phi3", tmp_path / "out1", tmp_path / "out2", "--export")
    exported = safetensors.numpy.load_file(tmp_path / "out2" / "model.safetensors")
    original = safetensors.numpy.load_file(source / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, x in exported.items():  # the special tokens have cut both tables to the tokenizer
        assert np.array_equal(x, original[name][: len(x)])
    run("phi3", tmp_path / "out2", tmp_path / "out3")
    assert equal(*(pretrained.load_pretrained(tmp_path / f"out{i}", dtype=None, allow_component=True).params for i in (1, 3)))
    import transformers

    theirs = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "out2")
    assert theirs.config.vocab_size == 262
    assert np.array_equal(theirs.lm_head.weight.detach().float().numpy(), exported["lm_head.weight"].astype(np.float32))


def test_an_export_of_several_shards(tmp_path, hf, monkeypatch):
    source = hf("qwen3")
    run("qwen3", source, tmp_path / "out1")
    monkeypatch.setattr(export, "MAX_SHARD", 20_000)
    in_memory = []
    monkeypatch.setattr(
        export, "save_file", lambda arrays, *a, **k: [in_memory.append(arrays.keys()), save_file(arrays, *a, **k)]
    )
    run("qwen3", tmp_path / "out1", tmp_path / "out2", "--export")
    index = json.loads((tmp_path / "out2" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out2").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(in_memory))]
    assert len(files) == 2
    original = safetensors.numpy.load_file(source / "model.safetensors")
    total = 0
    for file, names in zip(files, in_memory, strict=True):
        found = safetensors.numpy.load_file(tmp_path / "out2" / file)
        assert found.keys() == names == {name for name, place in index["weight_map"].items() if place == file}
        assert all(np.array_equal(x, original[name][: len(x)]) for name, x in found.items())
        size = sum(x.nbytes for x in found.values())
        assert size <= 20_000
        assert (tmp_path / "out2" / file).stat().st_mode & 0o777 == 0o644
        total += size
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == original.keys()
    run("qwen3", tmp_path / "out2", tmp_path / "out3")
    assert equal(*(pretrained.load_pretrained(tmp_path / f"out{i}", dtype=None, allow_component=True).params for i in (1, 3)))
    import transformers

    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "out2").state_dict()
    assert all(np.array_equal(theirs[n].float().numpy(), x[: len(theirs[n])].astype(np.float32)) for n, x in original.items())


def test_an_export_to_a_full_disk_leaves_nothing(tmp_path, hf, monkeypatch):
    run("sam", hf("sam"), tmp_path / "out1")

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match=r"out2 could not be written: .*No space left on device"):
        run("sam", tmp_path / "out1", tmp_path / "out2", "--export")
    assert leftovers(tmp_path) == ["out1"]


def test_xsam_becomes_a_model_that_runs(tmp_path, xsam, capsys):
    source, tensors, flags = xsam
    tokenizer = tiny.save_tokenizer(tmp_path / "tokens", more=2)  # 261 ids: with the special tokens the 264 rows of the table
    assert tokenizer == 261
    run("xsam", source, tmp_path / "out1", "--tokenizer", tmp_path / "tokens", *flags)
    loaded = pretrained.load_pretrained(tmp_path / "out1", dtype=None)
    cfg = FlowSegConfig.from_dict(loaded.model_config)
    remat = lambda part: dataclasses.replace(part, remat="full")  # noqa: E731
    assert cfg == dataclasses.replace(tiny.XSAM, dtype="bfloat16", llm=remat(tiny.XSAM.llm))
    assert equal(loaded.params, import_params("xsam", tensors, cfg))
    assert loaded.extra["prompts"] == {"chat_template": "qwen3_instruct"}
    abstract = flowseg.params_dict(flowseg.abstract_model(cfg)[1])
    restored = pretrained.load_pretrained(tmp_path / "out1", abstract).params  # as eval.py and predict.py read it
    assert equal(jax.tree.map(np.asarray, restored), jax.tree.map(lambda x: x.astype(np.float32), loaded.params))

    run("xsam", tmp_path / "out1", tmp_path / "out2", "--export")
    assert equal(safetensors.numpy.load_file(tmp_path / "out2" / "model.safetensors"), tensors)
    run("xsam", tmp_path / "out2", tmp_path / "out3")  # its own config.json says everything
    again = pretrained.load_pretrained(tmp_path / "out3", dtype=None)
    assert again.model_config == loaded.model_config
    assert equal(again.params, loaded.params)

    capsys.readouterr()
    run("xsam", source, tmp_path / "out4", "--tokenizer", tmp_path / "tokens", *flags, "--mode", "sr_cr")
    upgraded = pretrained.load_pretrained(tmp_path / "out4", dtype=None)
    fresh = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.endswith(" <- fresh")]
    added = flatten_params(upgraded.params).keys() - flatten_params(loaded.params).keys()
    assert set(fresh) == added == set(upgraded.extra["converted"]["fresh"])
    assert upgraded.model_config["semantic_flow"]["norm"] == "residual"
    run("qwen3", tmp_path / "out4", tmp_path / "out5", "--export")  # a component out of a whole model
    table = safetensors.numpy.load_file(tmp_path / "out5" / "model.safetensors")["model.embed_tokens.weight"]
    assert np.array_equal(table, tensors["llm.model.embed_tokens.weight"])


def test_xsam_writes_whatever_bos_there_is(tmp_path, xsam, hf):
    """A tokenizer that names a bos and never writes it: X-SAM does, a language model by itself does not."""
    source, _, flags = xsam
    tiny.save_tokenizer(tmp_path / "tokens", more=2)
    named = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tokens"))
    named.bos_token = "<|endoftext|>"
    named.save_pretrained(str(tmp_path / "tokens"))
    run("xsam", source, tmp_path / "out1", "--tokenizer", tmp_path / "tokens", *flags)
    run("qwen3", hf("qwen3"), tmp_path / "out2", "--tokenizer", tmp_path / "tokens")
    ours = [load_tokenizer(tmp_path / out / "tokenizer") for out in ("out1", "out2")]
    bos = named.convert_tokens_to_ids("<|endoftext|>")
    assert [tokenizer.bos for tokenizer in ours] == [bos, None]
    assert ours[0].hf.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)[:2] == [
        bos,
        named.convert_tokens_to_ids("<|im_start|>"),
    ]


def test_xsam_needs_the_right_tokenizer_and_the_right_presets(tmp_path, xsam):
    source, _, flags = xsam
    with pytest.raises(UserError, match="tokenizer has 262 ids with its segmentation tokens, the checkpoint's table 264 rows"):
        run("xsam", source, tmp_path / "out", "--tokenizer", tmp_path / "llm", *flags)
    with pytest.raises(UserError, match="xsam needs its language model's tokenizer: give --tokenizer DIR"):
        run("xsam", source, tmp_path / "out", *flags)
    with pytest.raises(UserError, match=r"width 64 and 2 layers, no preset has these; give --llm DIR"):
        run("xsam", source, "--check", *flags[2:])
    with pytest.raises(
        UserError, match=r"width 32, patches of 14 and 16 tokens, the config has 1152, 14 and 729; give --siglip"
    ):
        run("xsam", source, "--check", *flags[:2])
    with pytest.raises(UserError, match=r"--set mask_decoder.num_head=4: expected KEY=VALUE with a key of the config"):
        run("xsam", source, "--check", *flags, "--set", "mask_decoder.num_head=4")
    assert leftovers(tmp_path) == []


def test_a_whole_model_from_its_components(tmp_path, hf):
    run("siglip2", hf("siglip2"), tmp_path / "siglip")
    run("llama", hf("llama"), tmp_path / "llm")
    out = tmp_path / "out"
    small = [
        "--set",
        "mask_decoder.num_layers=2",
        "--set",
        "mask_decoder.mlp_dim=8",
        "--set",
        "mask_decoder.num_queries=3",
        "--set",
        "pixel_decoder.mlp_dim=8",
    ]
    small += ["--set", "pixel_decoder.num_layers=1"]
    # one component as its authors publish it, two of our own directories
    run("flowseg", f"llm={tmp_path / 'llm'}", f"siglip={tmp_path / 'siglip'}", f"sam={hf('sam')}", out, *small)
    loaded = pretrained.load_pretrained(out, dtype=None)
    cfg = FlowSegConfig.from_dict(loaded.model_config)
    assert (cfg.connector_hidden_layers, cfg.llm.vocab_size, cfg.semantic_flow.mode) == ((2, 4, 5), 262, "sr_cr")
    for part in ("siglip", "llm"):
        alone = pretrained.load_pretrained(tmp_path / part, dtype=None, allow_component=True).params
        assert equal(loaded.params[part], alone)
    fresh = set(loaded.extra["converted"]["fresh"])
    assert {name.split("/")[0] for name in fresh} == set(loaded.params) - {"siglip", "llm", "sam"}
    new = flatten_params(flowseg.init_model(cfg, 0)[1])
    assert all(np.allclose(flatten_params(loaded.params)[name], new[name], rtol=1e-5, atol=1e-7) for name in fresh)
    with pytest.raises(UserError, match="flowseg needs siglip=DIR: nothing is made up for a missing component"):
        run("flowseg", f"llm={tmp_path / 'llm'}", f"sam={tmp_path / 'hf_sam'}", tmp_path / "out2")
    with pytest.raises(UserError, match="flowseg has no part 'lm'"):
        run("flowseg", f"lm={tmp_path / 'llm'}", tmp_path / "out2")


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, hf):
    source = hf("qwen3")
    weights = safetensors.numpy.load_file(source / "model.safetensors")
    for family in ("llama", "sam"):
        with pytest.raises(
            UserError, match=f"config.json says model_type='qwen3': that is no checkpoint of the family {family}"
        ):
            run(family, source, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="out exists: remove it or choose another name"):
        run("qwen3", source, tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    (tmp_path / "out").rmdir()
    del weights["model.norm.weight"]
    safetensors.numpy.save_file(weights, source / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit qwen3: missing model.norm.weight \(24,\)$"):
        run("qwen3", source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: no such file; give the model's config by --config FILE"):
        run("qwen3", source, tmp_path / "out")
    with pytest.raises(UserError, match=r"there is no flag --frobnicate \(known: --chat, "):
        run("qwen3", source, tmp_path / "out", "--frobnicate")
    with pytest.raises(UserError, match="expected one SOURCE and one OUT"):
        run("qwen3", source)
    with pytest.raises(UserError, match="hf_qwen3 is not a model directory|no model directory|was not written by flowseg_jax"):
        run("qwen3", source, tmp_path / "out", "--export")
    assert leftovers(tmp_path) == []


def test_for_a_mesh_no_chunk_lies_in_two_devices_parts(tmp_path, hf, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 512)
    monkeypatch.setattr(streaming, "CHUNK", 1 << 12)
    source, mesh = hf("qwen3"), {"fsdp": 2, "tensor": 2}
    run("qwen3", source, tmp_path / "out1", "--mesh", "fsdp=2,tensor=2")
    run("qwen3", source, tmp_path / "out2")
    shards = get_family("qwen3").shards(LanguageConfig(**component_config(tmp_path / "out1")), sharding.abstract_mesh(mesh))

    def across(directory) -> list[str]:
        return [n for n, c in chunks(directory).items() if any(s % k for s, k in zip(shards[n], c, strict=True))]

    assert shards["layers/self_attn/q_proj/kernel"] == (3, 12, 16)  # [L, embed, heads]
    assert across(tmp_path / "out1") == []
    assert across(tmp_path / "out2")
    assert equal(*(pretrained.load_pretrained(tmp_path / f"out{i}", dtype=None, allow_component=True).params for i in (1, 2)))
    for text, message in (("fsdp=two", "got 'fsdp=two'"), ("model=2", "mesh.model: unknown axis"), ("fsdp=0", "got 'fsdp=0'")):
        with pytest.raises(UserError, match=message):
            run("qwen3", source, tmp_path / "out3", "--mesh", text)
    assert sorted(leftovers(tmp_path)) == ["out1", "out2"]


def component_config(directory) -> dict:
    return pretrained.read_model_config(directory, allow_component=True)["component"]["config"]


def chunks(directory) -> dict[str, tuple[int, ...]]:
    """The shape of the stored slices of each array, as TensorStore reads it."""
    found = {}
    for name in pretrained.read_model_config(directory, allow_component=True)["manifest"]:
        place = {"driver": "ocdbt", "base": (directory / "params").as_uri() + "/", "path": name.replace("/", ".") + "/"}
        store = ts.open({"driver": "zarr", "kvstore": place}, open=True).result()
        found[name] = store.chunk_layout.read_chunk.shape or ()
    return found


def test_chunks_divide_what_they_are_part_of(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 1000)
    assert streaming.chunk_shape((10, 10), 4) == (10, 10)
    assert streaming.chunk_shape((7, 30, 8), 4) == (1, 30, 8)
    assert streaming.chunk_shape((241, 6), 4) == (241, 1)  # a prime number of rows is not cut
    assert streaming.chunk_shape((3, 400, 100), 4) == (1, 2, 100)
    assert streaming.chunk_shape((), 4) == ()


def test_a_full_disk_leaves_nothing(tmp_path, hf, monkeypatch):
    source = hf("llama")
    written = []

    class Full(streaming._LazyHandler):
        async def _open_and_write(self, value, tspec, context):
            written.append(value.shape)
            if len(written) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            await super()._open_and_write(value, tspec, context)

    monkeypatch.setattr(streaming, "_LazyHandler", Full)
    with pytest.raises(UserError, match=r"model directory .*out could not be written: .*No space left"):
        run("llama", source, tmp_path / "out")
    assert leftovers(tmp_path) == []

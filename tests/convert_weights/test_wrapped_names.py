"""Names with a prefix around them: every wrapper is taken off and said, and what cannot be told apart is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from convert_weights import job as jobs
from convert_weights.convert import export_params, get_family, import_params, in_layout
from convert_weights.names import unwrapped
from convert_weights.sources import ArraySource
from flowseg_jax.checkpoints import pretrained
from flowseg_jax.cli import convert
from flowseg_jax.errors import UserError
from tests.helpers import hf_convert
from tests.helpers import tiny_checkpoints as tiny


def renamed(tensors, prefix, old=""):
    return {prefix + name.removeprefix(old) if name.startswith(old) else name: x for name, x in tensors.items()}


PREFIXES = ("_orig_mod.", "module.", "module._orig_mod.", "base_model.model.", "model.", "module.module.", "_forward_module.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", ["qwen3", "phi3", "llama", "siglip2", "sam", "mask2former", "xsam", "xsam_stage1"])
def test_a_prefix_before_all_names(family, prefix):
    if family.startswith("xsam"):
        tensors = tiny.xsam_tensors()
        if family == "xsam_stage1":
            tensors = {n: x for n, x in tensors.items() if n.startswith(("segmentor.", "seg_connector.")) and "logit" not in n}
    else:
        tensors, _ = tiny.arrays(family)
    source = unwrapped(ArraySource(renamed(tensors, prefix)), get_family(family))
    assert source.entries.keys() == tensors.keys()
    assert all(np.array_equal(source.read(name), x) for name, x in tensors.items())
    assert all(part in " ".join(source.notes) for part in prefix.split(".") if part)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "llama", "siglip2", "sam", "mask2former", "xsam"])
def test_names_that_need_nothing_stay(family):
    source = ArraySource(tiny.xsam_tensors() if family == "xsam" else tiny.arrays(family)[0])
    assert unwrapped(source, get_family(family)) is source


def test_wrappers_in_the_middle_of_names():
    tensors, cfg = tiny.arrays("qwen3")
    odd = {}
    for name, x in tensors.items():
        name = name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.").replace("mlp.", "_orig_mod.mlp.")
        odd["_fsdp_wrapped_module." + name] = x
    source = unwrapped(ArraySource(odd), get_family("qwen3"))
    (note,) = source.notes
    assert note.endswith("_checkpoint_wrapped_module., _fsdp_wrapped_module., _orig_mod. taken out of the names")
    assert tiny.equal(import_params("qwen3", source, cfg), import_params("qwen3", tensors, cfg))


LANGUAGE = {  # of a language model: (what stands before its layers, before its head)
    "bare": ("", "lm_head."),
    "qwen-vl": ("model.language_model.", "lm_head."),
    "llava": ("language_model.model.", "language_model.lm_head."),
    "wrapped": ("module.model.language_model.", "module.lm_head."),
    "peft": ("base_model.model.model.language_model.", "base_model.model.lm_head."),
}


@pytest.mark.parametrize("form", LANGUAGE)
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_inside_another(form, tied):
    tensors, cfg = tiny.arrays("qwen3", tie_word_embeddings=tied)
    body, head = LANGUAGE[form]
    odd = renamed(renamed(tensors, head, "lm_head."), body, "model.")
    # An image encoder of the same depth, whose names are partly the same.
    other = (
        {}
        if form == "bare"
        else {"model.visual.layers.0.mlp.up_proj.weight": np.ones(3), "model.visual.norm.weight": np.ones(3)}
    )
    source = unwrapped(ArraySource(odd | other), get_family("qwen3"))
    assert tiny.equal(import_params("qwen3", source, cfg), import_params("qwen3", tensors, cfg))
    if form == "bare":
        assert source.notes == ["the given arrays: names as they are, with model. before them"]
    else:
        assert f"the prefix {body if form != 'llava' else 'language_model.'}" in source.notes[0]
        assert source.notes[0].endswith("not used: 2 tensors of its other parts (model.visual)")


def test_an_encoder_inside_a_multimodal_model():
    for family, prefix in (("siglip2", "model.vision_tower."), ("sam", "model.visual_model.")):
        tensors, cfg = tiny.arrays(family)
        text = {f"model.language_model.{name}": x for name, x in tiny.arrays("qwen3")[0].items()}
        source = unwrapped(ArraySource(renamed(tensors, prefix) | text), get_family(family))
        assert tiny.equal(import_params(family, source, cfg), import_params(family, tensors, cfg))
        assert "not used: 35 tensors of its other parts (model.language_model)" in " ".join(source.notes)


def test_what_a_wrapper_does_not_explain_stays_unexpected():
    tensors, cfg = tiny.arrays("qwen3")
    odd = renamed(tensors, "module.") | {"stray.weight": np.zeros(3)}
    with pytest.raises(UserError, match=r"unexpected stray.weight \(3,\)$"):
        import_params("qwen3", unwrapped(ArraySource(odd), get_family("qwen3")), cfg)


def test_two_models_and_two_names_for_one():
    tensors, _ = tiny.arrays("qwen3")
    two = renamed(tensors, "student.") | renamed(tensors, "teacher.")
    with pytest.raises(UserError, match=r"holds 2 models, under student\., teacher\.: save the one that is meant by itself"):
        unwrapped(ArraySource(two), get_family("qwen3"))
    with pytest.raises(UserError, match=r"holds both .*model.norm.weight and .*: only one can be model.norm.weight"):
        unwrapped(ArraySource(tensors | {"_orig_mod.model.norm.weight": np.zeros(24)}), get_family("qwen3"))
    average = tensors | renamed(tensors, "ema.")  # the plain one is taken, and strictly
    assert unwrapped(source := ArraySource(average), get_family("qwen3")) is source


def test_another_family_keeps_its_names_and_its_error():
    llama, _ = tiny.arrays("llama")
    with pytest.raises(UserError, match="looks like a checkpoint of the family llama, not siglip2"):
        import_params("siglip2", unwrapped(ArraySource(llama), get_family("siglip2")), get_family("siglip2").example_config())


# transformers' script for SAM replaces these in segment-anything's names of the image encoder, in this order.
SAM_NAMES = {"image_encoder": "vision_encoder", "neck.0": "neck.conv1", "neck.1": "neck.layer_norm1", "neck.2": "neck.conv2"}
SAM_NAMES |= {"neck.3": "neck.layer_norm2", "patch_embed.proj": "patch_embed.projection", ".norm": ".layer_norm"}
SAM_NAMES |= {"blocks": "layers"}


def to_huggingface(name: str) -> str:
    for old, new in SAM_NAMES.items():
        name = name.replace(old, new)
    return name


def segment_anything():
    """A tiny SAM under the names of segment-anything's ImageEncoderViT, written out by hand, and under transformers' names."""
    tensors, cfg = tiny.arrays("sam")
    theirs = {name.removeprefix("vision_encoder."): x for name, x in tensors.items()}
    meta = {
        "image_encoder.pos_embed": theirs["pos_embed"],
        "image_encoder.patch_embed.proj.weight": theirs["patch_embed.projection.weight"],
        "image_encoder.patch_embed.proj.bias": theirs["patch_embed.projection.bias"],
        "image_encoder.neck.0.weight": theirs["neck.conv1.weight"],
        "image_encoder.neck.1.weight": theirs["neck.layer_norm1.weight"],
        "image_encoder.neck.1.bias": theirs["neck.layer_norm1.bias"],
        "image_encoder.neck.2.weight": theirs["neck.conv2.weight"],
        "image_encoder.neck.3.weight": theirs["neck.layer_norm2.weight"],
        "image_encoder.neck.3.bias": theirs["neck.layer_norm2.bias"],
    }
    same = {name: name for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")}
    for i in range(cfg.num_hidden_layers):
        for new, old in {"norm1": "layer_norm1", "norm2": "layer_norm2", **same}.items():
            for leaf in ("weight", "bias"):
                meta[f"image_encoder.blocks.{i}.{new}.{leaf}"] = theirs[f"layers.{i}.{old}.{leaf}"]
        for leaf in ("rel_pos_h", "rel_pos_w"):
            meta[f"image_encoder.blocks.{i}.attn.{leaf}"] = theirs[f"layers.{i}.attn.{leaf}"]
    rest = {
        "prompt_encoder.point_embeddings.0.weight": np.ones((1, 8), np.float32),
        "mask_decoder.iou_token.weight": np.ones((1, 8), np.float32),
    }
    return meta | rest, theirs, cfg


def test_metas_own_sam_is_transformers_sam():
    meta, theirs, cfg = segment_anything()
    assert {to_huggingface(name).removeprefix("vision_encoder.") for name in meta if "image_encoder" in name} == theirs.keys()
    expected = hf_convert.sam(theirs, cfg)
    ours = import_params("sam", meta, cfg)
    assert tiny.equal(ours, expected)
    # TorchView under Meta's names and renamed by transformers' rules, it is what transformers has.
    back = export_params("sam", ours, cfg, layout="meta")
    assert back.keys() < meta.keys()
    for name, x in back.items():
        assert np.array_equal(x, theirs[to_huggingface(name).removeprefix("vision_encoder.")])
    names = {name.removeprefix("image_encoder."): x for name, x in meta.items() if name.startswith("image_encoder.")}
    assert tiny.equal(import_params("sam", names, cfg), expected)  # the encoder saved by itself
    source = in_layout(get_family("sam"), cfg, ArraySource(meta), "hf")
    assert {name for name, _ in source.entries.items()} == {f"vision_encoder.{n}" for n in theirs if "neck" not in n}
    assert all(np.array_equal(source.read(n), theirs[n.removeprefix("vision_encoder.")]) for n in source.entries)
    with pytest.raises(UserError, match="unexpected stray"):
        in_layout(get_family("sam"), cfg, ArraySource(meta | {"stray": np.ones(3, np.float32)}), "hf")


@pytest.mark.parametrize("prefix", ["", "module.", "model.visual_model."])
def test_metas_own_sam_from_its_file(tmp_path, prefix):
    """`sam_vit_l_0b3195.pth` has no config beside it: all sizes are in the shapes."""
    meta, theirs, cfg = segment_anything()
    torch.save({prefix + name: torch.from_numpy(x) for name, x in meta.items()}, tmp_path / "sam_vit_t.pth")
    assert convert.main(["sam", str(tmp_path / "sam_vit_t.pth"), str(tmp_path / "out")]) == 0
    loaded = pretrained.load_pretrained(tmp_path / "out", dtype=None, allow_component=True)
    assert loaded.component["config"] == json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert tiny.equal(loaded.params, hf_convert.sam(theirs, cfg))
    if not prefix:
        convert.main(["sam", str(tmp_path / "out"), str(tmp_path / "back"), "--export", "--layout", "meta"])
        back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
        assert all(np.array_equal(x, meta[name]) for name, x in back.items())


def test_a_whole_model_with_metas_sam(tmp_path):
    meta, theirs, _ = segment_anything()
    torch.save({name: torch.from_numpy(x) for name, x in meta.items()}, tmp_path / "sam.pth")
    for family in ("siglip2", "qwen3"):
        tiny.huggingface(family).save_pretrained(tmp_path / family)
    tiny.save_tokenizer(tmp_path / "qwen3")
    parts = {"llm": f"{tmp_path}/qwen3", "siglip": f"{tmp_path}/siglip2", "sam": f"{tmp_path}/sam.pth"}
    with jobs.open_conversion(jobs.ConversionRequest("flowseg", parts)) as job:
        assert not [name for name in job.plan.fresh if name.startswith("sam/")]
        found = {name: job.source.read(name) for name in job.source.entries if name.startswith("segmentor.encoder.")}
    assert found.keys() == {f"segmentor.encoder.{name}" for name in theirs if "neck" not in name}
    assert all(np.array_equal(x, theirs[name.removeprefix("segmentor.encoder.")]) for name, x in found.items())


def test_what_is_said_on_the_way(tmp_path, capsys):
    model = tiny.huggingface("qwen3")
    model.config.save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    torch.save({f"_orig_mod.{n}": torch.from_numpy(x) for n, x in tiny.state(model).items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {}}))
    convert.main(["qwen3", str(tmp_path), "--check"])
    printed = capsys.readouterr().out
    assert "note: taken: pytorch_model.bin; not used beside it: pytorch_model.bin.index.json" in printed
    assert "_orig_mod. taken out of the names" in printed

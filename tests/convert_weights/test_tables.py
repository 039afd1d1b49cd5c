"""The tables: every tensor where it belongs, and back again bit for bit; strict both ways."""

from __future__ import annotations

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from convert_weights import configs_from_shapes
from convert_weights.convert import export_params, import_params
from convert_weights.families import FAMILIES
from convert_weights.plan import choose_layout
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from tests.helpers import hf_convert
from tests.helpers import tiny_checkpoints as tiny

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "llama", "siglip2", "sam"])
def test_a_component_is_what_the_hand_written_map_makes_of_it(family):
    tensors, cfg = tiny.arrays(family)
    ours = import_params(family, tensors, cfg)
    if family == "sam":
        names = {name.removeprefix("vision_encoder."): x for name, x in tensors.items()}
        expected = hf_convert.sam(names, cfg)
    elif family == "siglip2":
        expected = hf_convert.siglip(tensors, cfg.num_hidden_layers)
    else:
        expected = hf_convert.language(
            tensors, cfg.num_hidden_layers, cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        )
    assert tiny.equal(ours, expected)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "llama", "siglip2", "sam", "mask2former"])
def test_there_and_back(family):
    tensors, cfg = tiny.arrays(family)
    ours = import_params(family, tensors, cfg)
    back = export_params(family, ours, cfg, layout=choose_layout(FAMILIES[family], tensors))
    assert back.keys() <= tensors.keys()
    assert tiny.equal(back, {name: tensors[name] for name in back})
    unused = tensors.keys() - back.keys()
    assert all(any(part in name for part in ("neck.", "head.", "post_layernorm", "criterion", ".encoder.")) for name in unused)
    again = import_params(family, back, cfg)
    assert tiny.equal(again, ours)


def test_mask2former_names_a_stage_of_every_finer_map():
    tensors, cfg = tiny.arrays("mask2former", common_stride=2)
    assert cfg.pixel_decoder.fpn_stages == 2
    ours = import_params("mask2former", tensors, cfg)
    finest = tensors["model.pixel_level_module.decoder.adapter_1.0.weight"]  # 8 channels, stride 4
    assert np.array_equal(ours["pixel_decoder"]["lateral_convs"]["1"]["conv"]["kernel"][0, 0], finest[:, :, 0, 0].T)
    layers = "model.transformer_module.decoder.layers"
    assert np.array_equal(
        ours["mask_decoder"]["layers"]["cross_attn"]["v_proj"]["kernel"][2],
        tensors[f"{layers}.2.cross_attn.in_proj_weight"][64:].T,
    )
    assert ours["mask_decoder"]["logit_scale"] == np.float32(2.6593)


def test_xsam_and_its_older_names():
    tensors = tiny.xsam_tensors()
    ours = import_params("xsam", tensors, tiny.XSAM)
    assert tiny.equal(export_params("xsam", ours, tiny.XSAM), tensors)
    old = tiny.aaai_names(tensors)
    assert tiny.equal(import_params("xsam", old, tiny.XSAM), ours)
    assert tiny.equal(export_params("xsam", ours, tiny.XSAM, layout="aaai"), old)
    qkv = tensors["segmentor.encoder.layers.3.attn.qkv.weight"]
    assert np.array_equal(ours["sam"]["global_layers"]["attn"]["k_proj"]["kernel"][1], qkv[48:96].T)
    assert np.array_equal(
        ours["sam"]["window_layers"]["attn"]["rel_pos_h"][1], tensors["segmentor.encoder.layers.2.attn.rel_pos_h"]
    )
    conv = tensors["seg_connector.model.1.model.2.weight"]
    assert ours["connector"]["levels"]["1"]["conv2"]["kernel"][0, 2, 3, 4] == conv[4, 3, 0, 2]


def test_xsam_with_phi3_and_a_fused_matrix():
    llm = dataclasses.replace(tiny.XSAM.llm, model_type="phi3", qk_norm=False, tie_word_embeddings=False)
    cfg = dataclasses.replace(tiny.XSAM, llm=llm)
    ours = import_params("xsam", tiny.xsam_tensors(), tiny.XSAM)
    ours["llm"]["lm_head"] = ours["llm"]["embed_tokens"] + 1
    for name in ("q_norm", "k_norm"):
        del ours["llm"]["layers"]["self_attn"][name]
    tensors = export_params("xsam", ours, cfg)
    assert tensors["llm.model.layers.1.self_attn.qkv_proj.weight"].shape == (64 + 2 * 32, 64)
    assert tensors["llm.model.layers.1.mlp.gate_up_proj.weight"].shape == (2 * 112, 64)
    assert tiny.equal(import_params("xsam", tensors, cfg), ours)


@pytest.mark.parametrize("norm", ["post", "residual"])
def test_what_flowseg_adds_is_fresh_and_then_travels_too(norm):
    tensors = tiny.xsam_tensors()
    cfg = dataclasses.replace(tiny.XSAM, semantic_flow=SemanticFlowConfig(norm=norm), boundary=BoundaryConfig())
    ours = import_params("xsam", tensors, cfg, seed=3)
    added = flatten_params(ours).keys() - flatten_params(import_params("xsam", tensors, tiny.XSAM)).keys()
    new = flatten_params(flowseg.init_model(cfg, 3)[1])
    assert all(np.allclose(flatten_params(ours)[name], new[name], rtol=1e-5, atol=1e-7) for name in added)
    assert {name.split("/")[2] if "layers" in name else name.split("/")[0] for name in added} == {
        "semantic_refinement",
        "condition_refinement",
        "boundary",
    }
    everything = export_params("flowseg", ours, cfg)
    assert tiny.equal(import_params("flowseg", everything, cfg, seed=4), ours)
    del everything["segmentor.decoder.decoder.layers.1.text_gate.bias"]  # a group is there as a whole or not at all
    with pytest.raises(UserError, match=r"missing segmentor.decoder.decoder.layers.1.text_gate.bias \(64,\)$"):
        import_params("xsam", everything, cfg)


def test_stage_one_has_a_linear_head_and_no_language():
    tensors = {
        n: x for n, x in tiny.xsam_tensors().items() if n.startswith(("segmentor.", "seg_connector.")) and "logit" not in n
    }
    head = "segmentor.class_predictor.predictor"
    tensors |= {f"{head}.weight": np.ones((8, 64), np.float32), f"{head}.bias": np.ones(8, np.float32)}
    cfg = configs_from_shapes.stage1_from_shapes(configs_from_shapes.Shapes(tensors, "it"))
    assert (cfg.sam, cfg.num_classes) == (dataclasses.replace(tiny.XSAM.sam), 7)
    ours = import_params("xsam_stage1", tensors, cfg)
    old = tiny.aaai_names(tensors)
    assert "segmentor.class_predictor.weight" in old
    assert tiny.equal(import_params("xsam_stage1", old, cfg), ours)
    assert ours["category_head"]["kernel"].shape == (64, 8)


def test_every_fault_is_in_one_error():
    tensors = tiny.xsam_tensors()
    for i in range(3):
        del tensors[f"segmentor.encoder.layers.{i}.attn.qkv.bias"]
    tensors["stray.weight"] = np.zeros((2, 3), np.float32)
    tensors["bg_embeds.weight"] = np.zeros((1, 65), np.float32)
    tensors["segmentor.decoder.level_embed.weight"] = np.zeros((3, 64), np.int32)
    with pytest.raises(UserError) as caught:
        import_params("xsam", tensors, tiny.XSAM)
    for part in (
        "missing segmentor.encoder.layers.{0-2}.attn.qkv.bias (144,)",
        "unexpected stray.weight (2, 3)",
        "expected (1, 64) for bg_embeds.weight (1, 65)",
        "not a floating-point tensor but int32: segmentor.decoder.level_embed.weight (3, 64)",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_family_is_named():
    tensors, cfg = tiny.arrays("sam")
    with pytest.raises(UserError, match="looks like a checkpoint of the family sam, not siglip2"):
        import_params("siglip2", tensors, FAMILIES["siglip2"].example_config())
    llama, _ = tiny.arrays("llama")
    with pytest.raises(UserError, match="looks like a checkpoint of the family llama, not qwen3"):
        import_params("qwen3", llama, FAMILIES["qwen3"].example_config())
    with pytest.raises(UserError, match="unknown family 'qwen'.*did you mean 'qwen3'"):
        import_params("qwen", tensors, cfg)


def test_a_tied_head_may_be_listed_if_it_is_the_same():
    tensors, cfg = tiny.arrays("qwen3")
    table = tensors["model.embed_tokens.weight"]
    ours = import_params("qwen3", tensors | {"lm_head.weight": table.copy()}, cfg)
    assert "lm_head" not in ours
    other = table.copy()
    other[-1, -1] += 1
    with pytest.raises(UserError, match=r"lm_head.weight \(280, 24\) differs from model.embed_tokens.weight"):
        import_params("qwen3", tensors | {"lm_head.weight": other}, cfg)


def test_a_tied_head_in_integers_is_another_matrix():
    tensors, cfg = tiny.arrays("qwen3")
    with pytest.raises(UserError, match=r"lm_head.weight \(280, 24\) differs from model.embed_tokens.weight"):
        import_params("qwen3", tensors | {"lm_head.weight": np.zeros((280, 24), np.int8)}, cfg)


def test_the_vocabulary_is_cut_or_grown_as_xsam_does():
    tensors, cfg = tiny.arrays("phi3")
    table, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    cut = import_params("phi3", tensors, dataclasses.replace(cfg, vocab_size=262))
    assert np.array_equal(cut["embed_tokens"], table[:262])
    assert np.array_equal(cut["lm_head"], head[:262])
    grown = import_params("phi3", tensors, dataclasses.replace(cfg, vocab_size=283))
    assert np.array_equal(grown["embed_tokens"][:280], table)
    assert np.allclose(grown["embed_tokens"][280:], table.mean(0), atol=1e-7)
    with pytest.raises(UserError, match=r"expected \(262, 64\) for llm.model.embed_tokens.weight \(264, 64\)"):
        llm = dataclasses.replace(tiny.XSAM.llm, vocab_size=262)  # X-SAM's table has its size already
        import_params("xsam", tiny.xsam_tensors(), dataclasses.replace(tiny.XSAM, llm=llm))


def test_dtypes_stay_unless_asked_otherwise():
    tensors, cfg = tiny.arrays("siglip2")
    half = {name: x.astype(BF16) for name, x in tensors.items()}
    ours = import_params("siglip2", half, cfg)
    assert {x.dtype for x in jax.tree.leaves(ours)} == {BF16}
    back = export_params("siglip2", ours, cfg, layout=choose_layout(FAMILIES["siglip2"], half))
    assert tiny.equal(back, {name: half[name] for name in back})
    mixed = half | {n: x for n, x in tensors.items() if ".layers.1." in n}
    assert import_params("siglip2", mixed, cfg)["layers"]["self_attn"]["q_proj"]["kernel"].dtype == np.float32
    assert import_params("siglip2", mixed, cfg)["patch_embedding"]["kernel"].dtype == BF16
    assert {x.dtype for x in jax.tree.leaves(import_params("siglip2", tensors, cfg, dtype="bfloat16"))} == {BF16}


def test_the_rotary_order_of_llama_cpp():
    """Against llama.cpp's own formula: rows of a head [2, E/2] become [E/2, 2]."""
    tensors, cfg = tiny.arrays("llama")
    ours = import_params("llama", tensors, cfg)
    gguf = export_params("llama", ours, cfg, layout="gguf")
    q = tensors["model.layers.2.self_attn.q_proj.weight"]
    theirs = q.reshape(cfg.num_attention_heads, 2, cfg.head_dim // 2, -1).swapaxes(1, 2).reshape(q.shape)
    assert np.array_equal(gguf["blk.2.attn_q.weight"], theirs)
    assert np.array_equal(gguf["blk.2.attn_v.weight"], tensors["model.layers.2.self_attn.v_proj.weight"])
    assert tiny.equal(import_params("llama", gguf, cfg), ours)

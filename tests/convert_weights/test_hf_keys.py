"""The list of Hugging Face's config keys, held against the transformers that is installed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import GenerationConfig
from transformers.models.llama import modeling_llama
from transformers.models.mask2former import modeling_mask2former
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.sam import modeling_sam
from transformers.models.siglip import modeling_siglip

from convert_weights import configs_from_hf
from flowseg_jax.errors import UserError
from flowseg_jax.models import hf_keys
from flowseg_jax.models.hf_keys import HEADS, LAYERS, SIDE, WIDTH
from flowseg_jax.models.language_config import LanguageConfig
from tests.helpers import tiny_checkpoints as tiny

t = transformers
# Keys, the class that has them, its network, and classes that the same network reads for parts that we leave out.
CLASSES = {
    "qwen3": (hf_keys.QWEN3, t.Qwen3Config, modeling_qwen3, ()),
    "phi3": (hf_keys.PHI3, t.Phi3Config, modeling_phi3, ()),
    "llama": (hf_keys.LLAMA, t.LlamaConfig, modeling_llama, ()),
    "siglip": (hf_keys.SIGLIP, t.SiglipVisionConfig, modeling_siglip, (t.SiglipConfig, t.SiglipTextConfig)),
    "siglip2": (hf_keys.SIGLIP, t.Siglip2VisionConfig, None, ()),
    "sam": (
        hf_keys.SAM,
        t.SamVisionConfig,
        modeling_sam,
        (t.SamConfig, t.SamPromptEncoderConfig, t.SamMaskDecoderConfig),
    ),
    "mask2former": (hf_keys.MASK2FORMER, t.Mask2FormerConfig, modeling_mask2former, ()),
    "swin": (hf_keys.SWIN, t.SwinConfig, None, ()),
    "whole siglip": (hf_keys.WHOLE["siglip2"], t.SiglipConfig, None, ()),
    "whole sam": (hf_keys.WHOLE["sam"], t.SamConfig, None, ()),
}
COMPUTED = {"image_embedding_size"}  # of SAM's prompt encoder: an attribute that its class makes itself
READING = r"""(?:getattr|hasattr)\(\s*(?:self\.)?config,\s*"(\w+)"|\bconfig\.(\w+)(?!\w*\()"""
FROM_HF = ("qwen3", "phi3", "llama", "siglip2", "sam", "mask2former")


def accepted(cls: type) -> set[str]:
    """Every key that a configuration class has, writes, or takes for another."""
    return {f.name for f in dataclasses.fields(cls)} | set(cls().to_dict()) | set(cls.attribute_map)


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_of_the_class_and_of_its_network_is_in_the_list(name):
    keys, cls, module, others = CLASSES[name]
    wanted = accepted(cls)
    if module is not None:
        read = {a or b for a, b in re.findall(READING, inspect.getsource(module))}
        wanted |= read - set().union(*(accepted(other) for other in others)) - COMPUTED
    assert wanted - keys.known == set()


def test_every_key_that_all_classes_take_is_in_every_list():
    """What the base class takes out of the file by name, settings of generation included."""
    popped = set()
    for method in (t.PreTrainedConfig.__post_init__, t.PreTrainedConfig.convert_rope_params_to_dict):
        popped |= set(re.findall(r"kwargs\.(?:pop|get)\(\s*\"(\w+)\"", inspect.getsource(method)))
    assert "per_layer_config" in popped and "rope_scaling" in popped
    popped -= {"rope_scaling", "rope_theta", "partial_rotary_factor"}  # below
    popped |= set(GenerationConfig._get_default_generation_params())
    assert len(popped) > 30
    for keys, *_ in CLASSES.values():
        assert popped - keys.known == set()
    rope = {"rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor"}
    assert all(rope <= set(keys.read) for keys in hf_keys.LANGUAGE.values())
    from transformers.modeling_rope_utils import RopeParameters

    assert set(RopeParameters.__annotations__) <= hf_keys.ROPE.known


def test_sizes_have_bounds():
    for kind, most in ((WIDTH, 131_072), (LAYERS, 1000), (HEADS, 4096), (SIDE, 16_384)):
        assert [kind.fits(size) for size in (0, 1, most, most + 1, 1.5)] == [False, True, True, False, False]


def test_a_key_has_one_fate():
    for keys, *_ in CLASSES.values():
        fates = [*keys.read, *keys.fixed, *keys.training, *keys.unused]
        assert len(fates) == len(set(fates)), keys.name


@functools.cache
def original(family: str) -> torch.nn.Module:
    """One tiny model for all tests, none of which changes it."""
    return tiny.huggingface(family).eval()


def written(family: str) -> dict:
    return json.loads(original(family).config.to_json_string(use_diff=False))


def read(family: str, config: dict):
    return configs_from_hf.component_config(family, config)


@pytest.mark.parametrize("family", FROM_HF)
def test_what_transformers_writes_is_read_without_a_note(family, capsys):
    read(family, written(family))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", FROM_HF)
def test_a_fixed_key_is_refused_by_name_and_no_other_is(family):
    keys = {"siglip2": hf_keys.SIGLIP, "sam": hf_keys.SAM, "mask2former": hf_keys.MASK2FORMER}.get(family)
    keys = keys or hf_keys.LANGUAGE[family]
    config = written(family)
    cfg = read(family, config)
    for key in keys.fixed:
        with pytest.raises(UserError, match=rf"{key}='another' is not supported") as caught:
            read(family, config | {key: "another"})
        assert "\n" not in str(caught.value)
    for key in (*keys.training, *keys.unused):
        if key not in ("model_type", "text_config"):
            assert read(family, config | {key: 0.123}) == cfg, key


@pytest.mark.parametrize("family", FROM_HF)
def test_a_key_that_is_read_changes_the_config_or_is_an_error(family):
    config = written(family)
    cfg = read(family, config)
    keys = {"siglip2": hf_keys.SIGLIP, "sam": hf_keys.SAM, "mask2former": hf_keys.MASK2FORMER}.get(family)
    keys = keys or hf_keys.LANGUAGE[family]
    for key in keys.read:
        for value in ("abc", -1, math.nan, True if key != "tie_word_embeddings" else 1):
            with pytest.raises(UserError, match=key):
                read(family, config | {key: value})
    others = {"rms_norm_eps": 1e-3, "tie_word_embeddings": not config.get("tie_word_embeddings"), "layer_norm_eps": 1e-3}
    others |= {"global_attn_indexes": [1], "num_labels": None, "mlp_ratio": None, "id2label": {"0": "a"}, "common_stride": 8}
    for key in keys.read.keys() & config.keys():
        if key in ("backbone_config", "feature_strides", "rope_parameters"):
            continue
        other = others.get(key, config[key] * 2 if isinstance(config[key], int) else 7)
        if other is None:
            continue
        try:
            assert read(family, config | {key: other}) != cfg, key
        except UserError as error:
            assert re.search(rf"{key}|hidden_size|hidden_dim|head_dim", str(error))


def outputs(family: str, model: torch.nn.Module) -> np.ndarray:
    """What a network of transformers computes of fixed inputs, as far as it is in our component."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        if family in hf_keys.LANGUAGE:
            ids = torch.from_numpy(rng.integers(0, 200, (2, 9)))
            return model.model(ids).last_hidden_state.numpy()
        side = model.config.image_size
        image = torch.from_numpy(rng.normal(size=(1, 3, side, side)).astype(np.float32))
        return model(image, output_hidden_states=True).hidden_states[-2].numpy()  # the last one may be normalised


# Values other than the default, of the type that the class wants. What changes nothing in transformers either may be "unused".
OTHER = {
    "max_position_embeddings": 999, "initializer_range": 0.5, "pretraining_tp": 2, "sliding_window": 3, "max_window_layers": 1,
    "original_max_position_embeddings": 9, "use_sliding_window": True, "attention_dropout": 0.5, "resid_pdrop": 0.5,
    "embd_pdrop": 0.5, "vision_use_head": False, "output_channels": 5, "num_pos_feats": 3, "scale": 7, "use_cache": False,
    "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5, "output_hidden_states": True, "is_decoder": True,
    "add_cross_attention": True, "chunk_size_feed_forward": 2, "is_encoder_decoder": True, "num_labels": 7,
    "tie_last_hidden_states": True, "temperature": 0.5, "max_length": 3, "rope_interleaved": True, "is_llama_config": True,
    "projection_dim": 3, "intermediate_size": 99, "initializer_factor": 3.0, "dropout": 0.5, "tie_encoder_decoder": True,
    "gradient_checkpointing": True, "use_bfloat16": True, "torchscript": True, "cross_attention_hidden_size": 3,
    "repetition_penalty": 3.0, "top_k": 1,
}  # fmt: skip


@pytest.mark.parametrize("family", FROM_HF[:-1])
def test_a_key_without_effect_has_none_in_transformers(family):
    keys = {"siglip2": hf_keys.SIGLIP, "sam": hf_keys.SAM}.get(family) or hf_keys.LANGUAGE[family]
    model = original(family)
    config, weights, want = written(family), model.state_dict(), outputs(family, model)
    changed = {key: OTHER[key] for key in (*keys.unused, *keys.training) if key in OTHER}
    assert len(changed) > 15
    for change in (changed, *({key: value} for key, value in changed.items() if key in ("sliding_window", "scale"))):
        other = type(model)(type(model.config).from_dict(config | change)).eval()
        state = other.state_dict()
        same = {name: x for name, x in weights.items() if name in state and x.shape == state[name].shape}
        assert all("neck" in name or "head" in name for name in weights.keys() ^ same.keys())  # not in our components
        other.load_state_dict(same, strict=False)
        assert np.array_equal(outputs(family, other), want)


ROPES = (
    {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_theta": 7e5},
    {"rope_parameters": None, "rope_theta": 7e5},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": {}},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": None, "rope_theta": 7e5},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": {"rope_type": "default", "rope_theta": 3e3}},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": {"type": "default"}, "rope_theta": 7e5},
    {"rope_parameters": {"rope_theta": 5e4, "factor": 8.0}},
    {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5},
)
REFUSED_ROPES = (
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_theta": 5e4, "rope_type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {"rope_theta": 5e4, "rope_type": "llama3", "factor": 2.0}},
    {"rope_parameters": {"rope_theta": 5e4}, "partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"full_attention": {"rope_theta": 5e4, "rope_type": "default"}}},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": {"rope_type": "default"}},  # transformers takes 10000, unsaid
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": "yarn"},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": [4.0]},
)


@pytest.mark.parametrize(("family", "rope"), itertools.product(("qwen3", "phi3", "llama"), ROPES))
def test_the_rotary_base_is_the_one_that_transformers_takes(family, rope):
    config = written(family) | rope
    theirs = type(original(family).config).from_dict(json.loads(json.dumps(config))).rope_parameters
    assert (theirs["rope_type"], theirs.get("partial_rotary_factor", 1.0)) == ("default", 1.0)
    assert LanguageConfig.from_hf(config).rope_theta == theirs["rope_theta"]


@pytest.mark.parametrize(("family", "rope"), itertools.product(("qwen3", "phi3", "llama"), REFUSED_ROPES))
def test_scaled_and_partial_rotary_embeddings_are_refused_wherever_they_stand(family, rope):
    with pytest.raises(UserError, match="rope|rotary") as caught:
        LanguageConfig.from_hf(written(family) | rope)
    assert "\n" not in str(caught.value)


def test_notes(capsys):
    config = written("qwen3") | {"mystery": 3, "attention_dropout": 0.1, "rope_theta": 123.0}
    read("qwen3", config)
    said = capsys.readouterr().out
    assert "note: config.json (qwen3): 1 unknown keys, which are not read: mystery" in said
    assert "attention_dropout=0.1: training has no dropout here" in said
    assert "rope_theta=123.0 is not read, the rotary settings say 10000.0" in said
    read("qwen3", written("qwen3") | {f"strange_{i}": i for i in range(40)})
    assert re.search(r"40 unknown keys, which are not read: (strange_\d+, ){10}\.\.\.$", capsys.readouterr().out.strip())
    read("qwen3", written("qwen3") | {f"strange_{i}": i for i in range(10)})
    assert capsys.readouterr().out.strip().endswith("strange_9")
    read("qwen3", written("qwen3") | {"x" * 90: 1})
    assert capsys.readouterr().out.strip().endswith(" " + "x" * 80)
    scaling = {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}
    read("llama", written("llama") | scaling)
    assert "rope_scaling takes the place of rope_parameters, as in transformers" in capsys.readouterr().out
    whole = {"model_type": "siglip", "vision_config": written("siglip2"), "text_config": {}, "odd": 1}
    read("siglip2", whole)
    assert "SigLIP config: 1 unknown keys, which are not read: odd" in capsys.readouterr().out


def test_the_language_model_inside_a_model_with_pictures():
    inner = written("qwen3")
    alone = read("qwen3", inner)
    assert read("qwen3", {"model_type": "llava", "text_config": inner}) == alone
    untied = read("qwen3", {"model_type": "llava", "text_config": inner, "tie_word_embeddings": False})
    assert (untied.tie_word_embeddings, alone.tie_word_embeddings) == (False, True)
    with pytest.raises(UserError, match="quantization_config=.* is not supported: the weights are quantised"):
        read("qwen3", {"model_type": "llava", "text_config": inner, "quantization_config": {"bits": 4}})
    with pytest.raises(UserError, match="model_type='llava': that is no checkpoint of the family llama"):
        read("llama", {"model_type": "llava", "text_config": inner})


def test_defaults_are_those_of_the_classes():
    for family, keys, cls in (("sam", hf_keys.SAM, t.SamVisionConfig), ("siglip2", hf_keys.SIGLIP, t.SiglipVisionConfig),
                              ("mask2former", hf_keys.MASK2FORMER, t.Mask2FormerConfig), ("swin", hf_keys.SWIN, t.SwinConfig),
                              ("qwen3", hf_keys.QWEN3, t.Qwen3Config)):  # fmt: skip
        theirs = {f.name: f.default for f in dataclasses.fields(cls)}
        for key, how in keys.read.items():
            if how.default not in (hf_keys.REQUIRED, None, {}) and key in theirs and theirs[key] is not None:
                assert how.default == theirs[key], (family, key)


def test_rotary_settings_by_kind_of_layer_are_refused():
    values = {"rope_scaling": {"full_attention": {"rope_theta": 1e4}}, "rope_parameters": None}
    with pytest.raises(UserError, match=r"^it: rotary settings by kind of layer \(full_attention\) are not supported"):
        hf_keys.rope(values, "it")

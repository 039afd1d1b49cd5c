"""Model directories of earlier formats: every array arrives under today's name, and nothing else changes."""

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from flowseg_jax.checkpoints import pretrained, stored_config, upgrade
from flowseg_jax.checkpoints.manifest import checksums, flatten_params, manifest, unflatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system import json_files

# The config.json of a model as format 2 wrote it: 213 arrays of a whole model.
OLD = json.loads((Path(__file__).parent.parent / "golden" / "model_format_2.json").read_text())


def write_old(path: Path, config: dict, arrays: dict[str, np.ndarray]) -> Path:
    """A directory of an earlier format, its checksums right."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path / "params", args=ocp.args.PyTreeSave(unflatten_params(arrays)))
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    config = {**config, "manifest": manifest(unflatten_params(arrays)), "checksums": checksums(unflatten_params(arrays))}
    config.pop("json_checksum", None)
    if config["format_version"] > 1:
        config["tokenizer_checksums"] = stored_config.tokenizer_checksums(pretrained.resolve_path(path))
        config["json_checksum"] = json_files.checksum(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in OLD["manifest"].items()}
    return write_old(tmp_path_factory.mktemp("old"), OLD, arrays), arrays


def test_a_whole_model_of_format_2_fits_todays_network_value_by_value(old, tmp_path):
    path, arrays = old
    with pytest.raises(UserError, match=r"has format version 2, .* `flowseg upgrade .* NEW`"):
        pretrained.load_pretrained(path)
    model = pretrained.load_pretrained(upgrade.upgrade(path, tmp_path / "new"), dtype=None)
    abstract = flowseg.params_dict(flowseg.abstract_model(FlowSegConfig.from_dict(model.model_config))[1])
    assert manifest(abstract) == manifest(model.params)
    new = flatten_params(model.params)
    for ours, theirs in {
        "llm/layers/self_attn/q_proj/kernel": "llm/layers/q/kernel",
        "llm/layers/mlp/down_proj/kernel": "llm/layers/down/kernel",
        "llm/layers/input_layernorm/scale": "llm/layers/norm1/scale",
        "sam/window_layers/attn/k_proj/kernel": "sam/window_layers/k/kernel",
        "sam/global_layers/attn/proj/bias": "sam/global_layers/o/bias",
        "sam/window_layers/attn/rel_pos_h": "sam/window_layers/rel_pos_h",
        "sam/pos_embed": "sam/position",
        "siglip/layers/mlp/fc2/bias": "siglip/layers/down/bias",
        "siglip/layers/layer_norm2/scale": "siglip/layers/norm2/scale",
        "pixel_decoder/layers/self_attn/attention_weights/kernel": "pixel_decoder/layers/attention/weights/kernel",
        "pixel_decoder/layers/final_layer_norm/bias": "pixel_decoder/layers/norm2/bias",
        "mask_decoder/queries_embedder": "decoder/query_position",
        "mask_decoder/queries_features": "decoder/query_content",
        "mask_decoder/mask_embedder/1/kernel": "decoder/mask_mlp_1/kernel",
        "mask_decoder/layers/cross_attn/v_proj/kernel": "decoder/layers/cross/value/kernel",
        "mask_decoder/layers/semantic_refinement/attn/k_proj/bias": "decoder/layers/semantic/attention/key/bias",
        "mask_decoder/layers/condition_refinement/attn/out_proj/kernel": "decoder/layers/refinement/attention/output/kernel",
        "mask_decoder/layers/self_attn_layer_norm/scale": "decoder/layers/self_norm/scale",
        "visual_projector/linear_2/kernel": "visual_projector/down/kernel",
        "boundary/refine_conv/kernel": "boundary/refine/kernel",
        "background_embed": "background",
    }.items():
        np.testing.assert_array_equal(new[ours], arrays[theirs], err_msg=ours)
    assert sorted(x.tobytes() for x in new.values()) == sorted(x.tobytes() for x in arrays.values())  # each of them once
    assert model.extra["step"] == OLD["extra"]["step"]
    assert model.extra["upgraded_from"]["revision"] == OLD["revision"]
    with pytest.raises(UserError, match=r"has format version 3: only directories of the formats 1 to 2 are old"):
        upgrade.upgrade(tmp_path / "new", tmp_path / "again")


def test_a_component_of_format_1(tmp_path):
    config = {"family": "sam", "config": {"width": 8, "layers": 2, "window": 3, "global_layers": [1], "eps": 1e-6}}
    arrays = {"window_layers/q/kernel": np.ones((1, 8, 8), np.float32), "patch/bias": np.zeros(8, np.float32)}
    top = {"format": "flowseg_jax model", "format_version": 1, "model": {}, "tower": config, "extra": {}}
    (tmp_path / "old").mkdir()
    new = upgrade.upgrade(write_old(tmp_path / "old", top, arrays), tmp_path / "new")
    stored = pretrained.read_model_config(new, allow_component=True)
    assert stored["component"]["config"] == {
        "hidden_size": 8, "num_hidden_layers": 2, "window_size": 3, "global_attn_indexes": [1], "layer_norm_eps": 1e-6
    }  # fmt: skip
    assert sorted(stored["manifest"]) == ["patch_embed/bias", "window_layers/attn/q_proj/kernel"]


def test_values_that_changed_their_names():
    changed = upgrade.model_config({"parts": "language", "named_pass": "plain", "pixel_decoder": {"msda": "tent"}})
    assert changed == {
        "components": "vlm",
        "generic_pass": "without_flow",
        "pixel_decoder": {"deformable_attention_impl": "dense"},
    }


def test_what_was_changed_since_it_was_saved_is_not_upgraded(old, tmp_path):
    _, arrays = old
    copy = write_old(tmp_path / "old", OLD, {"background": arrays["background"]})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"extra": {"step": 1}}))
    with pytest.raises(UserError, match="has changed since it was saved"):
        upgrade.upgrade(copy, tmp_path / "new")


@pytest.mark.parametrize(
    ("family", "old_name", "new_name", "old_config", "new_config"),
    [
        ("phi3", "layers/q/kernel", "layers/self_attn/q_proj/kernel", {"kv_heads": 2}, {"num_key_value_heads": 2}),
        ("qwen3", "head", "lm_head", {"tie_embeddings": True}, {"tie_word_embeddings": True}),
        ("llama", "table", "embed_tokens", {"vocab": 7}, {"vocab_size": 7}),
        ("siglip2", "position", "position_embedding", {"mlp": 4}, {"intermediate_size": 4}),
        ("mask2former", "decoder/norm/bias", "mask_decoder/layernorm/bias", {"classes": 3}, {"num_classes": 3}),
    ],
)
def test_each_family_has_its_names(tmp_path, family, old_name, new_name, old_config, new_config):
    top = {"format": "flowseg_jax model", "format_version": 2, "model": {}, "extra": {"step": 5}, "revision": "r"}
    top |= {"tower": {"family": family, "config": old_config}, "versions": {"jax": "0"}}
    (tmp_path / "old").mkdir()
    old = write_old(tmp_path / "old", top, {old_name: np.arange(3, dtype=np.float32)})
    new = pretrained.load_pretrained(upgrade.upgrade(old, tmp_path / "new"), dtype=None, allow_component=True)
    assert new.component == {"family": family, "config": new_config}
    assert {name: x.tolist() for name, x in flatten_params(new.params).items()} == {new_name: [0.0, 1.0, 2.0]}
    assert new.extra == {"step": 5, "upgraded_from": {"format_version": 2, "versions": {"jax": "0"}, "revision": "r"}}
    with pytest.raises(UserError, match="new exists: remove it or choose another name"):
        upgrade.upgrade(old, tmp_path / "new")


def test_a_segmentor_needs_no_tokenizer_and_its_prompts_are_renamed(tmp_path):
    top = {
        "format": "flowseg_jax model",
        "format_version": 2,
        "extra": {"prompts": {"chat": "phi3_chat", "vary": True}, "step": 5},
    }
    top |= {"model": {"parts": "segmentor", "decoder": {"queries": 3}}}
    (tmp_path / "old").mkdir()
    old = write_old(tmp_path / "old", top, {"sam/window_layers/norm1/scale": np.ones(2, np.float32)})
    (old / "tokenizer" / "tokenizer.json").unlink()
    (old / "tokenizer").rmdir()
    config = {key: value for key, value in json.loads((old / "config.json").read_text()).items() if key != "json_checksum"}
    config["tokenizer_checksums"] = {}
    (old / "config.json").write_text(json.dumps(config | {"json_checksum": json_files.checksum(config)}))
    new = pretrained.load_pretrained(upgrade.upgrade(old, tmp_path / "new"), dtype=None)
    assert new.model_config == {"components": "segmentor", "mask_decoder": {"num_queries": 3}}
    assert new.extra["prompts"] == {"chat_template": "phi3_chat", "randomize": True}
    assert new.extra["step"] == 5 and new.component is None
    assert list(flatten_params(new.params)) == ["sam/window_layers/layer_norm1/scale"]
    with pytest.raises(UserError, match="no model directory .*gone"):
        upgrade.upgrade(tmp_path / "gone", tmp_path / "other")

"""Refusals at their limits."""

from __future__ import annotations

import re

import pytest

from convert_weights import refusals
from flowseg_jax.errors import UserError


def test_placeholders_are_more_than_half():
    assert not refusals.placeholders([])
    assert not refusals.placeholders([(0,), (1,)])
    assert refusals.placeholders([(0,), (3, 0), (1,)])
    assert not refusals.placeholders([(0,), (1,), (2, 2)])


@pytest.mark.parametrize(("name", "up"), [("global_step5", True), ("global_step5x", False), ("my_global_step5", False)])
def test_the_script_lies_beside_a_step_alone(tmp_path, name, up):
    directory = tmp_path / name
    directory.mkdir()
    (directory / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    root = tmp_path if up else directory
    with pytest.raises(UserError, match=rf": python zero_to_fp32.py {re.escape(str(root))} DIR \(the script lies beside"):
        refusals.refuse_training_state(directory)


def test_where_a_distributed_checkpoint_lies(tmp_path):
    """`.metadata` or `*.distcp` in the folder itself, or a folder of a known name in it."""
    for names, inner in (((".metadata",), ""), (("__0_0.distcp",), ""), (("dcp",), "/dcp"), (("dcp", ".metadata"), "")):
        directory = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        for name in names:
            (directory / name).write_bytes(b"")
        with pytest.raises(UserError, match=rf"dcp_to_torch {re.escape(str(directory))}{inner} model.pth, and convert model"):
            refusals.refuse_training_state(directory)
    assert refusals.training_state(tmp_path) == []


def test_a_model_beside_nothing_else_is_not_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    refusals.refuse_training_state(tmp_path)
    refusals.refuse_training_file(tmp_path / "model.safetensors")
    refusals.refuse_adapter(tmp_path, "model.safetensors")
    refusals.refuse_adapter(tmp_path, None)
    refusals.refuse_pointer(tmp_path / "model.safetensors")
    refusals.refuse_pointer(tmp_path / "nothing")
    refusals.refuse_names("it", ["model.layers.0.q_proj.weight", "alora_x.weight", "qweights.weight"])
    assert refusals.adapters(tmp_path) == []


@pytest.mark.parametrize("name", ["a_optim_states.pt", "zero_pp_rank_0_x", "__0_0.distcp"])
def test_a_file_of_one_rank(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"holds (DeepSpeed's ZeRO shards|a distributed checkpoint) \("):
        refusals.refuse_training_file(tmp_path / name)


def test_what_is_said_of_dtypes():
    with pytest.raises(UserError, match=r"^f: 2 tensors have the dtype complex64, which is not supported: a, b$"):
        refusals.refuse_dtypes("f", {"a": "complex64", "b": "complex64"})
    for kind in ("F8_E4M3", "float8_e5m2", "qint8", "uint4", "F4", "bits8"):
        with pytest.raises(UserError, match="the checkpoint is quantised: dequantise it first"):
            refusals.refuse_dtypes("f", {"a": kind})


@pytest.mark.parametrize("place", [None, "text_config", "vision_config"])
def test_what_is_said_of_a_quantised_config(place):
    def put(value):
        return {"quantization_config": value} if place is None else {place: {"quantization_config": value}}

    with pytest.raises(UserError, match=r"^c: quantization_config \(gptq\) says that the weights are quantised"):
        refusals.refuse_quantised(put({"quant_method": "gptq"}), "c")
    with pytest.raises(UserError, match=r"quantization_config \(of no known form\) says"):
        refusals.refuse_quantised(put([1]), "c")
    for nothing in (None, {}, False):
        refusals.refuse_quantised(put(nothing), "c")
    refusals.refuse_quantised({"text_config": 3}, "c")


def test_names_of_adapters_are_counted():
    with pytest.raises(UserError, match=r"^it holds an adapter \(4 of 5 tensors: a.lora_A.w, .*\): merge the adapter first"):
        refusals.refuse_names("it", ["a.lora_A.w", "b.lora_A.w", "base_layer.w", "x.ia3_l", "plain"])
    with pytest.raises(UserError, match=r"^it holds quantised weights \(1 of 2 tensors: a.qweight\): dequantise"):
        refusals.refuse_names("it", ["a.qweight", "plain"])

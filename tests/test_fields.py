"""Model configs from hostile JSON: one line that names the field, before anything is built."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from flowseg_jax import fields as fields_module
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.system import json_files

TINY = FlowSegConfig.tiny().to_dict()
HOSTILE = (0, -1, float("nan"), float("inf"), 1e308, 10**30, "abc", "x" * 10**6, "", True, [], [[]], {}, {"a": 1}, [1] * 10**5)


def fields(values, place=()):
    for key, value in values.items():
        yield (*place, key)
        if isinstance(value, dict):
            yield from fields(value, (*place, key))


def put(place, value):
    changed = copy.deepcopy(TINY)
    node = changed
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return changed


def test_every_value_of_every_field():
    """A value is refused in one line that names its field (or the part whose fields do not fit), or it is a possible one."""
    refused = 0
    for place in fields(TINY):
        for value in HOSTILE:
            try:
                FlowSegConfig.from_dict(put(place, value), "m/config.json: model")
            except UserError as error:
                refused += 1
                assert str(error).startswith("m/config.json: model"), error
                assert "\n" not in str(error) and len(str(error)) < 400
    assert refused > 900


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("sam.hidden_size", 0, "model.sam.hidden_size is 0, expected a whole number from 1 to 1000000"),
        ("sam.num_attention_heads", 0, "model.sam.num_attention_heads is 0, expected a whole number from 1 to 4096"),
        ("sam.image_size", 10**9, "model.sam.image_size is 1000000000, expected a whole number from 1 to 16384"),
        ("llm.rope_theta", float("nan"), "model.llm.rope_theta is nan, expected a number from 1 to 1e.12"),
        ("llm.hidden_size", "abc", "model.llm.hidden_size is 'abc', expected a whole number"),
        ("llm.num_hidden_layers", 2.0, "model.llm.num_hidden_layers is 2.0, expected a whole number"),
        ("llm.qk_norm", 1, "model.llm.qk_norm is 1, expected true or false"),
        ("llm.remat", "some", "model.llm.remat is 'some', expected one of none, full, attention, dots"),
        ("dtype", "float8", "model.dtype is 'float8', expected one of float32, bfloat16"),
        ("mask_decoder", 3, "model.mask_decoder is 3, expected a group of keys"),
        ("mask_decoder.num_heads", 3, r"mask_decoder.embed_dim 64 must be a multiple of 4 and of num_heads \(3\)"),
        ("connector.channels", [96, "a", 96], r"model.connector.channels\[1\] is 'a'"),
        ("sam.global_attn_indexes", [10**6], r"model.sam.global_attn_indexes\[0\] is 1000000"),
    ],
)
def test_what_each_says(place, value, message):
    with pytest.raises(UserError, match=message):
        FlowSegConfig.from_dict(put(tuple(place.split(".")), value))


def test_what_a_value_may_be_stays_what_it_was():
    """A range that shrinks would refuse models that there are; one that grows lets in what nothing has been built for."""
    recorded = json.loads((Path(__file__).parent / "golden" / "config_ranges.json").read_text())
    assert {**fields_module.WHOLE, **fields_module.REAL, **fields_module.CHOICES} == {k: tuple(v) for k, v in recorded.items()}
    for key, (least, most) in (fields_module.WHOLE | {"width": (1, 1_000_000)}).items():
        assert [fields_module._value(int, key, value, "m") for value in (least, most)] == [least, most]
        for value in (least - 1, most + 1):
            with pytest.raises(UserError, match=f"m is {value}, expected a whole number from {least} to {most}"):
                fields_module._value(int, key, value, "m")
    for key, (least, most) in (fields_module.REAL | {"loss": (-1e6, 1e6)}).items():
        assert [fields_module._value(float, key, value, "m") for value in (least, most)] == [least, most]
        for value in (least - 1e-3, most * 1.001):
            with pytest.raises(UserError, match="m is .*, expected a number from "):
                fields_module._value(float, key, value, "m")


def test_the_longest_lists_and_texts():
    assert fields_module._value(str, "chat_template", "x" * 100, "m") == "x" * 100
    assert fields_module._value(tuple[int, ...], "scales", [1] * 1000, "m") == (1,) * 1000
    with pytest.raises(UserError, match=r"m is 'x*…', expected a text of at most 100 characters"):
        fields_module._value(str, "chat_template", "x" * 101, "m")
    with pytest.raises(UserError, match="m is .*, expected a list of at most 1000"):
        fields_module._value(tuple[int, ...], "scales", [1] * 1001, "m")


def test_keys():
    with pytest.raises(UserError, match=r"model.sam: missing hidden_size$"):
        FlowSegConfig.from_dict(TINY | {"sam": {k: v for k, v in TINY["sam"].items() if k != "hidden_size"}})
    with pytest.raises(UserError, match=r"model.sam.hiden_size: unknown key \(did you mean 'hidden_size'\?\)"):
        FlowSegConfig.from_dict(put(("sam", "hiden_size"), 3))
    assert FlowSegConfig.from_dict(json.loads(json.dumps(TINY))) == FlowSegConfig.tiny()


def test_json_that_blows_up(tmp_path):
    for text, message in (
        ("[" * 10**5, "nested too deeply"),
        ("[" * 200 + "]" * 200, "more than 100 deep"),
        ("9" * 10**4, "digits"),
    ):
        with pytest.raises(ValueError, match=message):
            json_files.loads(text)
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(json_files.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="bytes, at most"):
        json_files.read(tmp_path / "large.json")
    assert json_files.short("x" * 10**6) == repr("x" * 40 + "…")
    assert json_files.short(10**6000) == "a number of 19932 bits"
    assert len(json_files.short([["x" * 10**6] * 10**5] * 3)) < 80


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="^m: model.connector: missing channels, hidden_channels$"):
        fields_module.read(ConnectorConfig, {"scales": [1]}, "m: model.connector")
    assert fields_module.read(ConnectorConfig, {"channels": [8], "hidden_channels": 4, "scales": [0.25]}, "m").channels == (8,)
    with pytest.raises(UserError, match="connector: width 6 with scale 0.25 needs a width divisible by 4"):
        fields_module.read(ConnectorConfig, {"channels": [6], "hidden_channels": 4, "scales": [0.25]}, "m")
    with pytest.raises(UserError, match=r"head_dim=13 must be even \(rotary embedding\)"):
        dataclasses.replace(LanguageConfig.tiny(300), head_dim=13)


def test_json_is_read_as_deep_as_any_file_of_ours_and_no_deeper():
    assert json_files.loads("[" * 100 + "]" * 100) and json_files.loads("7") == 7
    for deep in ("[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101):
        with pytest.raises(ValueError, match="it is nested more than 100 deep"):
            json_files.loads(deep)

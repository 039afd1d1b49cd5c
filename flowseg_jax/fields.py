"""Config dataclasses from plain values of any origin: every field's type and range is checked before anything is built."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from flowseg_jax.errors import UserError, did_you_mean, plain
from flowseg_jax.system.json_files import expect, number

# Whole numbers lie between 1 and a million, except: (least, most).
WHOLE = {
    "image_size": (1, 16_384),
    "patch_size": (1, 1_024),
    "num_hidden_layers": (1, 1_000),
    "num_layers": (1, 1_000),
    "global_attn_indexes": (0, 1_000),
    "connector_hidden_layers": (0, 1_000),
    "num_attention_heads": (1, 4_096),
    "num_key_value_heads": (1, 4_096),
    "num_heads": (1, 4_096),
    "vocab_size": (1, 1 << 24),
    "num_queries": (1, 65_536),
    "num_points": (1, 64),
    "num_levels": (1, 16),
    "kernel_size": (3, 255),
    "num_classes": (0, 1_000_000),
    "question": (0, 1_000),
    "answer": (0, 1_000),
}
# Other numbers lie between -1e6 and 1e6, except.
REAL = {
    "layer_norm_eps": (0.0, 1.0),
    "rms_norm_eps": (0.0, 1.0),
    "threshold": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
    "scales": (1 / 64, 64.0),
    "initializer_range": (0.0, 100.0),
    "embedding_initializer_range": (0.0, 100.0),
    "query_init_std": (0.0, 100.0),
    "mask_init_std": (0.0, 100.0),
    "logit_clamp": (1e-6, 1e6),
}
CHOICES = {"dtype": ("float32", "bfloat16"), "remat": ("none", "full", "dots")}
MOST_ITEMS, LONGEST_TEXT = 1_000, 100  # of a list; characters


def read(cls: type, values: Any, where: str) -> Any:
    """A config dataclass, and those in it, from nested plain values; lists become tuples.

    Args:
        where: what the values are, for messages: "model", or "RUN/model/config.json: model".

    Raises:
        UserError: an unknown or missing key, a value of another type or out of range, or values that do not fit together. It
            names the field.
    """
    expect(isinstance(values, Mapping), values, where, "a group of keys")
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            key = str(key)[:80]
            raise UserError(f"{where}.{key}: unknown key{did_you_mean(key, fields)}")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise UserError(f"{where}: missing {', '.join(missing)}")
    found = {key: _value(hints[key], key, value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**found)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: {plain(str(error), 300)}") from error


def _value(hint: Any, key: str, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return read(hint, value, where)
    if isinstance(hint, types.UnionType):  # with None
        if value is None:
            return None
        (hint,) = (each for each in typing.get_args(hint) if each is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        expect(isinstance(value, list | tuple) and len(value) <= MOST_ITEMS, value, where, f"a list of at most {MOST_ITEMS}")
        return tuple(_value(typing.get_args(hint)[0], key, item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is bool:
        expect(isinstance(value, bool), value, where, "true or false")
    elif hint is int:
        least, most = WHOLE.get(key, (1, 1_000_000))
        ok = number(value, whole=True, least=least, most=most)
        expect(ok, value, where, f"a whole number from {least} to {most}")
    elif hint is float:
        least, most = REAL.get(key, (-1e6, 1e6))
        expect(number(value, least=least, most=most), value, where, f"a number from {least:g} to {most:g}")
    else:
        known = CHOICES.get(key)
        ok = isinstance(value, str) and (value in known if known else len(value) <= LONGEST_TEXT)
        expect(ok, value, where, f"one of {', '.join(known)}" if known else f"a text of at most {LONGEST_TEXT} characters")
    return value

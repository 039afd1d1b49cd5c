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
CHOICES = {"dtype": ("float32", "bfloat16"), "remat": ("none", "full", "attention", "dots")}
MOST_ITEMS, LONGEST_TEXT = 1_000, 100  # of a list; characters

_ENCODER = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
_DECODER = {"width": "embed_dim", "layers": "num_layers", "heads": "num_heads", "ffn": "mlp_dim", "levels": "num_levels"}
# Keys that had another name: {section: {old: new}}; sections by their new names. `checkpoints.upgrade` reads it too.
RENAMED_KEYS: dict[str, dict[str, str]] = {
    "": {"steps": "num_steps"},
    "data": {
        "text": "text_length",
        "phrases": "max_phrases",
        "masks": "max_masks",
        "names": "max_names",
        "sets": "mixture",
        "mix": "shapes_mix",
        "images": "shapes_images",
        "chat": "chat_template",
        "vary_prompts": "random_prompts",
        "threads": "num_threads",
        "workers": "num_workers",
        "explain": "explanation_prob",
        "jitter": "lsj_scale_range",
        "square": "pad_to_square",
    },
    "optimizer": {
        "warmup": "warmup_fraction",
        "clip": "max_grad_norm",
        "groups": "param_groups",
        "accumulate": "grad_accum_steps",
        "skip_limit": "max_skipped_updates",
    },
    "optimizer.losses": {
        "language": "language_weight",
        "class_": "class_weight",
        "class_gain": "class_loss_scale",
        "mask": "mask_weight",
        "dice": "dice_weight",
        "background": "no_object_weight",
        "points": "num_points",
        "oversample": "oversample_ratio",
        "importance": "importance_sample_ratio",
        "named": "generic_weight",
        "category": "closed_vocab_weight",
        "vocabulary_chunk": "logits_chunk_size",
    },
    "model": {
        "decoder": "mask_decoder",
        "connector_layers": "connector_hidden_layers",
        "classes": "num_classes",
        "named_pass": "generic_pass",
        "negatives_group": "negatives_group_size",
        "parts": "components",
    },
    "model.sam": _ENCODER
    | {
        "mlp": "mlp_dim",
        "window": "window_size",
        "global_layers": "global_attn_indexes",
        "eps": "layer_norm_eps",
        "position_init": "pos_embed_init",
    },
    "model.siglip": _ENCODER | {"mlp": "intermediate_size", "eps": "layer_norm_eps"},
    "model.llm": _ENCODER
    | {
        "family": "model_type",
        "vocab": "vocab_size",
        "kv_heads": "num_key_value_heads",
        "mlp": "intermediate_size",
        "eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
        "embedding_std": "embedding_initializer_range",
    },
    "model.connector": {"hidden": "hidden_channels"},
    "model.pixel_decoder": _DECODER
    | {"mask_width": "mask_dim", "points": "num_points", "groups": "norm_groups", "msda": "deformable_attention_impl"},
    "model.mask_decoder": _DECODER
    | {"queries": "num_queries", "mask_width": "mask_dim", "query_std": "query_init_std", "mask_std": "mask_init_std"},
    "model.semantic_flow": {"zero_refinement": "zero_init_condition_refinement"},
    "model.boundary": {
        "kernel": "kernel_size",
        "eps": "threshold",
        "channels": "hidden_channels",
        "identity": "identity_init",
    },
    "extra.prompts": {"chat": "chat_template", "vary": "randomize"},
}
# Values that had another name: {key: {old: new}}.
RENAMED_VALUES = {
    "components": {"all": "full", "language": "vlm"},
    "generic_pass": {"flow": "with_flow", "plain": "without_flow"},
    "deformable_attention_impl": {"xla": "gather", "packed": "packed_gather", "tent": "dense"},
}


def new_name(key: str) -> str:
    """The name that the dotted `key` has: `model.decoder.queries` is `model.mask_decoder.num_queries`."""
    path: list[str] = []
    for part in key.split("."):
        path.append(RENAMED_KEYS.get(".".join(path), {}).get(part, part))
    return ".".join(path)


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
    section = where.rpartition(": ")[2]
    for key, value in values.items():
        if key not in fields:
            if new := RENAMED_KEYS.get(section, {}).get(key):
                raise UserError(f"{where}.{key} is called {new}")
            key = str(key)[:80]
            raise UserError(f"{where}.{key}: unknown key{did_you_mean(key, fields)}")
        if isinstance(value, str) and (new := RENAMED_VALUES.get(key, {}).get(value)):
            raise UserError(f"{where}.{key}: {value!r} is called {new!r}")
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

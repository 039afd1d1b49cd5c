"""Model directories of earlier formats: the same arrays under today's names.

    flowseg upgrade OLD NEW

Up to format 2, parameters and config fields had names of their own; since format 3 they have Hugging Face's. The tables below
and those in `fields` are the whole difference. No value changes, and what was saved with the model (step, prompts, revision)
stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from flowseg_jax import fields
from flowseg_jax.checkpoints import pretrained
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.stored_config import check_config, is_earlier, read_json
from flowseg_jax.checkpoints.streaming import LazyArray
from flowseg_jax.errors import UserError
from flowseg_jax.system import json_files
from flowseg_jax.system.paths import resolve_path

# (pattern, replacement), applied in order to every parameter path; a path that no pattern matches keeps its name.
_ATTENTION = ((r"/query/", "/q_proj/"), (r"/key/", "/k_proj/"), (r"/value/", "/v_proj/"), (r"/output/", "/out_proj/"))
LANGUAGE_MODEL = (
    (r"^table$", "embed_tokens"),
    (r"^head$", "lm_head"),
    (r"^layers/norm1/", "layers/input_layernorm/"),
    (r"^layers/norm2/", "layers/post_attention_layernorm/"),
    (r"^layers/([qkvo])/", r"layers/self_attn/\1_proj/"),
    (r"^layers/([qk]_norm)/", r"layers/self_attn/\1/"),
    (r"^layers/(gate|up|down)/", r"layers/mlp/\1_proj/"),
)
SIGLIP = (
    (r"^patch/", "patch_embedding/"),
    (r"^position$", "position_embedding"),
    (r"^layers/norm([12])/", r"layers/layer_norm\1/"),
    (r"^layers/([qkv])/", r"layers/self_attn/\1_proj/"),
    (r"^layers/o/", "layers/self_attn/out_proj/"),
    (r"^layers/up/", "layers/mlp/fc1/"),
    (r"^layers/down/", "layers/mlp/fc2/"),
)
SAM = (
    (r"^patch/", "patch_embed/"),
    (r"^position$", "pos_embed"),
    (r"_layers/norm([12])/", r"_layers/layer_norm\1/"),
    (r"_layers/([qkv])/", r"_layers/attn/\1_proj/"),
    (r"_layers/o/", "_layers/attn/proj/"),
    (r"_layers/rel_pos_", "_layers/attn/rel_pos_"),
    (r"_layers/up/", "_layers/mlp/lin1/"),
    (r"_layers/down/", "_layers/mlp/lin2/"),
)
PROJECTOR = ((r"^up/", "linear_1/"), (r"^down/", "linear_2/"))
PIXEL_DECODER = (
    (r"^projections/", "input_projections/"),
    (r"^lateral/", "lateral_convs/"),
    (r"^fuse/", "output_convs/"),
    (r"^layers/attention/offsets/", "layers/self_attn/sampling_offsets/"),
    (r"^layers/attention/weights/", "layers/self_attn/attention_weights/"),
    (r"^layers/attention/value/", "layers/self_attn/value_proj/"),
    (r"^layers/attention/output/", "layers/self_attn/output_proj/"),
    (r"^layers/norm1/", "layers/self_attn_layer_norm/"),
    (r"^layers/norm2/", "layers/final_layer_norm/"),
    (r"^layers/up/", "layers/fc1/"),
    (r"^layers/down/", "layers/fc2/"),
)
MASK_DECODER = (
    (r"^query_position$", "queries_embedder"),
    (r"^query_content$", "queries_features"),
    (r"^norm/", "layernorm/"),
    (r"^mask_mlp_(\d)/", r"mask_embedder/\1/"),
    *_ATTENTION,
    (r"^layers/cross/", "layers/cross_attn/"),
    (r"^layers/cross_norm/", "layers/cross_attn_layer_norm/"),
    (r"^layers/self_attention/", "layers/self_attn/"),
    (r"^layers/self_norm/", "layers/self_attn_layer_norm/"),
    (r"^layers/ffn_norm/", "layers/final_layer_norm/"),
    (r"^layers/up/", "layers/fc1/"),
    (r"^layers/down/", "layers/fc2/"),
    (r"^layers/semantic/attention/", "layers/semantic_refinement/attn/"),
    (r"^layers/semantic/", "layers/semantic_refinement/"),
    (r"^layers/refinement/attention/", "layers/condition_refinement/attn/"),
)
BOUNDARY = ((r"^compress/", "feature_proj/"), (r"^refine/", "refine_conv/"))
# {name in a whole model: (today's name, patterns below it)}
COMPONENTS = {
    "llm": ("llm", LANGUAGE_MODEL),
    "siglip": ("siglip", SIGLIP),
    "sam": ("sam", SAM),
    "visual_projector": ("visual_projector", PROJECTOR),
    "seg_projector": ("seg_projector", PROJECTOR),
    "llm_projector": ("llm_projector", PROJECTOR),
    "pixel_decoder": ("pixel_decoder", PIXEL_DECODER),
    "decoder": ("mask_decoder", MASK_DECODER),
    "boundary": ("boundary", BOUNDARY),
    "background": ("background_embed", ()),
}
# {family of a component's directory: the patterns of its names}; the others name their parameters as a whole model does.
FAMILIES = {"qwen3": LANGUAGE_MODEL, "phi3": LANGUAGE_MODEL, "llama": LANGUAGE_MODEL, "siglip2": SIGLIP, "sam": SAM}


def parameter_name(old: str, family: str | None = None) -> str:
    """Today's path of a parameter of format 2; `family` is that of a component's directory, None for a whole model."""
    first, _, rest = old.partition("/")
    if family in FAMILIES:
        return _substitute(old, FAMILIES[family])
    new, patterns = COMPONENTS.get(first, (first, ()))
    return f"{new}/{_substitute(rest, patterns)}" if rest else new


def _substitute(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def model_config(old: Mapping[str, Any], section: str = "model") -> dict[str, Any]:
    """A model's config, or one section's, with today's field names and values; what is not in the tables stays."""
    new = {}
    for key, value in old.items():
        key = fields.RENAMED_KEYS.get(section, {}).get(key, key)
        if isinstance(value, Mapping):
            value = model_config(value, f"{section}.{key}")
        elif isinstance(value, str):
            value = fields.RENAMED_VALUES.get(key, {}).get(value, value)
        new[key] = value
    return new


def read_earlier(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the arrays {flat name: array} of a model directory of an earlier format, under the names it has.

    Raises:
        UserError: no such directory, one of today's format, or a damaged one.
    """
    path = resolve_path(directory)
    if not path.is_dir():
        raise UserError(f"no model directory {path}")
    config = read_json(path)
    if not is_earlier(config):
        found = json_files.short(config.get("format_version"))
        raise UserError(
            f"{path} has format version {found}: only directories of the formats 1 to {pretrained.FORMAT_VERSION - 1} are old"
        )
    component, model = config.get("tower"), config.get("model")
    needs_tokenizer = component is None and not (isinstance(model, dict) and model.get("parts") == "segmentor")
    check_config(path, config, component, "tower", needs_tokenizer, "undo the change")
    stored = config["manifest"]
    item = unflatten_params({name: jax.ShapeDtypeStruct(tuple(shape), kind) for name, (shape, kind) in stored.items()})
    return config, flatten_params(pretrained.read_params(path, item, config["checksums"], on_devices=False))


def upgrade(old: str | os.PathLike, new: str | os.PathLike) -> epath.Path:
    """Writes the model directory `old`, of format 1 or 2, in today's format to `new`.

    Raises:
        UserError: `old` is no model directory of an earlier format or is damaged, or `new` exists.
    """
    pretrained.require_empty_directory(new)
    config, arrays = read_earlier(old)
    component = config.get("tower")
    family = component["family"] if component else None
    params = {parameter_name(name, family): value for name, value in arrays.items()}
    if component is not None:
        section = "llm" if family in ("qwen3", "phi3", "llama") else {"siglip2": "siglip", "sam": "sam"}.get(family)
        section = f"model.{section}" if section else "model"
        component = {"family": family, "config": model_config(component["config"], section)}
    extra = dict(config["extra"])
    if isinstance(prompts := extra.get("prompts"), Mapping):
        extra["prompts"] = model_config(prompts, "extra.prompts")
    extra["upgraded_from"] = {key: config.get(key) for key in ("format_version", "versions", "revision")}
    if component is None:
        tokenizer = epath.Path(old) / "tokenizer"
        tokenizer = tokenizer if tokenizer.is_dir() else None
        return pretrained.save_pretrained(new, unflatten_params(params), model_config(config["model"]), tokenizer, extra, None)
    arrays = {name: LazyArray(x.shape, x.dtype, lambda x=x: x) for name, x in params.items()}
    return pretrained.save_pretrained_streaming(new, arrays, None, None, extra, component=component)

"""Hugging Face's `config.json`: what becomes of each key.

transformers accepts any key and any value here, so a setting that nobody reads changes the numbers without a word. The tables
below list every key that the models' configuration classes have or their networks read. A key is *read* into our config,
*fixed* to the values that our network computes (another one is refused), *training only* (dropout, which we do not have), or
*unused*: the numbers do not depend on it. A key that stands in no table becomes a note.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from flowseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of value: its name in an error, and what belongs to it."""

    name: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number from {low:,} to {high:,}", lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float) -> Kind:
    """NaN is none: it fails both comparisons."""
    return Kind(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high)


def list_of(kind: Kind, most: int = 1000) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) <= most and all(map(kind.fits, value))

    return Kind(f"a list of at most {most} values, each {kind.name}", fits)


def one_of(*values: Any) -> Kind:
    return Kind(" or ".join(map(repr, values)), lambda v: any(type(v) is type(x) and v == x for x in values))


def empty(*names: Any) -> Kind:
    """Nothing, or what stands for nothing."""
    return Kind("nothing", lambda v: v is None or v is False or v == {} or v == [])


FLAG = Kind("true or false", lambda v: isinstance(v, bool))
GROUP = Kind("a group of keys", lambda v: isinstance(v, Mapping))
WIDTH, LAYERS, HEADS, SIDE = whole(1, 1 << 17), whole(1, 1000), whole(1, 4096), whole(1, 1 << 14)
EPS = number(1e-20, 1)  # 0 makes NaN of a row of zeros
THETA = number(1e-3, 1e15)
REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A key that is read.

    Attributes:
        kind: what its value must be.
        default: the value where the file leaves it out; `REQUIRED` where it must not.
        null: whether `null` means that it is left out.
    """

    kind: Kind
    default: Any = REQUIRED
    null: bool = False


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of one configuration class, see the head of this file.

    Attributes:
        name: what errors call the config.
        read: {key: how it is read}.
        fixed: {key: the values that our network computes}.
        training: dropouts.
        unused: keys that the numbers do not depend on.
    """

    name: str
    read: Mapping[str, Key]
    fixed: Mapping[str, Kind]
    training: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def known(self) -> frozenset[str]:
        return frozenset({*self.read, *self.fixed, *self.training, *self.unused})

    def values(self, config: Any) -> dict[str, Any]:
        """{key: value or default} of all keys that are read.

        Raises:
            UserError: a value of the wrong kind, a missing one, or one that our network does not compute.
        """
        self._check_group(config)
        for key, kind in self.fixed.items():
            if key in config and not kind.fits(config[key]):
                why = WHY.get(key, f"expected {kind.name}")
                raise UserError(f"{self.name}: {key}={reprlib.repr(config[key])} is not supported: {why}")
        return {key: self._value(config, key, how) for key, how in self.read.items()}

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """What a user should know of keys that are not read."""
        unknown = sorted(str(key)[:80] for key in config if key not in self.known)
        shown = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        lines = [f"{self.name}: {len(unknown)} unknown keys, which are not read: {shown}"] if unknown else []
        dropped = [f"{key}={reprlib.repr(config[key])}" for key in self.training if config.get(key)]
        if dropped:
            lines.append(f"{self.name}: {', '.join(dropped)}: training has no dropout here")
        return lines

    def _check_group(self, config: Any) -> None:
        if not isinstance(config, Mapping):
            raise UserError(f"{self.name}: expected a group of keys, got {reprlib.repr(config)}")

    def _value(self, config: Mapping[str, Any], key: str, how: Key) -> Any:
        value = config.get(key)
        if value is None and (how.null or how.default is REQUIRED or key not in config):
            if how.default is REQUIRED:
                raise UserError(f"{self.name}: {key} is missing")
            return how.default
        if not how.kind.fits(value):
            raise UserError(f"{self.name}: {key}={reprlib.repr(value)} is not {how.kind.name}")
        return value


WHY = {
    "quantization_config": "the weights are quantised; save them dequantised first (transformers: model.dequantize())",
    "compression_config": "the weights are compressed; save them decompressed first",
    "num_patches": "this is a SigLIP2 for images of any shape (NaFlex); give one of a fixed resolution",
    "per_layer_config": "all layers must have the same settings",
    "transformers_weights": "it names another file of weights; give that file as SOURCE",
}

# Keys of every configuration class, of today's transformers and of earlier ones: metadata, settings of outputs and devices, and
# settings of generation, which transformers moves to generation_config.json. Ids of special tokens come from the tokenizer.
_GENERAL = tuple(
    """
    model_type architectures transformers_version _name_or_path name_or_path _commit_hash auto_map dtype torch_dtype
    output_hidden_states output_attentions return_dict use_return_dict attn_implementation _attn_implementation
    _attn_implementation_autoset experts_implementation _experts_implementation chunk_size_feed_forward is_encoder_decoder
    is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder tie_last_hidden_states gradient_checkpointing
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix torchscript
    use_bfloat16 tf_legacy_loss use_cache bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id distributed_config transformers.js_config base_model_tp_plan base_model_pp_plan
    allow_global_per_layer_attribute_access serialize_explicit_per_layer_config
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature
    top_k top_p typical_p
    """.split()
)
# Any of these changes which numbers the file's weights stand for.
_FIXED = {
    key: empty()
    for key in (
        "quantization_config",
        "compression_config",
        "per_layer_config",
        "pruned_heads",
        "transformers_weights",
        "fusion_config",
    )
}


def _keys(name: str, read: dict[str, Key], fixed: dict[str, Kind] | None = None, training: str = "", unused: str = "") -> Keys:
    fixed = _FIXED | (fixed or {})
    general = tuple(key for key in _GENERAL if key not in read and key not in fixed)
    return Keys(name, read, fixed, tuple(training.split()), (*general, *unused.split()))


_TEXT = {
    "vocab_size": Key(whole(1, 1 << 24)),
    "hidden_size": Key(WIDTH),
    "num_hidden_layers": Key(LAYERS),
    "num_attention_heads": Key(HEADS),
    "num_key_value_heads": Key(HEADS, None, null=True),
    "intermediate_size": Key(whole(1, 1 << 20)),
    "head_dim": Key(whole(2, 1 << 14), None, null=True),
    "rms_norm_eps": Key(EPS),
    "tie_word_embeddings": Key(FLAG, False),
    "rope_parameters": Key(GROUP, None, null=True),
    "rope_scaling": Key(GROUP, None, null=True),
    "rope_theta": Key(THETA, None, null=True),
    "partial_rotary_factor": Key(number(0, 1), 1.0, null=True),
}
_CAUSAL = {
    "hidden_act": one_of("silu"),
    "attention_bias": one_of(False, None),
    "mlp_bias": one_of(False, None),
    "is_causal": one_of(True, None),
    "rope_interleaved": one_of(False, None),  # SmolLM2's file says so; transformers does not read it
}
_FULL = Kind("'full_attention' in every layer", lambda v: v is None or list_of(one_of("full_attention")).fits(v))
_UNIFORM = Kind(
    "the same kind in every layer",
    lambda v: v is None or (list_of(one_of("full_attention", "sliding_attention")).fits(v) and len(set(v)) <= 1),
)
_NO_WINDOW = {"use_sliding_window": one_of(False, None), "layer_types": _FULL}
_TEXT_UNUSED = "max_position_embeddings initializer_range pretraining_tp is_llama_config"

QWEN3 = _keys(
    "config.json (qwen3)",
    # The class has defaults of its own for what the others derive from the width.
    _TEXT | {"num_key_value_heads": Key(HEADS, 32, null=False), "head_dim": Key(whole(2, 1 << 14), 128)},
    _CAUSAL | _NO_WINDOW,
    "attention_dropout",
    f"{_TEXT_UNUSED} sliding_window max_window_layers",
)
PHI3 = _keys(
    "config.json (phi3)",
    _TEXT | {"sliding_window": Key(whole(1, 1 << 30), None, null=True)},
    _CAUSAL | {"layer_types": _UNIFORM},
    "attention_dropout resid_pdrop embd_pdrop",
    f"{_TEXT_UNUSED} use_sliding_window original_max_position_embeddings",
)
LLAMA = _keys(
    "config.json (llama)", _TEXT, _CAUSAL | _NO_WINDOW | {"sliding_window": empty()}, "attention_dropout", _TEXT_UNUSED
)
LANGUAGE = {"qwen3": QWEN3, "phi3": PHI3, "llama": LLAMA}
# Of the dictionary of rotary settings. Of scaled embeddings only Llama 3's is computed, which has keys of its own; others are
# refused by their type, so that what scales is without effect here.
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE = _keys(
    "rope_parameters",
    {"rope_theta": Key(THETA, None, null=True), "partial_rotary_factor": Key(number(0, 1), None, null=True)},
    unused=f"""{" ".join(ROPE_SCALING)} rope_type type attention_factor beta_fast beta_slow short_factor long_factor mscale
    mscale_all_dim truncate mrope_section""",
)
LLAMA3_ROPE = _keys("rope_parameters", {key: Key(number(1e-3, 1e6)) for key in ROPE_SCALING})
SIGLIP = _keys(
    "SigLIP config",
    {
        "image_size": Key(SIDE, 224),
        "patch_size": Key(SIDE, 16),
        "hidden_size": Key(WIDTH, 768),
        "num_hidden_layers": Key(LAYERS, 12),
        "num_attention_heads": Key(HEADS, 12),
        "intermediate_size": Key(whole(1, 1 << 20), 3072),
        "layer_norm_eps": Key(EPS, 1e-6),
    },
    {"hidden_act": one_of("gelu_pytorch_tanh"), "num_channels": one_of(3), "num_patches": empty()},
    "attention_dropout",
    "vision_use_head initializer_factor initializer_range projection_dim",
)
SAM = _keys(
    "SAM config",
    {
        "image_size": Key(SIDE, 1024),
        "patch_size": Key(SIDE, 16),
        "hidden_size": Key(WIDTH, 768),
        "num_hidden_layers": Key(LAYERS, 12),
        "num_attention_heads": Key(HEADS, 12),
        "mlp_dim": Key(whole(1, 1 << 20), None, null=True),
        "mlp_ratio": Key(number(1e-3, 1000), 4.0),
        "window_size": Key(whole(0, 1 << 14), 14),
        "global_attn_indexes": Key(list_of(whole(0, 1000)), (2, 5, 8, 11)),
        "layer_norm_eps": Key(EPS, 1e-6),
    },
    {
        "hidden_act": one_of("gelu"),
        "qkv_bias": one_of(True),
        "use_abs_pos": one_of(True),
        "use_rel_pos": one_of(True),
        "num_channels": one_of(3),
    },
    "attention_dropout dropout",
    "output_channels num_pos_feats initializer_range initializer_factor projection_dim intermediate_size scale",
)
# What stands beside `vision_config` in the config of a whole model.
WHOLE = {
    "siglip2": _keys("SigLIP config", {}, unused="vision_config text_config initializer_factor initializer_range"),
    "sam": _keys(
        "SAM config",
        {},
        unused="vision_config prompt_encoder_config mask_decoder_config initializer_range tie_word_embeddings",
    ),
}
MASK2FORMER = _keys(
    "config.json (mask2former)",
    {
        "backbone_config": Key(GROUP, {}, null=True),
        "feature_size": Key(WIDTH, 256),
        "mask_feature_size": Key(WIDTH, 256),
        "hidden_dim": Key(WIDTH, 256),
        "encoder_feedforward_dim": Key(whole(1, 1 << 20), 1024),
        "encoder_layers": Key(LAYERS, 6),
        "decoder_layers": Key(whole(2, 1000), 10),
        "num_attention_heads": Key(HEADS, 8),
        "dim_feedforward": Key(whole(1, 1 << 20), 2048),
        "num_queries": Key(whole(1, 1 << 16), 100),
        "common_stride": Key(whole(1, 1 << 10), 4),
        "feature_strides": Key(list_of(whole(1, 1 << 10), most=10), (4, 8, 16, 32)),
        "id2label": Key(GROUP, None, null=True),
        "num_labels": Key(whole(1, 1 << 20), 2),
        # transformers takes these for hidden_dim and decoder_layers
        "hidden_size": Key(WIDTH, None, null=True),
        "num_hidden_layers": Key(whole(2, 1000), None, null=True),
    },
    {
        "activation_function": one_of("relu"),
        "pre_norm": one_of(False),
        "enforce_input_projection": one_of(False),
        "num_feature_levels": one_of(3),
        "backbone": empty(),
        "use_timm_backbone": one_of(False, None),
        "backbone_kwargs": empty(),
    },
    "dropout",
    """ignore_value no_object_weight class_weight mask_weight dice_weight train_num_points oversample_ratio
    importance_sample_ratio init_std init_xavier_std initializer_range use_auxiliary_loss output_auxiliary_logits
    use_pretrained_backbone""",
)
# The backbone is left out; its sizes are those of the maps that the pixel decoder is given.
SWIN = _keys(
    "backbone_config",
    {
        "model_type": Key(one_of("swin"), "swin"),
        "embed_dim": Key(WIDTH, 96),
        "depths": Key(list_of(LAYERS, 10), (2, 2, 6, 2)),
        "out_features": Key(list_of(Kind("a name", lambda v: isinstance(v, str)), 10), None, null=True),
        "out_indices": Key(list_of(whole(0, 10), 10), None, null=True),
    },
    training="hidden_dropout_prob attention_probs_dropout_prob",
    unused="""image_size patch_size num_channels num_heads num_attention_heads num_hidden_layers num_layers window_size
    mlp_ratio qkv_bias drop_path_rate hidden_act use_absolute_embeddings initializer_range layer_norm_eps encoder_stride
    hidden_size stage_names path_norm _out_features _out_indices""",
)


def rope(values: Mapping[str, Any], name: str) -> tuple[float, tuple[float, ...] | None]:
    """The rotary base, and Llama 3's scaling or None, from `rope_scaling`, `rope_parameters` and the keys beside them.

    As in transformers, a `rope_scaling` that is not empty takes the place of `rope_parameters`, and what the dictionary says
    counts more than what stands beside it.

    Args:
        values: what `Keys.values` gives for a language model.
        name: of the config, for errors.

    Raises:
        UserError: a partial embedding or one that is scaled in another way, settings by kind of layer, or no base.
    """
    found = values["rope_scaling"] or values["rope_parameters"] or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{name}: rope_scaling={reprlib.repr(kind)} is not supported, only 'default' and 'llama3' are")
    if nested := [key for key, value in found.items() if isinstance(value, Mapping)]:
        raise UserError(f"{name}: rotary settings by kind of layer ({str(nested[0])[:40]}) are not supported")
    inside = dataclasses.replace(ROPE, name=f"{name}: rope_parameters").values(found)
    factor = inside["partial_rotary_factor"]
    factor = values["partial_rotary_factor"] if factor is None else factor
    if factor != 1:
        raise UserError(f"{name}: partial_rotary_factor={factor!r} is not supported, only 1 is")
    theta = inside["rope_theta"] if inside["rope_theta"] is not None else values["rope_theta"]
    if theta is None:
        raise UserError(f"{name}: rope_theta is missing")
    if kind == "default":
        return float(theta), None
    scaling = dataclasses.replace(LLAMA3_ROPE, name=f"{name}: rope_parameters").values(found)
    return float(theta), tuple(float(scaling[key]) for key in ROPE_SCALING)


def notes(family: str, config: Mapping[str, Any]) -> list[str]:
    """Notes about the config of a family of `convert_weights`: keys that are not known, settings that count no more."""
    if family in LANGUAGE:
        return [*LANGUAGE[family].notes(config), *_rope_notes(LANGUAGE[family].name, config)]
    if family == "mask2former":
        return [*MASK2FORMER.notes(config), *SWIN.notes(config.get("backbone_config") or {})]
    keys = {"siglip2": SIGLIP, "sam": SAM}[family]
    if "vision_config" not in config:
        return keys.notes(config)
    return [*WHOLE[family].notes(config), *keys.notes(config["vision_config"])]


def _rope_notes(name: str, config: Mapping[str, Any]) -> list[str]:
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    rope, lines = scaling or parameters or {}, ROPE.notes(scaling or parameters or {})
    if scaling and parameters and scaling != parameters:
        lines.append(f"{name}: rope_scaling takes the place of rope_parameters, as in transformers")
    for key in ("rope_theta", "partial_rotary_factor"):
        beside, inside = config.get(key), rope.get(key)
        if None not in (beside, inside) and beside != inside:
            lines.append(f"{name}: {key}={beside!r} is not read, the rotary settings say {inside!r}")
    return lines

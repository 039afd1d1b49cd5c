"""The config of a component, read from the `config.json` that Hugging Face writes beside its weights."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_weights.families import Mask2FormerConfig
from convert_weights.files import read_json, resolve_source
from convert_weights.refusals import refuse_quantised
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.models import hf_keys
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.siglip import SiglipConfig
from flowseg_jax.system.console import log

SIGLIPS = {"so400m_14_384": SiglipConfig.so400m_14_384}


def hf_config(path: Path | None, weights: Path) -> dict[str, Any]:
    """The Hugging Face config of some weights: the file or directory `path`, else `config.json` beside them."""
    place = path if path is not None else weights
    file = place / "config.json" if place.is_dir() else place if path is not None else place.parent / "config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the model's config by --config FILE")
    values = read_json(file)
    refuse_quantised(values, file)
    return values


MODEL_TYPES = {  # what config.json may call a family, where that is not the family's own name
    "siglip2": ("siglip", "siglip2", "siglip_vision_model", "siglip2_vision_model"),
    "sam": ("sam", "sam_vision_model"),
}


def component_config(family: str, values: Mapping[str, Any]) -> Any:
    """A component's config from Hugging Face's; says what it does not read.

    Raises:
        UserError: it belongs to another family, or names a feature that is not supported.
    """
    values = _language_part(family, values)
    kind = values.get("model_type", "")
    if kind and kind not in MODEL_TYPES.get(family, (family,)):
        raise UserError(f"config.json says model_type={reprlib.repr(kind)}: that is no checkpoint of the family {family}")
    read = {"siglip2": SiglipConfig.from_hf, "sam": SamConfig.from_hf, "mask2former": mask2former_config}
    cfg = read.get(family, LanguageConfig.from_hf)(values)
    _say_notes(family, values)
    return cfg


def language_config(values: Mapping[str, Any]) -> LanguageConfig:
    """The config of whichever language model this is; says what it does not read. Raises a UserError for another model."""
    cfg = LanguageConfig.from_hf(values)
    _say_notes(cfg.model_type, values)
    return cfg


def _say_notes(family: str, values: Mapping[str, Any]) -> None:
    for note in hf_keys.notes(family, values):
        log(f"note: {note}")


def _language_part(family: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model inside that of a model with pictures; any other config as it is."""
    inner = values.get("text_config")
    if family not in hf_keys.LANGUAGE or not isinstance(inner, Mapping) or inner.get("model_type") != family:
        return values
    # The whole model's word on tied heads counts, where it has one.
    tied = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
    fixed = {key: values[key] for key in ("quantization_config", "compression_config") if key in values}
    return {**inner, **tied, **fixed}


def mask2former_config(config: Mapping[str, Any]) -> Mask2FormerConfig:
    """Reads a `Mask2FormerConfig` JSON (Hugging Face's defaults for keys that it leaves out); its backbone must be a Swin.

    Raises:
        UserError: a value of the wrong kind, or one that our decoders do not compute.
    """
    name = hf_keys.MASK2FORMER.name
    values = hf_keys.MASK2FORMER.values(config)
    backbone = hf_keys.SWIN.values(values["backbone_config"])
    stages = len(backbone["depths"])
    strides = tuple(values["feature_strides"])  # they say no more than how many FPN stages follow the encoder
    width, heads, mask_width = values["hidden_dim"], values["num_attention_heads"], values["mask_feature_size"]
    stages_read = backbone["out_features"] in (None, ["stage1", "stage2", "stage3", "stage4"])
    stages_read = stages_read and backbone["out_indices"] in (None, [1, 2, 3, 4])
    faults = (
        (values["feature_size"] != width, f"feature_size={values['feature_size']} differs from hidden_dim={width}"),
        (values["hidden_size"] not in (None, width), f"hidden_size={values['hidden_size']} differs from hidden_dim={width}"),
        (
            values["num_hidden_layers"] not in (None, values["decoder_layers"]),
            f"num_hidden_layers={values['num_hidden_layers']} differs from decoder_layers={values['decoder_layers']}",
        ),
        (width % heads, f"num_attention_heads={heads} does not divide hidden_dim={width}"),
        (stages != 4, f"a backbone of {stages} stages is not supported, only one of 4 is"),
        (len(strides) != 4 or sorted(set(strides)) != list(strides), f"feature_strides={list(strides)} are no 4 growing ones"),
        (
            values["common_stride"] > min(strides[-3:], default=0),
            f"common_stride={values['common_stride']} is larger than the strides of the encoder's maps",
        ),
        (not stages_read, "the backbone's out_features must be all of its stages, in order"),
    )
    for wrong, fault in faults:
        if wrong:
            raise UserError(f"{name}: {fault}")
    pixel = PixelDecoderConfig(
        tuple(backbone["embed_dim"] * 2**i for i in reversed(range(stages))),
        strides[::-1],
        embed_dim=width,
        mask_dim=mask_width,
        num_layers=values["encoder_layers"],
        num_heads=heads,
        mlp_dim=values["encoder_feedforward_dim"],
        num_levels=3,
        common_stride=values["common_stride"],
    )
    decoder = MaskDecoderConfig(
        embed_dim=width,
        num_queries=values["num_queries"],
        num_layers=values["decoder_layers"] - 1,
        num_heads=heads,
        mlp_dim=values["dim_feedforward"],
        num_levels=3,
        mask_dim=None if mask_width == width else mask_width,
    )
    labels = values["id2label"]
    return Mask2FormerConfig(pixel, decoder, len(labels) if labels else values["num_labels"])


def preset(value: str, presets: Mapping[str, Any], read: Any, what: str) -> Any:
    """A named preset, or the config of a directory with a Hugging Face config.json."""
    if value in presets:
        return presets[value]()
    path = Path(value)
    if not path.exists() and "/" not in value:
        raise UserError(f"{what}: no preset and no directory {value!r}{did_you_mean(value, presets)}")
    return read(hf_config(None, resolve_source(value)))

"""The config of a conversion: read from `config.json` beside the weights, or from the shapes of the tensors.

Hugging Face writes a config beside a component. X-SAM writes none: what tensors cannot tell (numbers of heads, RoPE, the side
of SigLIP's image) comes from presets that must agree with the shapes, and any value can be set by name.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert_weights.families import Mask2FormerConfig, Stage1Config
from convert_weights.ops import Shape
from convert_weights.refusals import refuse_quantised
from convert_weights.sources import Entry, read_json, resolve_source
from flowseg_jax import fields
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.models import hf_keys
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig
from flowseg_jax.system.console import log

LLMS = {
    "qwen3_4b": LanguageConfig.qwen3_4b,
    "qwen3_1b7": LanguageConfig.qwen3_1b7,
    "phi3_mini": LanguageConfig.phi3_mini,
}
SIGLIPS = {"so400m_14_384": SiglipConfig.so400m_14_384}
STRIDES = (32, 16, 8, 4)


class Shapes:
    """The shapes of a checkpoint's tensors, with errors that name what is not there."""

    def __init__(self, entries: Mapping[str, Entry], name: str):
        self._entries, self._name = entries, name

    def __getitem__(self, tensor: str) -> Shape:
        if tensor not in self._entries:
            raise UserError(f"{self._name} holds no {tensor}: its sizes cannot be read off; is it a checkpoint of this family?")
        return self._entries[tensor].shape

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._entries

    def count(self, before: str) -> int:
        """How many numbers 0, 1, ... follow `before` in the names."""
        pattern = re.compile(re.escape(before) + r"(\d+)\.")
        found = [int(match.group(1)) for match in map(pattern.match, self._entries) if match]
        return max(found, default=-1) + 1


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


def tower_config(family: str, values: Mapping[str, Any]) -> Any:
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
            f"common_stride={values['common_stride']} is behind the encoder's maps",
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


def sam_from_shapes(shapes: Shapes, prefix: str = "segmentor.encoder.") -> SamConfig:
    """All sizes of SAM's encoder, in transformers' or segment-anything's naming.

    A layer whose position table fits the whole grid is a global one.
    """
    meta = f"{prefix}patch_embed.proj.weight" in shapes
    patches, blocks = ("patch_embed.proj", "blocks") if meta else ("patch_embed.projection", "layers")
    _, grid, _, width = shapes[f"{prefix}pos_embed"]
    patch = shapes[f"{prefix}{patches}.weight"][-1]
    layers = shapes.count(f"{prefix}{blocks}.")
    tables = [shapes[f"{prefix}{blocks}.{i}.attn.rel_pos_h"] for i in range(layers)]
    is_global = [rows == 2 * grid - 1 for rows, _ in tables]
    windows = {(rows + 1) // 2 for (rows, _), whole in zip(tables, is_global, strict=True) if not whole}
    if len(windows) > 1:
        raise UserError(f"{prefix}: layers with windows of {len(windows)} sizes, {sorted(windows)}; one size is supported")
    return SamConfig(
        image_size=grid * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // tables[0][1],
        mlp_dim=shapes[f"{prefix}{blocks}.0.mlp.lin1.weight"][0],
        window_size=windows.pop() if windows else 1,
        global_attn_indexes=tuple(i for i, whole in enumerate(is_global) if whole),
    )


def connector_from_shapes(shapes: Shapes, sam: SamConfig) -> tuple[ConnectorConfig, tuple[int, ...]]:
    """The connector, and the layers that it reads: the last quarters of the encoder, as X-SAM has them."""
    levels = shapes.count("seg_connector.model.")
    hidden, width = shapes["seg_connector.model.0.model.0.weight"][:2]
    scales = tuple(shapes[f"seg_connector.model.{i}.model.4.weight"][0] / width for i in range(levels))
    scales = tuple(int(scale) if scale == int(scale) else scale for scale in scales)
    return ConnectorConfig((width,) * levels, hidden, scales), quarters(sam.num_hidden_layers, levels)


def quarters(layers: int, levels: int) -> tuple[int, ...]:
    """The last `levels` of the four quarter points of an encoder: 12, 18, 24 of 24."""
    return tuple(round(layers * i / 4) for i in range(1, 5))[-levels:]


def decoders_from_shapes(shapes: Shapes, channels: Sequence[int]) -> tuple[PixelDecoderConfig, MaskDecoderConfig]:
    """Both decoders with 8 heads (X-SAM's number); the points a head samples follow from it."""
    pixel, decoder, heads = "segmentor.pixel_decoder.", "segmentor.decoder.", PixelDecoderConfig.num_heads
    levels, width = shapes[f"{pixel}level_embed"]
    samples = shapes[f"{pixel}encoder.layers.0.self_attn.attention_weights.weight"][0]
    mask_width = shapes[f"{pixel}mask_projection.weight"][0]
    queries, query_width = shapes[f"{decoder}queries_features.weight"]
    return (
        PixelDecoderConfig(
            tuple(channels),
            STRIDES[: len(channels)],
            embed_dim=width,
            mask_dim=mask_width,
            num_layers=shapes.count(f"{pixel}encoder.layers."),
            num_heads=heads,
            num_points=max(samples // (heads * levels), 1),
            mlp_dim=shapes[f"{pixel}encoder.layers.0.fc1.weight"][0],
        ),
        MaskDecoderConfig(
            embed_dim=query_width,
            num_queries=queries,
            num_layers=shapes.count(f"{decoder}decoder.layers."),
            num_heads=heads,
            mlp_dim=shapes[f"{decoder}decoder.layers.0.fc1.weight"][0],
            num_levels=levels,
            mask_dim=None if mask_width == query_width else mask_width,
        ),
    )


def llm_from_shapes(shapes: Shapes, chosen: LanguageConfig | None) -> LanguageConfig:
    """The preset that has the checkpoint's width, depth and kind, or `chosen`; the vocabulary is the table's."""
    vocab, width = shapes["llm.model.embed_tokens.weight"]
    layers = shapes.count("llm.model.layers.")
    known = [chosen] if chosen is not None else [make() for make in LLMS.values()]
    fitting = [cfg for cfg in known if (cfg.hidden_size, cfg.num_hidden_layers) == (width, layers)]
    if not fitting:
        asked = (
            f"--llm has width {known[0].hidden_size} and {known[0].num_hidden_layers}"
            if chosen is not None
            else "no preset has these"
        )
        raise UserError(
            f"the checkpoint's language model has width {width} and {layers} layers, {asked}; "
            "give --llm DIR with its config.json"
        )
    return dataclasses.replace(fitting[0], vocab_size=vocab)


def siglip_from_shapes(shapes: Shapes, chosen: SiglipConfig | None, vision: str) -> SiglipConfig:
    """The vision encoder: heads and image size of `chosen` (SigLIP2-so400m/14-384 by default), the rest from the shapes."""
    prefix = f"{vision}.vision_model."
    base = chosen or SiglipConfig.so400m_14_384()
    width, _, _, patch = shapes[f"{prefix}embeddings.patch_embedding.weight"]
    tokens = shapes[f"{prefix}embeddings.position_embedding.weight"][0]
    if (base.hidden_size, base.patch_size, base.num_patches) != (width, patch, tokens):
        raise UserError(
            f"the checkpoint's vision encoder has width {width}, patches of {patch} and {tokens} tokens, the config has "
            f"{base.hidden_size}, {base.patch_size} and {base.num_patches}; give --siglip DIR with its config.json"
        )
    mlp = shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0]
    return dataclasses.replace(base, num_hidden_layers=shapes.count(f"{prefix}encoder.layers."), intermediate_size=mlp)


def stage1_from_shapes(shapes: Shapes) -> Stage1Config:
    """X-SAM's stage-1 segmentor."""
    sam = sam_from_shapes(shapes)
    connector, layers = connector_from_shapes(shapes, sam)
    heads = [f"segmentor.class_predictor.{name}weight" for name in ("predictor.", "")]
    head = next((name for name in heads if name in shapes), heads[0])
    return Stage1Config(
        sam, connector, layers, *decoders_from_shapes(shapes, connector.out_channels), classes=shapes[head][0] - 1
    )


def xsam_from_shapes(
    shapes: Shapes, llm: LanguageConfig | None, siglip: SiglipConfig | None, mode: str, dtype: str
) -> FlowSegConfig:
    """The model that an X-SAM checkpoint is, or becomes.

    Args:
        mode: "off" leaves X-SAM as it is; "sr" and "sr_cr" add the semantic flow and BAR so that the model still starts as
            what it was (residual norm, zero-initialised outputs).
        dtype: what the network computes in.
    """
    if "llm.model.embed_tokens.weight" not in shapes and "segmentor.encoder.pos_embed" in shapes:
        raise UserError("a checkpoint of X-SAM's first stage (no language model): use flowseg convert xsam_stage1 ...")
    aaai = "visual_encoder.vision_model.embeddings.patch_embedding.weight" in shapes
    sam = sam_from_shapes(shapes)
    connector, layers = connector_from_shapes(shapes, sam)
    pixel, decoder = decoders_from_shapes(shapes, connector.out_channels)
    return FlowSegConfig(
        sam=sam,
        siglip=siglip_from_shapes(shapes, siglip, "visual_encoder" if aaai else "vision_encoder"),
        llm=llm_from_shapes(shapes, llm),
        connector=connector,
        pixel_decoder=pixel,
        mask_decoder=dataclasses.replace(decoder, logit_clamp=500.0 if aaai else 50.0),
        connector_hidden_layers=layers,
        semantic_flow=SemanticFlowConfig(mode=mode, norm="post" if mode == "off" else "residual"),
        boundary=BoundaryConfig(enabled=mode != "off"),
        dtype=dtype,
    )


def joined_config(
    llm: LanguageConfig, siglip: SiglipConfig, sam: SamConfig, stage1: Stage1Config | None, mode: str, dtype: str
) -> FlowSegConfig:
    """A FlowSeg around encoders and a language model, with the connector and decoders of `stage1`, or the full-sized ones."""
    if stage1 is None:
        scales = ConnectorConfig.sam_large().scales
        connector = ConnectorConfig((sam.hidden_size,) * len(scales), sam.hidden_size // 2, scales)
        pixel = PixelDecoderConfig.mask2former(connector.out_channels)
        stage1 = Stage1Config(sam, connector, quarters(sam.num_hidden_layers, len(scales)), pixel, MaskDecoderConfig(), 0)
    elif stage1.sam != sam:
        raise UserError(f"the segmentor's mask encoder is {stage1.sam}, the given one {sam}: leave sam= out")
    return FlowSegConfig(
        sam=sam,
        siglip=siglip,
        llm=llm,
        connector=stage1.connector,
        pixel_decoder=stage1.pixel_decoder,
        mask_decoder=stage1.decoder,
        connector_hidden_layers=stage1.connector_layers,
        semantic_flow=SemanticFlowConfig(mode=mode),
        boundary=BoundaryConfig(enabled=mode != "off"),
        dtype=dtype,
    )


def override(cfg: Any, settings: Sequence[str]) -> Any:
    """The config with `KEY=VALUE`s set; keys are dotted (`mask_decoder.num_heads=4`), values are Python literals or bare words.

    Raises:
        UserError: no such key, or values that do not fit each other.
    """
    tree = dataclasses.asdict(cfg)
    for setting in settings:
        key, equals, text = setting.partition("=")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not equals or not isinstance(node, dict) or last not in node:
            raise UserError(f"--set {setting}: expected KEY=VALUE with a key of the config (say mask_decoder.num_heads=4)")
        try:
            node[last] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            node[last] = text
    return rebuild(type(cfg), tree)


def rebuild(kind: type, values: Mapping[str, Any]) -> Any:
    """A config dataclass from nested plain values, lists for tuples; strict. Raises UserError."""
    if kind is FlowSegConfig:
        return FlowSegConfig.from_dict(values)
    return fields.read(kind, values, kind.__name__)


def to_hf(family: str, cfg: Any) -> dict[str, Any] | None:
    """Hugging Face's `config.json` of an exported encoder or language model, or None where its class needs more than that."""
    if family == "siglip2":
        return {
            "model_type": "siglip_vision_model",
            "architectures": ["SiglipVisionModel"],
            "hidden_size": cfg.hidden_size,
            "intermediate_size": cfg.intermediate_size,
            "num_hidden_layers": cfg.num_hidden_layers,
            "num_attention_heads": cfg.num_attention_heads,
            "image_size": cfg.image_size,
            "patch_size": cfg.patch_size,
            "layer_norm_eps": cfg.layer_norm_eps,
            "hidden_act": "gelu_pytorch_tanh",
        }
    if family == "sam":
        return {
            "model_type": "sam_vision_model",
            "architectures": ["SamVisionModel"],
            "hidden_size": cfg.hidden_size,
            "mlp_dim": cfg.mlp_dim,
            "num_hidden_layers": cfg.num_hidden_layers,
            "num_attention_heads": cfg.num_attention_heads,
            "image_size": cfg.image_size,
            "patch_size": cfg.patch_size,
            "window_size": cfg.window_size,
            "global_attn_indexes": list(cfg.global_attn_indexes),
            "layer_norm_eps": cfg.layer_norm_eps,
        }
    if isinstance(cfg, LanguageConfig):
        classes = {"qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM", "llama": "LlamaForCausalLM"}
        windows = {"sliding_window": cfg.sliding_window} if cfg.model_type == "phi3" else {}
        # A Phi-3 has no separate width of a head: transformers computes it.
        widths = (
            {"head_dim": cfg.head_dim}
            if cfg.model_type != "phi3" or cfg.head_dim * cfg.num_attention_heads != cfg.hidden_size
            else {}
        )
        return {
            "model_type": cfg.model_type,
            "architectures": [classes[cfg.model_type]],
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.hidden_size,
            "num_hidden_layers": cfg.num_hidden_layers,
            "num_attention_heads": cfg.num_attention_heads,
            "num_key_value_heads": cfg.num_key_value_heads,
            "intermediate_size": cfg.intermediate_size,
            "rms_norm_eps": cfg.rms_norm_eps,
            "rope_theta": cfg.rope_theta,
            "tie_word_embeddings": cfg.tie_word_embeddings,
            "hidden_act": "silu",
            **widths,
            **windows,
        }
    return None

"""The config of a conversion: components joined to a whole model, and values that the user sets by name."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convert_weights.configs_from_shapes import quarters
from convert_weights.families import XSamStage1Config
from flowseg_jax import fields
from flowseg_jax.errors import UserError
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig


def joined_config(
    llm: LanguageConfig, siglip: SiglipConfig, sam: SamConfig, stage1: XSamStage1Config | None, mode: str, dtype: str
) -> FlowSegConfig:
    """A FlowSeg around encoders and a language model, with the connector and decoders of `stage1`, or the full-sized ones."""
    if stage1 is None:
        scales = ConnectorConfig.sam_large().scales
        connector = ConnectorConfig((sam.hidden_size,) * len(scales), sam.hidden_size // 2, scales)
        pixel = PixelDecoderConfig.mask2former(connector.out_channels)
        stage1 = XSamStage1Config(sam, connector, quarters(sam.num_hidden_layers, len(scales)), pixel, MaskDecoderConfig(), 0)
    elif stage1.sam != sam:
        raise UserError(f"the segmentor's mask encoder is {stage1.sam}, the given one {sam}: leave sam= out")
    return FlowSegConfig(
        sam=sam,
        siglip=siglip,
        llm=llm,
        connector=stage1.connector,
        pixel_decoder=stage1.pixel_decoder,
        mask_decoder=stage1.mask_decoder,
        connector_hidden_layers=stage1.connector_hidden_layers,
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

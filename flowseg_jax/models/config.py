"""One frozen dataclass that nests the configs of all parts, its presets, and its strict reading from a plain dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowseg_jax import fields
from flowseg_jax.errors import UserError
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True)
class FlowSegConfig:
    """The whole model.

    Attributes:
        sam, siglip, llm, connector, pixel_decoder, decoder, semantic_flow, boundary: configs of the parts.
        connector_layers: SAM hidden states that feed the connector, shallow to deep, one a level (connector.scales in the
            same order).
        classes: categories of the linear class head (0: none); it adds the pass by category to training.
        named_pass: "off", "flow" or "plain": the pass in which every object is a named phrase, with or without SR and CR.
        negatives_group: images whose phrases are each other's negatives (the batch must be a multiple).
        exclude_same_target: phrases of one image that refer to the same object are not each other's negatives.
        dtype: what the network computes in; parameters are float32.
        parts: "all"; "segmentor": SAM, connector and mask decoder with the linear head, without language (stage 1); "language":
            both encoders, their projectors and the language model, without a mask decoder (stage 2).
    """

    sam: SamConfig
    siglip: SiglipConfig
    llm: LanguageConfig
    connector: ConnectorConfig
    pixel_decoder: PixelDecoderConfig
    mask_decoder: MaskDecoderConfig
    connector_hidden_layers: tuple[int, ...]
    semantic_flow: SemanticFlowConfig = dataclasses.field(default_factory=SemanticFlowConfig)
    boundary: BoundaryConfig = dataclasses.field(default_factory=BoundaryConfig)
    num_classes: int = 0
    generic_pass: str = "off"
    negatives_group_size: int = 4
    exclude_same_target: bool = False
    dtype: str = "float32"
    components: str = "all"

    def __post_init__(self):
        if len(self.connector_hidden_layers) != len(self.connector.scales):
            raise ValueError("connector_layers and connector.scales must have one entry for each map")
        if self.connector.out_channels != tuple(self.pixel_decoder.channels):
            raise ValueError(
                f"the connector puts out {self.connector.out_channels} channels, "
                f"pixel_decoder.channels is {self.pixel_decoder.channels}"
            )
        if self.pixel_decoder.encoder_levels != self.mask_decoder.num_levels:
            raise ValueError(
                f"the pixel decoder gives {self.pixel_decoder.encoder_levels} levels, decoder.levels is {self.mask_decoder.num_levels}"
            )
        if self.pixel_decoder.embed_dim != self.mask_decoder.embed_dim:
            raise ValueError("pixel_decoder.width and decoder.width must be equal")
        if self.pixel_decoder.mask_dim != (self.mask_decoder.mask_dim or self.mask_decoder.embed_dim):
            raise ValueError("pixel_decoder.mask_width and decoder.mask_width (if unset, decoder.width) must be equal")
        if self.generic_pass not in ("off", "flow", "plain"):
            raise ValueError(f"named_pass is {self.generic_pass!r}: choose off, flow or plain")
        if self.components not in ("all", "segmentor", "language"):
            raise ValueError(f"parts is {self.components!r}: choose all, segmentor or language")
        if self.components == "segmentor" and (
            not self.num_classes or self.generic_pass != "off" or self.semantic_flow.mode != "off"
        ):
            raise ValueError(
                "a segmentor without language needs classes for its linear head, named_pass off and semantic_flow.mode off"
            )

    @property
    def has_mask_decoder(self) -> bool:
        """Whether it has a mask decoder."""
        return self.components != "language"

    @property
    def has_language_model(self) -> bool:
        """Whether it has a language model."""
        return self.components != "segmentor"

    def require_full_model(self, where: str) -> None:
        """Raises a UserError unless the model can be asked for something: without language, or without masks, it cannot."""
        if self.components != "all":
            raise UserError(
                f"{where}: holds only the parts {self.components!r} of a model, made to start the next stage of training from "
                "(init_from); it answers no expressions"
            )

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens an image puts into the prompt: SigLIP's and a quarter of SAM's; none without a language model."""
        if not self.has_language_model:
            return 0
        side = (self.sam.grid_size + 1) // 2
        return self.siglip.num_patches + side * side

    @classmethod
    def tiny(cls, vocab: int = 512, classes: int = 0) -> FlowSegConfig:
        """Trains from scratch on two cores: 96-pixel images, 24x24 masks, about 1.5 M parameters."""
        return cls(
            sam=SamConfig.tiny(),
            siglip=SiglipConfig.tiny(),
            llm=LanguageConfig.tiny(vocab),
            connector=ConnectorConfig.tiny(),
            pixel_decoder=PixelDecoderConfig.tiny(),
            decoder=MaskDecoderConfig.tiny(),
            connector_layers=(2, 3, 4),
            semantic_flow=SemanticFlowConfig(gate_bias=3.0),
            classes=classes,
            named_pass="plain",
            negatives_group=1,
            exclude_same_target=True,
        )

    @classmethod
    def full(cls, llm: LanguageConfig) -> FlowSegConfig:
        """SigLIP2-so400m/14-384, SAM ViT-L/1024 and a 256/200/9 decoder around `llm`: the paper's model."""
        return cls(
            sam=SamConfig.vit_large(),
            siglip=SiglipConfig.so400m_14_384(),
            llm=llm,
            connector=ConnectorConfig.sam_large(),
            pixel_decoder=PixelDecoderConfig.mask2former(),
            decoder=MaskDecoderConfig(),
            connector_layers=(12, 18, 24),
            dtype="bfloat16",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (tuples as lists), for JSON."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, tuple | list) else value

        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model") -> FlowSegConfig:
        """Reads `to_dict`'s form; errors as `fields.read`, which says what `where` is."""
        return fields.read(cls, values, where)

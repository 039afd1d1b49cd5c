"""The config of the whole model: one frozen dataclass that nests the components' configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowseg_jax import fields
from flowseg_jax.errors import UserError
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True)
class FlowSegConfig:
    """The whole model.

    Attributes:
        sam, siglip, llm, connector, pixel_decoder, mask_decoder, semantic_flow, boundary: configs of the components.
        connector_hidden_layers: SAM hidden states that feed the connector, shallow to deep, one per level
            (connector.scales in the same order).
        num_classes: categories of the linear class head (0: none); it adds the closed-vocabulary pass to training.
        generic_pass: "off", "with_flow" or "without_flow": the open-vocabulary pass, in which the name of every object is a
            condition, with or without SR and CR.
        negatives_group_size: images whose phrases are each other's negatives (the batch must be a multiple).
        exclude_same_target: phrases of one image that refer to the same object are not each other's negatives.
        dtype: what the network computes in; parameters are float32.
        components: "full"; "segmentor": SAM, connector and mask decoder with the linear head, without language (stage 1);
            "vlm": both encoders, their projectors and the language model, without a mask decoder (stage 2).
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
    components: str = "full"

    def __post_init__(self):
        if len(self.connector_hidden_layers) != len(self.connector.scales):
            raise ValueError("connector_hidden_layers and connector.scales must have one entry per map")
        if self.connector.out_channels != tuple(self.pixel_decoder.channels):
            raise ValueError(
                f"the connector puts out {self.connector.out_channels} channels, "
                f"pixel_decoder.channels is {self.pixel_decoder.channels}"
            )
        if self.pixel_decoder.encoder_levels != self.mask_decoder.num_levels:
            raise ValueError(
                f"the pixel decoder gives {self.pixel_decoder.encoder_levels} levels, "
                f"mask_decoder.num_levels is {self.mask_decoder.num_levels}"
            )
        if self.pixel_decoder.embed_dim != self.mask_decoder.embed_dim:
            raise ValueError("pixel_decoder.embed_dim and mask_decoder.embed_dim must be equal")
        if self.pixel_decoder.mask_dim != (self.mask_decoder.mask_dim or self.mask_decoder.embed_dim):
            raise ValueError(
                "pixel_decoder.mask_dim and mask_decoder.mask_dim (if unset, mask_decoder.embed_dim) must be equal"
            )
        if self.generic_pass not in ("off", "with_flow", "without_flow"):
            raise ValueError(f"generic_pass is {self.generic_pass!r}: choose off, with_flow or without_flow")
        if self.components not in ("full", "segmentor", "vlm"):
            raise ValueError(f"components is {self.components!r}: choose full, segmentor or vlm")
        if self.components == "segmentor" and (
            not self.num_classes or self.generic_pass != "off" or self.semantic_flow.mode != "off"
        ):
            raise ValueError(
                "a segmentor without language needs num_classes for its linear head, generic_pass off and "
                "semantic_flow.mode off"
            )

    @property
    def has_mask_decoder(self) -> bool:
        """Whether it has a mask decoder."""
        return self.components != "vlm"

    @property
    def has_language_model(self) -> bool:
        """Whether it has a language model."""
        return self.components != "segmentor"

    def require_full_model(self, where: str) -> None:
        """Raises a UserError unless the model has all components; without language, or without masks, it answers nothing."""
        if self.components != "full":
            raise UserError(
                f"{where}: holds only the components {self.components!r} of a model, made to start the next stage of "
                "training from (init_from); it answers no expressions"
            )

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens an image puts into the prompt: SigLIP's and a quarter of SAM's; none without a language model."""
        if not self.has_language_model:
            return 0
        side = (self.sam.grid_size + 1) // 2
        return self.siglip.num_patches + side * side

    @property
    def mask_grid_size(self) -> int:
        """Cells along a side of the mask logits: the finest map that the connector makes of SAM's patches."""
        return round(self.sam.grid_size * max(self.connector.scales))

    @classmethod
    def tiny(cls, vocab_size: int = 512, num_classes: int = 0) -> FlowSegConfig:
        """Trains from scratch on two cores: 96-pixel images, 24x24 masks, about 1.5 M parameters."""
        return cls(
            sam=SamConfig.tiny(),
            siglip=SiglipConfig.tiny(),
            llm=LanguageConfig.tiny(vocab_size),
            connector=ConnectorConfig.tiny(),
            pixel_decoder=PixelDecoderConfig.tiny(),
            mask_decoder=MaskDecoderConfig.tiny(),
            connector_hidden_layers=(2, 3, 4),
            semantic_flow=SemanticFlowConfig(gate_bias=3.0),
            num_classes=num_classes,
            generic_pass="without_flow",
            negatives_group_size=1,
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
            mask_decoder=MaskDecoderConfig(),
            connector_hidden_layers=(12, 18, 24),
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

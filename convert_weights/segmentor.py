"""The tables of the connectors and of the mask decoder, under the names of X-SAM, a port of Hugging Face's.

What FlowSeg adds has no name there. Its text cross-attention is our SR's attention and keeps X-SAM's names; gate, CR and BAR
are named in the same style, so that a whole FlowSeg can be exported and read back.
"""

from __future__ import annotations

from convert_weights.table import Table, TableRow, conv, linear, norm, numbered
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig

PROJECTOR = Table((*linear("model.0", "linear_1"), *linear("model.2", "linear_2")))


def _connector_levels(cfg: ConnectorConfig) -> dict:
    return {"level": numbered("level", len(cfg.scales))}


# Each level is a Sequential of three convolutions and three norms, alternating.
CONNECTOR = Table(
    (
        *conv("model.{level}.model.0", "levels/{level}/conv1", bias=False),
        *norm("model.{level}.model.1", "levels/{level}/norm1"),
        *conv("model.{level}.model.2", "levels/{level}/conv2", bias=False),
        *norm("model.{level}.model.3", "levels/{level}/norm2"),
        *conv("model.{level}.model.4", "levels/{level}/conv3", bias=False),
        *norm("model.{level}.model.5", "levels/{level}/norm3"),
    ),
    _connector_levels,
)


def _pixel_axes(cfg: PixelDecoderConfig) -> dict:
    # adapter_1 and layer_1 belong to the finest map, our stages go from low to high resolution.
    stages = cfg.fpn_stages
    return {
        "layer": numbered("layer", cfg.num_layers),
        "level": numbered("level", cfg.encoder_levels),
        "adapter": [{"adapter": stages - stage, "stage": stage} for stage in range(stages)],
    }


PIXEL_DECODER = Table(
    (
        TableRow("level_embed", "level_embed"),
        *conv("input_projections.{level}.0", "input_projections/{level}/conv"),
        *norm("input_projections.{level}.1", "input_projections/{level}/norm"),
        *linear("encoder.layers.{layer}.self_attn.sampling_offsets", "layers/self_attn/sampling_offsets"),
        *linear("encoder.layers.{layer}.self_attn.attention_weights", "layers/self_attn/attention_weights"),
        *linear("encoder.layers.{layer}.self_attn.value_proj", "layers/self_attn/value_proj"),
        *linear("encoder.layers.{layer}.self_attn.output_proj", "layers/self_attn/output_proj"),
        *norm("encoder.layers.{layer}.self_attn_layer_norm", "layers/self_attn_layer_norm"),
        *linear("encoder.layers.{layer}.fc1", "layers/fc1"),
        *linear("encoder.layers.{layer}.fc2", "layers/fc2"),
        *norm("encoder.layers.{layer}.final_layer_norm", "layers/final_layer_norm"),
        *conv("adapter_{adapter}.0", "lateral_convs/{stage}/conv", bias=False),
        *norm("adapter_{adapter}.1", "lateral_convs/{stage}/norm"),
        *conv("layer_{adapter}.0", "output_convs/{stage}/conv", bias=False),
        *norm("layer_{adapter}.1", "output_convs/{stage}/norm"),
        *conv("mask_projection", "mask_projection"),
    ),
    _pixel_axes,
)


def _attention(source: str, target: str) -> tuple[TableRow, ...]:
    """torch.nn.MultiheadAttention: the three in-projections are one matrix."""
    return (
        *linear(f"{source}.in_proj", f"{target}/q_proj {target}/k_proj {target}/v_proj", suffix="_"),
        *linear(f"{source}.out_proj", f"{target}/out_proj"),
    )


def _decoder_axes(cfg: MaskDecoderConfig) -> dict:
    return {"layer": numbered("layer", cfg.num_layers), "mlp": numbered("mlp", 3)}


_LAYER = "decoder.layers.{layer}."
DECODER = Table(
    (
        TableRow("queries_embedder.weight", "queries_embedder"),
        TableRow("queries_features.weight", "queries_features"),
        TableRow("level_embed.weight", "level_embed"),
        *_attention(_LAYER + "cross_attn", "layers/cross_attn"),
        *norm(_LAYER + "cross_attn_layer_norm", "layers/cross_attn_layer_norm"),
        *linear(_LAYER + "self_attn.q_proj", "layers/self_attn/q_proj"),
        *linear(_LAYER + "self_attn.k_proj", "layers/self_attn/k_proj"),
        *linear(_LAYER + "self_attn.v_proj", "layers/self_attn/v_proj"),
        *linear(_LAYER + "self_attn.out_proj", "layers/self_attn/out_proj"),
        *norm(_LAYER + "self_attn_layer_norm", "layers/self_attn_layer_norm"),
        *linear(_LAYER + "fc1", "layers/fc1"),
        *linear(_LAYER + "fc2", "layers/fc2"),
        *norm(_LAYER + "final_layer_norm", "layers/final_layer_norm"),
        *norm("decoder.layernorm", "layernorm"),
        *linear("decoder.mask_predictor.mask_embedder.{mlp}.0", "mask_embedder/{mlp}"),
        # SR and CR
        *_attention(_LAYER + "text_cross_attn", "layers/semantic_refinement/attn"),
        *norm(_LAYER + "text_cross_attn_layer_norm", "layers/semantic_refinement/norm"),
        *linear(_LAYER + "text_gate", "layers/semantic_refinement/gate"),
        *_attention(_LAYER + "condition_cross_attn", "layers/condition_refinement/attn"),
    ),
    _decoder_axes,
)
BOUNDARY = Table((*conv("compress", "feature_proj"), *conv("refine", "refine_conv"), TableRow("alpha", "alpha")))

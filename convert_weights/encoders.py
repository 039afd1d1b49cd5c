"""The tables of the components, under the names that Hugging Face's classes give them."""

from __future__ import annotations

from convert_weights.table import Table, TableRow, conv, linear, norm, numbered
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.sam import SamConfig


def _layers(cfg) -> dict:
    return {"layer": numbered("layer", cfg.num_hidden_layers)}


# Qwen3ForCausalLM, Phi3ForCausalLM, LlamaForCausalLM. The head exists on our side where it is not tied; a tied model's file may
# carry a copy of the embedding table under its name.
_TEXT = (
    TableRow("model.embed_tokens.weight", "embed_tokens", "vocabulary"),
    TableRow("lm_head.weight", "lm_head", "vocabulary"),
    *norm("model.norm", "norm", bias=False),
    *norm("model.layers.{layer}.input_layernorm", "layers/input_layernorm", bias=False),
    *norm("model.layers.{layer}.post_attention_layernorm", "layers/post_attention_layernorm", bias=False),
    *linear("model.layers.{layer}.self_attn.o_proj", "layers/self_attn/o_proj", bias=False),
    *linear("model.layers.{layer}.mlp.down_proj", "layers/mlp/down_proj", bias=False),
)
_SEPARATE = (
    *linear("model.layers.{layer}.self_attn.q_proj", "layers/self_attn/q_proj", bias=False),
    *linear("model.layers.{layer}.self_attn.k_proj", "layers/self_attn/k_proj", bias=False),
    *linear("model.layers.{layer}.self_attn.v_proj", "layers/self_attn/v_proj", bias=False),
    *linear("model.layers.{layer}.mlp.gate_proj", "layers/mlp/gate_proj", bias=False),
    *linear("model.layers.{layer}.mlp.up_proj", "layers/mlp/up_proj", bias=False),
)
_FUSED = (
    *linear(
        "model.layers.{layer}.self_attn.qkv_proj",
        "layers/self_attn/q_proj layers/self_attn/k_proj layers/self_attn/v_proj",
        bias=False,
    ),
    *linear("model.layers.{layer}.mlp.gate_up_proj", "layers/mlp/gate_proj layers/mlp/up_proj", bias=False),
)
_HEAD_NORMS = (
    *norm("model.layers.{layer}.self_attn.q_norm", "layers/self_attn/q_norm", bias=False),
    *norm("model.layers.{layer}.self_attn.k_norm", "layers/self_attn/k_norm", bias=False),
)
_TEXT_EXTRAS = {
    "axes": _layers,
    "ignore": (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    "tied_copies": {"lm_head.weight": "model.embed_tokens.weight"},
}
LLAMA = Table((*_TEXT, *_SEPARATE), **_TEXT_EXTRAS)
QWEN3 = Table((*_TEXT, *_SEPARATE, *_HEAD_NORMS), **_TEXT_EXTRAS)
PHI3 = Table((*_TEXT, *_FUSED), **_TEXT_EXTRAS)

# The names that llama.cpp gives the same model in a GGUF file. It stores a head's rotary rows in another order.
LLAMA_GGUF = Table(
    (
        TableRow("token_embd.weight", "embed_tokens", "vocabulary"),
        TableRow("output.weight", "lm_head", "vocabulary"),
        *norm("output_norm", "norm", bias=False),
        *norm("blk.{layer}.attn_norm", "layers/input_layernorm", bias=False),
        *norm("blk.{layer}.ffn_norm", "layers/post_attention_layernorm", bias=False),
        *linear("blk.{layer}.attn_q", "layers/self_attn/q_proj", bias=False, op="rotary"),
        *linear("blk.{layer}.attn_k", "layers/self_attn/k_proj", bias=False, op="rotary"),
        *linear("blk.{layer}.attn_v", "layers/self_attn/v_proj", bias=False),
        *linear("blk.{layer}.attn_output", "layers/self_attn/o_proj", bias=False),
        *linear("blk.{layer}.ffn_gate", "layers/mlp/gate_proj", bias=False),
        *linear("blk.{layer}.ffn_up", "layers/mlp/up_proj", bias=False),
        *linear("blk.{layer}.ffn_down", "layers/mlp/down_proj", bias=False),
    ),
    _layers,
    tied_copies={"output.weight": "token_embd.weight"},
)


def language(cfg: LanguageConfig) -> Table:
    """The table of a language model's family."""
    return {"qwen3": QWEN3, "phi3": PHI3, "llama": LLAMA}[cfg.model_type]


# SiglipVisionModel (and SigLIP2 of fixed resolution), without the prefix `vision_model.`.
SIGLIP = Table(
    (
        *conv("embeddings.patch_embedding", "patch_embedding"),
        TableRow("embeddings.position_embedding.weight", "position_embedding"),
        *norm("encoder.layers.{layer}.layer_norm1", "layers/layer_norm1"),
        *norm("encoder.layers.{layer}.layer_norm2", "layers/layer_norm2"),
        *linear("encoder.layers.{layer}.self_attn.q_proj", "layers/self_attn/q_proj"),
        *linear("encoder.layers.{layer}.self_attn.k_proj", "layers/self_attn/k_proj"),
        *linear("encoder.layers.{layer}.self_attn.v_proj", "layers/self_attn/v_proj"),
        *linear("encoder.layers.{layer}.self_attn.out_proj", "layers/self_attn/out_proj"),
        *linear("encoder.layers.{layer}.mlp.fc1", "layers/mlp/fc1"),
        *linear("encoder.layers.{layer}.mlp.fc2", "layers/mlp/fc2"),
    ),
    _layers,
    # The language model reads an inner layer: neither the last norm nor the pooling head is part of our encoder. A whole
    # SigLIP has a text encoder beside it.
    ignore=(
        r"post_layernorm\..*",
        r"head\..*",
        r"embeddings\.position_ids",
        r"text_model\..*",
        r"logit_scale",
        r"logit_bias",
    ),
)


def _sam_layers(cfg: SamConfig) -> dict:
    # Window and global layers are two stacks, their position tables differ in size.
    return {"layer": [{"layer": i, "stack": cfg.stack_and_index(i)[0]} for i in range(cfg.num_hidden_layers)]}


# Modules that only other parts of a whole SAM have, and the encoder's neck, which we do not read.
_SAM_IGNORED = (
    r"neck\..*",
    r"prompt_encoder\..*",
    r"mask_decoder\..*",
    r"shared_image_embedding\..*",
    r"pixel_mean",
    r"pixel_std",
)


def _sam(patch: str, layer: str, norm_name: str) -> Table:
    """SAM's encoder under the names of one of its codes; they differ in three of them."""
    return Table(
        (
            *conv(f"patch_embed.{patch}", "patch_embed"),
            TableRow("pos_embed", "pos_embed", "unbatch"),
            *norm(f"{layer}.{{layer}}.{norm_name}1", "{stack}/layer_norm1"),
            *norm(f"{layer}.{{layer}}.{norm_name}2", "{stack}/layer_norm2"),
            *linear(f"{layer}.{{layer}}.attn.qkv", "{stack}/attn/q_proj {stack}/attn/k_proj {stack}/attn/v_proj"),
            *linear(f"{layer}.{{layer}}.attn.proj", "{stack}/attn/proj"),
            TableRow(f"{layer}.{{layer}}.attn.rel_pos_h", "{stack}/attn/rel_pos_h"),
            TableRow(f"{layer}.{{layer}}.attn.rel_pos_w", "{stack}/attn/rel_pos_w"),
            *linear(f"{layer}.{{layer}}.mlp.lin1", "{stack}/mlp/lin1"),
            *linear(f"{layer}.{{layer}}.mlp.lin2", "{stack}/mlp/lin2"),
        ),
        _sam_layers,
        ignore=_SAM_IGNORED,
    )


SAM = _sam("projection", "layers", "layer_norm")  # transformers' SamVisionEncoder
SAM_META = _sam("proj", "blocks", "norm")  # segment-anything's ImageEncoderViT

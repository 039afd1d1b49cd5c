"""Hugging Face's `config.json` of an exported component."""

from __future__ import annotations

from typing import Any

from flowseg_jax.models import hf_keys
from flowseg_jax.models.language_config import LanguageConfig


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
            "vision_use_head": False,
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
        scaling = {}
        if cfg.rope_scaling is not None:
            values = dict(zip(hf_keys.ROPE_SCALING, (*cfg.rope_scaling[:3], int(cfg.rope_scaling[3])), strict=True))
            scaling = {"rope_scaling": {"rope_type": "llama3", "rope_theta": cfg.rope_theta, **values}}
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
            **scaling,
        }
    return None

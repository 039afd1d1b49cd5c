"""Sizes of the language model: presets, and what a Hugging Face `config.json` says."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

from flowseg_jax.errors import UserError
from flowseg_jax.models import hf_keys

ARCHITECTURES = ("qwen3", "phi3", "llama")


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the language model.

    Attributes:
        model_type: "qwen3", "phi3" or "llama"; it names the layout of the checkpoint. The other fields decide the network.
        vocab_size: rows of the embedding table (V).
        hidden_size: model width (W).
        num_hidden_layers: number of layers.
        num_attention_heads: query heads (H).
        num_key_value_heads: key and value heads (G); must divide `num_attention_heads`.
        head_dim: width of a head (E), even; H * E need not be W.
        intermediate_size: hidden width of the gated feed-forward part.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: RMSNorm epsilon.
        qk_norm: whether queries and keys are RMS-normalised per head before the rotation (Qwen3).
        tie_word_embeddings: whether the language head is the embedding table.
        sliding_window: a token sees keys less than this many positions back, its own included; None for all.
        remat: rematerialisation policy of a layer: "none", "full" or "dots".
        initializer_range: standard deviation of the layers' initial matrices. For widths near a hundred, 0.02 leaves every
            layer close to the identity.
        embedding_initializer_range: standard deviation of the embedding table's initial values (pretrained models 0.02). With
            small values the many visual tokens drown the words: all phrases of an image are then pooled to nearly the same.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    qk_norm: bool
    tie_word_embeddings: bool
    sliding_window: int | None = None
    remat: str = "full"
    initializer_range: float = 0.02
    embedding_initializer_range: float = 0.02

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise UserError(f"language model: model_type={self.model_type!r} is unknown (known: {', '.join(ARCHITECTURES)})")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"language model: num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"language model: head_dim={self.head_dim} must be even (rotary embedding)")

    @classmethod
    def qwen3_4b(cls) -> LanguageConfig:
        """Qwen3-4B-Instruct-2507 with the table cut to the tokenizer and the three segmentation tokens."""
        return cls(
            model_type="qwen3",
            vocab_size=151672,
            hidden_size=2560,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=9728,
            rope_theta=5e6,
            rms_norm_eps=1e-6,
            qk_norm=True,
            tie_word_embeddings=True,
        )

    @classmethod
    def qwen3_1b7(cls) -> LanguageConfig:
        """Qwen3-1.7B with the table cut to the tokenizer and the three segmentation tokens."""
        return dataclasses.replace(
            cls.qwen3_4b(),
            hidden_size=2048,
            num_hidden_layers=28,
            num_attention_heads=16,
            intermediate_size=6144,
            rope_theta=1e6,
        )

    @classmethod
    def phi3_mini(cls) -> LanguageConfig:
        """Phi-3-mini-4k-instruct with the table cut to the tokenizer and the three segmentation tokens."""
        return cls(
            model_type="phi3",
            vocab_size=32014,
            hidden_size=3072,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=96,
            intermediate_size=8192,
            rope_theta=1e4,
            rms_norm_eps=1e-5,
            qk_norm=False,
            tie_word_embeddings=False,
            sliding_window=2047,
        )

    @classmethod
    def smollm2_135m(cls) -> LanguageConfig:
        """SmolLM2-135M-Instruct with the three segmentation tokens: a pretrained model that a laptop can run."""
        return cls(
            model_type="llama",
            vocab_size=49155,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            intermediate_size=1536,
            rope_theta=1e5,
            rms_norm_eps=1e-5,
            qk_norm=False,
            tie_word_embeddings=True,
        )

    @classmethod
    def tiny(cls, vocab_size: int) -> LanguageConfig:
        return cls(
            model_type="qwen3",
            vocab_size=vocab_size,
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=48,
            intermediate_size=256,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            qk_norm=True,
            tie_word_embeddings=True,
            remat="none",
            initializer_range=0.1,
            embedding_initializer_range=0.5,
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LanguageConfig:
        """Reads a Qwen3, Phi-3 or Llama `config.json`; `hf_keys` lists what becomes of each key.

        Raises:
            UserError: another model type, a missing size, a value of the wrong type, or a feature that would change the numbers
                (scaled or partial rotary embedding, biases, another activation, windows in some layers only).
        """
        family = config.get("model_type")
        if not isinstance(family, str) or family not in hf_keys.LANGUAGE:
            known = ", ".join(hf_keys.LANGUAGE)
            raise UserError(f"config.json: model_type={reprlib.repr(family)} is not supported (known: {known})")
        keys = hf_keys.LANGUAGE[family]
        values = keys.values(config)
        types = config.get("layer_types") or ()
        heads, width, layers = values["num_attention_heads"], values["hidden_size"], values["num_hidden_layers"]
        if types and len(types) != layers:
            raise UserError(f"{keys.name}: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
        if values["head_dim"] is None and width % heads:
            raise UserError(f"{keys.name}: num_attention_heads={heads} does not divide hidden_size={width}")
        return cls(
            model_type=family,
            vocab_size=values["vocab_size"],
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=values["num_key_value_heads"] or heads,
            head_dim=values["head_dim"] or width // heads,
            intermediate_size=values["intermediate_size"],
            rope_theta=hf_keys.rope_theta(values, keys.name),
            rms_norm_eps=values["rms_norm_eps"],
            qk_norm=family == "qwen3",
            tie_word_embeddings=values["tie_word_embeddings"],
            sliding_window=values.get("sliding_window"),
        )

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
        rope_scaling: Llama 3's scaled rotary frequencies: (factor, low_freq_factor, high_freq_factor,
            original_max_position_embeddings) in Hugging Face's names; None: they are not scaled.
        sliding_window: a token sees keys less than this many positions back, its own included; None for all.
        remat: rematerialisation policy of a layer: "none", "full", "attention" or "dots".
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
    rope_scaling: tuple[float, ...] | None = None
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
        if self.rope_scaling is not None:
            factor, low, high, length = (*self.rope_scaling, 0, 0, 0, 0)[:4]
            if len(self.rope_scaling) != 4 or factor < 1 or not 0 < low < high or length < 1:
                raise UserError(
                    f"language model: rope_scaling={self.rope_scaling} must be (factor from 1, low_freq_factor, a larger "
                    "high_freq_factor, original_max_position_embeddings)"
                )

    # Presets give sizes in the order of the fields: V, W, layers, H, G, E, feed-forward width, rotary base, epsilon. The tables
    # of Qwen3 and Phi-3 are cut to the tokenizer and the three segmentation tokens, as X-SAM has them.

    @classmethod
    def qwen3_1b7(cls) -> LanguageConfig:
        """Qwen3-1.7B."""
        return cls("qwen3", 151672, 2048, 28, 16, 8, 128, 6144, 1e6, 1e-6, qk_norm=True, tie_word_embeddings=True)

    @classmethod
    def qwen3_4b(cls) -> LanguageConfig:
        """Qwen3-4B-Instruct-2507."""
        return cls("qwen3", 151672, 2560, 36, 32, 8, 128, 9728, 5e6, 1e-6, qk_norm=True, tie_word_embeddings=True)

    @classmethod
    def qwen3_8b(cls) -> LanguageConfig:
        """Qwen3-8B."""
        return cls("qwen3", 151672, 4096, 36, 32, 8, 128, 12288, 1e6, 1e-6, qk_norm=True, tie_word_embeddings=False)

    @classmethod
    def qwen3_14b(cls) -> LanguageConfig:
        """Qwen3-14B."""
        return cls("qwen3", 151672, 5120, 40, 40, 8, 128, 17408, 1e6, 1e-6, qk_norm=True, tie_word_embeddings=False)

    @classmethod
    def qwen3_32b(cls) -> LanguageConfig:
        """Qwen3-32B."""
        return cls("qwen3", 151672, 5120, 64, 64, 8, 128, 25600, 1e6, 1e-6, qk_norm=True, tie_word_embeddings=False)

    @classmethod
    def llama3_8b(cls) -> LanguageConfig:
        """Llama-3.1-8B-Instruct with the three segmentation tokens."""
        scaling = (8.0, 1.0, 4.0, 8192.0)
        return cls("llama", 128259, 4096, 32, 32, 8, 128, 14336, 5e5, 1e-5, False, False, rope_scaling=scaling)

    @classmethod
    def phi3_mini(cls) -> LanguageConfig:
        """Phi-3-mini-4k-instruct."""
        return cls("phi3", 32014, 3072, 32, 32, 32, 96, 8192, 1e4, 1e-5, False, False, sliding_window=2047)

    @classmethod
    def smollm2_135m(cls) -> LanguageConfig:
        """SmolLM2-135M-Instruct with the three segmentation tokens: a pretrained model that a laptop can run."""
        return cls("llama", 49155, 576, 30, 9, 3, 64, 1536, 1e5, 1e-5, qk_norm=False, tie_word_embeddings=True)

    @classmethod
    def tiny(cls, vocab_size: int) -> LanguageConfig:
        deviations = {"initializer_range": 0.1, "embedding_initializer_range": 0.5}
        return cls("qwen3", vocab_size, 96, 2, 2, 1, 48, 256, 1e4, 1e-6, True, True, remat="none", **deviations)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LanguageConfig:
        """Reads a Qwen3, Phi-3 or Llama `config.json`; `hf_keys` lists what becomes of each key.

        Raises:
            UserError: another model type, a missing size, a value of the wrong type, or a feature that would change the numbers
                (a rotary embedding that is partial or scaled in another way than Llama 3's, biases, another activation, windows
                in some layers only).
        """
        family = config.get("model_type")
        if not isinstance(family, str) or family not in hf_keys.LANGUAGE:
            known = ", ".join(hf_keys.LANGUAGE)
            raise UserError(f"config.json: model_type={reprlib.repr(family)} is not supported (known: {known})")
        keys = hf_keys.LANGUAGE[family]
        values = keys.values(config)
        theta, scaling = hf_keys.rope(values, keys.name)
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
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=values["rms_norm_eps"],
            qk_norm=family == "qwen3",
            tie_word_embeddings=values["tie_word_embeddings"],
            sliding_window=values.get("sliding_window"),
        )


PRESETS = {  # what configs and conversions may name
    "qwen3_1b7": LanguageConfig.qwen3_1b7,
    "qwen3_4b": LanguageConfig.qwen3_4b,
    "qwen3_8b": LanguageConfig.qwen3_8b,
    "qwen3_14b": LanguageConfig.qwen3_14b,
    "qwen3_32b": LanguageConfig.qwen3_32b,
    "llama3_8b": LanguageConfig.llama3_8b,
    "phi3_mini": LanguageConfig.phi3_mini,
}

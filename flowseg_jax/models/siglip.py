"""SigLIP's vision encoder: a ViT whose tokens the language model reads.

Same function as the encoder of `transformers.SiglipVisionModel` (and the fixed-resolution SigLIP2 checkpoints), without its
post-norm and pooling head: the language model reads the output of an inner layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from flowseg_jax.errors import UserError
from flowseg_jax.models import hf_keys
from flowseg_jax.models.layers import Conv, LayerNorm, Linear, gathered_weight, gelu_tanh, make_param, normal_init
from flowseg_jax.models.stack import scan_layers, stack_layers
from flowseg_jax.ops.attention import attention


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of SigLIP's vision encoder.

    Attributes:
        image_size: side of the square input (V), pixels; a remainder that fills no patch is ignored.
        patch_size: side of a patch, pixels.
        hidden_size: model width (W).
        num_hidden_layers: encoder layers held; the caller chooses how many of them run.
        num_attention_heads: attention heads; must divide `hidden_size`.
        intermediate_size: hidden width of the feed-forward part.
        layer_norm_eps: LayerNorm epsilon.
        remat: rematerialisation policy of a layer: "none", "full", "attention" or "dots".
    """

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-6
    remat: str = "attention"

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"SigLIP: num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
        if self.image_size < self.patch_size:
            raise UserError(f"SigLIP: image_size={self.image_size} is smaller than patch_size={self.patch_size}")

    @property
    def num_patches(self) -> int:
        """Patches per image (P)."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def so400m_14_384(cls) -> SiglipConfig:
        """SigLIP2-so400m-patch14-384: 729 tokens of width 1152."""
        return cls(
            image_size=384,
            patch_size=14,
            hidden_size=1152,
            num_hidden_layers=27,
            num_attention_heads=16,
            intermediate_size=4304,
        )

    @classmethod
    def tiny(cls) -> SiglipConfig:
        return cls(
            image_size=48,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            remat="none",
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> SiglipConfig:
        """Reads a `SiglipVisionConfig` JSON (or a whole model's config with a `vision_config`).

        A key that the file leaves out has the Hugging Face class's default; `hf_keys` lists what becomes of each.

        Raises:
            UserError: a value of the wrong type, or one that this encoder does not compute.
        """
        values = hf_keys.SIGLIP.values(config.get("vision_config", config))
        return cls(
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            hidden_size=values["hidden_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=values["num_attention_heads"],
            intermediate_size=values["intermediate_size"],
            layer_norm_eps=values["layer_norm_eps"],
        )


class SiglipAttention(nnx.Module):
    """Unmasked multi-head self-attention with biases."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        w = cfg.hidden_size
        self.q_proj = Linear(w, w, rngs=rngs, axes=("embed", "heads"))
        self.k_proj = Linear(w, w, rngs=rngs, axes=("embed", "heads"))
        self.v_proj = Linear(w, w, rngs=rngs, axes=("embed", "heads"))
        self.out_proj = Linear(w, w, rngs=rngs, axes=("heads", "embed"))
        self.num_heads = cfg.num_attention_heads

    def __call__(self, x: Float[Array, "b p w"]) -> Float[Array, "b p w"]:
        q, k, v = (f(x).reshape(*x.shape[:2], self.num_heads, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v).reshape(x.shape))


class SiglipMLP(nnx.Module):
    """Linear - GELU(tanh) - Linear."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(cfg.hidden_size, cfg.intermediate_size, rngs=rngs, axes=("embed", "mlp"))
        self.fc2 = Linear(cfg.intermediate_size, cfg.hidden_size, rngs=rngs, axes=("mlp", "embed"))

    def __call__(self, x: Float[Array, "b p w"]) -> Float[Array, "b p w"]:
        return self.fc2(gelu_tanh(self.fc1(x)))


class SiglipBlock(nnx.Module):
    """One pre-norm encoder layer: unmasked self-attention, then a GELU(tanh) feed-forward part."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        w = cfg.hidden_size
        self.layer_norm1 = LayerNorm(w, rngs=rngs, eps=cfg.layer_norm_eps)
        self.self_attn = SiglipAttention(cfg, rngs=rngs)
        self.layer_norm2 = LayerNorm(w, rngs=rngs, eps=cfg.layer_norm_eps)
        self.mlp = SiglipMLP(cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "b p w"]) -> Float[Array, "b p w"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipVisionEncoder(nnx.Module):
    """SigLIP's vision encoder (HF `SiglipVisionModel` without post-norm and pooling head)."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.patch_embedding = Conv(3, cfg.hidden_size, cfg.patch_size, rngs=rngs, stride=cfg.patch_size, axes=(None, "embed"))
        self.position_embedding = make_param(
            rngs, normal_init(cfg.hidden_size**-0.5), (cfg.num_patches, cfg.hidden_size), (None, "embed")
        )
        self.layers = stack_layers(lambda r: SiglipBlock(cfg, rngs=r), cfg.num_hidden_layers, rngs)
        self.cfg = cfg

    def __call__(
        self, images: Float[Array, "b v v 3"], *, layers: int | None = None, out: dict[str, Any] | None = None
    ) -> Float[Array, "b p w"]:
        """Encodes normalised images.

        Args:
            images: [B, V, V, 3], already normalised; its dtype is the dtype computed in.
            layers: how many layers to run, None for all. HF's `hidden_states[-2]` is
                `cfg.num_hidden_layers - 1`; 0 gives the embeddings.
            out: if given, it gets "siglip/hidden_states": the embeddings and the output of every layer. All layers run then.

        Returns:
            [B, P, W], the output of that layer, row-major over the patches, no final norm.

        Raises:
            ValueError: an image of another size, or a layer that does not exist.
        """
        cfg = self.cfg
        if images.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise ValueError(f"SigLIP of image_size {cfg.image_size} got images {images.shape}")
        layers = cfg.num_hidden_layers if layers is None else layers
        if not 0 <= layers <= cfg.num_hidden_layers:
            raise ValueError(f"SigLIP has {cfg.num_hidden_layers} layers, not {layers}")
        x = self.patch_embedding(images).reshape(images.shape[0], cfg.num_patches, cfg.hidden_size)
        x = x + gathered_weight(self.position_embedding, x.dtype)
        if out is not None:
            _, states = scan_layers(self.layers, lambda layer, x, _: (layer(x),) * 2, x, policy=cfg.remat)
            out["siglip/hidden_states"] = (x, *states)
            return out["siglip/hidden_states"][layers]
        if not layers:
            return x
        return scan_layers(self.layers, lambda layer, x, _: (layer(x), None), x, policy=cfg.remat, stop=layers)[0]

"""SAM's image encoder: a ViT whose hidden states are read at several depths.

Same function as `transformers.models.sam.modeling_sam.SamVisionEncoder` without its neck. Most layers attend inside
windows, a few over the whole grid; both add a decomposed relative position term to the attention logits. That term is computed
without a bias as large as the attention matrix (`ops.attention.decomposed_rel_pos_attention`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from flowseg_jax.errors import UserError
from flowseg_jax.models import hf_keys
from flowseg_jax.models.layers import Conv, LayerNorm, Linear, gathered_weight, gelu, make_param, normal_init, zeros
from flowseg_jax.models.pixel_decoder import sine_position_embedding
from flowseg_jax.models.stack import scan_blocks, scan_layers, stack_layers
from flowseg_jax.ops.attention import rel_pos_attention
from flowseg_jax.ops.windows import join_windows, split_windows


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Sizes of SAM's image encoder.

    Attributes:
        image_size: side of the square input (S), pixels; a remainder that fills no patch is ignored.
        patch_size: side of a patch, pixels.
        hidden_size: model width (W).
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads; must divide `hidden_size`.
        mlp_dim: hidden width of the feed-forward part.
        window_size: side of an attention window in patches; need not divide the grid.
        global_attn_indexes: 0-based indices of the layers that attend over the whole grid, in any pattern.
        layer_norm_eps: LayerNorm epsilon.
        remat: rematerialisation policy of a layer: "none", "full", "attention" or "dots".
        pos_embed_init: what the learned position embedding starts from: "normal" (standard deviation 0.02) or "sine" (half of
            Mask2Former's sine table). Trained from scratch, features that hardly depend on their place cannot tell
            look-alikes apart.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mlp_dim: int
    window_size: int
    global_attn_indexes: tuple[int, ...]
    layer_norm_eps: float = 1e-6
    remat: str = "attention"
    pos_embed_init: str = "normal"

    def __post_init__(self):
        object.__setattr__(self, "global_attn_indexes", tuple(sorted(set(self.global_attn_indexes))))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"SAM: num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
        if self.image_size < self.patch_size:
            raise UserError(f"SAM: image_size={self.image_size} is smaller than patch_size={self.patch_size}")
        if self.window_size < 1:
            raise UserError(
                f"SAM: window_size={self.window_size} must be at least 1 "
                "(list every layer in global_attn_indexes for no windows)"
            )
        if self.pos_embed_init not in ("normal", "sine"):
            raise UserError(f"SAM: pos_embed_init={self.pos_embed_init!r} is unknown (known: normal, sine)")
        for i in self.global_attn_indexes:
            if not 0 <= i < self.num_hidden_layers:
                raise UserError(
                    f"SAM: global_attn_indexes={self.global_attn_indexes} names layer {i}, "
                    f"there are {self.num_hidden_layers} (0-based)"
                )

    @property
    def grid_size(self) -> int:
        """Patches per side (g)."""
        return self.image_size // self.patch_size

    def stack_and_index(self, layer: int) -> tuple[str, int]:
        """Where layer `layer` is stored: the stack ("window_layers" or "global_layers") and the index in it."""
        before = sum(i < layer for i in self.global_attn_indexes)
        return ("global_layers", before) if layer in self.global_attn_indexes else ("window_layers", layer - before)

    @classmethod
    def vit_large(cls) -> SamConfig:
        """SAM ViT-L: 64 x 64 patches of 1024 px images, every sixth of 24 layers global."""
        return cls(
            image_size=1024,
            patch_size=16,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            mlp_dim=4096,
            window_size=14,
            global_attn_indexes=(5, 11, 17, 23),
        )

    @classmethod
    def tiny(cls) -> SamConfig:
        return cls(
            image_size=96,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=2,
            mlp_dim=384,
            window_size=6,
            global_attn_indexes=(1, 3),
            remat="none",
            pos_embed_init="sine",
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> SamConfig:
        """Reads a `SamVisionConfig` JSON (or a whole `SamConfig` with a `vision_config`).

        A key that the file leaves out has the Hugging Face class's default; `hf_keys` lists what becomes of each.

        Raises:
            UserError: a value of the wrong type, or one that this encoder does not compute.
        """
        values = hf_keys.SAM.values(config.get("vision_config", config))
        layers, width, window, mlp = (values[key] for key in ("num_hidden_layers", "hidden_size", "window_size", "mlp_dim"))
        return cls(
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=values["num_attention_heads"],
            mlp_dim=int(width * values["mlp_ratio"]) if mlp is None else mlp,
            # In SAM's config a window of 0 means that every layer is global.
            window_size=window or 1,
            global_attn_indexes=tuple(values["global_attn_indexes"]) if window else tuple(range(layers)),
            layer_norm_eps=values["layer_norm_eps"],
        )


class SamAttention(nnx.Module):
    """Self-attention over squares of `size` x `size` patches with decomposed relative positions (HF `SamVisionAttention`).

    The logits are `scale q.k + q.Rh[y_q, y_k] + q.Rw[x_q, x_k]`, the last two with the unscaled query.
    """

    def __init__(self, cfg: SamConfig, size: int, *, rngs: nnx.Rngs):
        w, e = cfg.hidden_size, cfg.hidden_size // cfg.num_attention_heads
        self.q_proj = Linear(w, w, rngs=rngs, axes=("embed", "heads"))
        self.k_proj = Linear(w, w, rngs=rngs, axes=("embed", "heads"))
        self.v_proj = Linear(w, w, rngs=rngs, axes=("embed", "heads"))
        self.proj = Linear(w, w, rngs=rngs, axes=("heads", "embed"))
        self.rel_pos_h = make_param(rngs, zeros, (2 * size - 1, e), (None, None))
        self.rel_pos_w = make_param(rngs, zeros, (2 * size - 1, e), (None, None))
        self.num_heads = cfg.num_attention_heads

    def __call__(self, x: Float[Array, "n s s w"]) -> Float[Array, "n s s w"]:
        """Every square attends on its own."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (f(tokens) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = rel_pos_attention(q, k, v, self.rel_pos_h[...], self.rel_pos_w[...], self.num_heads)
        return self.proj(y).reshape(x.shape)


class SamMLP(nnx.Module):
    """Linear - GELU(erf) - Linear."""

    def __init__(self, cfg: SamConfig, *, rngs: nnx.Rngs):
        self.lin1 = Linear(cfg.hidden_size, cfg.mlp_dim, rngs=rngs, axes=("embed", "mlp"))
        self.lin2 = Linear(cfg.mlp_dim, cfg.hidden_size, rngs=rngs, axes=("mlp", "embed"))

    def __call__(self, x: Float[Array, "*b w"]) -> Float[Array, "*b w"]:
        return self.lin2(gelu(self.lin1(x)))


class SamBlock(nnx.Module):
    """One pre-norm layer: attention inside windows of `size` x `size` patches, or over the whole grid, then the MLP."""

    def __init__(self, cfg: SamConfig, size: int, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(cfg.hidden_size, rngs=rngs, eps=cfg.layer_norm_eps)
        self.attn = SamAttention(cfg, size, rngs=rngs)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, rngs=rngs, eps=cfg.layer_norm_eps)
        self.mlp = SamMLP(cfg, rngs=rngs)
        self.size = size

    def __call__(self, x: Float[Array, "b g g w"]) -> Float[Array, "b g g w"]:
        y = self.layer_norm1(x)
        g, w = y.shape[2:]
        if g == self.size:
            y = self.attn(y)
        else:
            # Zeros fill the last windows AFTER the norm and are attended to like any patch: SAM was trained that way.
            y = self.attn(split_windows(y, self.size).reshape(-1, self.size, self.size, w))
            y = join_windows(y.reshape(-1, self.size**2, w), self.size, g)
        x = x + y
        return x + self.mlp(self.layer_norm2(x))


class SamImageEncoder(nnx.Module):
    """SAM's image encoder without its neck (HF `SamVisionEncoder`).

    Window and global layers are two stacks, because their relative position tables differ in size.
    """

    def __init__(self, cfg: SamConfig, *, rngs: nnx.Rngs):
        n_global = len(cfg.global_attn_indexes)
        n_window = cfg.num_hidden_layers - n_global
        self.patch_embed = Conv(3, cfg.hidden_size, cfg.patch_size, rngs=rngs, stride=cfg.patch_size, axes=(None, "embed"))
        sine = lambda key, shape, dtype: 0.5 * sine_position_embedding(*shape).astype(dtype)  # noqa: E731
        position = sine if cfg.pos_embed_init == "sine" else normal_init(0.02)
        self.pos_embed = make_param(rngs, position, (cfg.grid_size, cfg.grid_size, cfg.hidden_size), (None, None, "embed"))
        self.window_layers = (
            stack_layers(lambda r: SamBlock(cfg, cfg.window_size, rngs=r), n_window, rngs) if n_window else None
        )
        self.global_layers = stack_layers(lambda r: SamBlock(cfg, cfg.grid_size, rngs=r), n_global, rngs) if n_global else None
        self.cfg = cfg

    def __call__(
        self, images: Float[Array, "b y x 3"], hidden_states: tuple[int, ...], out: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "b g g w"], ...]:
        """Encodes normalised images.

        Args:
            images: [B, S, S, 3], already normalised, padding zero; its dtype is the dtype computed in.
            hidden_states: which hidden states to return, as HF counts them: 0 = embeddings, i = after layer i (1-based),
                negative from the end (-1 = after the last layer). Layers after the deepest one do not run.
            out: if given, it gets "sam/hidden_states", all of them, and every layer runs.

        Returns:
            One map [B, g, g, W] per selected state, in the order of `hidden_states`.

        Raises:
            ValueError: an image of another size, or a state that does not exist.
        """
        cfg = self.cfg
        if images.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise ValueError(f"SAM of image_size {cfg.image_size} got images {images.shape}")
        if not hidden_states or not all(-cfg.num_hidden_layers - 1 <= i <= cfg.num_hidden_layers for i in hidden_states):
            raise ValueError(f"SAM has hidden states 0 to {cfg.num_hidden_layers}, not {hidden_states}")
        hidden_states = tuple(i % (cfg.num_hidden_layers + 1) for i in hidden_states)
        select = hidden_states if out is None else tuple(range(cfg.num_hidden_layers + 1))
        x = self.patch_embed(images)
        states = {0: x + gathered_weight(self.pos_embed, x.dtype)}
        period = self._period(select)
        states |= self._periodic(states[0], select, period) if period else self._runs(states[0], select)
        if out is not None:
            out["sam/hidden_states"] = tuple(states[i] for i in select)
        return tuple(states[i] for i in hidden_states)

    def _run(self, layers: nnx.Module, x: Array, start: int = 0, stop: int | None = None) -> Array:
        body = lambda layer, x, _: (layer(x), None)  # noqa: E731
        return scan_layers(layers, body, x, policy=self.cfg.remat, start=start, stop=stop)[0]

    def _period(self, select: tuple[int, ...]) -> int | None:
        """Layers per block, if the encoder is equal blocks that each end with their one global layer; `select` must fit."""
        cfg = self.cfg
        blocks = len(cfg.global_attn_indexes)
        if blocks < 2 or cfg.num_hidden_layers % blocks or max(select) < cfg.num_hidden_layers:
            return None
        period = cfg.num_hidden_layers // blocks
        regular = cfg.global_attn_indexes == tuple(range(period - 1, cfg.num_hidden_layers, period))
        return period if regular and all(i % period in (0, period - 1) for i in select) else None

    def _periodic(self, x: Array, select: tuple[int, ...], period: int) -> dict[int, Array]:
        """One scan over the blocks: only one block is compiled."""
        stacks = [s for s in (self.window_layers, self.global_layers) if s is not None]
        blocks = self.cfg.num_hidden_layers // period
        inputs, outputs = scan_blocks(stacks, lambda layer, x: layer(x), x, blocks, policy=self.cfg.remat)
        states = {(i + 1) * period: outputs[i] for i in range(blocks)}
        if any(i % period for i in select):  # the input of a global layer
            states |= {(i + 1) * period - 1: inputs[i] for i in range(blocks)}
        return states

    def _runs(self, x: Array, select: tuple[int, ...]) -> dict[int, Array]:
        """Any other pattern: one scan per run of equal layers, cut at the selected states."""
        states, done, last = {}, 0, max(select)
        while done < last:
            name, start = self.cfg.stack_and_index(done)
            stop = done + 1
            while stop < last and stop not in select and self.cfg.stack_and_index(stop)[0] == name:
                stop += 1
            x = self._run(getattr(self, name), x, start, start + stop - done)
            states[stop], done = x, stop
        return states

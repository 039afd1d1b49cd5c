"""Bidirectional semantic flow: what FlowSeg adds to every layer of the mask decoder.

SR, semantic refinement (language -> queries), right after the visual cross-attention:

    Q_sem = MHA(Q_vis, C, C)                       the pass's own conditions and the background row
    g     = sigmoid(W_g [Q_vis || Q_sem])          one gate a channel
    Q     = g * Q_vis + (1 - g) * Q_sem

CR, condition refinement (queries -> language), at the end of the layer, from the queries after self-attention:

    C     = C + MHA(C, Q_s, Q_s)

Both are the paper's equations; residuals and norms, which it leaves open, follow `SemanticFlowConfig.norm`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from flowseg_jax.models.layers import LayerNorm, Linear, MultiHeadAttention, zeros


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """The condition embeddings of each decoder pass; the learned background is the last row.

    Attributes:
        embeds: [P, N, D], C(0).
        own: bool [P, N], the rows that SR attends to: the pass's own phrases and the background. A pass that owns no row is
            language-free: SR and CR leave it untouched (stage 1, and the generic pass with the linear class head).
        valid: bool [P, N], the rows that exist for this pass: refined by CR and classified against.
    """

    embeds: Float[Array, "p n d"]
    attend_mask: Bool[Array, "p n"]
    valid_mask: Bool[Array, "p n"]


@dataclasses.dataclass(frozen=True)
class SemanticFlowConfig:
    """Switches of the semantic flow.

    Attributes:
        mode: "off" (plain X-SAM), "sr", or "sr_cr" (FlowSeg).
        norm: "post": Q_sem = LN(Q_vis + MHA), as X-SAM's layers. "residual": Q_sem = Q_vis + MHA, no norm, output
            projection starting at zero, so that a converted X-SAM checkpoint predicts at step 0 what X-SAM predicts.
        gate_bias: initial bias of the gate; 0 mixes both halves evenly, positive values start near vision.
        zero_init_condition_refinement: CR's output projection starts at zero, so that C(l) = C(0) at step 0.
    """

    mode: str = "sr_cr"
    norm: str = "post"
    gate_bias: float = 0.0
    zero_init_condition_refinement: bool = True

    def __post_init__(self):
        if self.mode not in ("off", "sr", "sr_cr"):
            raise ValueError(f"semantic_flow.mode is {self.mode!r}: choose off, sr or sr_cr")
        if self.norm not in ("post", "residual"):
            raise ValueError(f"semantic_flow.norm is {self.norm!r}: choose post or residual")


class SemanticRefinement(nnx.Module):
    """SR: lets the pass's own conditions into the queries, channel by channel."""

    def __init__(self, width: int, heads: int, cfg: SemanticFlowConfig, *, rngs: nnx.Rngs):
        residual = cfg.norm == "residual"
        self.attn = MultiHeadAttention(width, heads, rngs=rngs, zero_output=residual)
        self.norm = None if residual else LayerNorm(width, rngs=rngs)
        self.gate = Linear(
            2 * width, width, rngs=rngs, init=zeros, bias_init=nnx.initializers.constant(cfg.gate_bias), axes=(None, None)
        )

    def __call__(
        self,
        q_vis: Float[Array, "p q d"],
        position: Float[Array, "q d"],
        conditions: Float[Array, "p n d"],
        own: Bool[Array, "p n"],
        out: dict[str, Array] | None = None,
    ) -> Float[Array, "p q d"]:
        """The queries with language in them; `out`, if given, gets `gate` [P, Q, D]: 1 keeps vision, 0 takes language."""
        mask = jnp.broadcast_to(own[:, None, None, :], (own.shape[0], 1, q_vis.shape[1], own.shape[1]))
        q_sem = q_vis + self.attn(q_vis + position, conditions, conditions, mask=mask)
        if self.norm is not None:
            q_sem = self.norm(q_sem)
        gate = jax.nn.sigmoid(self.gate(jnp.concatenate([q_vis, q_sem], -1)))
        if out is not None:
            out["gate"] = gate
        # Written as a correction of Q_sem: exact where both agree, which the warm start relies on.
        fused = q_sem + gate * (q_vis - q_sem)
        return jnp.where(own.any(-1)[:, None, None], fused, q_vis)


class ConditionRefinement(nnx.Module):
    """CR: lets what the queries found into every valid condition, the negatives and the background included.

    Refining only the pass's own row would let the class head tell it apart for free.
    """

    def __init__(self, width: int, heads: int, cfg: SemanticFlowConfig, *, rngs: nnx.Rngs):
        self.attn = MultiHeadAttention(width, heads, rngs=rngs, zero_output=cfg.zero_init_condition_refinement)

    def __call__(
        self,
        conditions: Float[Array, "p n d"],
        queries: Float[Array, "p q d"],
        refine: Bool[Array, "p n"],
    ) -> Float[Array, "p n d"]:
        return jnp.where(refine[..., None], conditions + self.attn(conditions, queries, queries), conditions)

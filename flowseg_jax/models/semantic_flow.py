"""Bidirectional semantic flow: what FlowSeg adds to every layer of the mask decoder.

SR, semantic refinement (language -> queries), right after the visual cross-attention:

    Q_sem = MHA(Q_vis, C, C)                       the pass's own conditions and the background row
    g     = sigmoid(W_g [Q_vis || Q_sem])          one gate per channel
    Q     = g * Q_vis + (1 - g) * Q_sem

CR, condition refinement (queries -> language), at the end of the layer, from the queries after self-attention:

    C     = C + MHA(C, Q_s, Q_s)

Both are the paper's equations; residuals and norms, which it leaves open, follow `SemanticFlowConfig.norm`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from flowseg_jax.errors import UserError
from flowseg_jax.models.layers import LayerNorm, Linear, MultiHeadAttention, zeros


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """The condition embeddings of each decoder pass; the learned background is the last row.

    Attributes:
        embeds: [P, N, D], C(0).
        attend_mask: bool [P, N], the rows that SR attends to: the pass's own phrases and the background. A pass without such
            a row is language-free: SR and CR leave it untouched (the closed-vocabulary pass, with the linear class head).
        valid_mask: bool [P, N], the rows that exist for this pass: CR refines them, and queries are classified against them.
    """

    embeds: Float[Array, "p n d"]
    attend_mask: Bool[Array, "p n"]
    valid_mask: Bool[Array, "p n"]


@dataclasses.dataclass(frozen=True)
class SemanticFlowConfig:
    """Switches of the semantic flow.

    Attributes:
        mode: "off" (X-SAM without semantic flow), "sr" or "cr" (one of the two alone), or "sr_cr" (FlowSeg).
        norm: "post": Q_sem = LN(Q_vis + MHA), as in X-SAM's layers. "residual": Q_sem = Q_vis + MHA without a norm, the
            output projection starting at zero, so that a converted X-SAM checkpoint predicts at step 0 what X-SAM predicts.
        gate_bias: initial bias of the gate; 0 mixes Q_vis and Q_sem evenly, positive values start near Q_vis.
        zero_init_condition_refinement: CR's output projection starts at zero, so that C(l) = C(0) at step 0.
    """

    mode: str = "sr_cr"
    norm: str = "post"
    gate_bias: float = 0.0
    zero_init_condition_refinement: bool = True

    def __post_init__(self):
        if self.mode not in ("off", "sr", "cr", "sr_cr"):
            raise UserError(f"semantic_flow.mode is {self.mode!r}: choose off, sr, cr or sr_cr")
        if self.norm not in ("post", "residual"):
            raise UserError(f"semantic_flow.norm is {self.norm!r}: choose post or residual")

    @property
    def has_sr(self) -> bool:
        """Whether language refines the queries."""
        return self.mode in ("sr", "sr_cr")

    @property
    def has_cr(self) -> bool:
        """Whether the queries refine the conditions."""
        return self.mode in ("cr", "sr_cr")


class SemanticRefinement(nnx.Module):
    """SR: mixes the pass's own conditions into the queries, channel by channel."""

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
        query_pos: Float[Array, "q d"],
        conditions: Float[Array, "p n d"],
        attend_mask: Bool[Array, "p n"],
        out: dict[str, Any] | None = None,
    ) -> Float[Array, "p q d"]:
        """Refines the queries of every pass.

        Args:
            q_vis: the queries after the visual cross-attention.
            query_pos: the queries' learned positions.
            conditions: C.
            attend_mask: the conditions that a pass attends to; a pass without any keeps its queries.
            out: if given, it gets "text_attention" (the output of MHA), "q_sem" and "gate" (1 keeps vision, 0 takes
                language), each [P, Q, D].
        """
        p, n = attend_mask.shape
        mask = jnp.broadcast_to(attend_mask[:, None, None, :], (p, 1, q_vis.shape[1], n))
        text = self.attn(q_vis + query_pos, conditions, conditions, mask=mask)
        q_sem = q_vis + text
        if self.norm is not None:
            q_sem = self.norm(q_sem)
        gate = jax.nn.sigmoid(self.gate(jnp.concatenate([q_vis, q_sem], -1)))
        # g * Q_vis + (1 - g) * Q_sem, in a form that is exact where both agree: a converted X-SAM checkpoint starts there.
        fused = q_sem + gate * (q_vis - q_sem)
        if out is not None:
            out |= {"text_attention": text, "q_sem": q_sem, "gate": gate}
        return jnp.where(attend_mask.any(-1)[:, None, None], fused, q_vis)


class ConditionRefinement(nnx.Module):
    """CR: mixes what the queries found into every valid condition, the negatives and the background included.

    If only the pass's own row were refined, the class head could recognise it by that alone.
    """

    def __init__(self, width: int, heads: int, cfg: SemanticFlowConfig, *, rngs: nnx.Rngs):
        self.attn = MultiHeadAttention(width, heads, rngs=rngs, zero_output=cfg.zero_init_condition_refinement)

    def __call__(
        self,
        conditions: Float[Array, "p n d"],
        queries: Float[Array, "p q d"],
        refine_mask: Bool[Array, "p n"],
    ) -> Float[Array, "p n d"]:
        """C after the layer: the rows of `refine_mask` are refined, the others stay."""
        return jnp.where(refine_mask[..., None], conditions + self.attn(conditions, queries, queries), conditions)

"""How an answer came about: what every decoder layer chose, and what boundary refinement changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flowseg_jax.evaluation import postprocess
from flowseg_jax.inference.selection import Prediction
from flowseg_jax.models.flowseg import FlowSeg
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.models.outputs import ImageCache
from flowseg_jax.types import ExpressionQueries


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """What would be answered after one decoder layer.

    Attributes:
        query: with the highest score there. score: of it, in [0, 1].
        margin: its cosine with the condition minus that with the background, above the runner-up's.
        gate: mean of SR's gate over queries and channels, 1 keeps vision, 0 takes language; None before the first layer and
            without SR.
        drift: |C(l) - C(0)| / |C(0)|, what CR has changed of the condition.
        mask: bool [H, W] of that query at the image's own size, before BAR.
    """

    query: int
    score: float
    margin: float
    gate: float | None
    drift: float
    mask: Bool[np.ndarray, "y x"]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One expression about one image, layer by layer.

    Attributes:
        prediction: the answer.
        layers: J = L + 1 choices: before the first decoder layer, and after each of the L layers.
        scores: float32 [Q] of all queries after the last layer.
        mask_logits: float32 [Q, H', W'] of all queries after the last layer, on the part of the mask grid that the image fills.
        before_boundary, after_boundary: bool [H, W], the selected mask without and with BAR; equal without BAR.
        band: bool [H, W], where BAR may change it; None without BAR.
    """

    prediction: Prediction
    layers: Sequence[LayerChoice]
    scores: Float[np.ndarray, " q"]
    mask_logits: Float[np.ndarray, "q h w"]
    before_boundary: Bool[np.ndarray, "y x"]
    after_boundary: Bool[np.ndarray, "y x"]
    band: Bool[np.ndarray, "y x"] | None

    def owner(self, x: int, y: int) -> tuple[int, float]:
        """The query whose mask is most certain of a pixel of the image, and its mask probability there.

        Raises:
            IndexError: the pixel is outside the image.
        """
        height, width = self.prediction.image.shape[:2]
        if not (0 <= x < width and 0 <= y < height):
            raise IndexError(f"pixel ({x}, {y}) is outside the image of {width} x {height}")
        h, w = self.mask_logits.shape[1:]
        logits = self.mask_logits[:, min(h - 1, int((y + 0.5) * h / height)), min(w - 1, int((x + 0.5) * w / width))]
        query = int(logits.argmax())
        return query, float(1 / (1 + np.exp(-logits[query])))

    def query_mask(self, query: int) -> Bool[np.ndarray, "y x"]:
        """The mask of any query at the image's own size, each pixel that of the nearest cell of the mask grid."""
        height, width = self.prediction.image.shape[:2]
        h, w = self.mask_logits.shape[1:]
        rows = np.minimum(h - 1, ((np.arange(height) + 0.5) * h / height).astype(int))
        columns = np.minimum(w - 1, ((np.arange(width) + 0.5) * w / width).astype(int))
        return self.mask_logits[query][rows[:, None], columns[None]] > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderTrace:
    """What `trace_decoder` finds: J = L + 1 predictions of K expressions about one image.

    Attributes:
        query: int32 [K, J], the selected one. score, margin, gate, drift: float32 [K, J], as in `LayerChoice` (gate: NaN).
        masks: float32 [1, K, J + 2, h, w], mask logits: the selected one of each prediction, then the last one after BAR, then
            the band (above 0 inside).
        all_scores: float32 [K, Q]. all_masks: float32 [K, Q, h, w], of all queries in the end.
    """

    query: Int[Array, "k j"]
    score: Float[Array, "k j"]
    margin: Float[Array, "k j"]
    gate: Float[Array, "k j"]
    drift: Float[Array, "k j"]
    masks: Float[Array, "1 k n h w"]
    all_scores: Float[Array, "k q"]
    all_masks: Float[Array, "k q h w"]


def layer_figures(out: dict[str, Any]) -> dict[str, Float[Array, "..."]]:
    """How the condition and the choice change from layer to layer, from the decoder's intermediates.

    Returns:
        `cosines` [J, P, Q]: between each query and the expression's condition C(j), as the class head sees them;
        `margin` [J, P]: cos(q, C) - cos(q, background) of the highest query minus that of the runner-up;
        `gate` [J, P]: SR's gate, its mean over queries and channels; NaN before the first layer and without SR;
        `step`, `drift` [J, P]: |C(j) - C(j-1)| and |C(j) - C(0)|, as shares of |C(0)|.
    """
    queries, conditions = out["decoder_output"].queries, out["conditions"]
    cosines = jnp.einsum("jpqd,jpnd->jpqn", _unit(queries), _unit(conditions))
    highest, _ = jax.lax.top_k(cosines[..., 0] - cosines[..., -1], 2)
    own = conditions[:, :, 0].astype(jnp.float32)
    length = jnp.linalg.norm(own[0], axis=-1)
    gate = jnp.full(own.shape[:2], jnp.nan, jnp.float32)
    if "gate" in out:
        gate = gate.at[1:].set(out["gate"].astype(jnp.float32).mean((2, 3)))
    moved = lambda before: jnp.linalg.norm(own - before, axis=-1) / length  # noqa: E731
    return {
        "cosines": cosines[..., 0],
        "margin": highest[..., 0] - highest[..., 1],
        "gate": gate,
        "step": moved(jnp.concatenate([own[:1], own[:-1]])),
        "drift": moved(own[:1]),
    }


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def trace_decoder(model: FlowSeg, cache: ImageCache, queries: ExpressionQueries) -> DecoderTrace:
    """Predicts, and keeps what every layer would have answered; one image, traced."""
    out: dict[str, Any] = {}
    found = model.predict_cached(cache, queries, out)
    decoded, figures = out["decoder_output"], layer_figures(out)
    scores = jax.nn.softmax(decoded.class_logits, -1)[..., 0]  # [J, K, Q]
    query = jax.lax.top_k(postprocess.ranked(scores), 1)[1]  # [J, K, 1]
    score = jnp.take_along_axis(scores, query, -1)[..., 0]
    embeds = jnp.take_along_axis(decoded.mask_embeds, query[..., None], 2)[:, :, 0]  # [J, K, F]
    masks = mask_logits(embeds.reshape(1, -1, embeds.shape[-1]), cache.mask_features)[0]
    masks = jnp.moveaxis(masks.reshape(*embeds.shape[:2], *masks.shape[1:]), 0, 1)  # [K, J, h, w]
    last = masks[:, -1]
    after = model.refine_masks(last[None], found.mask_features)[0]
    band = jnp.zeros_like(last) if model.boundary is None else model.boundary.band(last)
    by_text = lambda x: jnp.moveaxis(x, 0, 1)  # noqa: E731
    return DecoderTrace(
        by_text(query[..., 0]),
        by_text(score),
        *(by_text(figures[name]) for name in ("margin", "gate", "drift")),
        jnp.concatenate([masks, after[:, None], band[:, None] - 0.5], 1)[None],
        found.scores[0],
        found.mask_logits[0],
    )

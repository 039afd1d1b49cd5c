"""The angles of the rotary position embedding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_cos_sin(
    position_ids: Int[Array, "b t"], head_dim: int, theta: float, scaling: tuple[float, ...] | None = None
) -> tuple[Float[Array, "b t r"], Float[Array, "b t r"]]:
    """Cosine and sine of the rotary angles, float32 [B, T, head_dim / 2]; `scaling`: see `LanguageConfig.rope_scaling`."""
    frequencies = float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        frequencies = _scaled(frequencies, *scaling)
    frequencies = frequencies.astype(np.float32)
    angles = position_ids[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _scaled(frequencies: np.ndarray, factor: float, low: float, high: float, length: float) -> np.ndarray:
    """Llama 3.1's frequencies: what turns fewer than `low` times in the `length` tokens of the first training is divided by
    `factor`, what turns more than `high` times stays, and between them lies a straight line."""
    kept = np.clip((length * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)

"""The exponential moving average of what is trained: kept beside it, sharded like it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Attributes:
    decay: share of the average that stays in a step, below 1; 0 for no average.
    warmup: in step t (from 0) no more than (1 + t) / (10 + t) stays, so that the first parameters are soon forgotten.
    export: the average is what is evaluated and written as the model; otherwise the last parameters are.
    """

    decay: float = 0.0
    warmup: bool = True
    export: bool = True

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise UserError(f"ema.decay is {self.decay}: it must be at least 0 (no average) and below 1")


def update(cfg: EmaConfig, average: Any, params: Any, step: jax.Array) -> Any:
    """The average after step `step` (int32, from 0), which led to `params`; both are trees of the same shapes and dtypes."""
    decay = jnp.minimum(cfg.decay, (1 + step) / (10 + step)) if cfg.warmup else cfg.decay
    return optax.incremental_update(params, average, 1 - decay)

"""AdamW with warm-up and cosine, clipping, and one ordered table that says how fast each parameter learns, if at all."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.errors import UserError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    learning_rate: peak.
    warmup_fraction: share of the steps that warm up linearly from 1e-5 of the peak (X-SAM's start factor).
    weight_decay: decoupled, on every trainable parameter (X-SAM decays norms and biases too).
    max_grad_norm: largest global gradient norm.
    b1, b2, eps: of Adam.
    param_groups: ordered (regular expression on the parameter's path, learning-rate multiplier or None for frozen); the first
        that matches the whole path counts, and a parameter that none matches is an error.
    grad_accum_steps: micro-batches of a device's images that are differentiated one after the other, to save memory; the update
        is the same.
    max_skipped_updates: updates in a row that may be skipped because they are not finite; more stop the run.
    frozen_dtype: how the matrices of frozen components (SAM, SigLIP, the language model) are stored: "float32" or "bfloat16".
        They are cast to the compute dtype before every use, so the numbers stay the same where the model computes in bfloat16.
    """

    learning_rate: float = 4e-5
    warmup_fraction: float = 0.03
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    param_groups: tuple[tuple[str, float | None], ...] = ((".*", 1.0),)
    grad_accum_steps: int = 1
    max_skipped_updates: int = 10
    frozen_dtype: str = "float32"

    def __post_init__(self):
        if self.frozen_dtype not in ("float32", "bfloat16"):
            raise UserError(f"optimizer.frozen_dtype is {self.frozen_dtype!r}: choose float32 or bfloat16")
        if self.grad_accum_steps < 1 or self.max_skipped_updates < 0:
            raise UserError(
                f"optimizer: grad_accum_steps={self.grad_accum_steps} must be at least 1, "
                f"max_skipped_updates={self.max_skipped_updates} at least 0"
            )


def lr_multipliers(paths: list[str], groups: tuple[tuple[str, float | None], ...]) -> dict[str, float | None]:
    """Learning-rate multiplier of each path, None for a frozen one.

    Raises:
        UserError: paths that no expression matches, all of them listed, or an expression that is none.
    """
    try:
        table = [(re.compile(pattern), value) for pattern, value in groups]
    except re.error as error:
        raise UserError(f"optimizer.param_groups: {error.pattern!r} is no regular expression: {error}") from error
    found = {path: next((v for p, v in table if p.fullmatch(path)), "uncovered") for path in paths}
    if uncovered := [path for path, value in found.items() if value == "uncovered"]:
        raise UserError(
            f"optimizer.param_groups covers no group for {', '.join(uncovered)}; end the table with ('.*', 1.0) or (.., None)"
        )
    return found


def split_trainable(params: Params, rates: dict[str, float | None]) -> tuple[Params, Params]:
    """(trainable, frozen): frozen parameters get neither gradients nor moments."""
    flat = flatten_params(params)
    trainable = {path: leaf for path, leaf in flat.items() if rates[path] is not None}
    frozen = {path: leaf for path, leaf in flat.items() if rates[path] is None}
    return unflatten_params(trainable), unflatten_params(frozen)


ENCODER_KERNELS = re.compile(r"(sam|siglip|llm)/(.*/)?(kernel|embed_tokens|lm_head)")


def cast_frozen(frozen: Params, dtype: str) -> Params:
    """The frozen parameters as they are kept: the matrices of the components in `dtype`, all else as it is."""
    cast = lambda path, x: x.astype(dtype) if ENCODER_KERNELS.fullmatch(path) else x  # noqa: E731
    return unflatten_params({path: cast(path, x) for path, x in flatten_params(frozen).items()})


def merge_trainable(trainable: Params, frozen: Params) -> Params:
    return unflatten_params(flatten_params(trainable) | flatten_params(frozen))


def lr_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine to zero at `steps`. Counts steps, never time."""
    warmup = max(1, round(cfg.warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(1e-5 * cfg.learning_rate, cfg.learning_rate, warmup, max(steps, warmup + 1), 0.0)


def make_optimizer(cfg: OptimizerConfig, steps: int, rates: dict[str, float | None]) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, multipliers, schedule; over the trainable parameters only."""
    factors = unflatten_params({path: rate for path, rate in rates.items() if rate is not None})

    def scale(updates: Params, state: optax.EmptyState, params: Params | None = None) -> tuple[Params, optax.EmptyState]:
        del params
        return jax.tree.map(lambda update, factor: update * jnp.asarray(factor, update.dtype), updates, factors), state

    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
        optax.scale_by_learning_rate(lr_schedule(cfg, steps)),
    )

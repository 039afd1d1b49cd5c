"""Optimizer, schedule, clipping, and one ordered table that says how fast each parameter learns, if at all."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig

Params = dict[str, Any]
Rate = float | np.ndarray | None  # a multiplier, one for each layer of a stack, or None for a frozen parameter

OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")
FROZEN_DTYPES = ("float32", "bfloat16", "int8")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


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
    name: "adamw"; "lion" (https://arxiv.org/abs/2302.06675; b1, b2); "adafactor" (https://arxiv.org/abs/1804.04235, without a
        first moment and without relative steps: rows and columns of a matrix share their second moments); "muon" (matrices by
        https://arxiv.org/abs/2502.16982, with b1 as momentum, all else as by adamw, whose learning rates it takes).
    schedule: after the warm-up, "cosine" or "linear" to zero at the last step; "constant"; "wsd" (warm-up, stable, decay):
        constant, and linear to zero over the last `decay_fraction`. What was trained in its constant part goes on with more
        steps as if they had been planned.
    decay_fraction: share of the steps, for "wsd".
    layer_decay: in a stack of N layers of SAM, SigLIP or the language model, layer i (from 0) learns at layer_decay^(N - 1 - i)
        of its rate, and the embeddings at layer_decay^N (https://arxiv.org/abs/2106.08254); 1 for equal rates.
    frozen_dtype: how the matrices of frozen components (SAM, SigLIP, the language model) are stored: "float32" or "bfloat16".
        They are cast to the compute dtype before every use, so the numbers stay the same where the model computes in bfloat16.
        "int8" rounds those of the language model's and of SAM's layers (`models.quantization`), the rest is in bfloat16.
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
    name: str = "adamw"
    schedule: str = "cosine"
    decay_fraction: float = 0.2
    layer_decay: float = 1.0

    def __post_init__(self):
        for key, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            if (value := getattr(self, key)) not in known:
                raise UserError(f"optimizer.{key} is {value!r}: choose {', '.join(known)}")
        for key in ("decay_fraction", "layer_decay"):
            if not 0 < (value := getattr(self, key)) <= 1:
                raise UserError(f"optimizer.{key} is {value}: it must be above 0 and at most 1")
        if self.frozen_dtype not in FROZEN_DTYPES:
            raise UserError(f"optimizer.frozen_dtype is {self.frozen_dtype!r}: choose {', '.join(FROZEN_DTYPES)}")
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
    """The frozen parameters as they are kept: the matrices of the components in `dtype`, all else as it is.

    For "int8" that is bfloat16, where they are no int8 matrices already.
    """
    dtype = "bfloat16" if dtype == "int8" else dtype
    cast = lambda path, x: x.astype(dtype) if ENCODER_KERNELS.fullmatch(path) and x.dtype != jnp.int8 else x  # noqa: E731
    return unflatten_params({path: cast(path, x) for path, x in flatten_params(frozen).items()})


def merge_trainable(trainable: Params, frozen: Params) -> Params:
    return unflatten_params(flatten_params(trainable) | flatten_params(frozen))


def decay_by_layer(rates: dict[str, float | None], model: FlowSegConfig, decay: float) -> dict[str, Rate]:
    """The multipliers with `OptimizerConfig.layer_decay`: those of a stack become an array, one for each of its layers."""
    if decay == 1:
        return dict(rates)
    found: dict[str, Rate] = dict(rates)
    for part, cfg in (("sam", model.sam), ("siglip", model.siglip), ("llm", model.llm)):
        count = cfg.num_hidden_layers
        for path, rate in rates.items():
            if rate is None or not path.startswith(f"{part}/"):
                continue
            stack = path.split("/")[1]
            if stack.endswith("layers"):
                depths = (
                    range(count) if part != "sam" else [i for i in range(count) if model.sam.stack_and_index(i)[0] == stack]
                )
                found[path] = np.array([rate * decay ** (count - 1 - i) for i in depths], np.float32)
            elif "embed" in stack:
                found[path] = rate * decay**count
    return found


def lr_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, as `OptimizerConfig.schedule` describes it. Counts steps, never time."""
    warmup = max(1, round(cfg.warmup_fraction * steps))
    first, peak, end = 1e-5 * cfg.learning_rate, cfg.learning_rate, max(steps, warmup + 1)
    if cfg.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(first, peak, warmup, end, 0.0)
    stable = {"linear": warmup, "constant": end, "wsd": max(warmup, end - max(1, round(cfg.decay_fraction * steps)))}[
        cfg.schedule
    ]
    after = [optax.constant_schedule(peak)]
    if stable < end:
        after.append(optax.linear_schedule(peak, 0.0, end - stable))
    return optax.join_schedules([optax.linear_schedule(first, peak, warmup), *after], [warmup, stable][: len(after)])


def make_optimizer(cfg: OptimizerConfig, steps: int, rates: dict[str, Rate]) -> optax.GradientTransformation:
    """Clip, the optimizer's direction, decoupled decay, multipliers, schedule; over the trainable parameters only."""
    factors = unflatten_params({path: rate for path, rate in rates.items() if rate is not None})

    def multiply(update: jax.Array, factor: float | np.ndarray) -> jax.Array:
        factor = jnp.asarray(factor, update.dtype)
        return update * factor.reshape(*factor.shape, *[1] * (update.ndim - factor.ndim))

    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        _direction(cfg),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.stateless(lambda updates, params: jax.tree.map(multiply, updates, factors)),
        optax.scale_by_learning_rate(lr_schedule(cfg, steps)),
    )


def _direction(cfg: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    if cfg.name == "lion":
        return optax.scale_by_lion(cfg.b1, cfg.b2)
    if cfg.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if cfg.name == "muon":
        matrices = lambda tree: jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), tree)  # noqa: E731
        # The root mean square of Adam's updates, which an orthogonal matrix of any shape is scaled to.
        like_adam = optax.stateless(lambda updates, _: jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates))
        muon = optax.chain(scale_by_muon(beta=cfg.b1, weight_dimension_numbers=matrices), like_adam)
        return optax.partition({"muon": muon, "adam": adam}, _by_shape)
    return adam


MATRICES = re.compile(r"(.*/)?(kernel|lora/[ab])")


def _by_shape(params: Params) -> Params:
    """Which parameters are matrices, or stacks of them: weights of linear layers and adapters, but no convolutions."""
    label = lambda path, x: "muon" if MATRICES.fullmatch(path) and x.ndim in (2, 3) else "adam"  # noqa: E731
    return unflatten_params({path: label(path, x) for path, x in flatten_params(params).items()})

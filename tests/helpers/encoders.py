"""The encoders and the language model alone, and a training program around them that compiles in seconds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.models import flowseg
from flowseg_jax.models.language import LanguageModel
from flowseg_jax.models.layers import Linear
from flowseg_jax.models.quantization import quantized
from flowseg_jax.models.sam import SamImageEncoder
from flowseg_jax.models.siglip import SiglipVisionEncoder
from flowseg_jax.training import step
from flowseg_jax.training.lora import initial_adapters, is_scale
from flowseg_jax.training.optimizer import split_trainable
from flowseg_jax.training.program import TrainProgram
from flowseg_jax.training.step import TrainState
from tests.helpers import small

CFG = small.lean(negatives_group_size=1)


class Encoders(flowseg.FlowSeg):
    """Every encoder's mean output, an image a row, through a head that is no encoder."""

    def __init__(self, cfg, *, rngs: nnx.Rngs):
        self.sam = SamImageEncoder(cfg.sam, rngs=rngs)
        self.siglip = SiglipVisionEncoder(cfg.siglip, rngs=rngs)
        self.llm = LanguageModel(cfg.llm, rngs=rngs)
        self.head = Linear(cfg.sam.hidden_size + cfg.siglip.hidden_size + cfg.llm.hidden_size, 3, rngs=rngs)

    def __call__(self, batch, *_) -> jax.Array:
        (seen,) = self.sam(batch.sam_images / 255, (-1,))
        looked = self.siglip(batch.siglip_images / 255)
        read = self.llm(self.llm.embed(batch.input_ids), batch.position_ids, batch.segment_ids)
        return self.head(jnp.concatenate([seen.mean((1, 2)), looked.mean(1), read.mean(1)], -1))


@contextlib.contextmanager
def only_encoders() -> Iterator[None]:
    """Programs that are built inside train `Encoders` towards 1, and nothing else of a FlowSeg exists."""

    def terms(model, part, out, keys, losses, group):
        return {"distance": (jnp.square(out - 1).sum(), None)}, {}

    abstract = functools.cache(lambda cfg: nnx.eval_shape(lambda: Encoders(cfg, rngs=nnx.Rngs(0))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flowseg, "FlowSeg", Encoders)
        patch.setattr(flowseg, "_abstract_network", abstract)  # the real one keeps what it made
        patch.setattr(step, "denominators", lambda cfg, batch, losses: {"distance": jnp.float32(len(batch.input_ids))})
        patch.setattr(step, "loss_terms", terms)
        yield


def config(images: int = 2, **mesh: int) -> ConfigDict:
    found = small.experiment(CFG, small.batch(CFG, images=images), **mesh)
    found.optimizer.update(learning_rate=0.01, warmup_fraction=0.1, param_groups=((".*", 1.0),))
    return found


def start(program: TrainProgram, seed: int = 0) -> TrainState:
    """A state to begin with: random numbers, which need no compilation, and adapters as they begin."""
    rng = np.random.default_rng(seed)
    like = flatten_params(program.state.trainable) | flatten_params(program.state.frozen)
    shapes = {name: x.shape for name, x in like.items() if not is_scale(name)}
    params = {name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    for name in [name for name, x in like.items() if x.dtype == jnp.int8]:
        params |= quantized(name, params[name])
    trainable, frozen = split_trainable(unflatten_params(params | initial_adapters(shapes, seed)), program.lr_multipliers)
    average = jax.tree.map(np.array, trainable) if program.state.ema else {}
    state = TrainState(np.int32(0), trainable, frozen, program.optimizer.init(trainable), np.zeros(2, np.int32), average)
    return jax.tree.map(lambda x, like: jax.device_put(jnp.array(x), like.sharding), state, program.state)


def go_on(program: TrainProgram, state: Any, steps: int) -> tuple[Any, list[dict[str, float]]]:
    order = program.partition.rows()
    batch = program.to_device(jax.tree.map(lambda x: np.asarray(x)[order], small.batch(CFG, images=len(order))))
    seen = []
    with only_encoders():
        for _ in range(steps):
            state, metrics = program.step(state, batch)
            seen.append({name: float(value) for name, value in metrics.items()})
    return state, seen

"""The train step of a config as a candidate, in this revision of the repository or in another one.

This file is run against other revisions: beyond configs, batches and `TrainProgram` it may use only what they have. A worker:
`python -m benchmarks.step [--clock=cpu] [--config=FILE] [--config.KEY=VALUE ...]`.
"""

from __future__ import annotations

import contextlib

if __name__ == "__main__":  # as `flowseg train`, before anything starts threads
    with contextlib.suppress(ImportError):  # earlier versions have none
        from flowseg_jax.system.memory import keep_freed_memory

        keep_freed_memory()

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import flowseg_jax
from benchmarks import worker
from flowseg_jax import experiment as configs
from flowseg_jax.data.collate import empty_batch
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.training.program import TrainProgram
from flowseg_jax.types import IMAGE_TOKEN_INDEX, Batch, BatchShape

COMPARED = ("loss", "optimizer/gradient_norm")  # metrics of the first step; they must be the same for times to be comparable


class TrainStep:
    """The jitted train step on one device, with a state of its own that every call takes one step further.

    Every step sees the same random batch. Steps are dispatched one after the other, as in training. `clock` says what a second
    is.
    """

    def __init__(self, config: ConfigDict, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        run_config, place, self._step, self.state = build(config)
        self._batch = place(random_batch(run_config.shape, run_config.model))
        self.pid = os.getpid()
        self.state, metrics = self._step(self.state, self._batch)
        self._first = {name: np.asarray(metrics[name]) for name in COMPARED}

    def run(self, calls: int) -> float:
        started = self._clock()
        for _ in range(calls):
            self.advance()
        jax.block_until_ready(self.state)
        return self._clock() - started

    def advance(self) -> None:
        """Dispatches one step."""
        self.state, _ = self._step(self.state, self._batch)

    def output(self) -> dict[str, np.ndarray]:
        return self._first


class Built(NamedTuple):
    """A run config, what puts a batch on the device, the jitted (state, batch) -> (state, metrics), the initial state."""

    run_config: Any
    place: Callable[[Batch], Batch]
    step: Callable[[Any, Batch], tuple[Any, dict[str, jax.Array]]]
    state: Any


def build(config: ConfigDict) -> Built:
    """What a step needs on the first device."""
    program = TrainProgram.build(config, jax.devices()[:1])
    state = program.initial_state(config)
    state = state[0] if isinstance(state, tuple) else state  # earlier versions return nothing beside it
    return Built(program.run_config, program.to_device, program.step, state)


def random_batch(shape: BatchShape, model: FlowSegConfig, seed: int = 0) -> Batch:
    """A batch of noise in which everything is present: all phrases and masks, one generic conversation, text to the end.

    Raises:
        UserError: the text length has no room for it.
    """
    rng = np.random.default_rng(seed)
    prefix, conversations = 1 + model.num_visual_tokens, shape.max_phrases + 1
    length = (shape.text_length - prefix) // conversations  # tokens of each conversation
    if length < max(5, shape.max_masks + 2):
        raise UserError(
            f"data.text_length={shape.text_length} has no room for {conversations} conversations and {shape.max_masks} names"
        )
    batch = empty_batch(shape, 0)
    used = prefix + conversations * length
    batch.input_ids[:, :used] = rng.integers(0, model.llm.vocab_size, (shape.batch, used))
    batch.input_ids[:, 1:prefix] = IMAGE_TOKEN_INDEX
    batch.segment_ids[:, :prefix] = 0
    batch.position_ids[:, :prefix] = np.arange(prefix)
    for number in range(conversations):
        at = prefix + number * length
        here = slice(at, at + length)
        batch.segment_ids[:, here] = number + 1
        batch.position_ids[:, here] = prefix + np.arange(length)
        batch.labels[:, here] = batch.input_ids[:, here]
        batch.seg_ids[:, at + length - 1] = number  # the generic conversation, after the phrases, has the last number
        if number < shape.max_phrases:
            batch.phrase_ids[:, at + 1 : at + 4] = number
        else:
            batch.phrase_ids[:, at + 1 : at + 1 + shape.max_masks] = shape.max_phrases + np.arange(shape.max_masks)
    batch.sam_images[:] = rng.integers(0, 256, batch.sam_images.shape)
    batch.siglip_images[:] = rng.integers(0, 256, batch.siglip_images.shape)
    coarse = rng.random((shape.batch, shape.max_masks, 8, 8)) > 0.6
    pixels = np.arange(shape.sam_size) * 8 // shape.sam_size
    batch.packed_masks[:] = np.packbits(coarse[:, :, pixels][:, :, :, pixels], axis=-1)
    batch.mask_valid[:] = True
    batch.phrase_target[:] = np.arange(shape.max_phrases) % shape.max_masks
    batch.object_category[:] = rng.integers(0, max(model.num_classes, 1), (shape.batch, shape.max_masks))
    batch.object_name[:] = np.arange(shape.max_masks)
    if hasattr(batch, "name_valid"):  # earlier versions, which this one is measured against, have none
        batch.name_valid[:] = True
    return dataclasses.replace(batch, example_id=np.arange(shape.batch, dtype=np.int32))


def make(argv: list[str]) -> TrainStep:
    """The candidate of a worker's command line.

    Raises:
        RuntimeError: this worker would time the code of another directory than the one it was started in.
    """
    package = Path(flowseg_jax.__file__).resolve()
    if not package.is_relative_to(Path.cwd().resolve()):
        raise RuntimeError(f"this is the train step of {package.parent}, not of {Path.cwd()}")
    config, rest = configs.load(argv)
    clock = time.process_time if "--clock=cpu" in rest else time.perf_counter  # the first one counts all threads
    if unknown := [argument for argument in rest if argument not in ("--clock=cpu", "--clock=wall")]:
        raise UserError(f"benchmarks.step: unknown arguments {' '.join(unknown)}")
    return TrainStep(config, clock)


if __name__ == "__main__":
    worker.serve(lambda: make(sys.argv[1:]))

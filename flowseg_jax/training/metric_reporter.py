"""What a training run measures, from the device to the writers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from flowseg_jax.data.train_dataset import TrainDataset
from flowseg_jax.errors import UserError
from flowseg_jax.system import hardware
from flowseg_jax.training import flops
from flowseg_jax.training.metric_writers import Throughput
from flowseg_jax.training.program import TrainProgram


class MetricReporter:
    """Metrics on their way from the device to the writers, a step late so that nobody waits."""

    def __init__(self, program: TrainProgram, data: TrainDataset, writer: Any, start: int, began: float, spent: float):
        self._program, self._data, self._writer = program, data, writer
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        run, state, self._devices = program.run_config, program.state, list(program.mesh.devices.flat)
        self._flops = flops.total(flops.step_flops(run.model, run.shape, run.losses, state.trainable, state.frozen))
        self._throughput = Throughput(start, run.shape.batch, began, spent)
        self.waiting_for, self.seconds_in_steps = self._throughput.waiting_for, self._throughput.seconds_in_steps

    def log(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._pending = step, metrics

    def flush(self) -> None:
        """Writes what is pending. Raises a UserError when too many updates in a row were not finite."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        speed = self._throughput(step)
        use = hardware.mfu(self._flops, 1 / speed["speed/steps_per_second"], self._devices)
        memory = hardware.memory_in_use(self._devices)["peak"]
        known = {"speed/mfu": use, "device/memory_gib": None if memory is None else memory / hardware.GIB}
        self._writer.write_scalars(step, values | speed | {name: x for name, x in known.items() if x is not None})
        check_skipped(values, step, self._data, self._program.run_config.optimizer.max_skipped_updates)


def check_skipped(values: Mapping[str, float], step: int, data: TrainDataset, limit: int) -> None:
    """Raises a UserError with the images of the last batches when too many updates in a row were not finite.

    Nothing is lost: parameters and moments are those before the first of them.
    """
    row = int(values["optimizer/skipped_in_a_row"])
    if row > limit:
        last = [data.batch(i).example_id.tolist() for i in range(step - min(row, 3), step)]
        raise UserError(
            f"the last {row} updates up to step {step} were not finite and were skipped, optimizer.max_skipped_updates "
            f"is {limit}; "
            f"image ids of the last batches: {'; '.join(', '.join(map(str, ids)) for ids in last)}"
        )

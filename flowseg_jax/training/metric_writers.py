"""Where metrics go: the terminal, `metrics.jsonl` and TensorBoard, all through CLU's `MetricWriter`.

CLU's `metric_writers` imports TensorFlow for one class, its `SummaryWriter`. `clu_metric_writers` imports CLU without it, when
the first run needs a writer and not before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from flowseg_jax.errors import UserError, short_reason
from flowseg_jax.system import json_files
from flowseg_jax.system.console import duration, log
from flowseg_jax.system.json_files import number
from flowseg_jax.system.paths import is_remote, resolve_path

UPLOAD_SECONDS = 30.0  # between two uploads of a metrics.jsonl that is an object in a store
RATES = ("learning_rate", "steps_per_second", "examples_per_second")  # scalars that the terminal shows in its own columns


@functools.cache
def clu_metric_writers() -> types.ModuleType:
    """`clu.metric_writers`, without TensorFlow.

    While CLU is imported, `TensorBoardWriter` stands where its `SummaryWriter` does, also where TensorFlow is installed: that
    would reserve the accelerator's memory in a JAX process. Afterwards `sys.modules` is as before.
    """
    name = "clu.metric_writers.summary_writer"
    if "clu.metric_writers" in sys.modules:  # somebody else has imported all of it
        from clu import metric_writers
    else:
        sys.modules[name] = stand_in = types.ModuleType(name)
        stand_in.SummaryWriter = TensorBoardWriter
        try:
            from clu import metric_writers
        finally:
            del sys.modules[name]
    for writer in (TensorBoardWriter, ScalarWriter):
        metric_writers.MetricWriter.register(writer)
    return metric_writers


class TensorBoardWriter:
    """A CLU `MetricWriter` that writes TensorBoard event files with tensorboardX."""

    def __init__(self, logdir: str | os.PathLike):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(os.fspath(logdir), flush_secs=10)

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        raise ValueError("tensorboardX has no generic summaries: write scalars, images, texts or histograms")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        for name, value in images.items():
            value = np.asarray(value)
            self._writer.add_images(name, value if value.ndim == 4 else value[None], step, dataformats="NHWC")

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        for name, value in videos.items():
            value = np.asarray(value)
            value = value if value.ndim == 5 else value[None]
            self._writer.add_video(name, value.transpose(0, 1, 4, 2, 3), step)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        for name, value in audios.items():
            for i, track in enumerate(np.asarray(value)):
                self._writer.add_audio(f"{name}/{i}", track, step, sample_rate)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, value in texts.items():
            self._writer.add_text(name, value, step)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int | None] | None = None
    ) -> None:
        for name, value in arrays.items():
            bins = (num_buckets or {}).get(name) or 30
            self._writer.add_histogram(name, np.asarray(value), step, bins=bins)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        rows = "".join(f"| {name} | {value} |\n" for name, value in hparams.items())
        self._writer.add_text("hparams", f"| name | value |\n|---|---|\n{rows}", 0)

    def flush(self) -> None:
        """Flushes what tensorboardX's own thread has taken over; only `close` is sure to have written everything."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class ScalarWriter:
    """A writer of scalars: everything else that CLU can write is none of its business."""

    def write_summaries(self, step, values, metadata=None):
        pass

    def write_images(self, step, images):
        pass

    def write_videos(self, step, videos):
        pass

    def write_audios(self, step, audios, *, sample_rate):
        pass

    def write_texts(self, step, texts):
        pass

    def write_histograms(self, step, arrays, num_buckets=None):
        pass

    def write_hparams(self, hparams):
        pass

    def flush(self):
        pass

    def close(self):
        pass


class JsonlWriter(ScalarWriter):
    """Appends one JSON object a logged step, `{"step": s, name: value, ...}`, and flushes it.

    Values are doubles with all their digits (a float32 comes back bit for bit); one that is not finite is written as NaN or
    Infinity, as Python's `json` reads it back. The file has each step once: opened by a run that continues from `start_step`,
    it drops the lines after that step (they will be computed again) and a last line that a kill cut short.

    An object of a store cannot be appended to. It is replaced as a whole: at most every `UPLOAD_SECONDS`, and by `flush`, which
    is to be called before a checkpoint is saved so that no line after it can be lost.

    Raises:
        UserError: the file cannot be written.
        ValueError: a step that is not after the last one.
    """

    def __init__(self, path: str | os.PathLike, start_step: int = 0):
        self.path = resolve_path(path)
        self._step = -1
        with self._written():
            lines = self._read()
            kept = self._kept(lines, start_step)
            self._lines = (_ReplacedLines if is_remote(self.path) else _AppendedLines)(self.path, kept, kept != lines)

    def _read(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_bytes().decode(errors="replace").splitlines(keepends=True)

    def _kept(self, lines: list[str], start_step: int) -> list[str]:
        """The lines to keep. Notes the last step of them."""
        kept = []
        for line in lines:
            try:
                step = json_files.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue
            if not number(step, whole=True):
                continue
            if line.endswith("\n") and self._step < step <= start_step:
                kept.append(line)
                self._step = step
        return kept

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and not is_remote(self.path):  # clients of object stores have errors of their own
                raise
            raise UserError(f"cannot write {self.path}: {getattr(error, 'strerror', None) or short_reason(error)}") from None

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if step <= self._step:
            raise ValueError(f"step {step} was already logged: the last one in {self.path} is {self._step}")
        values = {"step": int(step)} | {name: _number(value) for name, value in scalars.items()}
        with self._written():
            self._lines.write(json.dumps(values) + "\n")
        self._step = step

    def flush(self) -> None:
        with self._written():
            self._lines.flush()

    def close(self) -> None:
        with self._written():
            self._lines.close()


class _AppendedLines:
    """The lines of a local file, each in it as soon as it is written."""

    def __init__(self, path: epath.Path, lines: list[str], changed: bool):
        if changed:
            fresh = path.with_name(path.name + ".tmp")
            with fresh.open("w") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        self._file = path.open("a")

    def write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class _ReplacedLines:
    """The lines of an object, held here and uploaded all together."""

    def __init__(self, path: epath.Path, lines: list[str], changed: bool):
        self._path, self._lines, self._uploaded = path, lines, time.monotonic()
        if changed:
            self.flush()

    def write(self, line: str) -> None:
        self._lines.append(line)
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._path.write_text("".join(self._lines))
        self._uploaded = time.monotonic()

    def close(self) -> None:
        self.flush()


class ProgressWriter(ScalarWriter):
    """One line on the terminal a logged step: losses, learning rate, steps/s, examples/s, time left.

    `loss` comes first, other scalars follow in their order; the scalars named in `RATES` have columns of their own.
    """

    def __init__(self, steps: int):
        self._steps = steps

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        order = sorted((name for name in values if name not in RATES), key=lambda name: name != "loss")
        columns = [f"step {step:{len(str(self._steps))}d}/{self._steps}"]
        columns.append(" ".join(f"{name.removeprefix('loss_')} {values[name]:.4g}" for name in order))
        if "learning_rate" in values:
            columns.append(f"lr {values['learning_rate']:.2e}")
        rate = values.get("steps_per_second", 0.0)
        if rate > 0:
            columns.append(f"{rate:.3g} steps/s")
            if "examples_per_second" in values:
                columns.append(f"{values['examples_per_second']:.3g} examples/s")
            columns.append(f"{duration((self._steps - step) / rate)} left")
        log("  ".join(column for column in columns if column))


class Throughput:
    """Steps and examples a second since the last time it was asked.

    Args:
        step: the step that the clock starts at; start it after the compilation.
        batch_size: examples a step, over all devices.
    """

    def __init__(self, step: int, batch_size: int):
        self._step, self._batch_size, self._time = step, batch_size, time.perf_counter()

    def __call__(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return {"steps_per_second": rate, "examples_per_second": rate * self._batch_size}


def create_writer(
    workdir: str | os.PathLike, *, steps: int, start_step: int = 0, primary: bool = True, tensorboard: bool = True
) -> Any:
    """The writers of a training run as one CLU writer: terminal, `<workdir>/metrics.jsonl`, `<workdir>/tensorboard`.

    The first two write at once; TensorBoard is written by a thread of its own. On a process that is not the primary one nothing
    is written. `close()` it at the end.
    """
    metric_writers = clu_metric_writers()
    if not primary:
        return metric_writers.MultiWriter([])
    directory = resolve_path(workdir)
    writers: list[Any] = [JsonlWriter(directory / "metrics.jsonl", start_step), ProgressWriter(steps)]
    if tensorboard:
        writers.append(metric_writers.AsyncWriter(TensorBoardWriter(directory / "tensorboard")))
    return metric_writers.MultiWriter(writers)


def _number(value: Any) -> int | float:
    item = np.asarray(value).item()
    return item if isinstance(item, (bool, int)) else float(item)

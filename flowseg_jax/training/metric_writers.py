"""Where metrics go: the terminal, `metrics.jsonl`, TensorBoard and trackers, all through CLU's `MetricWriter`.

Names are grouped as TensorBoard groups them: `loss` and its parts `loss/...`, `accuracy/...`, `optimizer/...`, `eval/...`,
`speed/...`, `device/...`, `input/wait` and `goodput`.

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
from ml_collections import ConfigDict

from flowseg_jax.errors import UserError, short_reason
from flowseg_jax.experiment import to_json
from flowseg_jax.system import json_files
from flowseg_jax.system.console import duration, is_terminal, log, progress
from flowseg_jax.system.json_files import number
from flowseg_jax.system.paths import is_remote, resolve_path
from flowseg_jax.training.trackers import ScalarWriter, open_tracker

UPLOAD_SECONDS = 30.0  # between two uploads of a metrics.jsonl that is an object in a store
STEPS_PER_SECOND = "speed/steps_per_second"
# What the terminal shows of a validation, and of a step beside steps/s and the time left; `metrics.jsonl` has everything.
EVAL_COLUMNS = {"eval/ciou": "cIoU", "eval/giou": "gIoU", "eval/oracle_ciou": "oracle cIoU", "eval/selection_gap": "gap"}
COLUMNS = {
    "loss": "loss {:.4g}",
    "accuracy/referring_selection": "selection {:.2f}",
    "optimizer/learning_rate": "lr {:.2e}",
    STEPS_PER_SECOND: "{:.3g} steps/s",
}


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
            with fresh.open("w", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

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
        self._path.write_text("".join(self._lines), encoding="utf-8")
        self._uploaded = time.monotonic()

    def close(self) -> None:
        self.flush()


class ProgressWriter(ScalarWriter):
    """What a person sees of a run: a bar on a terminal, else one short line a logged step; and a line a validation.

    Args:
        steps: of the whole run.
        start: the step that it begins after.
    """

    def __init__(self, steps: int, start: int = 0):
        self._steps, self._stack, self._figures = steps, contextlib.ExitStack(), ""
        self._bar = self._stack.enter_context(progress("train", steps, "steps", done=start)) if is_terminal() else None

    def on_step(self, step: int) -> None:
        """A step was begun; moves the bar."""
        if self._bar is not None:
            self._bar.update(step, self._figures)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        shown = [form.format(float(scalars[name])) for name, form in COLUMNS.items() if name in scalars]
        if self._bar is not None:
            self._figures = "  ".join(shown)
            self._bar.update(step, self._figures)
        else:
            rate = float(scalars.get(STEPS_PER_SECOND, 0.0))
            left = [f"{duration((self._steps - step) / rate)} left"] if rate > 0 else []
            log("  ".join([f"step {step:{len(str(self._steps))}d}/{self._steps}", *shown, *left]))
        if evaluated := [f"{name} {float(scalars[key]):.2f}" for key, name in EVAL_COLUMNS.items() if key in scalars]:
            log(f"validation at step {step}: {', '.join(evaluated)}")

    def close(self) -> None:
        self._stack.close()


class Throughput:
    """Steps and examples a second since the last time it was asked, and what the time went into.

    `input/wait` is the time a step that the loop waited for its batch, in seconds; an accelerator may have computed meanwhile.
    `goodput` is the share of the time since the run was first started that was spent in steps which count: not in starting,
    compiling, validating or saving, nor in steps that were lost and done again, nor between two starts. None of these is in the
    steps a second.

    Args:
        step: the step that the clock starts at; start it after the compilation.
        batch_size: examples a step, over all devices.
        began: when the run was first started, by `time.perf_counter`; None: now.
        spent: seconds that the steps before this start took.
    """

    def __init__(self, step: int, batch_size: int, began: float | None = None, spent: float = 0.0):
        self._step, self._batch_size, self._time = step, batch_size, time.perf_counter()
        self._began = self._time if began is None else began
        self._lost, self._paused, self._input = self._time - self._began - spent, 0.0, 0.0  # in all; since it was last asked

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Time that the loop spends on something else than steps: "input", "validation", "checkpoint"."""
        before = time.perf_counter()
        yield
        spent = time.perf_counter() - before
        if what == "input":
            self._input += spent
        else:
            self._paused += spent

    def seconds_in_steps(self) -> float:
        """Of all starts together; what was paused counts only when it is over."""
        return time.perf_counter() - self._began - self._lost - self._paused

    def __call__(self, step: int) -> dict[str, float]:
        now, steps = time.perf_counter(), step - self._step
        rate = steps / max(now - self._time - self._paused, 1e-9)
        self._lost += self._paused
        found = {
            STEPS_PER_SECOND: rate,
            "speed/examples_per_second": rate * self._batch_size,
            "input/wait": self._input / max(steps, 1),
            "goodput": 1 - self._lost / max(now - self._began, 1e-9),
        }
        self._step, self._time, self._paused, self._input = step, now, 0.0, 0.0
        return found


def create_writer(
    workdir: str | os.PathLike,
    config: ConfigDict,
    *,
    progress: ScalarWriter,
    start_step: int = 0,
    primary: bool = True,
    tensorboard: bool = True,
) -> Any:
    """The writers of a training run as one CLU writer: `metrics.jsonl`, the terminal, `tensorboard/`, the config's trackers.

    The first two write at once; the others are written by threads of their own. On a process that is not the primary one
    nothing is written. `close()` it at the end.

    Args:
        workdir: the run's.
        config: the run's; TensorBoard shows it as text, trackers keep it with the run.
        progress: the writer for the terminal.
        start_step: the step that the run continues from.
    """
    metric_writers = clu_metric_writers()
    if not primary:
        return metric_writers.MultiWriter([])
    directory = resolve_path(workdir)
    writers: list[Any] = [JsonlWriter(directory / "metrics.jsonl", start_step), progress]
    if tensorboard:
        board = TensorBoardWriter(directory / "tensorboard")
        board.write_texts(start_step, {"config": f"```json\n{to_json(config)}\n```"})
        writers.append(metric_writers.AsyncWriter(board))
        log(f"watch it: tensorboard --logdir={directory / 'tensorboard'}")
    for name in config.trackers:
        writers.append(metric_writers.AsyncWriter(open_tracker(name, directory, config)))
    return metric_writers.MultiWriter(writers)


def _number(value: Any) -> int | float:
    item = np.asarray(value).item()
    return item if isinstance(item, (bool, int)) else float(item)

"""`--profile=START:STEPS`: `jax.profiler` watches a few steps of a run and writes what it saw into `<workdir>/profile`."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax

from flowseg_jax.errors import UserError
from flowseg_jax.system.console import log


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which steps are traced: `start + 1` to `start + steps`, so the first is never the one that compiles and warms up."""

    start: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Reads `START:STEPS`. Raises a UserError for anything else."""
        match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
        if match is None or int(match[2]) == 0:
            raise UserError(f"--profile={text}: give START:STEPS, for instance 10:5 to trace steps 11 to 15")
        return cls(int(match[1]), int(match[2]))

    @property
    def last(self) -> int:
        return self.start + self.steps

    def __contains__(self, step: int) -> bool:
        return self.start < step <= self.last


class Profiler:
    """Traces the steps of a profile; without one every method does nothing.

    The trace is `<directory>/plugins/profile/steps_FIRST-LAST/`, where XProf and TensorBoard look for it. Only the first
    process writes one: all run the same program, and several on one host would overwrite each other's files.

    Python functions are not traced: a frame for each call of the data pipeline slows the steps down and fills the trace. A
    trace that cannot be written does not end the run.

    Args:
        profile: the steps, or None.
        directory: where to; local or `gs://`.
    """

    def __init__(self, profile: Profile | None, directory: str | os.PathLike):
        self._profile = profile if jax.process_index() == 0 else None
        self._directory = os.fspath(directory)
        self._annotation: jax.profiler.StepTraceAnnotation | None = None  # of the step that is being traced
        self._traced = 0

    def on_step_start(self, step: int) -> None:
        """To be called before anything of step `step` (counted from 1) is done."""
        if self._profile is None or step not in self._profile:
            return
        if not self._traced:
            self._start()
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()
        self._traced += 1

    def on_step_end(self, step: int, result: Any) -> None:
        """To be called when the host is done with step `step`; `result` are arrays that the step puts out and nobody donates.

        They are waited for where the trace begins and where it ends, so that it holds its steps whole and no others.
        """
        if self._profile is None:
            return
        if step == self._profile.start:
            jax.block_until_ready(result)
        self._end_step()
        if step == self._profile.last and self._traced:
            jax.block_until_ready(result)
            self._stop()

    def close(self) -> None:
        """Writes the trace of a run that ended early; says so where no step was traced at all."""
        if self._profile is None:
            return
        self._end_step()
        if self._traced:
            self._stop()
        else:
            log(f"--profile: this run had none of the steps {self._profile.start + 1} to {self._profile.last}")
            self._profile = None

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        options.session_id = f"steps_{self._profile.start + 1}-{self._profile.last}"
        local = "://" not in self._directory
        jax.profiler.start_trace(self._directory, create_perfetto_trace=local, profiler_options=options)

    def _end_step(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None

    def _stop(self) -> None:
        try:
            jax.profiler.stop_trace()
            log(f"the profile of {self._traced} step(s) is in {self._directory}: xprof --logdir {self._directory}")
        except (jax.errors.JaxRuntimeError, OSError) as error:
            log(f"the profile could not be written to {self._directory}: {str(error).splitlines()[0]}")
        self._profile = None

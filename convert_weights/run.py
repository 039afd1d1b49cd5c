"""A conversion with everything that it reports: what the command line calls."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from pathlib import Path

from convert_weights import job as jobs
from convert_weights.export import export_directory
from convert_weights.families import CheckpointFamily
from convert_weights.job import ConversionRequest
from convert_weights.plan import ConversionPlan, ParamTarget, collapse_layer_names
from flowseg_jax.system import host
from flowseg_jax.system.console import duration, heartbeat, log


def convert(request: ConversionRequest, *, check: bool = False) -> None:
    """Converts what `request` names, reports every array, and what it took.

    Args:
        request: what to convert, and where to.
        check: do everything but write.

    Raises:
        UserError: see `job.open_conversion`.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        with heartbeat(f"opening {_sources(request)}"):
            job = stack.enter_context(jobs.open_conversion(request))
        for note in job.source.notes:
            log(f"note: {note}")
        before = host.peak_memory()  # with libraries and tokenizer
        targets = {target.name: target for target in job.plan.targets}
        beat, number = stack.enter_context(heartbeat("reading the first array")), itertools.count(1)

        def progress(name: str) -> None:
            done = next(number)
            log(f"{done:{len(str(len(targets)))}}/{len(targets)} {_line(targets[name])}")
            beat.message = f"{done} of {len(targets)} arrays, {duration(time.monotonic() - started)} so far"

        (jobs.check if check else jobs.write)(job, request, progress)
        _summary(job.plan)
    seconds = time.monotonic() - started
    values = sum(math.prod(target.shape) for target in targets.values())
    largest = max(math.prod(target.shape) * target.dtype.itemsize for target in targets.values())
    log(
        f"{'checked' if check else request.out}: {len(targets)} arrays, {values:,} values in {seconds:.0f} s; "
        f"peak memory {host.peak_memory() >> 20} MiB ({before >> 20} before, largest array {largest >> 20})"
    )


def export(
    family: CheckpointFamily, source: str | Path, out: str | Path, *, layout: str | None, dtype: str | None, overwrite: bool
) -> None:
    """Writes a model directory as safetensors under a family's names, and reports it: see `export.export_directory`."""
    with heartbeat(f"exporting {source}"):
        path = export_directory(family, source, out, layout=layout, dtype=dtype, overwrite=overwrite, progress=log)
    log(f"{path}: peak memory {host.peak_memory() >> 20} MiB")


def _sources(request: ConversionRequest) -> str:
    source = request.source
    return ", ".join(map(str, source.values())) if isinstance(source, dict) else str(source)


def _line(target: ParamTarget) -> str:
    """`llm/layers/self_attn/q_proj/kernel (36, 2560, 4096) bfloat16 <- llm.model.layers.{0-35}.self_attn.q_proj.weight`."""
    names = [name for _, name, _ in collapse_layer_names(("", part.source, ()) for part in target.slices)]
    return f"{target.name} {target.shape} {target.dtype} <- {', '.join(names) or 'fresh'}"


def _summary(plan: ConversionPlan) -> None:
    for name, (found, rows) in plan.resized.items():
        log(f"resized {name}: {found} rows in the checkpoint, {rows} here")
    if plan.fresh:
        # Each has its own line above; here is what they belong to.
        parts = dict.fromkeys(name.rpartition("/")[0] or name for name in plan.fresh)
        tops = dict.fromkeys("/".join(part.split("/")[:3]) for part in parts)
        log(f"fresh, not in the checkpoint: {len(plan.fresh)} parameters of {', '.join(tops)}")
    if plan.ignored:
        log(f"not used: {len(plan.ignored)} tensors that are known to be of no use here")

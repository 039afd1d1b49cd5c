"""The command line: python -m convert_weights FAMILY SOURCE OUT."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from convert_weights import job as jobs
from convert_weights.convert import get_family
from convert_weights.families import FAMILIES
from convert_weights.plan import ConversionPlan, ParamTarget
from flowseg_jax.cli import Parser
from flowseg_jax.errors import UserError
from flowseg_jax.system import host
from flowseg_jax.system.console import log

USAGE = """%(prog)s FAMILY SOURCE OUT [options]
       %(prog)s flowseg llm=DIR siglip=DIR sam=DIR [segmentor=FILE] OUT [options]
       %(prog)s FAMILY MODEL_DIRECTORY OUT --export"""
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m convert_weights",
        usage=USAGE,
        description="Converts PyTorch checkpoints to model directories and back, strictly and one array at a time.",
    )
    parser.add_argument("family", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("paths", nargs="+", metavar="SOURCE OUT", help="file, directory or hub name; the directory to write")
    parser.add_argument("--check", action="store_true", help="do everything but write; OUT may be left out")
    parser.add_argument(
        "--export", action="store_true", help="the other way: SOURCE is a model directory, OUT gets safetensors"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="the language model's tokenizer, default: beside its weights")
    parser.add_argument("--config", metavar="FILE", help="the config.json, default: beside the weights")
    parser.add_argument("--llm", metavar="NAME", help="of xsam: qwen3_4b, qwen3_1b7, phi3_mini or a directory with config.json")
    parser.add_argument("--siglip", metavar="NAME", help="of xsam: so400m_14_384 or a directory with config.json")
    parser.add_argument("--mode", choices=("off", "sr", "sr_cr"), help="semantic flow of a whole model (xsam: off)")
    parser.add_argument("--chat", metavar="NAME", help="chat template, default: the language model's")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a value of the config: decoder.heads=4"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="what parameters are stored as, default: as they are")
    parser.add_argument("--layout", metavar="NAME", help="of --export: hf; X-SAM: main or aaai; SAM: also meta")
    parser.add_argument("--seed", type=int, default=0, help="of parameters that the checkpoint does not have")
    parser.add_argument(
        "--mesh", metavar="AXES", help="store for a mesh such as fsdp=8,tensor=2: each device then reads its own part only"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    a = parser.parse_args(argv)
    family = get_family(a.family)
    if a.export:
        return _export(family, a)
    if a.layout:
        raise UserError("--layout chooses the names of an export: give --export too (an import recognises them)")
    source, out = _paths(a)
    request = jobs.ConversionRequest(
        a.family,
        source,
        out,
        a.tokenizer,
        a.config,
        a.llm,
        a.siglip,
        a.mode,
        a.chat,
        a.set,
        a.dtype,
        a.seed,
        a.overwrite,
        _mesh(a.mesh),
    )
    started = time.monotonic()
    with jobs.open_conversion(request) as job:
        for note in job.source.notes:
            log(f"note: {note}")
        before = host.peak_memory()  # with libraries and tokenizer
        targets = {target.name: target for target in job.plan.targets}
        progress = lambda name: log(_line(targets[name]))  # noqa: E731
        if a.check:
            jobs.check(job, request, progress)
        else:
            jobs.write(job, request, progress)
        _summary(job.plan)
    values = sum(math.prod(target.shape) for target in targets.values())
    largest = max(math.prod(target.shape) * target.dtype.itemsize for target in targets.values())
    log(
        f"{'checked' if a.check else out}: {len(targets)} arrays, {values:,} values in {time.monotonic() - started:.0f} s; "
        f"peak memory {host.peak_memory() >> 20} MiB ({before >> 20} before, largest array {largest >> 20})"
    )
    return 0


def _export(family, a) -> int:
    from convert_weights.export import export_directory

    if len(a.paths) != 2 or a.check:
        raise UserError("--export takes one model directory and OUT")
    path = export_directory(family, *a.paths, layout=a.layout, dtype=a.dtype, overwrite=a.overwrite, progress=log)
    log(f"{path}: peak memory {host.peak_memory() >> 20} MiB")
    return 0


def _paths(a) -> tuple[str | dict[str, str], str | None]:
    """SOURCE, or the parts of flowseg, and OUT."""
    parts = [path for path in a.paths if "=" in path and not path.startswith(("/", "."))] if a.family == "flowseg" else []
    rest = [path for path in a.paths if path not in parts]
    source = dict(part.split("=", 1) for part in parts) if parts else rest.pop(0)
    if len(parts) != len(source) and parts:
        raise UserError("flowseg: a part is given twice")
    if len(rest) > 1 or (not rest and not a.check):
        raise UserError(f"{a.family}: expected one SOURCE and one OUT, got {' '.join(a.paths)}")
    return source, None if a.check else rest[0]


def _mesh(text: str | None) -> dict[str, int] | None:
    """{"fsdp": 8} for "fsdp=8"."""
    if text is None:
        return None
    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if bad := [f"{axis}={size}" for axis, size in sizes.items() if not size.isdecimal()]:
        raise UserError(f"--mesh takes axes and their sizes, fsdp=8,tensor=2; got {bad[0]!r}")
    return {axis: int(size) for axis, size in sizes.items()}


def _line(target: ParamTarget) -> str:
    """`llm/layers/q/kernel (36, 2560, 4096) bfloat16 <- llm.model.layers.{0-35}.self_attn.q_proj.weight`."""
    from convert_weights.plan import collapse_layer_names

    names = [name for _, name, _ in collapse_layer_names(("", piece.source, ()) for piece in target.pieces)]
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

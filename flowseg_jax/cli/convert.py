"""`flowseg convert FAMILY SOURCE OUT`: PyTorch checkpoints to model directories and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flowseg_jax.cli.parser import Parser, mesh_sizes
from flowseg_jax.errors import UserError

USAGE = """%(prog)s FAMILY SOURCE OUT [options]
       %(prog)s flowseg llm=DIR siglip=DIR sam=DIR [segmentor=FILE] OUT [options]
       %(prog)s FAMILY MODEL_DIRECTORY OUT --export"""
FAMILIES = "qwen3, phi3, llama, siglip2, sam, mask2former, xsam_stage1, xsam, flowseg"
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="flowseg convert",
        usage=USAGE,
        description="Converts PyTorch checkpoints to model directories and back, strictly and one array at a time.",
    )
    parser.add_argument("family", metavar="FAMILY", help=FAMILIES)
    parser.add_argument("paths", nargs="+", metavar="SOURCE OUT", help="file, directory or hub name; the directory to write")
    parser.add_argument("--check", action="store_true", help="do everything but write; OUT may be left out")
    parser.add_argument(
        "--export", action="store_true", help="the other way: SOURCE is a model directory, OUT gets safetensors"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="the language model's tokenizer, default: beside its weights")
    parser.add_argument("--config", metavar="FILE", help="the config.json, default: beside the weights")
    parser.add_argument("--llm", metavar="NAME", help="of xsam: a preset such as qwen3_4b, or a directory with config.json")
    parser.add_argument("--siglip", metavar="NAME", help="of xsam: so400m_14_384 or a directory with config.json")
    parser.add_argument("--mode", choices=("off", "sr", "sr_cr"), help="semantic flow of a whole model (xsam: off)")
    parser.add_argument("--chat", metavar="NAME", help="chat template, default: the language model's")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a value of the config: mask_decoder.num_heads=4"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="what parameters are stored as, default: as they are")
    parser.add_argument("--layout", metavar="NAME", help="of --export: hf; X-SAM: main or aaai; SAM: also meta")
    parser.add_argument("--seed", type=int, default=0, help="of parameters that the checkpoint does not have, default 0")
    only = "store for a mesh such as fsdp=8,tensor=2: each device then reads its own part only"
    parser.add_argument("--mesh", metavar="AXES", type=mesh_sizes, help=only)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    a = parser.parse_args(argv)
    from convert_weights import run
    from convert_weights.convert import get_family

    family = get_family(a.family)
    if a.export:
        if len(a.paths) != 2 or a.check:
            raise UserError("--export takes one model directory and OUT")
        run.export(family, *a.paths, layout=a.layout, dtype=a.dtype, overwrite=a.overwrite)
        return 0
    if a.layout:
        raise UserError("--layout chooses the names of an export: give --export too (an import recognises them)")
    source, out = _paths(a)
    names = ("tokenizer", "config", "llm", "siglip", "mode", "chat", "dtype", "seed", "mesh", "overwrite")
    options = {name: getattr(a, name) for name in names}
    run.convert(run.ConversionRequest(a.family, source, out, settings=a.set, **options), check=a.check)
    return 0


def _paths(a: argparse.Namespace) -> tuple[str | dict[str, str], str | None]:
    """SOURCE, or the components of flowseg, and OUT."""
    parts = [path for path in a.paths if "=" in path and not path.startswith(("/", "."))] if a.family == "flowseg" else []
    rest = [path for path in a.paths if path not in parts]
    source = dict(part.split("=", 1) for part in parts) if parts else rest.pop(0)
    if len(parts) != len(source) and parts:
        raise UserError("flowseg: a component is given twice")
    if len(rest) > 1 or (not rest and not a.check):
        raise UserError(f"{a.family}: expected one SOURCE and one OUT, got {' '.join(a.paths)}")
    return source, None if a.check else rest[0]

"""`flowseg export`: a model as programs that run without this package, or as directories that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence

from flowseg_jax.cli.parser import Parser, add_model_flags
from flowseg_jax.errors import UserError

BATCH, PHRASES, TEXT, PLATFORMS = 1, 8, 256, "cpu,tpu,cuda"  # as in `inference.export`, which imports JAX
FORMATS = ("jax", "hf")
ONLY_JAX, ONLY_HF = ("batch", "phrases", "text", "platforms"), ("dtype", "push_to_hub")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="flowseg export", description="Exports a model. See docs/export.md.")
    add_model_flags(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the directory to make")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="jax: programs that run without this package; hf: X-SAM's layout, and what transformers loads",
    )
    parser.add_argument("--batch", type=int, metavar="B", help=f"images at a time, default {BATCH}")
    parser.add_argument("--phrases", type=int, metavar="K", help=f"expressions per image, default {PHRASES}")
    parser.add_argument("--text", type=int, metavar="T", help=f"token ids per image, default {TEXT}")
    parser.add_argument("--platforms", metavar="LIST", help=f"default {PLATFORMS}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of hf, default: as it is stored")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="of hf: upload the directory")
    arguments = parser.parse_args(argv)
    for flag in ONLY_HF if arguments.format == "jax" else ONLY_JAX:
        if getattr(arguments, flag) is not None:
            other = "hf" if arguments.format == "jax" else "jax"
            raise UserError(f"--{flag.replace('_', '-')} belongs to --format={other}, not to --format={arguments.format}")
    from flowseg_jax.checkpoints.find import find_model
    from flowseg_jax.system.console import heartbeat, log

    directory = find_model(arguments.checkpoint, arguments.workdir)
    if arguments.format == "hf":
        from convert_weights.export import export_for_huggingface
        from flowseg_jax.checkpoints.hub import upload_export

        with heartbeat(f"exporting {directory}"):
            path = export_for_huggingface(directory, arguments.out, arguments.dtype)
        log(str(path))
        if arguments.push_to_hub:
            log(upload_export(path, directory, arguments.push_to_hub))
        return 0
    from flowseg_jax.inference import export

    sizes = (arguments.batch, arguments.phrases, arguments.text)
    shapes = export.ExportShapes(
        *(default if size is None else size for size, default in zip(sizes, (BATCH, PHRASES, TEXT), strict=True))
    )
    log(str(export.export(directory, arguments.out, shapes, (arguments.platforms or PLATFORMS).split(","))))
    return 0

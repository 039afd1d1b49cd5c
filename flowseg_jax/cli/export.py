"""`flowseg export`: a model as `jax.export` programs, which run where JAX is, without this package."""

from __future__ import annotations

from collections.abc import Sequence

from flowseg_jax.cli.parser import Parser, add_model_flags

BATCH, PHRASES, TEXT, PLATFORMS = 1, 8, 256, "cpu,tpu,cuda"  # as in `inference.export`, which imports JAX


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="flowseg export", description="Exports a model as programs that run without this package.")
    add_model_flags(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the directory to make")
    parser.add_argument("--batch", type=int, default=BATCH, metavar="B", help="images at a time, default %(default)s")
    parser.add_argument("--phrases", type=int, default=PHRASES, metavar="K", help="expressions per image, default %(default)s")
    parser.add_argument("--text", type=int, default=TEXT, metavar="T", help="token ids per image, default %(default)s")
    parser.add_argument("--platforms", default=PLATFORMS, metavar="LIST", help="default %(default)s")
    arguments = parser.parse_args(argv)
    from flowseg_jax.checkpoints.find import find_model
    from flowseg_jax.inference import export
    from flowseg_jax.system.console import log

    shapes = export.ExportShapes(arguments.batch, arguments.phrases, arguments.text)
    directory = find_model(arguments.checkpoint, arguments.workdir)
    log(str(export.export(directory, arguments.out, shapes, arguments.platforms.split(","))))
    return 0

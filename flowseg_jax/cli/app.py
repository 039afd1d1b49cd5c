"""`flowseg app`: the page, a model in the browser."""

from __future__ import annotations

from collections.abc import Sequence

from flowseg_jax.cli.parser import Parser, add_model_flags


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="flowseg app", description="Starts the page: a model in the browser (needs the extra `app`).")
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860; 0: any free one")
    arguments = parser.parse_args(argv)
    from flowseg_jax.app import page
    from flowseg_jax.checkpoints.find import SHIPPED_MODEL, find_model
    from flowseg_jax.inference import loading
    from flowseg_jax.system import host
    from flowseg_jax.system.console import heartbeat, log
    from flowseg_jax.system.paths import ROOT

    host.enable_compilation_cache()
    directory = find_model(arguments.checkpoint, arguments.workdir)
    with heartbeat("loading"):
        model = loading.load(directory)
    shipped = directory == SHIPPED_MODEL
    about = model.card.lines() or [f"The model of {directory}."]
    blocks = page.build(model, page.scenes(ROOT / "examples" / "scenes"), None if shipped else str(directory), about)
    log(f"the page is on http://{arguments.host}:{arguments.port}/ (Ctrl-C ends it)")
    page.serve(blocks, arguments.host, arguments.port)
    return 0

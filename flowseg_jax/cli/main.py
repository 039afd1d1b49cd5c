"""`flowseg COMMAND`, the same as `python -m flowseg_jax COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flowseg_jax.cli.parser import Command, run_command
from flowseg_jax.errors import run_cli

COMMANDS = {
    "train": Command("flowseg_jax.cli.train:main", "train a model; the same command resumes"),
    "eval": Command("flowseg_jax.cli.eval:main", "evaluate a model on prepared data sets"),
    "predict": Command("flowseg_jax.cli.predict:main", "segment what sentences name in images"),
    "app": Command("flowseg_jax.cli.app:main", "a page to try a model in the browser"),
    "plan": Command("flowseg_jax.cli.plan:main", "memory, FLOPs and collectives of a training run, without its hardware"),
    "data": Command("flowseg_jax.cli.data:main", "prepare, validate, preview and generate data sets"),
    "convert": Command("flowseg_jax.cli.convert:main", "PyTorch checkpoints to model directories and back"),
    "adapters": Command("flowseg_jax.cli.adapters:main", "LoRA adapters: merge them into their base, PEFT's format in and out"),
    "analyze": Command("flowseg_jax.cli.analyze:main", "where a model loses: from results, or by running it"),
    "report": Command("flowseg_jax.cli.report:main", "an HTML page of evaluations: verdict, pictures, learning curve, tables"),
    "export": Command("flowseg_jax.cli.export:main", "a model as programs that run without this package"),
    "parity": Command("flowseg_jax.cli.parity:main", "compare our numbers with recorded numbers of PyTorch"),
    "seal": Command("flowseg_jax.cli.model_directory:seal", "accept the edited config.json and tokenizer of a model directory"),
    "upgrade": Command("flowseg_jax.cli.model_directory:upgrade", "write a model directory of an earlier version anew"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version"]:
        from flowseg_jax import __version__

        print(f"flowseg-jax {__version__}")
        return 0
    about = "FlowSeg: language-conditioned segmentation in JAX. `flowseg --version` prints the version."
    return run_command("flowseg", about, COMMANDS, argv)


def console_script() -> None:
    """What the installed command `flowseg` calls."""
    run_cli("flowseg_jax.cli.main:main")

"""`flowseg seal` and `flowseg upgrade`: model directories that were edited, and those of earlier versions."""

from __future__ import annotations

from collections.abc import Sequence

from flowseg_jax.cli.parser import Parser


def seal(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="flowseg seal",
        description="Accepts config.json and the tokenizer of a model directory as they are now: renews their checksums.",
    )
    parser.add_argument("directory", metavar="DIR", help="the model directory")
    arguments = parser.parse_args(argv)
    from flowseg_jax.checkpoints.pretrained import seal

    print(f"{seal(arguments.directory)}: config.json and tokenizer are accepted as they are")
    return 0


def upgrade(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="flowseg upgrade", description="Writes a model directory of an earlier version anew, in today's format and names."
    )
    parser.add_argument("old", metavar="OLD", help="the model directory of an earlier version")
    parser.add_argument("new", metavar="NEW", help="the directory to make")
    arguments = parser.parse_args(argv)
    from flowseg_jax.checkpoints.pretrained import FORMAT_VERSION
    from flowseg_jax.checkpoints.upgrade import upgrade

    print(f"{upgrade(arguments.old, arguments.new)}: the model of {arguments.old} in format {FORMAT_VERSION}")
    return 0

"""`python -m flowseg_jax.data COMMAND`: everything that is done to data before training."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowseg_jax import errors
from flowseg_jax.data.shapes import cli as shapes


def _prepare(args: argparse.Namespace) -> int:
    from flowseg_jax.data import builders

    builders.prepare(
        args.source,
        args.out,
        layout=args.layout,
        split_by=args.split_by,
        images=args.images,
        splits=args.splits,
        tokenizer_vocab=args.tokenizer_vocab,
    )
    return 0


def _tokenizer(args: argparse.Namespace) -> int:
    from flowseg_jax.data import tokenizer

    print(f"{args.out}: {tokenizer.extend_tokenizer(args.source, args.out)} ids")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flowseg_jax.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shapes.add_parser(commands)

    prepare = commands.add_parser("prepare", help="turn an on-disk layout into a data set that training reads")
    prepare.add_argument("--source", type=Path, required=True, help="root of the layout (the folder with instances.json)")
    prepare.add_argument("--out", type=Path, required=True, help="directory to create")
    prepare.add_argument("--layout", default="refcoco", help="what the source looks like (default: refcoco)")
    prepare.add_argument("--split-by", help="which refs(<split_by>).p, e.g. unc, google, umd")
    prepare.add_argument("--images", type=Path, help="folder of the images (default: the usual places)")
    prepare.add_argument("--splits", nargs="+", help="only these splits")
    prepare.add_argument("--tokenizer-vocab", type=int, help="train a byte-level BPE tokenizer of this many ids, e.g. 512")
    prepare.set_defaults(run=_prepare)

    tokenizer = commands.add_parser("tokenizer", help="add <SEG>, <p> and </p> to a language model's tokenizer")
    tokenizer.add_argument("--source", type=Path, required=True, help="tokenizer directory of the language model")
    tokenizer.add_argument("--out", type=Path, required=True, help="directory to write")
    tokenizer.set_defaults(run=_tokenizer)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    args = _parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    errors.run(main)

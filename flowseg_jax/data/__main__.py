"""`python -m flowseg_jax.data COMMAND`: everything that is done to data before training."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that a Ctrl-C while they last is as clean as later
    from flowseg_jax.errors import run_cli

    run_cli("flowseg_jax.data.__main__:main")

import argparse
from pathlib import Path

from flowseg_jax import errors
from flowseg_jax.data import checks
from flowseg_jax.data.formats import LAYOUTS
from flowseg_jax.synthetic import cli as shapes


def _prepare(args: argparse.Namespace) -> int:
    from flowseg_jax.data import prepare as builders

    builders.prepare(
        args.source,
        args.out,
        layout=args.layout,
        **_options(args),
        splits=args.splits,
        tokenizer_vocab=args.tokenizer_vocab,
        on_error=args.on_error,
        processes=args.processes,
    )
    return 0


def _options(args: argparse.Namespace) -> dict[str, object]:
    """What only some layouts have; None where it is not given."""
    return {"split_by": args.split_by, "images": args.images, "file": args.file, "max_characters": args.max_characters}


def _tokenizer(args: argparse.Namespace) -> int:
    from flowseg_jax.data import tokenizer

    print(f"{args.out}: {tokenizer.extend_tokenizer(args.source, args.out)} ids")
    return 0


def _validate(args: argparse.Namespace) -> int:
    import json
    import sys

    from flowseg_jax.data import validate

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def opened(name: str, root: str | Path, **options: object) -> validate.Opened:
        log(f"{root}: opening as {name}")
        return validate.open_set(name, root, **options)

    others = [item.partition("=") for item in args.others]
    for name, _, root in others:
        if not (name and root):
            raise errors.UserError(f"--with takes LAYOUT=DIR, got {name or root!r}")
    sets = [opened(args.layout, args.source, splits=args.splits, **_options(args))]
    sets += [opened(name, root) for name, _, root in others]
    report = validate.validate(sets, args.quick, log)
    print(validate.render(report))
    if args.json:
        try:
            args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise errors.UserError(f"cannot write {args.json}: {error.strerror}; choose another place for --json") from error
    return 0 if report.ok else 1


def _preview(args: argparse.Namespace) -> int:
    from flowseg_jax.data import formats, preview, records

    problems = records.RecordErrors(keep=True)
    layout = formats.open_layout(args.layout, args.source, problems, **_options(args))
    splits = layout.splits if args.split is None else (args.split,)
    path = preview.preview(layout, args.out, splits, problems, samples=args.samples, seed=args.seed)
    print(f"{path}{records.damaged(problems.found)}")
    return 1 if problems.found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flowseg_jax.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shapes.add_parser(commands)

    prepare = commands.add_parser("prepare", help="turn an on-disk layout into a data set that training reads")
    prepare.add_argument("--source", type=Path, required=True, help="root of the layout (or the .jsonl file)")
    prepare.add_argument("--out", type=Path, required=True, help="directory to create")
    known = ", ".join(LAYOUTS)
    prepare.add_argument("--layout", default="refcoco", help=f"what the source looks like (default: refcoco): {known}")
    _add_options(prepare)
    prepare.add_argument("--splits", nargs="+", help="only these splits")
    prepare.add_argument("--on-error", default="stop", help="stop at a damaged record, or record: list them and go on")
    prepare.add_argument("--processes", type=int, help="that read and write (default: the number of cores)")
    prepare.add_argument("--tokenizer-vocab", type=int, help="train a byte-level BPE tokenizer of this many ids, e.g. 512")
    prepare.set_defaults(run=_prepare)

    tokenizer = commands.add_parser("tokenizer", help="add <SEG>, <p> and </p> to a language model's tokenizer")
    tokenizer.add_argument("--source", type=Path, required=True, help="tokenizer directory of the language model")
    tokenizer.add_argument("--out", type=Path, required=True, help="directory to write")
    tokenizer.set_defaults(run=_tokenizer)

    validate = commands.add_parser("validate", help="read a data set: what is broken, incomplete or leaks into evaluation")
    _add_source(validate)
    validate.add_argument("--splits", nargs="+", help="only these splits")
    validate.add_argument("--quick", action="store_true", help="only look whether the image files exist")
    validate.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        metavar="LAYOUT=DIR",
        help="more sets; leakage is looked for between all",
    )
    validate.add_argument("--json", type=Path, metavar="FILE", help="write the whole report here too")
    validate.set_defaults(run=_validate)

    preview = commands.add_parser("preview", help="an HTML page of samples of a data set")
    _add_source(preview)
    preview.add_argument("--out", type=Path, required=True, help="directory to create")
    preview.add_argument("--split", help="only this split (default: all)")
    preview.add_argument("--samples", type=int, default=12, help="of each split (default: 12)")
    preview.add_argument("--seed", type=int, default=0, help="which samples are drawn")
    preview.set_defaults(run=_preview)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layout", metavar="LAYOUT", help="what it looks like, e.g. refcoco, reasonseg, coco-panoptic")
    parser.add_argument("source", metavar="DIR", type=Path, help="its root")
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split-by", help="which refs(<split_by>).p, e.g. unc, google, umd")
    parser.add_argument("--images", type=Path, help="folder of the images (default: the usual places)")
    parser.add_argument("--file", help="which JSON of chats, where a llava folder holds several")
    longest = f"that an expression, a question or an explanation may have (default: {checks.MAX_CHARACTERS})"
    parser.add_argument("--max-characters", type=int, help=longest)


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    args = _parser().parse_args(argv)
    return args.run(args)

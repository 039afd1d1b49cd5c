"""`python -m flowseg_jax.evaluation COMMAND`: what results files say."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that a Ctrl-C while they last is as clean as later
    from flowseg_jax.errors import run_cli

    run_cli("flowseg_jax.evaluation.__main__:main")

import argparse
import json

from flowseg_jax import errors
from flowseg_jax.evaluation import audit, panoptic, protocols


def _audit(args: argparse.Namespace) -> int:
    records = audit.read_lines(args.file)
    if audit.on_categories(records):
        if args.no_target_below is not None:
            raise errors.UserError(f"{args.file}: results on categories, without expressions: leave --no-target-below out")
        found = audit.category_tables(args.file, records)
        print(json.dumps(found, indent=1) if args.json else "\n".join(panoptic.in_words(found)))
        return 0
    records = audit.samples(args.file, records)
    if args.no_target_below is not None:
        records = [record | {"no_target_below": args.no_target_below} for record in records]
    found = audit.tables(records)
    print(json.dumps(found, indent=1) if args.json else audit.render(found))
    return 0


def _compare(args: argparse.Namespace) -> int:
    first, second = (audit.read_records(path) for path in (args.first, args.second))
    for name, difference in audit.compare(first, second, protocols.get_protocol(args.protocol)).items():
        print(f"{name}: {difference}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m flowseg_jax.evaluation", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("audit", help="recompute the tables of all protocols from the samples of a .jsonl")
    one.add_argument("file", metavar="FILE", help="<split>.jsonl of an evaluation")
    one.add_argument("--json", action="store_true", help="print JSON")
    one.add_argument(
        "--no-target-below", type=float, metavar="SCORE", help='another threshold for "no target" than the evaluation\'s'
    )
    one.set_defaults(run=_audit)
    two = commands.add_parser("compare", help="two models on the same samples, with bootstrap intervals by image")
    two.add_argument("first", metavar="A")
    two.add_argument("second", metavar="B")
    two.add_argument("--protocol", default="xsam", help=f"one of {', '.join(protocols.PROTOCOLS)} (default: xsam)")
    two.set_defaults(run=_compare)
    args = parser.parse_args(argv)
    return args.run(args)

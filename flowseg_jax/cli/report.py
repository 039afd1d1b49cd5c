"""`flowseg report`: writes the report of results that are there, again or anew, without running a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowseg_jax.cli.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="flowseg report", description="Writes report.html of one evaluation or several, with their pictures and diagnoses."
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="results of `flowseg eval`; the last is judged")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the last DIR")
    parser.add_argument("--run", metavar="DIR", type=Path, help="the training run of the learning curve, default: above DIR")
    parser.add_argument("--title", metavar="TEXT", help="heading, default: the model's name")
    parser.add_argument("--self-contained", action="store_true", help="a single file: pictures are put into the page")
    arguments = parser.parse_args(argv)
    from flowseg_jax.evaluation import report
    from flowseg_jax.system.console import log

    rows = [row for folder in arguments.folders for row in report.read_rows(folder)]
    last = arguments.folders[-1]
    path = report.write(
        arguments.out or last / "report.html",
        rows,
        title=arguments.title or f"FlowSeg: {rows[-1].label.removesuffix(', shuffled text')}",
        run=arguments.run or last.parent,
        self_contained=arguments.self_contained,
    )
    log(f"{report.table(rows)}\n{path}")
    return 0

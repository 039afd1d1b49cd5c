"""`flowseg parity DIR`: are our numbers those of the PyTorch code?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from flowseg_jax.cli.parser import Parser
from flowseg_jax.errors import UserError

ABOUT = """Compares the arrays of a recorded fixture with what this package computes.

DIR is a recorded fixture (its format: tests/golden/xsam/README.md). The model that its config.json describes is built, gets the
fixture's weights through the public converter, and runs in float32 on the CPU. Exit code 1 if any array is over its limit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, writes the JSON, returns the exit code."""
    parser = Parser(prog="flowseg parity", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", help="directory of the fixture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    arguments = parser.parse_args(argv)
    import jax

    jax.config.update("jax_platforms", "cpu")  # before JAX looks for accelerators
    from convert_weights.parity.compare import compare

    with jax.default_matmul_precision("float32"):
        report = compare(arguments.directory)
    print(report.text())
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{arguments.json}: cannot be written ({error.strerror})") from None
    return 0 if report.ok else 1

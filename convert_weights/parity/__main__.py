"""`python -m convert_weights.parity DIR`: are our numbers those of the PyTorch code?

DIR is a recorded fixture (its format: tests/golden/xsam/README.md). The model that its config.json describes is built, gets the
fixture's weights through the public converter, and runs in float32 on the CPU. Exit code 1 if any array is over its limit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that a Ctrl-C while they last is as clean as later
    from flowseg_jax.errors import run_cli

    run_cli("convert_weights.parity.__main__:main")

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from flowseg_jax import errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command: prints the table, writes the JSON, returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m convert_weights.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIR", help="directory of the fixture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # before JAX looks for accelerators
    from convert_weights.parity.compare import compare

    with jax.default_matmul_precision("float32"):
        report = compare(args.directory)
    print(report.text())
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise errors.UserError(f"{args.json}: cannot be written ({error.strerror})") from None
    return 0 if report.ok else 1

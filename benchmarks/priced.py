"""Compares plans with the committed ones: priced cycles by part of the model.

    flowseg plan --json --config=configs/stage3_mixed.py --topology=v5e:4x4 --xla-opt-level=default > step.log
    flowseg plan --json --eval --config=configs/stage3_mixed.py --topology=v5e:4x4 --xla-opt-level=default > eval.log
    python -m benchmarks.priced step.log eval.log             # exit code 1 if they differ by 2 % or more
    python -m benchmarks.priced step.log eval.log --write     # into benchmarks/priced.json

A plan compiles and executes nothing, and is the same on every machine. So this finds what a change of the code costs on a TPU.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that a Ctrl-C while they last is as clean as later
    from flowseg_jax.errors import run_cli

    run_cli("benchmarks.priced:main")

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowseg_jax.cli.parser import Parser
from flowseg_jax.errors import UserError
from flowseg_jax.system.console import log
from flowseg_jax.system.paths import ROOT

TABLE = ROOT / "benchmarks" / "priced.json"
TOLERANCE = 0.02
SMALLEST = 0.01  # of a program's cycles: a smaller part is not compared
ALL = "together"


def programs(path: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """(name of the program, {part: priced cycles}) of a plan's last line.

    Raises:
        UserError: a file without a priced plan.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        found = plan["programs"] if "programs" in plan else {"step": plan}
        for name, program in found.items():
            parts = {part: row["cycles"] if isinstance(row, dict) else row for part, row in program["priced_by_part"].items()}
            yield f"{name} on {plan['topology']}", {ALL: program["priced_cycles"], **parts}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not end with the JSON of a priced plan (flowseg plan --json): {error!r}") from None


def differences(found: dict[str, int], committed: dict[str, int]) -> list[str]:
    """Lines about the parts that differ by `TOLERANCE` or more."""
    least = SMALLEST * max(found[ALL], committed.get(ALL, 0))
    lines = []
    for part in sorted(found.keys() | committed.keys()):
        now, before = found.get(part, 0), committed.get(part, 0)
        if max(now, before) >= least and abs(now - before) >= TOLERANCE * before:
            lines.append(f"{part}: {now / 1e6:,.1f} million cycles, {before / 1e6:,.1f} committed")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.priced", description=__doc__.splitlines()[0])
    parser.add_argument("plans", nargs="+", type=Path, metavar="FILE", help="what flowseg plan --json printed")
    parser.add_argument("--write", action="store_true", help="commit these instead of comparing with them")
    arguments = parser.parse_args(argv)
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    found = {name: parts for path in arguments.plans for name, parts in programs(path)}
    if arguments.write:
        TABLE.write_text(json.dumps(table | found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        log(f"written to {TABLE.relative_to(ROOT)}")
        return 0
    differ = False
    for name, parts in found.items():
        lines = differences(parts, table.get(name, {}))
        log(f"{name}: {parts[ALL] / 1e6:,.1f} million cycles" + (", as committed" if not lines else ""))
        for line in lines:
            log(f"  {line}")
        differ |= bool(lines)
    return int(differ)

"""The committed ratios: `ratios.json`, the table in `docs/performance.md` that is made from it, and comparing with both.

A result is what `measure` returns. What is kept of it is one entry of `ratios.json`, under "component dtype".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.components import COMPONENTS, TimedComponent
from flowseg_jax.checkpoints.storage import write_text_atomic
from flowseg_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RATIOS = ROOT / "benchmarks" / "ratios.json"
DOCS = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- made by python -m benchmarks --write-docs -->", "<!-- end -->"
TOLERANCE = 0.25  # by how much a ratio may exceed the committed one
BUSY, REGRESSED, UNKNOWN = "machine too busy", "regressed", "not in the table"

Result = Mapping[str, Any]
KEPT = ("component", "dtype", "peer", "mode", "clock", "ratio", "seconds", "peer_seconds", "quality")
KEPT += ("difference", "peak_gib", "facts")


def key(result: Result) -> str:
    return f"{result['component']} {result['dtype']}"


def verdict(result: Result) -> str:
    """What a ratio is worth beside its bar: "aim met", "met", "missed", "" without a bar. None is given on a busy machine."""
    bar = COMPONENTS[result["component"]].bars.get(result["dtype"])
    if bar is None:
        return ""
    return BUSY if result["quality"] == "C" else bar.verdict(result["ratio"])


def compared(result: Result, committed: Mapping[str, Result]) -> str:
    """What a ratio is worth beside the committed one: "as committed", "faster", or one of BUSY, REGRESSED and UNKNOWN."""
    before = committed.get(key(result))
    if before is None:
        return UNKNOWN
    if "C" in (result["quality"], before["quality"]):
        return BUSY
    if machine(result) != machine(before):
        return f"another machine: {before['ratio']:.2f}"
    if clock(result) != clock(before):
        return f"another clock: {before['ratio']:.2f}"
    if result["ratio"] > before["ratio"] * (1 + TOLERANCE):
        return REGRESSED
    return "faster" if result["ratio"] < before["ratio"] / (1 + TOLERANCE) else "as committed"


def clock(result: Result) -> str:
    """Which seconds were counted, "wall" or "cpu". The oldest entries do not say it: it was the wall's."""
    return result.get("clock", "wall")


def machine(result: Result) -> str:
    return f"{result['environment']['cpu']}, {result['environment']['cores']} cores"


def bars(component: TimedComponent, dtype: str) -> str:
    """A component's bar and aim, "" without."""
    bar = component.bars.get(dtype)
    return "" if bar is None else f"{bar.bar:g}" + ("" if bar.aim is None else f" / {bar.aim:g}")


def milliseconds(seconds: float) -> str:
    """To four digits."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.4g}"


def line(result: Result) -> str:
    """A result for the terminal."""
    name, dtype = result["component"], result["dtype"]
    times = f"{milliseconds(result['peer_seconds']):>9}  {milliseconds(result['seconds']):>9}  {result['ratio']:6.3f}"
    judged = f"{bars(COMPONENTS[name], dtype):11}  {result['quality']}  {verdict(result) or '-'}"
    return f"{name:20} {dtype:8}  {times}  {judged}  ({result['peer']}, {result['mode']})"


HEAD = f"{'component':20} {'dtype':8}  {'peer ms':>9}  {'our ms':>9}   ratio  {'bar / aim':11}  Q  verdict"


def read(path: Path = RATIOS) -> dict[str, dict[str, Any]]:
    """The committed ratios by key.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no table yet; python -m benchmarks --write-docs makes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def write(results: Iterable[Result], ratios: Path = RATIOS, docs: Path = DOCS) -> None:
    """Puts results into the committed ratios, where each replaces the earlier one of its component, and makes the table anew.

    Raises:
        UserError: the document has no place for the table, or a file cannot be written.
    """
    entries = read(ratios) if ratios.exists() else {}
    for result in results:
        entries[key(result)] = {name: result[name] for name in KEPT if name in result} | {"environment": result["environment"]}
    order = {name: number for number, name in enumerate(COMPONENTS)}
    entries = dict(sorted(entries.items(), key=lambda item: (order[item[1]["component"]], item[1]["dtype"] != "float32")))
    text = placed(docs, markdown(list(entries.values())))  # before anything is written
    write_text_atomic(ratios, json.dumps(entries, indent=1) + "\n")
    write_text_atomic(docs, text)


def placed(docs: Path, table: str) -> str:
    """The document's text with the table between its markers."""
    try:
        text = docs.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{docs}: cannot be read ({error.strerror})") from None
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise UserError(f"{docs}: the table goes between the lines {BEGIN} and {END}, and one of them is missing")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def markdown(results: list[Result]) -> str:
    """The table of the document, and below it where its figures come from."""
    rows = [
        "| component | dtype | peer | peer ms | our ms | ratio | bar / aim | | Q |",
        "|---|---|---|--:|--:|--:|---|---|---|",
    ]
    for result in results:
        component = COMPONENTS[result["component"]]
        times = f"{milliseconds(result['peer_seconds'])} | {milliseconds(result['seconds'])} | **{result['ratio']:.2f}**"
        quality = result["quality"] + ", CPU" * (clock(result) == "cpu")
        peer = f"{result['peer']}, {result['mode']}" if component.peer == "torch" else result["peer"]
        rows.append(
            f"| `{component.name}`: {component.text} | {result['dtype']} | {peer} | {times} "
            f"| {bars(component, result['dtype'])} | {verdict(result)} | {quality} |"
        )
    notes = [extrapolation(result) for result in results if "extrapolate_ours" in result["facts"]]
    return "\n".join([*rows, "", *notes, *sorted({origin(result) for result in results})])


def extrapolation(result: Result) -> str:
    """What the times would be with all layers, by arithmetic."""
    ours = result["seconds"] * result["facts"]["extrapolate_ours"]
    peer = result["peer_seconds"] * result["facts"]["extrapolate_peer"]
    return (
        f"`{result['component']}` at full depth, *extrapolated* by FLOPs, not measured: ours {ours:.0f} s, {result['peer']} "
        f"{peer:.0f} s, ratio {ours / peer:.2f}.\n"
    )


def origin(result: Result) -> str:
    """Date, machine and versions of a result."""
    here = result["environment"]
    versions = ", ".join(f"{name} {here['versions'][name]}" for name in ("jax", "jaxlib", "torch", "transformers", "scipy"))
    return f"- {here['date']}: {machine(result)} ({' '.join(here['cpu_flags'])}); {versions}"

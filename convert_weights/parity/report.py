"""What a comparison found: one row an array, and what the fixture holds beyond that."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

# Limits on the error relative to the array's maximum. They come from a conditioning test of the PyTorch code itself (all
# weights moved by 1e-6): gradients through the sampling locations of deformable attention have kinks, all else is smooth.
LIMITS = {
    "exact": 0.0,
    "activation": 1e-4,
    "loss": 1e-4,
    "gradient": 1e-3,
    "kinked gradient": 0.1,
    "gradient norm": 1e-2,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared array.

    Attributes:
        file, name: where the fixture has it.
        kind: key of `LIMITS`.
        shape: the fixture's.
        error: largest difference over the fixture's largest magnitude; for "exact" the share of elements that differ. Infinite
            where shapes differ or we have a number that is none.
        note: what the reader should know about the comparison.
    """

    file: str
    name: str
    kind: str
    shape: tuple[int, ...]
    error: float
    note: str = ""

    @property
    def limit(self) -> float:
        return LIMITS[self.kind]

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


def relative_error(ours: np.ndarray, theirs: np.ndarray, scale: float = 0.0) -> float:
    """max |ours - theirs| / max(|theirs|, scale); the plain difference where that maximum is zero."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if not theirs.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        error = np.where(ours == theirs, 0.0, np.abs(ours - theirs)).max()
    largest = max(np.abs(theirs).max(), scale)
    error = error / largest if largest > 0 else error
    return float(error) if np.isfinite(error) else float("inf")


class ParityReport:
    """Collects rows, and keeps account of everything the fixture holds.

    Args:
        held: the names in each file of the fixture.
    """

    def __init__(self, held: Mapping[str, Iterable[str]]):
        self.rows: list[Row] = []
        self._held = {file: list(names) for file, names in held.items()}
        self._inputs: set[tuple[str, str]] = set()
        self._reasons: list[tuple[str, str, str]] = []

    def compare(
        self,
        file: str,
        name: str,
        ours: Any,
        theirs: np.ndarray,
        kind: str,
        *,
        where: Bool[np.ndarray, "..."] | None = None,
        scale: float = 0.0,
        note: str = "",
    ) -> None:
        """Adds a row.

        Args:
            file, name: where the fixture has the array.
            ours: our array, of the same shape.
            theirs: the fixture's array.
            kind: key of `LIMITS`.
            where: what to compare, over the leading axes; None for everything.
            scale: the least magnitude that the error is taken relative to.
            note: printed after the row.
        """
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape:
            row = Row(file, name, kind, theirs.shape, float("inf"), f"our shape is {list(ours.shape)}")
        else:
            if where is not None:
                a, b = ours[where], theirs[where]
            else:
                a, b = ours, theirs
            error = float(np.mean(a != b)) if kind == "exact" and a.size else relative_error(a, b, scale)
            row = Row(file, name, kind, theirs.shape, error, note)
        self.rows.append(row)

    def used(self, file: str, *names: str) -> None:
        """Marks arrays that went into the computation and are thereby no results."""
        self._inputs.update((file, name) for name in names)

    def explain(self, file: str, pattern: str, reason: str) -> None:
        """Gives the reason for what is not compared: names that `pattern` matches from their start. The first match counts."""
        self._reasons.append((file, pattern, reason))

    def not_compared(self) -> list[tuple[str, str, str]]:
        """(file, name, reason) of everything held that no row is about."""
        compared = {(row.file, row.name) for row in self.rows}
        out = []
        for file, names in self._held.items():
            for name in names:
                if (file, name) not in compared:
                    out.append((file, name, self._reason(file, name)))
        return out

    def _reason(self, file: str, name: str) -> str:
        if (file, name) in self._inputs:
            return "an input of the computation"
        for where, pattern, reason in self._reasons:
            if re.fullmatch(where, file) and re.match(pattern, name):
                return reason
        return "nothing here is known to have this name"

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def text(self) -> str:
        """The table, what was not compared, and a summary."""
        header = ("array", "shape", "max rel error", "limit", "ok")
        cells = [
            (
                f"{row.file}:{row.name}",
                "x".join(map(str, row.shape)) or "scalar",
                "exact" if row.kind == "exact" and row.error == 0 else f"{row.error:.1e}",
                "exact" if row.kind == "exact" else f"{row.limit:.0e}",
                ("ok" if row.ok else "OVER") + (f"  ({row.note})" if row.note else ""),
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (header, *cells)) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}" for a, b, c, d, e in (header, *cells)
        ]
        groups: dict[tuple[str, str], dict[str, None]] = {}
        for file, name, reason in self.not_compared():
            groups.setdefault((file, reason), {})[re.sub(r"\d+", "*", name)] = None  # numbered names once
        lines += ["", "held, but not compared:"] if groups else []
        lines += [f"  {file}: {reason}: {', '.join(names)}" for (file, reason), names in groups.items()]
        lines.append("")
        for kind in LIMITS:
            rows = [row for row in self.rows if row.kind == kind]
            if rows:
                worst = max(rows, key=lambda row: row.error)
                at = "" if worst.error == 0 else f", worst {worst.error:.1e} ({worst.file}:{worst.name})"
                lines.append(f"{kind}: {sum(row.ok for row in rows)} of {len(rows)} ok{at}")
        lines.append(f"{sum(row.ok for row in self.rows)} of {len(self.rows)} arrays within their limits")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values; an infinite error is null."""
        rows = [
            {
                "file": row.file,
                "name": row.name,
                "kind": row.kind,
                "shape": list(row.shape),
                "error": row.error if np.isfinite(row.error) else None,
                "limit": row.limit,
                "ok": row.ok,
                "note": row.note,
            }
            for row in self.rows
        ]
        left = [{"file": file, "name": name, "reason": reason} for file, name, reason in self.not_compared()]
        return {
            "ok": self.ok,
            "compared": len(rows),
            "within": sum(r["ok"] for r in rows),
            "arrays": rows,
            "not_compared": left,
        }

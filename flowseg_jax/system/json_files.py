"""JSON that is read back, from whoever wrote it: one clear line for what is wrong, and bounded memory and time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from flowseg_jax.errors import UserError

MAX_BYTES = 256 << 20  # of a file that is read whole
ITSELF = "json_checksum"  # the key under which a file keeps the checksum of its other values
NESTED = 100  # lists and groups in each other, far more than any of our files has


def loads(text: str | bytes) -> Any:
    """`json.loads` whose every fault is a ValueError: no JSON, no UTF-8, nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if isinstance(value, dict | list) and _deeper_than(value, NESTED):
        raise ValueError(f"it is nested more than {NESTED} deep")
    return value


def read(path: os.PathLike) -> Any:
    """The JSON of a file; errors as `loads`, or an OSError. `path` has the methods of `pathlib.Path` and may be remote."""
    stat = path.stat()
    if (size := getattr(stat, "st_size", None) or getattr(stat, "length", 0)) > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, at most {MAX_BYTES:,} are read")
    return loads(path.read_bytes())


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their order and the spaces between them; without their own checksum, under `ITSELF`."""
    rest = {key: value for key, value in values.items() if key != ITSELF}
    return hashlib.sha256(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode()).hexdigest()


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            item
            for each in level
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def short(value: Any) -> str:
    """A value for a message, at most some forty characters, whatever it is; it is cut before it is formatted."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "…")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        return f"a group of {len(value)} keys"
    if isinstance(value, list | tuple):
        shown = ", ".join(short(item) for item in value[:4]) if all(_is_plain(item) for item in value[:4]) else "…"
        return f"[{shown}{', …' if len(value) > 4 else ''}]" if len(shown) <= 60 else f"a list of {len(value)}"
    return repr(value) if value is None or isinstance(value, bool | int | float) else type(value).__name__


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def number(value: Any, *, whole: bool = False, least: float = -1e300, most: float = 1e300) -> bool:
    """Whether a value is a finite number within bounds; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return (isinstance(value, int) or math.isfinite(value)) and least <= value <= most


def expect(ok: bool, value: Any, where: str, wanted: str) -> None:
    """Raises a UserError "where is ..., expected ..." unless `ok`."""
    if not ok:
        raise UserError(f"{where} is {short(value)}, expected {wanted}")

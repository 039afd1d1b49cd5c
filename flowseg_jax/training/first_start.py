"""When a run was first started: what goodput counts from, and how local checkpoints know their run."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid

from flowseg_jax.checkpoints.storage import write_text_atomic
from flowseg_jax.system import json_files
from flowseg_jax.system.distributed import all_gather_bytes, is_primary
from flowseg_jax.system.json_files import number
from flowseg_jax.system.paths import resolve_path

FILE = "first_start.json"


@dataclasses.dataclass(frozen=True)
class FirstStart:
    """Attributes:
    run_id: tells the run from an earlier one in the same work directory.
    time: seconds since 1970.
    """

    run_id: str
    time: float

    @classmethod
    def of(cls, workdir: str | os.PathLike) -> FirstStart:
        """That of the run in a work directory; the first start notes it there. Every process must call it."""
        told = all_gather_bytes(json.dumps(_noted(workdir)).encode() if is_primary() else b"")[0]
        return cls(**json.loads(told))

    def seconds_ago(self) -> float:
        return max(time.time() - self.time, 0.0)


def _noted(workdir: str | os.PathLike) -> dict:
    file = resolve_path(workdir) / FILE
    try:
        found = json_files.read(file)
        if number(found["time"]) and uuid.UUID(found["run_id"]):
            return {"run_id": uuid.UUID(found["run_id"]).hex, "time": found["time"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # there is none, or somebody has changed it
        pass
    new = {"run_id": uuid.uuid4().hex, "time": time.time()}
    write_text_atomic(file, json.dumps(new) + "\n")
    return new

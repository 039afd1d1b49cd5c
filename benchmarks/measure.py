"""One component in a process of its own: numerics first, then both candidates in turn. Writes the result as JSON.

python -m benchmarks.measure sam_window float32 --size=tiny --out=result.json     # what python -m benchmarks starts
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:measure")

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import components, ratio
from benchmarks.command_line import measure_parser
from flowseg_jax.errors import UserError
from flowseg_jax.system import host
from flowseg_jax.system.hardware import GIB

OURS = "flowseg_jax"
TRIES = 3  # calls that decide whether the compiled peer is the faster one
SLOW = 10.0  # seconds of a call, from which on so few rounds are made as a median needs


class Readable(ratio.Local):
    """A call of either framework; `read` makes of its result what is compared, in any structure of arrays or tensors."""

    def __init__(self, call: Callable[[], Any], read: Callable[[Any], Any], clock: Callable[[], float] = time.perf_counter):
        super().__init__(call, clock)
        self._compared = ratio.Local(lambda: read(call()))

    def output(self) -> dict[str, np.ndarray]:
        return self._compared.output()


def as_arrays(result: Any) -> Any:
    """Tensors as float32 arrays, in the same structure."""
    import jax
    import torch

    plain = lambda x: x.detach().float().numpy() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return jax.tree.map(plain, result)


def fastest(pair: components.Pair, eager_only: bool, clock: Callable[[], float]) -> tuple[components.Call, str, float]:
    """The peer's call in its faster mode, warmed up; the name of the mode; about how many seconds the call takes.

    Only one of the two exists at a time: a train step's state is the larger part of the machine's memory.
    """
    mode, seconds = "eager", math.inf
    if pair.compiled and not eager_only:
        import torch

        try:
            seconds = _seconds(pair.peer(torch.compile), clock)
        except Exception as error:  # the compiler's many; what it cannot compile runs as it is
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            mode = f"eager (torch.compile failed: {reason[:80]})"
        gc.collect()
    call = pair.peer(lambda layer: layer)
    eager = _seconds(call, clock)
    if eager <= seconds:
        return call, mode, eager
    del call
    gc.collect()
    call = pair.peer(torch.compile)
    call()
    return call, "torch.compile", seconds


def _seconds(call: components.Call, clock: Callable[[], float]) -> float:
    """The least of TRIES calls after a first one; of fewer where they are slow."""
    call()
    found: list[float] = []
    while len(found) < TRIES and sum(found) < SLOW:
        started = clock()
        call()
        found.append(clock() - started)
    return min(found)


def measure(
    component: components.TimedComponent, size: str, dtype: str, rounds: int, eager_only: bool = False, clock: str = "wall"
) -> dict[str, Any]:
    """Builds and times a component by one of `ratio.CLOCKS`; see `python -m benchmarks` for what the result holds.

    Raises:
        UserError: the outputs differ: there is no ratio then.
    """
    import scipy
    import torch

    pair = components.build(component, size, dtype)
    seconds = ratio.CLOCKS[clock]
    call, mode, about = fastest(pair, eager_only, seconds)
    rounds = min(rounds, ratio.ENOUGH) if about > SLOW else rounds
    candidates = {
        component.peer: Readable(call, lambda result: as_arrays(pair.peer_output(result)), seconds),
        OURS: Readable(pair.ours, pair.our_output, seconds),
    }
    comparison = ratio.compare(candidates, component.peer, pair.tolerance, rounds=rounds, cpu_time=clock == "cpu")
    result = comparison.to_json()
    result["environment"]["versions"] |= {"torch": torch.__version__, "scipy": scipy.__version__}
    peak = host.peak_memory() / GIB
    return {
        "component": component.name,
        "dtype": dtype,
        "size": size,
        "peer": component.peer,
        "mode": mode,
        "clock": clock,
        "ratio": comparison.ratio(OURS),
        "seconds": comparison.timings[OURS].seconds,
        "peer_seconds": comparison.timings[component.peer].seconds,
        "peak_gib": peak,
        "facts": dict(pair.facts),
        **result,
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = measure_parser().parse_args(argv)
    (component,) = components.choose([arguments.component])
    if arguments.dtype not in component.dtypes:
        raise UserError(f"{component.name} is measured in {', '.join(component.dtypes)}, not in {arguments.dtype!r}")
    found = measure(component, arguments.size, arguments.dtype, arguments.rounds, arguments.eager, arguments.clock)
    result = json.dumps(found, indent=1)
    if arguments.out is None:
        print(result)
    else:
        arguments.out.write_text(result + "\n", encoding="utf-8")
    return 0

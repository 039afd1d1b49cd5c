"""What a TPU or GPU takes for a train step, beside the prices of `flowseg plan`: the first thing to run on one.

    benchmarks/on_device.sh                                            # builds the environment, then all of this
    python -m benchmarks.on_device --config=FILE --config.KEY=VALUE    # the config must fit: `flowseg plan` tells

It compiles the step for the devices that are here, times it on random images, traces three steps, and adds the trace up by part
of the model and by instruction. On a TPU each part stands beside its price, and a price that is wrong is named. Then it times
the answers of a model. `report.json` and `report.txt` in `--out` hold everything.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:on_device")

import collections
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from ml_collections import ConfigDict

from benchmarks import ratio
from benchmarks.command_line import on_device_parser
from benchmarks.step import random_batch
from flowseg_jax import experiment as configs
from flowseg_jax.aot import hlo
from flowseg_jax.aot.pricing import PricedStep, price
from flowseg_jax.aot.tpu_cost import cycles, part_of
from flowseg_jax.inference.loading import load
from flowseg_jax.system.console import heartbeat, log
from flowseg_jax.system.hardware import DEVICE_SPECS, memory_in_use, mfu
from flowseg_jax.training import flops
from flowseg_jax.training.program import TrainProgram

TRACED = 3  # steps
WRONG = 1.3  # a price is wrong that the measured time exceeds, or falls short of, by this factor
SMALL = 0.02  # share of the step below which a part's price does not matter
LARGEST = 25  # instructions in the report

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", re.MULTILINE)
_NAME = re.compile(r"%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Event:
    """One execution of one instruction, in seconds."""

    instruction: str
    start: float
    seconds: float


def measure_step(config: ConfigDict, steps: int) -> dict[str, Any]:
    """Compiles, times and traces the train step on all devices of this process."""
    with heartbeat("building the train step"):
        program = TrainProgram.build(config)
        started = time.perf_counter()
        step = program.compile()
        compile_seconds = time.perf_counter() - started
    run = program.run_config
    with heartbeat("initialising parameters"):
        state, _ = program.initial_state(config)
        batch = program.to_device(random_batch(run.shape, run.model))
        state, metrics = jax.block_until_ready(step(state, batch))
    seconds = []
    with heartbeat("timing the train step"):
        for _ in range(steps):
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - started)
    text, devices = step.as_text(), list(program.mesh.devices.flat)
    with heartbeat("tracing the train step"), tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(TRACED):
                state, metrics = step(state, batch)
            jax.block_until_ready(state)
        (trace,) = Path(directory).rglob("*.xplane.pb")
        paths = dict(_INSTRUCTION.findall(text))
        timelines = list(read_trace(ProfileData.from_file(str(trace)), paths))
    by_instruction = own_seconds(timelines, len(devices) * TRACED)
    step_flops = flops.total(flops.step_flops(run.model, run.shape, run.losses, program.state.trainable, program.state.frozen))
    typical = statistics.median(seconds)
    return {
        "loss": float(metrics["loss"]),
        "compile_seconds": compile_seconds,
        "step_seconds": typical,
        "fastest_and_slowest": [min(seconds), max(seconds)],
        "flops": step_flops,
        "mfu": mfu(step_flops, typical, devices),
        "memory": memory_in_use(devices),
        "parts": compare_parts(by_instruction, paths, priced(text, devices, step_flops)),
        "instructions": [
            {"name": name, "seconds": found, "path": paths[name]} for name, found in by_instruction.most_common(LARGEST)
        ],
    }


def read_trace(trace: ProfileData, known: Mapping[str, str]) -> Iterator[list[Event]]:
    """The executions of known instructions, a list a timeline: of the devices, or of the host where the CPU is the device."""
    planes = [plane for plane in trace.planes if plane.name.startswith("/device:")] or list(trace.planes)
    for plane in planes:
        for line in plane.lines:
            found = []
            for event in line.events:
                name = dict(event.stats).get("hlo_op") or event.name  # a GPU's event is named after its kernel
                match = _NAME.match(str(name))
                if match and match[1] in known:
                    found.append(Event(match[1], event.start_ns / 1e9, event.duration_ns / 1e9))
            if found:
                yield found


def own_seconds(timelines: Iterable[Sequence[Event]], runs: int) -> collections.Counter[str]:
    """{instruction: seconds of one run on one device}, without those of the instructions inside it: a loop is one, too."""
    found: collections.Counter[str] = collections.Counter()
    for events in timelines:
        around: list[Event] = []
        for event in sorted(events, key=lambda event: (event.start, -event.seconds)):
            while around and around[-1].start + around[-1].seconds <= event.start:
                around.pop()
            if around:
                found[around[-1].instruction] -= event.seconds / runs
            found[event.instruction] += event.seconds / runs
            around.append(event)
    return found


def priced(text: str, devices: Sequence[Any], step_flops: float) -> PricedStep | None:
    """The step's price; None for devices that have none."""
    device, estimate = DEVICE_SPECS.get(devices[0].device_kind), cycles(text)
    if estimate is None or device is None or device.clock is None:
        return None
    return price(estimate, hlo.collective_stats(text), device, step_flops / len(devices))


def compare_parts(
    by_instruction: Mapping[str, float], paths: Mapping[str, str], price_of: PricedStep | None
) -> dict[str, dict[str, Any]]:
    """{part: seconds measured and priced, and whether the price is "right", "too low" or "too high"}; no verdict without one,
    nor for a part of less than SMALL of the step."""
    measured: collections.Counter[str] = collections.Counter()
    for name, seconds in by_instruction.items():
        measured[part_of(paths[name])] += seconds
    prices = {} if price_of is None else {p: row["cycles"] / price_of.device.clock for p, row in price_of.by_part().items()}
    whole, found = sum(measured.values()), {}
    for part, seconds in measured.most_common():
        expected = prices.get(part)
        verdict = None
        if expected and max(seconds, expected) > SMALL * whole:
            verdict = "too low" if seconds > WRONG * expected else "too high" if WRONG * seconds < expected else "right"
        found[part] = {"seconds": seconds, "priced": expected, "price": verdict}
    return found


def measure_answers(checkpoint: str | None, turns: int) -> dict[str, float]:
    """Median seconds of encoding an image and of answering one expression about it."""
    model, image, text = load(checkpoint), "examples/scenes/06.png", ["green triangle"]
    encoded = model.encode_image(image)
    model.predict(encoded, text)
    seconds: dict[str, list[float]] = {"encode_image": [], "predict": []}
    for _ in range(turns):
        started = time.perf_counter()
        encoded = model.encode_image(image)
        jax.block_until_ready(encoded.cache)
        encoded_at = time.perf_counter()
        model.predict(encoded, text)
        seconds["encode_image"].append(encoded_at - started)
        seconds["predict"].append(time.perf_counter() - encoded_at)
    return {name: statistics.median(found) for name, found in seconds.items()}


def lines(found: Mapping[str, Any]) -> list[str]:
    """The report as text."""
    step, low_high = found["step"], found["step"]["fastest_and_slowest"]
    share = "no peak known" if step["mfu"] is None else f"MFU {step['mfu']:.1%}"
    out = [
        f"{found['device']} x {found['devices']}: a step takes {1e3 * step['step_seconds']:.1f} ms "
        f"({1e3 * low_high[0]:.1f} to {1e3 * low_high[1]:.1f}), {share}; compiled in {step['compile_seconds']:.0f} s",
        f"{'ms a step and device, by part':<32}{'measured':>10}{'priced':>10}  price",
    ]
    for part, row in step["parts"].items():
        expected = "-" if row["priced"] is None else f"{1e3 * row['priced']:.2f}"
        out.append(f"  {part:<30}{1e3 * row['seconds']:>10.2f}{expected:>10}  {row['price'] or '-'}")
    wrong = [f"{part} ({row['price']})" for part, row in step["parts"].items() if row["price"] not in (None, "right")]
    judged = any(row["price"] for row in step["parts"].values())
    out.append(f"wrong prices: {', '.join(wrong) or ('none' if judged else 'this device has no prices')}")
    out += [f"  {1e3 * row['seconds']:>10.3f} ms  {row['name']:<40} {row['path'][-60:]}" for row in step["instructions"]]
    out += [f"{name}: {1e3 * seconds:.1f} ms" for name, seconds in found["answers"].items()]
    return out


def main(argv: Sequence[str] | None = None) -> int:
    config, rest = configs.load(sys.argv[1:] if argv is None else list(argv))
    arguments = on_device_parser().parse_args(rest)
    found = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "step": measure_step(config, arguments.steps),
        "answers": measure_answers(arguments.checkpoint, arguments.turns),
        "environment": ratio.environment(),
    }
    text = "\n".join(lines(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "report.txt").write_text(text + "\n", encoding="utf-8")
    log(text)
    return 0

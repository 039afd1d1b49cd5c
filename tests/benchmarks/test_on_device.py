"""What is made of a trace: instructions by part, beside their prices. Whether it runs as a whole is a slow test."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks import on_device
from benchmarks.on_device import Event


def test_time_inside_an_instruction_is_not_its_own():
    timelines = [
        [Event("loop", 0.0, 10.0), Event("inner", 1.0, 3.0), Event("inner", 5.0, 3.0), Event("after", 10.0, 2.0)],
        [Event("after", 0.0, 4.0)],
    ]
    assert on_device.own_seconds(timelines, 2) == {"loop": 2.0, "inner": 3.0, "after": 3.0}


def test_a_price_is_judged_by_what_was_measured():
    seconds = {"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.01, "e": 0.3}
    scopes = {"a": "jvp(sam)/x", "b": "transpose(jvp(llm))/x", "c": "losses/x", "d": "optimizer/x", "e": "x"}
    cycles = {"sam forward": 0.9, "llm backward": 0.5, "losses forward": 0.8, "optimizer forward": 0.001}
    step = SimpleNamespace(
        device=SimpleNamespace(clock=100.0), by_part=lambda: {part: {"cycles": 100 * x} for part, x in cycles.items()}
    )
    found = on_device.compare_parts(seconds, scopes, step)
    assert {part: row["price"] for part, row in found.items()} == {
        "sam forward": "right",
        "llm backward": "too low",
        "losses forward": "too high",
        "optimizer forward": None,  # too small to matter
        "other": None,  # no price
    }
    assert found["llm backward"] == {"seconds": 1.0, "priced": 0.5, "price": "too low"}
    assert {row["price"] for row in on_device.compare_parts(seconds, scopes, None).values()} == {None}


def test_a_trace_of_the_cpu_has_the_instructions_of_its_program(tmp_path):
    def program(x):
        with jax.named_scope("sam"):
            return jnp.sin(x @ x).sum()

    x = jnp.ones((256, 256))
    compiled = jax.jit(program).lower(x).compile()
    paths = dict(on_device._INSTRUCTION.findall(compiled.as_text()))
    jax.block_until_ready(compiled(x))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(2):
            jax.block_until_ready(compiled(x))
    (trace,) = tmp_path.rglob("*.xplane.pb")
    seconds = on_device.own_seconds(on_device.read_trace(ProfileData.from_file(str(trace)), paths), 2)
    assert seconds and seconds.keys() <= paths.keys()
    assert on_device.compare_parts(seconds, paths, None)["sam forward"]["seconds"] > 0


@pytest.mark.slow  # compiles the tiny train step
def test_a_report_of_this_machine(tmp_path, capsys):
    flags = ["--config=shapes_tiny", "--steps=2", "--turns=2", f"--out={tmp_path}"]
    assert on_device.main(flags) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["step"]["step_seconds"] > 0 and found["step"]["mfu"] is None
    assert {"sam forward", "llm backward", "losses forward", "mask_decoder backward"} <= found["step"]["parts"].keys()
    assert set(found["answers"]) == {"encode_image", "predict"}
    assert "wrong prices: this device has no prices" in capsys.readouterr().out

"""`flowseg plan`: what is reported, verdicts and exit codes, and the real step planned by the command for eight devices."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from flowseg_jax import experiment as configs
from flowseg_jax.aot import plan
from flowseg_jax.aot.topology import Topology
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig
from flowseg_jax.system.hardware import GIB
from flowseg_jax.training.step import TrainState
from flowseg_jax.types import BatchShape
from tests.helpers import small, tpu

ROOT = Path(__file__).resolve().parents[2]
CHIP = SimpleNamespace(device_kind="TPU v5 lite")


def abstract(*shape: int, spec: tuple = (), dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(AbstractMesh((4, 2), ("data", "fsdp")), PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class FakeStep:
    """A step whose compilation ends as it is told to."""

    def __init__(self, outcome):
        self.outcome = outcome

    def lower(self, *arguments):
        return self

    def compile(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def executable(arguments: int, temporaries: int) -> SimpleNamespace:
    sizes = SimpleNamespace(
        argument_size_in_bytes=arguments,
        temp_size_in_bytes=temporaries,
        output_size_in_bytes=arguments + 8,
        alias_size_in_bytes=arguments,
    )
    text = (
        "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        "  ROOT %r = f32[8]{0} all-reduce(%p), to_apply=%add\n}"
    )
    return SimpleNamespace(memory_analysis=lambda: sizes, as_text=lambda: text)


def planned(outcome, usable: int | None = 16 * GIB, chip=CHIP, slices: int = 1) -> plan.PlanReport:
    """The report on a model of three parameters, two of them trained, on 4 x 2 devices."""
    divided = ("fsdp",)
    trainable = {"llm": {"embed_tokens": abstract(40, 28, spec=divided)}, "sam": {"patch_embed": abstract(10)}}
    frozen = {"llm": {"lm_head": abstract(6, dtype=jnp.bfloat16)}}
    moments = [abstract(40, 28, spec=divided), abstract(10)] * 2
    state = TrainState(abstract(dtype=jnp.int32), trainable, frozen, moments, abstract(2, dtype=jnp.int32))
    model = small.config()
    shape = BatchShape(16, model.num_visual_tokens + 20, 2, 3, 32, 16)
    program = SimpleNamespace(
        run_config=SimpleNamespace(model=model, shape=shape, losses=LossConfig()),
        mesh=SimpleNamespace(shape={"data": 4, "fsdp": 2}),
        state=state,
        batch={"input_ids": abstract(16, 100, spec=(("data", "fsdp"),), dtype=jnp.int32)},
        step=FakeStep(outcome),
    )
    return plan.report(program, Topology("v5e:2x4", (chip,) * 8, usable, "not executed", slices), "O1")


def test_what_crosses_slices_is_said():
    report = planned(executable(1, 1), slices=2)
    assert report.to_json()["between_slices"] == {"all-reduce": {"count": 1, "bytes": 32}}
    assert report.to_json()["gradient_bytes"] == (40 * 28 // 2 + 10) * 4
    assert "between 2 slices, a step and device: all-reduce 1 (0.0 MB); its gradients are 0.0 MB" in report.text()
    assert "between" not in planned(executable(1, 1)).text() and "WARNING" not in report.text()
    gathered = executable(1, 1)
    text = gathered.as_text()
    gathered.as_text = lambda: text.replace("all-reduce", "all-gather")
    assert "WARNING: not only gradients cross: all-gather" in planned(gathered, slices=2).text()


def test_sizes_are_those_of_one_device():
    report = planned(executable(2000, 3000))
    weights = (40 * 28 // 2 + 10) * 4
    assert report.memory.parameters == weights + 6 * 2
    assert report.memory.moments == 2 * weights
    assert report.memory.batch == 2 * 100 * 4
    assert report.memory.needed == 2000 + 3000 + 8  # what is donated is not counted twice
    assert report.parameters == {"llm": {"trained": 1120, "frozen": 6}, "sam": {"trained": 10, "frozen": 0}}
    assert report.traffic.totals() == {"all-reduce": (1, 32)}


def test_a_step_with_estimates_is_priced_in_text_and_json():
    """One fusion of 1,000 cycles, and a gather of 50 single values, which the compiler estimates nothing for."""
    compiled = executable(1, 1)
    compiled.as_text = lambda: (
        "HloModule m\n\nENTRY %main (p: f32[50]) -> f32[50] {\n  %p = f32[50]{0} parameter(0)\n  %i = s32[50]{0} parameter(1)\n"
        '  %e = f32[50]{0} exp(%p), metadata={op_name="losses/exp"}, backend_config={"estimated_cycles":"1000"}\n'
        "  ROOT %g = f32[50]{0} gather(%e, %i), offset_dims={}, slice_sizes={1}\n}"
    )
    report = planned(compiled)
    found, priced = report.to_json(), 1000 + round(50 * 13.6)
    assert found["cycles"]["total"] == 1000
    assert found["priced_cycles"] == found["priced_cycles_nothing_hidden"] == priced
    assert found["priced_by_source"] == {"estimated": 1000, "gathers": 680}
    assert found["mfu"]["high"] == pytest.approx(sum(report.flops.values()) / 8 / (priced * 2**17))
    assert found["without_a_price"] == {}
    assert found["priced_by_part"]["losses forward"]["cycles"] == 1000
    assert "  by source: " in report.text() and "  without a price: none" in report.text()
    assert planned(compiled, chip=SimpleNamespace(device_kind="cpu")).priced is None


def test_step_time_is_at_forty_percent_of_all_devices_peak():
    report = planned(executable(1, 1))
    assert report.step_seconds == pytest.approx(sum(report.flops.values()) / (0.4 * 197e12 * 8))
    assert planned(executable(1, 1), chip=SimpleNamespace(device_kind="cpu")).step_seconds is None


AGAIN = "; --xla-opt-level=default, at which training compiles, may need less"


@pytest.mark.parametrize(
    ("needed", "usable", "fits", "words"),
    [
        (10 * GIB, 16 * GIB, True, "fits, 6.00 GiB to spare"),
        (18 * GIB, 16 * GIB, False, f"does not fit, 2.00 GiB too much{AGAIN}"),
        (18 * GIB, None, True, "compiles, 18.00 GiB a device"),
    ],
)
def test_the_verdict_is_needed_against_usable(needed, usable, fits, words):
    report = planned(executable(needed // 2, needed - needed // 2), usable)
    assert report.fits is fits
    assert report.verdict() == words
    assert report.text().endswith(f"verdict: {words}")
    assert dataclasses.replace(report, effort="default").verdict() == words.removesuffix(AGAIN)
    found = json.loads(json.dumps(report.to_json()))
    assert found["compiled"] and found["fits"] is fits
    assert found["bytes_per_device"] == needed + 8


GIVEN = (
    3 * (40 * 28 // 2 + 10) * 4 + 6 * 2 + 2 * 100 * 4
)  # parameters, moments and batch of `planned`, as the test above has them


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (124.70G) exceeds available HBM (15.75G).",
            124.7 * GIB + GIVEN,
        ),
        ("Ran out of memory in memory space hbm. Used 512.5M of 400.0M hbm. Exceeded hbm capacity by 112.5M.", 512.5 * 2**20),
        ("Ran out of memory on HBM.", None),
    ],
)
def test_a_program_that_the_compiler_refuses_does_not_fit(words, needed):
    report = planned(jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {words}\nAllocations:\n"))
    assert not report.fits
    assert report.memory.needed == (None if needed is None else round(needed))
    assert report.verdict() == f"does not fit. The compiler: {words}"
    found = json.loads(json.dumps(report.to_json()))
    assert (found["compiled"], found["fits"], found["bytes_per_device"]) == (False, False, report.memory.needed)
    assert ("refused: temporaries 124.70 GiB beside what the step is given" in report.text()) == ("temporaries" in words)
    assert report.text().endswith(f"verdict: does not fit. The compiler: {words}")


@pytest.mark.parametrize(("asked", "found", "slices"), [(0, 2, 2), (0, 1, 1), (1, 2, 1), (4, 2, 4)])
def test_slices_are_those_of_the_topology_where_the_config_leaves_them_open(monkeypatch, asked, found, slices):
    config, built = configs.read("configs/shapes_tiny.py"), []
    config.mesh.slices = asked
    monkeypatch.setattr(plan, "open_topology", lambda name: Topology(name, (CHIP,) * 8, None, "", found))
    monkeypatch.setattr(plan.TrainProgram, "build", lambda config, devices: built.append((config.mesh.slices, devices)) or "it")
    program, topology = plan.prepare(config, "2xv5e:2x2", "O1")
    assert (program, topology.slices, topology.name) == ("it", max(slices, 1), "2xv5e:2x2")
    assert built == [(asked or found, (CHIP,) * 8)] and config.mesh.slices == asked  # that of the caller is left alone


def test_what_a_device_holds_between_two_steps(monkeypatch):
    trainable = {"llm": {"embed_tokens": abstract(40, 28, spec=("fsdp",))}, "sam": {"patch_embed": abstract(10)}}
    frozen = {"llm": {"lm_head": abstract(6, dtype=jnp.bfloat16)}}
    average = {"llm": {"embed_tokens": abstract(3)}}
    state = TrainState(abstract(dtype=jnp.int32), trainable, frozen, [abstract(7)], abstract(2, dtype=jnp.int32), average)
    found = SimpleNamespace(state=state), Topology("v5e:2x4", (CHIP,) * 8, None, "")
    asked = []
    monkeypatch.setattr(plan, "prepare", lambda *arguments: asked.append(arguments) or found)
    sizes, *rest = plan.state_sizes("config", "v5e:2x4")
    assert asked == [("config", "v5e:2x4", "O0")] and tuple(rest) == found
    weights = (40 * 28 // 2 + 10) * 4
    assert sizes == {
        "parameters, trained": weights, "parameters, frozen": 12, "gradients": weights, "moments": 28, "moving average": 12
    }  # fmt: skip
    lines = plan.state_text("config", "v5e:2x4").splitlines()
    assert lines[-7] == "v5e:2x4: on each of 8 x TPU v5 lite, without activations" and lines[-1].startswith("  together  ")
    assert lines[-1].endswith(plan.gib(2 * weights + 52)) and lines[-6].endswith(plan.gib(weights))


@pytest.mark.parametrize("words", ["INTERNAL: something else", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"])
def test_another_failure_of_the_compiler_is_no_verdict(words):
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        planned(jax.errors.JaxRuntimeError(words))


def test_effort_is_set_for_the_compiler_alone():
    before = jax.config.jax_optimization_level
    with plan.compiler_effort("O2"):
        assert jax.config.jax_optimization_level == "O2"
        assert not jax.config.jax_enable_compilation_cache  # compile_seconds would be those of reading a file
    assert jax.config.jax_optimization_level == before
    assert jax.config.jax_enable_compilation_cache


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_the_command_prints_json_last_and_exits_by_the_verdict(monkeypatch, capsys, fits, code):
    report = planned(executable(1, 1 if fits else 17 * GIB))
    asked = []
    monkeypatch.setattr(plan, "plan", lambda config, name, effort: asked.append((config.seed, name, effort)) or report)
    arguments = [
        "--topology=v5e:2x4",
        "--json",
        "--config.seed=5",
        "--xla-opt-level=default",
        "--workdir=/proc/nowhere",
    ]
    assert flowseg(["plan", *arguments]) == code
    assert flowseg(["train", "--plan", *arguments]) == code
    assert asked == [(5, "v5e:2x4", "default")] * 2
    *_, verdict, last = capsys.readouterr().out.splitlines()
    assert verdict.startswith("verdict: ")
    assert json.loads(last)["fits"] is fits


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--topology=v5e:4x4"], "there is no flag --topology"),
        (["train", "--json"], "there is no flag --json"),
        (["plan", "--topology=v9:4x4"], "--topology=v9:4x4: unknown"),
        (["plan", "--xla-opt-level=O9"], "--xla-opt-level=O9: choose O0, O1, O2, O3, default"),
        (["plan", "--config.mesh.data=3"], "does not fit 1 device"),
    ],
)
def test_what_each_mistake_says(argv, message):
    with pytest.raises(UserError, match=message):
        flowseg(argv)


def smallest_config() -> ConfigDict:
    """As little to compile as there can be with every component present."""
    model = small.config(negatives_group_size=1, num_classes=0, generic_pass="off")
    model = dataclasses.replace(
        model,
        mask_decoder=dataclasses.replace(model.mask_decoder, num_layers=1),
        boundary=dataclasses.replace(model.boundary, enabled=False),
    )
    config = configs.read("configs/shapes_tiny.py")
    config.model = ConfigDict(model.to_dict())
    config.update(batch_size=8, num_steps=10)
    config.data.update(text_length=60, max_phrases=2, max_masks=3)
    config.optimizer.update(param_groups=((r"sam/.*", None), (".*", 1.0)))
    config.optimizer.losses.update(logits_chunk_size=16)
    config.mesh.update(data=2, fsdp=4)
    return config


def run_command(topology: str, directory: Path, **mesh: int) -> tuple[int, str, dict]:
    file, config = directory / "config.json", smallest_config()
    config.mesh.update(mesh)
    file.write_text(configs.to_json(config))
    command = [sys.executable, "train.py", f"--config={file}", "--plan", f"--topology={topology}", "--json"]
    environment = {name: value for name, value in os.environ.items() if name not in ("FLOWSEG_DEVICES", "JAX_PLATFORMS")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


def check_plan(found: dict, output: str) -> None:
    assert found["compiled"] and found["fits"]
    assert found["bytes_per_device"] > found["memory"]["arguments"] > 0
    assert found["compile_seconds"] > 0
    assert found["parameters"]["sam"]["trained"] == 0 < found["parameters"]["sam"]["frozen"]
    assert found["parameters"]["llm"]["frozen"] == 0 < found["parameters"]["llm"]["trained"]
    assert found["collectives"]["all-reduce"]["count"] > 0
    assert found["data_dependent_loops_with_collectives"] == []  # the matcher waits for nobody
    assert "nothing was executed" in output


def check_slices(found: dict, least: float) -> None:
    """Nothing but all-reduces crosses slices: a device's gradients, or at least a share of them, and a few sums of losses."""
    assert found["slices"] == 2 and list(found["between_slices"]) == ["all-reduce"]
    assert least * found["gradient_bytes"] <= found["between_slices"]["all-reduce"]["bytes"] < found["gradient_bytes"] + 1000


@pytest.mark.slow
def test_the_command_plans_the_real_step(tmp_path):
    code, output, found = run_command("2xcpu:4", tmp_path)
    assert code == 0
    check_plan(found, output)
    check_slices(found, 1)
    assert (found["devices"], found["mesh"]) == (8, {"data": 2, "fsdp": 4, "tensor": 1})
    assert found["step_seconds_at_mfu_0.4"] is None
    assert "effort O0" in output and "40% MFU: n/a" in output
    given = sum(found["memory"][name] for name in ("parameters", "moments", "batch"))
    assert found["memory"]["arguments"] == pytest.approx(given, abs=256)  # counters come on top, what is not used goes


@tpu.needs_libtpu
@pytest.mark.parametrize(("topology", "tensor"), [("v5e:2x4", 1), ("v5e:2x4", 2), ("2xv5e:2x2", 1)])
@pytest.mark.slow
def test_the_command_plans_the_real_step_for_tpus(tmp_path, topology, tensor):
    code, output, found = run_command(topology, tmp_path, fsdp=4 // tensor, tensor=tensor)
    assert code == 0
    check_plan(found, output)
    assert found["device_kind"] == "TPU v5 lite"
    assert found["step_seconds_at_mfu_0.4"] > 0
    assert found["memory"]["usable"] == int(15.75 * GIB)
    if topology.startswith("2x"):
        check_slices(found, 1 / 4)  # the four chips of a slice share out what each of them has whole

"""`flowseg plan --by-component`: the components are the step, and what the command says of them."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest
from ml_collections import ConfigDict

from flowseg_jax.aot import components
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.ops.portable import traced_for, without_kernels
from flowseg_jax.training.program import TrainProgram
from tests.aot import test_plan
from tests.helpers.counting import products


def config_of(which: str = "full", **optimizer) -> ConfigDict:
    config = test_plan.smallest_config()
    model = FlowSegConfig.from_dict(config.model.to_dict())
    if which == "segmentor":
        model = dataclasses.replace(model, num_classes=3, semantic_flow=dataclasses.replace(model.semantic_flow, mode="off"))
    config.model = ConfigDict(dataclasses.replace(model, components=which).to_dict())
    config.mesh.update(data=1, fsdp=1)
    config.optimizer.update(param_groups=((".*", 1.0),), **optimizer)
    return config


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("full", ["sam", "siglip", "pixel_decoder", "llm", "mask_decoder", "losses", "optimizer"]),
        ("segmentor", ["sam", "pixel_decoder", "mask_decoder", "losses", "optimizer"]),
        ("vlm", ["sam", "siglip", "llm", "optimizer"]),
    ],
)
def test_the_components_multiply_what_the_step_does(which, names):
    """Nothing is left out and nothing is there twice, forward and backward."""
    program = TrainProgram.build(config_of(which), jax.devices()[:1])
    with without_kernels(), traced_for("cpu"):  # as the step is
        by_component = {
            name: products(jax.make_jaxpr(step)(*given).jaxpr) for name, step, given in components.programs(program)
        }
        whole = products(jax.make_jaxpr(program.step)(program.state, program.batch).jaxpr)
    assert list(by_component) == names
    assert by_component.pop("optimizer") == 0 < min(by_component.values())
    assert sum(by_component.values()) == pytest.approx(whole, rel=1e-9)


def test_a_component_is_one_micro_batch_of_one_device():
    config = config_of(grad_accum_steps=2)
    program = TrainProgram.build(config, jax.devices()[:1])
    (_, _, (_, _, batch, _, _)), *_ = components.programs(program)
    assert batch.sam_images.shape[0] == config.batch_size // 2


def test_every_component_is_compiled_and_reported(capsys):
    config = config_of("vlm")
    reports = components.compile_components(config, "cpu:1")
    assert [x.name for x in reports] == ["sam", "siglip", "llm", "optimizer"]
    assert all(x.refusal is None and min(x.arguments, x.temporaries, x.hlo_lines) > 0 for x in reports)
    head, *rows, together = components.table(reports).splitlines()
    assert head.split()[0] == "component" and [row.split()[0] for row in rows] == [x.name for x in reports]
    assert together.split() == ["together", f"{sum(x.compile_seconds for x in reports):.0f}", "s"]


@pytest.mark.parametrize("refusal", [None, "Ran out of memory on HBM."])
def test_the_command_prints_a_table_then_json_and_fails_where_a_component_does_not_fit(monkeypatch, capsys, refusal):
    sizes = (None,) * 5 if refusal else (2**30, 2**31, 3_000_000, 4_000_000, 12_345)
    found = [
        components.ComponentReport("sam", *sizes, 12.3, refusal),
        components.ComponentReport("llm", 2**30, 0, None, None, 7, 1.2, None),
    ]
    asked = []
    monkeypatch.setattr(
        components, "compile_components", lambda config, name, effort: asked.append((config.seed, name, effort)) or found
    )
    code = flowseg(["plan", "--by-component", "--topology=v5e:2x4", "--xla-opt-level=O1", "--json", "--config.seed=5"])
    assert (code, asked) == (int(refusal is not None), [(5, "v5e:2x4", "O1")])
    *_, sam, llm, together, last = capsys.readouterr().out.splitlines()
    expected = ["does", "not", "fit"] if refusal else ["1.00", "GiB", "2.00", "GiB", "3", "4", "12,345"]
    assert sam.split() == ["sam", "12", "s", *expected]
    assert llm.split() == ["llm", "1", "s", "1.00", "GiB", "0.00", "GiB", "7"]
    assert together.split() == ["together", "14", "s"]
    assert json.loads(last) == [dataclasses.asdict(x) for x in found]

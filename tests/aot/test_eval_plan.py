"""`flowseg plan --eval`: what is lowered, how prices become times, and what is printed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from flowseg_jax.aot import eval_plan
from flowseg_jax.cli import plan as cli
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig
from flowseg_jax.training import flops
from flowseg_jax.types import BatchShape
from tests.helpers import small, tpu

DEVICE = SimpleNamespace(clock=1.5e9)


def program(cycles: float | None, memory: int = 2**30, refusal: str | None = None) -> eval_plan.ProgramReport:
    priced = cycles and SimpleNamespace(
        hidden=cycles,
        exposed=2 * cycles,
        device=DEVICE,
        mfu={"low": 0.1, "high": 0.2},
        by_part=lambda: {"sam": {"cycles": cycles}},
        unpriced=dict,
    )
    return eval_plan.ProgramReport(989e9, memory, priced, 1.0, refusal)


def report(
    image: eval_plan.ProgramReport, one_round: eval_plan.ProgramReport, usable: int | None = 2**31
) -> eval_plan.EvalReport:
    programs = {"encode_image": image, "round": one_round}
    return eval_plan.EvalReport("v5e:4x4", "a note", "TPU v5 lite", 16, 335 * 10**6, usable, programs)


def test_prices_become_expressions_a_second_and_minutes():
    found = report(program(150e6), program(50e6))
    assert found.seconds("encode_image") == pytest.approx(0.1)
    assert found.expressions_per_second == pytest.approx(8 / (0.1 + 0.05 / 1.5))
    images, sentences = eval_plan.split_sizes()
    assert len(eval_plan.SPLITS) == 8 and (images, sentences) == (9_900, 57_457)
    rounds = sentences / 8 + images  # an image has at most one that is not full
    assert found.minutes == pytest.approx((images * 0.1 + rounds * 0.05 / 1.5) / 16 / 60)
    assert found.gpu_minutes == pytest.approx((images + rounds) * 1e-3 / 60, rel=1e-3)  # 989 GFLOP at 989 TFLOP/s
    assert "expressions a second and chip: 60.0" in found.text() and "an image: 989 GFLOP" in found.text()
    assert found.to_json()["programs"]["round"]["priced_cycles"] == 50_000_000


def test_what_does_not_fit_is_said():
    assert report(program(1e6), program(1e6)).fits
    assert not report(program(1e6), program(1e6, memory=2**32)).fits
    refused = report(program(None, refusal="Used 20.1G of 15.75G hbm"), program(1e6))
    assert not refused.fits and refused.minutes is None
    assert "an image: does not fit. The compiler: Used 20.1G" in refused.text()


def test_flops_are_those_that_training_counts_of_the_same_parts():
    model = small.config()
    prefix, length = 1 + model.num_visual_tokens, 16
    shape = BatchShape(1, prefix, eval_plan.EXPRESSIONS, 1, model.sam.image_size, model.siglip.image_size, 1)
    parts = {name: part.forward for name, part in flops.forward(model, shape, LossConfig(num_points=0)).items()}
    encoders = ("sam", "siglip", "visual_projector", "seg_projector", "llm", "connector", "pixel_decoder")
    found = eval_plan.model_flops(model, prefix, length)
    assert found["encode_image"] == pytest.approx(sum(parts[name] for name in encoders))
    assert found["round"] > flops.language(model.llm, length).forward


@pytest.fixture
def uncompiled(monkeypatch):
    """Everything but the compilers: what was lowered."""
    lowered = []
    sizes = SimpleNamespace(argument_size_in_bytes=1, temp_size_in_bytes=2, output_size_in_bytes=4)
    text = "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}"
    executable = SimpleNamespace(memory_analysis=lambda: sizes, as_text=lambda: text)
    monkeypatch.setattr(eval_plan, "try_to_compile", lambda program: (lowered.append(program), (executable, None))[1])
    return lowered


def test_both_programs_are_lowered_with_matrices_in_bfloat16(uncompiled):
    model = small.config()
    found = eval_plan.plan_eval(ConfigDict({"model": model.to_dict()}), "cpu:1")
    assert list(found.programs) == ["encode_image", "round"] and found.programs["round"].memory == 7
    text = [program.as_text() for program in uncompiled]
    assert all("bf16" in one for one in text)
    assert f"1x{eval_plan.EXPRESSIONS}x" in text[1]
    assert "one image a device" in found.text() and found.minutes is None


def test_a_model_without_masks_is_refused():
    model = ConfigDict({"model": small.config().to_dict()})
    model.model.components = "vlm"
    with pytest.raises(UserError, match="--eval"):
        eval_plan.plan_eval(model, "cpu:1")


def test_the_command_prints_the_report(monkeypatch, capsys):
    monkeypatch.setattr(eval_plan, "plan_eval", lambda config, topology, effort: report(program(150e6), program(50e6)))
    assert cli.main(["--eval", "--topology=v5e:4x4", "--json", "--config=configs/shapes_tiny.py"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["expressions_per_second_and_device"] == pytest.approx(60)


@tpu.needs_libtpu
@pytest.mark.slow
def test_tpu_programs_are_priced_in_full():
    found = eval_plan.plan_eval(ConfigDict({"model": small.config().to_dict()}), "v5e:2x2")
    assert found.fits and found.expressions_per_second > 0
    assert not any(x.priced.unpriced() for x in found.programs.values())

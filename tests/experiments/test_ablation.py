"""The ablation: its variants differ in one thing at a time, its runs come in a useful order, and finished ones are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flowseg_jax.configs.shapes_ablation import FROZEN

from experiments import ablation, command_line
from experiments.ablation_tables import MAIN, NAMES, SIDE, Counts
from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.training import loop
from flowseg_jax.training.optimizer import lr_multipliers
from flowseg_jax.training.program import RunConfig
from tests.helpers.answers import record, write


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Training and evaluation that do nothing but count, and leave what they would."""
    calls = {"train": [], "evaluate": []}

    def train(config, workdir):
        calls["train"].append(f"{workdir.parent.name}/{workdir.name}")
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(configs.to_json(config))
        return workdir / "model"

    class Evaluated:
        def __init__(self, model, data):
            self.run_dir, self.step = model.parent, json.loads((model.parent / "config.json").read_text())["num_steps"]

        def run(self, split, out, *, shuffle_text, pictures):
            assert split == "val" and not pictures
            calls["evaluate"].append(f"{self.run_dir.parent.name}/{self.run_dir.name}{'*' * shuffle_text}")
            out.mkdir(exist_ok=True)
            name = "val_shuffled" if shuffle_text else "val"
            write(out / f"{name}.jsonl", [record(2, 0, iou=30, oracle=80), record(1, 0, iou=10 if shuffle_text else 50)])
            about = {"data": "d", "checkpoint": {"step": self.step, "digest": self.run_dir.name}}
            (out / f"{name}.json").write_text(json.dumps(about))

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(loop, "load_dataset", lambda config: "data")
    monkeypatch.setattr(ablation.EvalModel, "load", lambda model: model)
    monkeypatch.setattr(ablation, "ReferringEvaluation", Evaluated)
    monkeypatch.setattr(ablation, "train_components", lambda data, runs: None)
    monkeypatch.setattr(ablation, "read_model_config", lambda path: {"checksums": path.parent.name})
    return calls


def run(tmp_path, budgets):
    ablation.main(tmp_path / "data", tmp_path / "runs", budgets)


def test_the_plan_has_whole_seeds_first_and_side_questions_at_one_budget():
    todo = list(ablation.plan({500: [0, 1], 1500: [0]}))
    assert todo[:6] == [*((500, 0, variant) for variant in MAIN), (500, 1, "baseline")]
    assert todo[10:14] == [(500, seed, variant) for seed in (0, 1) for variant in SIDE]
    assert todo[14:] == [(1500, 0, variant) for variant in MAIN]
    assert len(list(ablation.plan({n: range(seeds) for n, seeds in command_line.BUDGETS.items()}))) == 5 * 20 + 2 * 8


def test_finished_runs_are_kept(counted, tmp_path):
    run(tmp_path, {500: [0, 1]})
    names = [f"500/{variant}_{seed}" for variants in (MAIN, SIDE) for seed in (0, 1) for variant in variants]
    assert counted["train"] == names
    assert counted["evaluate"] == [name + star for name in names for star in (("", "*") if name.endswith("0") else ("",))]
    first = json.loads((tmp_path / "runs/500/sr_1/config.json").read_text())
    assert (first["seed"], first["num_steps"], first["model"]["semantic_flow"]["mode"]) == (1, 500, "sr")
    assert first["init_from"] == [str(tmp_path / "runs" / name / "model") for name in ("stage2", "stage1")]
    assert first["data"]["dir"] == str(tmp_path / "data/shapes/prepared")

    (tmp_path / "runs/500/sr_1/eval/val.json").unlink()  # stopped before it was evaluated
    for seen in counted.values():
        seen.clear()
    run(tmp_path, {500: [1], 1500: [0]})
    assert counted["train"] == ["500/sr_1", *(f"1500/{variant}_0" for variant in MAIN)]

    table = (tmp_path / "runs/ablation.md").read_text()
    assert all(f"| 500 | {name} | 2 |" in table and f"| 1,500 | {name} | 1 |" in table for name in MAIN.values())
    found = Counts.read(tmp_path / "runs/results")  # the runs of both times
    assert found.budgets(MAIN) == [500, 1500] and found.seeds(500, NAMES) == [0, 1] and found.seeds(1500, MAIN) == [0]
    np.testing.assert_array_equal(found.runs[500, "cr", 1], [[50, 100, 50, 100], [30, 100, 80, 100]])  # in the order of images
    assert found.controls[500, "cr", 0][0].tolist() == [10, 100, 10, 100] and (500, "cr", 1) not in found.controls


def test_a_run_of_another_config_is_not_taken_for_finished(counted, tmp_path):
    config = ablation.read("sr", tmp_path, tmp_path).unlock()
    config.seed, workdir = 1, tmp_path / "500" / "sr_1"
    ablation.finish(config, workdir)
    ablation.finish(config, workdir)
    assert len(counted["evaluate"]) == 1
    config.num_steps += 1
    ablation.finish(config, workdir)
    (workdir / "eval" / "val.json").write_text(json.dumps({"checkpoint": {"step": 1}}))  # of an earlier model
    ablation.finish(config, workdir)
    config.optimizer.learning_rate *= 2
    ablation.finish(config, workdir)
    assert len(counted["evaluate"]) == 4


def test_runs_of_other_components_are_not_mixed(counted, tmp_path, monkeypatch):
    run(tmp_path, {1500: [0]})
    monkeypatch.setattr(ablation, "read_model_config", lambda path: {"checksums": "trained anew"})
    with pytest.raises(UserError, match="has runs with other components; remove it, or name another --runs"):
        run(tmp_path, {1500: [0]})


def test_variants_differ_in_one_thing_and_nothing_in_front_of_the_mask_decoder_learns():
    learned = {}
    for variant in NAMES:
        plan = RunConfig.from_config(configs.read(f"configs/shapes_ablation.py:{variant}"))
        names = flatten_params(flowseg.params_dict(flowseg.abstract_model(plan.model)[1]))
        rates = lr_multipliers(list(names), plan.optimizer.param_groups)
        assert {name.split("/")[0] for name, rate in rates.items() if rate is None} == set(FROZEN)
        learned[variant] = {name for name, rate in rates.items() if rate}
    assert {name.split("/")[0] for name in learned["baseline"]} == {"mask_decoder", "llm_projector", "background_embed"}
    added = {
        ("baseline", "sr"): "/semantic_refinement/",
        ("sr", "sr_cr"): "/condition_refinement/",
        ("sr_cr", "sr_cr_bar"): "boundary/",
        ("baseline", "cr"): "/condition_refinement/",
        ("baseline", "sr_residual"): "/semantic_refinement/",
    }
    for (before, after), part in added.items():
        assert learned[before] < learned[after] and all(part in name for name in learned[after] - learned[before])
    assert learned["sr_even"] == learned["sr"]
    with pytest.raises(UserError, match=r"no variant 'sr_bar' of the ablation \(did you mean"):
        configs.read("configs/shapes_ablation.py:sr_bar")


@pytest.mark.parametrize(
    ("flags", "budgets"), [([], {500: 8, 1500: 8, 4500: 4}), (["--budget=1500", "--seeds=3,5"], {1500: [3, 5]})]
)
def test_flags(flags, budgets, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation, "main", lambda *arguments: asked.append(arguments))
    assert command_line.ablation(flags) == 0
    expected = {budget: list(range(seeds)) if isinstance(seeds, int) else seeds for budget, seeds in budgets.items()}
    assert asked[0][2] == expected
    with pytest.raises(UserError, match="--seeds takes integers, 0,1,2, got 'x'"):
        command_line.ablation(["--seeds=x"])
    with pytest.raises(UserError, match="invalid choice: 700"):
        command_line.ablation(["--budget=700"])

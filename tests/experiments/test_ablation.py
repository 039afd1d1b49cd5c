"""The ablation: its variants differ in one thing at a time, its tables are right, and what is finished is not repeated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import ablation
from experiments.ablation import Estimate, VariantComparison
from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, metrics, protocols
from flowseg_jax.models import flowseg
from flowseg_jax.training import loop
from flowseg_jax.training.initialization import InitSource
from flowseg_jax.training.optimizer import lr_multipliers
from flowseg_jax.training.program import RunConfig


def sample(image: int, number: int, found: int, best: int, family: str = "attribute") -> dict:
    """One line of a results file: of 10 pixels, `found` are in the selected mask and `best` in the best candidate."""
    i = {"intersection": found, "union": 10, "oracle_intersection": best, "oracle_union": 10}
    once = {
        name.replace("inter", "single_cover_inter").replace("union", "single_cover_union"): value for name, value in i.items()
    }
    about = {"image_id": image, "ann_id": number, "sentence_id": 0, "text": "a", "sentence": "a", "family": family}
    answer = {
        "text_form": "lower",
        "count": 1,
        "failed": False,
        "failure": "",
        "area": 10,
        "score": 0.5,
        "no_target_threshold": 0.0,
    }
    return about | i | once | answer


def chance(rng: np.random.Generator, images: int = 12) -> list[dict]:
    found, more = rng.integers(0, 8, (images, 3)), rng.integers(0, 4, (images, 3))
    families = ("attribute", "ordinal", "relation")
    return [sample(i, k, int(found[i, k]), int((found + more)[i, k]), families[k]) for i in range(images) for k in range(3)]


def test_figures_are_those_of_the_evaluation(rng):
    records = {variant: {seed: chance(rng) for seed in (0, 1)} for variant in ablation.VARIANTS}
    comparison = VariantComparison.of(records, resamples=50)
    assert (comparison.n, comparison.seeds) == (36, (0, 1))
    for variant, runs in records.items():
        tables = [metrics.summarise(runs[seed]) for seed in (0, 1)]
        tables = [t | {"ciou_to_oracle": t["oracle_ciou"] - t["ciou"]} for t in tables]
        for name, estimate in comparison.figures[variant].items():
            assert estimate.seeds == pytest.approx([table[name] for table in tables])
            assert estimate.mean == pytest.approx(np.mean(estimate.seeds)) and estimate.low < estimate.mean < estimate.high
        for family, share in comparison.families[variant].items():
            assert share == pytest.approx(np.mean([table["families"][family]["p_at"]["0.5"] for table in tables]))


def test_differences_are_paired(rng):
    """Each step and the whole way; the interval is that of `compare` on one seed, and vanishes where nothing differs."""
    first = chance(rng, images=60)
    better = [sample(r["image_id"], r["ann_id"], r["intersection"] + r["image_id"] % 3, 10, r["family"]) for r in first]
    runs = dict(zip(ablation.VARIANTS, (first, better, better, first), strict=True))
    comparison = VariantComparison.of({variant: {0: run} for variant, run in runs.items()})
    assert list(comparison.differences) == [
        ("baseline", "sr"),
        ("sr", "sr_cr"),
        ("sr_cr", "sr_cr_bar"),
        ("baseline", "sr_cr_bar"),
    ]
    step = comparison.differences["baseline", "sr"]
    for name, expected in audit.compare(first, better, protocols.XSAM).items():
        assert step[name].mean == pytest.approx(expected.second - expected.first)
        assert (step[name].low, step[name].high) == pytest.approx((expected.low, expected.high), abs=0.5)
    nothing = comparison.differences["sr", "sr_cr"]["ciou"]
    assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)


def test_hand_computed_table():
    """Two images of one sample each: 5 and 9 of 10 pixels are found, or 9 and 5, and 9 and 9 with the next variant.

    Whatever images are drawn, the baseline's two seeds have 14 of 20 between them, and SR gains 6.
    """
    runs = {"baseline": {3: [(5, 9), (9, 10)], 4: [(9, 9), (5, 10)]}, "sr": {3: [(9, 10), (9, 10)], 4: [(9, 10), (9, 10)]}}
    records = {
        variant: {seed: [sample(i, 0, *values) for i, values in enumerate(run)] for seed, run in seeds.items()}
        for variant, seeds in runs.items()
    }
    comparison = VariantComparison.of(records, resamples=100)
    lines = comparison.tables().splitlines()
    assert "val, n 2 | cIoU | gIoU | oracle cIoU | oracle cIoU - cIoU | cIoU by seed" in lines[0]
    assert lines[2] == (
        "| baseline | 70.0 [70.0, 70.0] ± 0.0 | 70.0 [70.0, 70.0] ± 0.0 | 95.0 [90.0, 100.0] ± 0.0 "
        "| 25.0 [20.0, 30.0] ± 0.0 | 70.0 70.0 |"
    )
    assert "| +SR against baseline | +20.0 [+20.0, +20.0] ± 0.0, 2 of 2 |" in comparison.tables()
    assert list(comparison.differences) == [("baseline", "sr")]
    assert comparison.to_json()["differences"][0]["ciou"]["mean"] == pytest.approx(20)


def test_spread_and_agreement():
    estimate = Estimate(1.0, 0.0, 2.0, (3.0, 1.0, -1.0))
    assert estimate.spread == pytest.approx(2.0) and estimate.agree == 2
    assert Estimate(1.0, 0.0, 2.0, (1.0,)).spread is None


def test_different_samples_are_refused():
    records = {"baseline": {0: [sample(0, 0, 5, 9)]}, "sr": {0: [sample(0, 1, 5, 9)]}}
    with pytest.raises(UserError, match="different samples"):
        VariantComparison.of(records, resamples=2)


@pytest.fixture
def counted(monkeypatch, rng):
    """Training and evaluation that do nothing but count, and leave what they would."""
    calls = {"train": [], "evaluate": []}

    def train(config, workdir):
        calls["train"].append(workdir.name)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(configs.to_json(config))
        return workdir / "model"

    class Evaluated:
        def __init__(self, model, step):
            self.model, self.step = model, step

        def run(self, split, out, *, pictures):
            calls["evaluate"].append(self.model.parent.name)
            out.mkdir(exist_ok=True)
            (out / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chance(rng)))
            (out / f"{split}.json").write_text(json.dumps({"checkpoint": {"step": self.step}}))

    def benchmark(model, data):
        return Evaluated(model, json.loads((model.parent / "config.json").read_text())["num_steps"])

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(loop, "load_dataset", lambda config: "data")
    monkeypatch.setattr(ablation.EvalModel, "load", lambda model: model)
    monkeypatch.setattr(ablation, "ReferringEvaluation", benchmark)
    return calls


def read(variant: str):
    return configs.read(f"configs/shapes_ablation.py:{variant}")


def test_finished_runs_are_kept(counted, tmp_path):
    ablation.ablate(read, (0, 1), tmp_path)
    names = [f"{variant}_{seed}" for seed in (0, 1) for variant in ablation.VARIANTS]
    assert counted == {"train": names, "evaluate": names}
    assert [json.loads((tmp_path / name / "config.json").read_text())["seed"] for name in names] == [0] * 4 + [1] * 4
    table = (tmp_path / "ablation.md").read_text()
    assert all(f"| {name} |" in table for name in ablation.VARIANTS.values())

    (tmp_path / "sr_1" / "eval" / "val.json").unlink()  # stopped before it was evaluated
    for seen in counted.values():
        seen.clear()
    again = ablation.ablate(read, (0, 1, 2), tmp_path)
    names = ["sr_1", *(f"{variant}_2" for variant in ablation.VARIANTS)]
    assert counted == {"train": names, "evaluate": names} and again.seeds == (0, 1, 2)
    assert json.loads((tmp_path / "ablation.json").read_text())["seeds"] == [0, 1, 2]


def test_a_run_of_another_config_is_not_taken_for_finished(counted, tmp_path):
    config = read("sr").unlock()
    ablation.finish(config, tmp_path / "sr_0")
    config.num_steps += 1
    ablation.finish(config, tmp_path / "sr_0")
    (tmp_path / "sr_0" / "eval" / "val.json").write_text(json.dumps({"checkpoint": {"step": 1}}))  # of an earlier model
    ablation.finish(config, tmp_path / "sr_0")
    assert len(counted["evaluate"]) == 3
    config.optimizer.learning_rate *= 2
    ablation.finish(config, tmp_path / "sr_0")
    assert len(counted["evaluate"]) == 4
    ablation.finish(config, tmp_path / "sr_0")
    assert len(counted["evaluate"]) == 4


def test_variants_differ_in_one_thing_and_share_their_encoders():
    """What every variant learns is what the one before learns and one part more; all else comes from the shipped model."""
    learned = {}
    for variant in ablation.VARIANTS:
        config = read(variant)
        plan = RunConfig.from_config(config)
        shapes = {
            name: x.shape for name, x in flatten_params(flowseg.params_dict(flowseg.abstract_model(plan.model)[1])).items()
        }
        rates = lr_multipliers(list(shapes), plan.optimizer.param_groups)
        brought = {name for text in config.init_from for name in InitSource.open(text, shapes).places}
        assert brought == {name for name, rate in rates.items() if rate is None}
        learned[variant] = set(shapes) - brought
    assert {name.split("/")[0] for name in learned["baseline"]} == {"mask_decoder", "llm_projector", "background_embed"}
    names = list(ablation.VARIANTS)
    parts = ("/semantic_refinement/", "/condition_refinement/", "boundary/")
    for before, after, part in zip(names, names[1:], parts, strict=False):
        assert learned[before] < learned[after] and all(part in f"/{name}" for name in learned[after] - learned[before])
    with pytest.raises(UserError, match=r"no variant 'sr_bar' of the ablation \(did you mean"):
        read("sr_bar")

"""The three stages end to end in a minute: data sets in four layouts, three kinds of models, one handed on to the next."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from flowseg_jax.configs.stage3_mixed import SETS

from experiments import stages
from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.checkpoints.pretrained import load_pretrained
from flowseg_jax.data import masks
from flowseg_jax.data.formats import open_layout
from flowseg_jax.data.records import examples
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.synthetic import toy_dataset
from flowseg_jax.training.optimizer import lr_multipliers
from flowseg_jax.training.program import RunConfig
from tests.helpers import small


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(outcome, runs, what was said) of the shortest form."""
    root, said = tmp_path_factory.mktemp("stages"), []

    def tiny(cls, vocab_size: int = 512, num_classes: int = 0) -> FlowSegConfig:
        llm = dataclasses.replace(
            LanguageConfig.tiny(vocab_size), hidden_size=28, num_hidden_layers=1, head_dim=14, intermediate_size=36
        )
        lean = small.lean(negatives_group_size=1, llm=llm)
        return dataclasses.replace(lean, mask_decoder=dataclasses.replace(lean.mask_decoder, num_queries=12))

    size = stages.Size(shapes=40, reasonseg=10, panoptic=16, chat=16, steps=(40, 40, 2), evaluated=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowSegConfig, "tiny", classmethod(tiny))
        for module in ("experiments.stages", "flowseg_jax.training.loop", "flowseg_jax.training.initialization"):
            patch.setattr(f"{module}.log", said.append)
        outcome = stages.main(root / "data", root / "runs", size)
    return outcome, root / "runs", said


@pytest.mark.slow
def test_what_stages_1_and_2_minimise_falls(ran):
    outcome, *_ = ran
    for name in ("stage 1", "stage 2"):
        loss, first, last = outcome.losses[name]
        assert last < first, (name, loss, first, last)
    assert all(np.isfinite(values).all() for _, *values in outcome.losses.values())


@pytest.mark.slow
def test_each_stage_hands_on_what_it_has(ran):
    _, runs, said = ran
    parts = {name: load_pretrained(runs / name / "model").params for name in ("stage1", "stage2", "stage3")}
    assert "llm" not in parts["stage1"] and "mask_decoder" not in parts["stage2"]
    assert {"llm", "mask_decoder"} <= set(parts["stage3"])
    sam = [flatten_params(parts[name]["sam"]) for name in ("stage1", "stage2")]
    assert all(np.array_equal(sam[0][path], sam[1][path]) for path in sam[0])  # frozen in stage 2
    fresh = [line for line in said if line.startswith("not found, initialised afresh: ")]
    assert len(fresh) == 2 and "background" in fresh[1] and "mask_decoder/layers/semantic_refinement" in fresh[1]
    assert "sam/" not in fresh[1] and "llm/" not in fresh[1] and "pixel_decoder" not in fresh[1]
    assert any("stage1/model: " in line and "not used: category_head" in line for line in said)


@pytest.mark.parametrize("llm", ["qwen3_4b", "qwen3_1b7", "phi3_mini", "tiny"])
@pytest.mark.parametrize("stage", ["stage1_segmentor", "stage2_align", "stage3_mixed"])
def test_every_stage_has_a_config_for_every_language_model(stage, llm):
    config = configs.read(f"configs/{stage}.py:{llm}")
    plan = RunConfig.from_config(config)
    assert plan.model.components == {"stage1": "segmentor", "stage2": "vlm", "stage3": "full"}[stage[:6]]
    if llm == "tiny":
        return
    # X-SAM's recipe, with FlowSeg's two epochs of stage 3.
    recipe = {
        "stage1_segmentor": (64, 36 * 118_287 // 64, 1e-4, 0.05, 0.01, {"sam/patch_embed/kernel": 0.1, "connector/x": 1.0}),
        "stage2_align": (
            256,
            558_128 // 256,
            1e-3,
            0.0,
            1.0,
            {"llm/embed_tokens": None, "sam/x": None, "seg_projector/x": 1.0},
        ),
        "stage3_mixed": (
            64,
            config.num_steps,
            4e-5,
            0.05,
            1.0,
            {"siglip/x": 0.1, "sam/x": 0.1, "llm/embed_tokens": 1.0, "mask_decoder/x": 1.0},
        ),
    }
    batch, steps, rate, decay, clip, multiplied = recipe[stage]
    optimizer = plan.optimizer
    assert (config.batch_size, config.num_steps) == (batch, steps)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.max_grad_norm) == (rate, decay, clip)
    assert (optimizer.warmup_fraction, optimizer.b1, optimizer.b2) == (0.03, 0.9, 0.999)
    assert lr_multipliers(list(multiplied), optimizer.param_groups) == multiplied
    if stage == "stage3_mixed":
        images = sum(SETS.values())
        assert plan.model.negatives_group_size == 8 and config.num_steps > 2 * images // 64 and plan.shape.max_names == 128


def test_an_unknown_language_model_is_named():
    with pytest.raises(UserError, match=r"no language model 'qwen3_4' for a stage \(did you mean 'qwen3_4b'"):
        configs.read("configs/stage3_mixed.py:qwen3_4")


def test_the_toy_data_set_is_a_data_set_of_ones_own(tmp_path):
    """All three kinds of masks, each the picture's one star; and the fine-tuning config fits what they need."""
    toy_dataset.write(tmp_path / "mine", images=6)
    layout = open_layout("jsonl", tmp_path / "mine")
    assert layout.splits == ("train", "val") and layout.size("train") == 2
    kinds = {type(json.loads(line)["mask"]) for line in (tmp_path / "mine" / "toy.jsonl").read_text().splitlines()}
    assert kinds == {list, dict, str}
    for split in layout.splits:
        for example in examples(layout, split):
            (annotation,) = example.annotations
            area = masks.decode([annotation.rle], example.height, example.width).mean()
            assert 0.005 < area < 0.2 and {e.text for e in example.expressions} == {"the zib", "find the zib", "a zib"}
    with pytest.raises(UserError, match="mine: cannot be made"):
        toy_dataset.write(tmp_path / "mine")
    plan = RunConfig.from_config(configs.read("configs/finetune.py"))
    assert plan.model.num_classes == 0 and plan.model.generic_pass == "off" and plan.options.objects == "referred"

"""The spread over templates: every prompt template asks the same samples in the same shapes, each row is an evaluation."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest

from flowseg_jax.analysis import prompt_sensitivity, runner
from flowseg_jax.data import prepare
from flowseg_jax.data.prompts import REFERRING_ANSWERS, REFERRING_QUESTIONS, PromptTemplates
from flowseg_jax.data.train_dataset import open_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.models import flowseg
from tests.helpers import minirefcoco as mini
from tests.helpers import small


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A random model and a miniature RefCOCO."""
    root = tmp_path_factory.mktemp("data")
    prepared = prepare.prepare(mini.write(root / "layout"), root / "prepared", tokenizer_vocab=300, log=lambda _: None)
    tokenizer = open_tokenizer(prepared, PromptTemplates())
    cfg = small.lean()
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=tokenizer.vocab))
    evaluator = Evaluator(flowseg.abstract_model(cfg)[0])
    return ReferringEvaluation(
        EvalModel(cfg, evaluator, small.params(cfg), {"digest": "0"}, tokenizer, PromptTemplates()), prepared, 2
    )


def test_all_templates_ask_the_same_samples(benchmark):
    first = benchmark.open("train")
    for question, answer in ((0, 0), (6, 3), (len(REFERRING_QUESTIONS) - 1, len(REFERRING_ANSWERS) - 1)):
        other = benchmark.open("train", prompts=PromptTemplates(question=question, answer=answer))
        ours, theirs = (sorted(batch.places) for batch in (first.batch(0), other.batch(0)))
        assert other.samples == first.samples and ours == theirs
        ours, theirs = (data.batch(0).rounds[0].questions.input_ids for data in (first, other))
        assert np.array_equal(ours, theirs) == ((question, answer) == (0, 0))


def test_a_template_is_an_evaluation(benchmark):
    analysis, compiles = runner.AnalysisRunner(benchmark, "train", images=2), benchmark.model.evaluator.compiles
    rows = prompt_sensitivity.evaluate(analysis, [(0, 0), (7, 4), (0, 0)])
    assert [(r["question"], r["answer"]) for r in rows] == [(0, 0), (7, 4), (0, 0)]
    assert rows[0] == rows[2] and rows[0]["same"] == 100 and rows[0]["n"] == rows[1]["n"] > 0
    assert rows[0]["giou"] != rows[1]["giou"]
    compiled = compiles.total()
    assert prompt_sensitivity.evaluate(analysis, [(0, 0)]) == rows[:1]
    assert compiles.total() == compiled > 0  # a prompt template is compiled once


def test_spread_by_hand():
    found = prompt_sensitivity.summarise(
        [{"ciou": 60.0, "giou": 1.0}, {"ciou": 63.0, "giou": 1.0}, {"ciou": 66.0, "giou": 4.0}]
    )
    assert found["ciou"] == {"mean": 63, "sd": 3, "lowest": 60, "highest": 66}
    assert found["giou"] == pytest.approx({"mean": 2, "sd": 3**0.5, "lowest": 1, "highest": 4})
    assert prompt_sensitivity.summarise([{"ciou": 60.0, "giou": 1.0}])["ciou"]["sd"] is None


def test_the_page_shows_every_template(monkeypatch, tmp_path):
    """Numbers that say which prompt template they are of, so that a cell in the wrong place would show."""

    def evaluate(_, templates):
        assert templates[0] == (2, 1)  # the model's own first: the others are compared with it
        return [{"question": q, "answer": a, "n": 9, "ciou": 10.0 * q + a, "giou": 50.0, "same": 100.0} for q, a in templates]

    monkeypatch.setattr(prompt_sensitivity, "evaluate", evaluate)
    evaluation = types.SimpleNamespace(model=types.SimpleNamespace(prompts=PromptTemplates(question=2, answer=1)))
    source = types.SimpleNamespace(evaluation=evaluation, split="val", about={"images": None}, origin=["Model m"])
    page = prompt_sensitivity.run(source, tmp_path)
    result = json.loads((tmp_path / "prompt_sensitivity_val.json").read_text())
    assert len(result["templates"]) == len(REFERRING_QUESTIONS) * len(REFERRING_ANSWERS)
    assert result["spread"]["answers, model's question"]["ciou"]["mean"] == 22  # 20 .. 24
    assert result["spread"]["questions, model's answer"]["ciou"]["highest"] == 71
    cells = [part.partition("</text>")[0] for part in page.read_text().split(">") if "</text" in part]
    assert page.suffix == ".html" and len(cells) > 120


def test_what_cannot_be_measured_is_said(benchmark):
    with pytest.raises(UserError, match="split"):
        runner.AnalysisRunner(benchmark, "vall")
    with pytest.raises(UserError, match="--max-images must be at least 1, got -1"):
        runner.AnalysisRunner(benchmark, "train", images=-1)

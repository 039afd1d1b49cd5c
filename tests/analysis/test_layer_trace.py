"""What is measured from the decoder's layers is what the evaluation finds."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest

from flowseg_jax.analysis import boundary, layer_trace
from flowseg_jax.analysis import runner as source
from flowseg_jax.data.eval_dataset import EvalBatch, QueryRound
from flowseg_jax.data.records import Sample
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import postprocess
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.tasks import referring
from flowseg_jax.models import flowseg
from flowseg_jax.types import ExpressionQueries, ImageInputs
from tests.helpers import small


class Data(list):
    """Batches after one prefix that know how many samples they hold."""

    prefix = np.zeros(0, np.int32)

    @property
    def samples(self):
        return sum(len(row) for batch in self for asked in batch.rounds for row in asked.samples)


@pytest.fixture(scope="module")
def model():
    cfg = small.lean()
    params = small.params(cfg)
    params["boundary"]["alpha"] = np.full_like(params["boundary"]["alpha"], 3.0)
    return cfg, flowseg.abstract_model(cfg)[0], params


@pytest.fixture(scope="module")
def data(model):
    cfg, *_ = model
    rng = np.random.default_rng(3)
    batch, sizes = small.batch(cfg), [(40, 30), (64, 48)]
    samples = [[Sample(b, f"{b}.png", 10 * b + k, 0, k, f"s{k}", "", (0,), 1, f"s{k}") for k in range(2)] for b in range(2)]
    y, x = np.mgrid[:64, :48]
    truth = [np.array([(x[:h, :w] < 9 + 9 * k) & (y[:h, :w] > 5) for k in range(2)]) for h, w in sizes]
    ignored = [np.zeros((1, *size), bool) for size in sizes]
    ignored[0][:, :4] = True
    images = [rng.integers(0, 255, (*size, 3)).astype(np.uint8) for size in sizes]
    after = 1 + cfg.num_visual_tokens
    fields = {
        name: getattr(batch, name)[:, after:] for name in ("input_ids", "position_ids", "segment_ids", "phrase_ids", "seg_ids")
    }
    asked = QueryRound(ExpressionQueries(**fields, query_valid=np.ones((2, 2), bool)), samples, truth, truth)
    views = ImageInputs(batch.sam_images, batch.resized_hw, batch.siglip_images)
    data = Data([EvalBatch(views, [asked], [0, 1], ignored, images, sizes, (128, 128))])
    data.prefix = batch.input_ids[0, :after]
    return data


@pytest.fixture(scope="module")
def records(model, data):
    """What the evaluation says of the same samples."""
    _, graphdef, params = model
    return referring.evaluate(Evaluator(graphdef), params, lambda **_: data, split="val").records


@pytest.fixture(scope="module")
def traced(model, data):
    _, graphdef, params = model
    return list(source.measure(graphdef, params, data, layer_trace.layer_trace, "layers"))


@pytest.fixture(scope="module")
def refined(model, data):
    _, graphdef, params = model
    return list(source.measure(graphdef, params, data, boundary.before_and_after, "bar"))


def test_the_last_prediction_is_the_evaluation(model, records, traced):
    layers_count = model[0].mask_decoder.num_layers
    for record, m in zip(records, traced, strict=True):
        assert m.sample.sentence == record["sentence"] and m.values["selected"].shape == (layers_count + 1,)
        assert (m.values["selected"][-1], m.values["best"][-1]) == (record["query"], record["best_query"])
        assert (m.values["margin"] > 0).all() and m.masks.shape == (2 * layers_count + 2, record["height"], record["width"])
        assert m.values["drift"][0] == m.values["step"][0] == 0 and m.values["step"][1] == m.values["drift"][1] > 0
        assert (np.abs(m.values["cosine_best"]) <= 1).all()


def test_proposals_are_the_queries_that_show_the_object(rng):
    logits, truth, inside = rng.normal(size=(5, 6, 8)), (rng.random((6, 8)) > 0.5).astype(np.float32), np.ones((6, 8))
    inside[:, 6:] = truth[:, 6:] = 0
    logits[0], logits[1] = truth - 0.5, -1
    ious = postprocess.iou_on_grid(*(x.astype(np.float32) for x in (logits, truth, inside)))
    expected = [((x > 0) * truth).sum() / (np.maximum(x > 0, truth) * inside).sum() for x in logits]
    np.testing.assert_allclose(ious, expected, rtol=1e-6)
    assert ious[0] == 1 and ious[1] == 0


def test_proposals_count_the_best_query(model, traced):
    for m in traced:
        proposals = m.values["proposals"]
        assert proposals.shape == m.values["best"].shape and (proposals == proposals.astype(int)).all()
        assert (0 <= proposals).all() and (proposals <= model[0].mask_decoder.num_queries).all()
    assert len({tuple(m.values["proposals"]) for m in traced}) > 1


def test_before_and_after_bar(records, traced, refined):
    """After BAR stands what the evaluation counts; before it, what the last layer predicts."""
    for record, flow, m in zip(records, traced, refined, strict=True):
        assert m.iou[1] == record["iou"]
        np.testing.assert_array_equal(m.masks[0], flow.masks[-2])
        counted = ~m.ignored
        for mask, iou in zip(m.masks, m.iou, strict=True):
            expected = (mask & m.truth & counted).sum() / ((mask | m.truth) & counted).sum()
            assert iou == pytest.approx(expected)
        assert 0 < m.values["band"] <= 1 and 0 <= m.values["mask"] <= 1
    assert any((m.masks[0] != m.masks[1]).any() for m in refined)


def test_means_over_samples(traced):
    rows = layer_trace.summarise(traced)
    assert [row["prediction"] for row in rows] == list(range(len(rows)))
    assert rows[0]["gate"] is None and rows[-1]["agreement"] == 100
    for name in ("margin", "cosine_selected", "cosine_best", "drift"):
        assert rows[1][name] == pytest.approx(np.mean([m.values[name][1] for m in traced]))
    assert rows[1]["iou_best"] == pytest.approx(100 * np.mean([m.iou[3] for m in traced]))
    assert rows[2]["iou_selected"] == pytest.approx(100 * np.mean([m.iou[4] for m in traced]))


def test_pages(model, traced, refined, tmp_path):
    cfg, _, params = model
    evaluation = types.SimpleNamespace(model=types.SimpleNamespace(cfg=cfg, params=params))

    def asked(measured):
        return types.SimpleNamespace(
            measure=lambda *_: iter(measured), split="val", about={"images": 2}, origin=["Model m"], evaluation=evaluation
        )

    (tmp_path / "layer_trace_val").mkdir()
    (tmp_path / "layer_trace_val" / "7_of-an-earlier-run.png").write_bytes(b"")
    page = layer_trace.run(asked(traced), tmp_path).read_text()
    kept = [path.name for path in (tmp_path / "layer_trace_val").iterdir()]
    assert all(f"layer_trace_val/{name}" in page for name in kept) and page.count("<img") == len(kept)
    assert len({name.split("_")[0] for name in kept}) == 2  # a row of panels of each image, and none of an earlier run
    assert "Model m" in page
    result = json.loads((tmp_path / "layer_trace_val.json").read_text())
    assert result["n"] == 4 and result["groups"]["all"] == layer_trace.summarise(traced)
    page = boundary.run(asked(refined), tmp_path).read_text()
    kept = [path.name for path in (tmp_path / "boundary_val").iterdir()]
    assert page.count("<img") == len(kept) and len({name.split("_")[0] for name in kept}) == 4
    result = json.loads((tmp_path / "boundary_val.json").read_text())
    assert result["alpha"] == 3.0 and result["groups"]["all"] == boundary.summarise(
        [boundary.with_boundary(m) for m in refined]
    )
    evaluation.model.cfg = dataclasses.replace(cfg, boundary=dataclasses.replace(cfg.boundary, enabled=False))
    with pytest.raises(UserError, match="no boundary refinement"):
        boundary.run(asked(refined), tmp_path)


def test_no_samples_are_refused(model):
    _, graphdef, params = model
    with pytest.raises(UserError, match="holds no expression to measure"):
        next(source.measure(graphdef, params, Data(), layer_trace.layer_trace, "layers"))


def test_how_many_images_are_looked_at():
    checked = []
    evaluation = types.SimpleNamespace(data=types.SimpleNamespace(check_split=checked.append))
    assert [source.AnalysisRunner(evaluation, "val", n).images for n in (None, 1)] == [None, 1] and checked == ["val"] * 2
    with pytest.raises(UserError, match="--max-images must be at least 1, got 0"):
        source.AnalysisRunner(evaluation, "val", 0)

"""The runner: numbers equal an independent route in torch, and depend on neither batch size nor bucket; files; the control."""

from __future__ import annotations

import json
import time

import fake_segmentor as fake
import numpy as np
import pytest
import torch

from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, runner
from flowseg_jax.evaluation.examples import Example, Gallery

SCENES = fake.scenes()


@pytest.fixture(scope="module")
def evaluator():
    return runner.Evaluator(fake.parts()[0])


def run(evaluator, batch=2, scenes=SCENES, params=None, control=False, **options):
    graphdef, fresh = fake.parts()
    data = fake.EvalData(scenes, batch, control)
    return runner.evaluate(graphdef, params or fresh, data, split="val", evaluator=evaluator, **options)


def one_by_one(scenes):
    """(I, U) and query of every sample by torch and NumPy, an image and a sentence at a time."""
    import jax
    from flax import nnx

    graphdef, params = fake.parts()
    model = nnx.merge(graphdef, params)
    rows = []
    for data in fake.batches(scenes, 1):
        found = model.segment(jax.device_put(data.batch))
        for k in range(len(data.samples[0])):
            query = int(np.argmax(np.asarray(found.scores)[0, k]))
            logits = np.asarray(model.refine(found.mask_logits[:, k, query : query + 1], found.mask_features))
            full = torch.nn.functional.interpolate(torch.tensor(logits), (fake.SIDE,) * 2, mode="bilinear", align_corners=False)
            h, w = data.batch.scaled_size[0]
            size = data.images[0].shape[:2]
            full = torch.nn.functional.interpolate(full[..., :h, :w], size, mode="bilinear", align_corners=False)[0, 0].numpy()
            assert np.abs(full).min() > 1e-5  # else the comparison of masks below would be a coin toss
            truth = data.truth[0][k]
            rows.append((query, int(((full > 0) & truth).sum()), int(((full > 0) | truth).sum())))
    return rows


def test_equals_one_by_one_and_batch_size_changes_nothing(evaluator):
    two = run(evaluator, 2)
    rows = [(r["query"], r["intersection"], r["union"]) for r in two.records]
    assert rows == one_by_one(SCENES)
    assert len({r["query"] for r in two.records}) > 1
    three = run(runner.Evaluator(fake.parts()[0]), 3)
    for a, b in zip(two.records, three.records, strict=True):
        assert a.pop("score") == pytest.approx(b.pop("score"), rel=1e-5)
        assert a.pop("best_score") == pytest.approx(b.pop("best_score"), rel=1e-5)
        assert a == b
    assert two.result == three.result


def test_oracle_is_at_least_as_good_as_the_selection(evaluator):
    found = run(evaluator)
    assert any(r["oracle_iou"] > r["iou"] for r in found.records)
    for r in found.records:
        assert r["oracle_iou"] == max(r["iou"], r["best_iou"])
    assert found.result["oracle_ciou"] > found.result["ciou"]
    assert found.result["selection_gap"] == found.result["oracle_ciou"] - found.result["ciou"]


def test_files_hold_what_recomputes_them(evaluator, tmp_path, capsys):
    run(evaluator)  # so that nothing is left to compile
    found = run(evaluator, out=tmp_path / "eval", checkpoint={"digest": "abc", "step": 7})
    result = json.loads((tmp_path / "eval" / "val.json").read_text())
    assert result == found.result
    assert set(result) >= {"protocol", "n", "ciou", "giou", "oracle_ciou", "selection_gap", "p_at", "families"}
    assert result["n"] == 13 and result["checkpoint"] == {"digest": "abc", "step": 7}
    assert list(result["p_at"]) == ["0.5", "0.6", "0.7", "0.8", "0.9"]
    assert set(result["families"]) == {"attribute", "relation"}
    records = [json.loads(line) for line in (tmp_path / "eval" / "val.jsonl").read_text().splitlines()]
    assert metrics.summarise(records).items() <= result.items()
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {"val.json", "val.jsonl"}
    printed = capsys.readouterr().out
    assert (
        "13 samples" in printed
        and "0 compilations (so far: " in printed
        and "1 model" in printed
        and f"cIoU {result['ciou']:.2f}" in printed
    )


def test_the_model_compiles_once_whatever_the_sizes():
    evaluator = runner.Evaluator(fake.parts()[0])
    run(evaluator, 1)
    assert evaluator.compiles["model"] == 1
    assert evaluator.compiles["restore"] == 2  # 128 x 128 and, for the taller images, 320 x 128
    run(evaluator, 1)
    assert evaluator.compiles.total() == 5


def test_shuffled_text_keeps_the_truth(evaluator, tmp_path):
    plain = run(evaluator)
    shuffled = run(evaluator, out=tmp_path, control=True, shuffle_text=True)
    assert {p.name for p in tmp_path.iterdir()} == {"val_shuffled.json", "val_shuffled.jsonl"}
    assert shuffled.result["shuffled_text"] and not plain.result["shuffled_text"]
    assert shuffled.result["n"] == plain.result["n"] and shuffled.result["ciou"] != plain.result["ciou"]
    for r, own in zip(shuffled.records, plain.records, strict=True):
        assert r["text"] != r["sentence"] == own["sentence"] == own["text"]
        donor = next(p for p in plain.records if p["sentence"] == r["text"])
        assert r["query"] == donor["query"] and r["best_iou"] == own["best_iou"]


@pytest.mark.parametrize("control", [True, False])
def test_a_control_cannot_be_taken_for_a_result(evaluator, tmp_path, control):
    with pytest.raises(ValueError, match="disagree"):
        run(evaluator, out=tmp_path / "eval", control=control, shuffle_text=not control)
    assert not (tmp_path / "eval").exists()


def test_logits_without_numbers_fail_and_are_counted(evaluator, capsys):
    _, params = fake.parts()
    params["gain"] = params["gain"] * np.nan
    found = run(evaluator, params=params)
    assert found.result["failed"] == found.result["n"] == 13
    assert found.result["ciou"] == found.result["giou"] == 0.0
    assert all(r["failed"] and r["intersection"] == 0 and r["union"] > 0 for r in found.records)
    assert "failed 13" in capsys.readouterr().out
    json.dumps(found.result, allow_nan=False), json.dumps(found.records, allow_nan=False)


def test_an_empty_split_is_refused_and_nothing_is_written(evaluator, tmp_path):
    with pytest.raises(UserError, match="holds no expression"):
        run(evaluator, scenes=[], out=tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


def test_an_unwritable_folder_is_named(evaluator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        run(evaluator, out=tmp_path / "file" / "eval")


def test_progress_is_printed_while_a_batch_takes_long(evaluator, monkeypatch, capsys):
    monkeypatch.setattr(runner, "HEARTBEAT", 0.05)
    data = fake.EvalData(SCENES, 2)

    class Slow:
        samples = data.samples

        def __iter__(self):
            for batch in data:
                time.sleep(0.2)
                yield batch

    graphdef, params = fake.parts()
    runner.evaluate(graphdef, params, Slow(), split="val", evaluator=evaluator)
    lines = [line for line in capsys.readouterr().out.splitlines() if "/13 samples" in line]
    assert len(lines) >= 3 and lines[0].startswith("evaluate val: 0/13 samples, reading images")


def test_gallery_keeps_the_same_examples_in_any_order():
    rng = np.random.default_rng(0)
    records = [
        {"image_id": i, "ann_id": i, "sentence_id": i, "iou": float(v), "failed": False} for i, v in enumerate(rng.random(200))
    ]
    blank = np.zeros((1, 1), bool)

    def kept(order):
        gallery = Gallery(4)
        for i in order:
            if kinds := gallery.wants(records[i]):
                gallery.add(Example(records[i], np.zeros((1, 1, 3), np.uint8), blank, blank, blank), kinds)
        return {kind: [e.record["image_id"] for e in rows] for kind, rows in gallery.examples().items()}

    first = kept(range(200))
    assert kept(rng.permutation(200)) == first
    assert len(first["good"]) == len(first["failed"]) == 4
    assert all(records[i]["iou"] >= 0.8 for i in first["good"]) and all(records[i]["iou"] < 0.5 for i in first["failed"])
    assert not set(first["random"]) & set(first["good"] + first["failed"])


def test_the_gallery_of_a_run_holds_its_own_masks(evaluator):
    found = run(evaluator, gallery=20)
    examples = [e for rows in found.examples.values() for e in rows]
    assert len(examples) == 13
    for e in examples:
        assert e.image.shape[:2] == e.truth.shape == e.selected.shape == (e.record["height"], e.record["width"])
        assert (e.selected & e.truth).sum() == e.record["intersection"]
        assert (e.best | e.truth).sum() == e.record["best_union"]

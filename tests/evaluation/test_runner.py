"""The runner: numbers equal an independent route in torch, and depend on neither batch size nor bucket; files; the control."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from flowseg_jax.data import masks
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, examples, metrics, protocols, runner
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.tasks import referring
from flowseg_jax.models.outputs import MaskCandidates
from flowseg_jax.types import PromptQueries
from tests.helpers import fake_segmentor as fake

SCENES = fake.scenes()


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(fake.parts()[0])


def run(evaluator, batch=2, scenes=SCENES, params=None, control=False, **options):
    data = functools.partial(fake.EvalData, scenes, batch, control)
    return referring.evaluate(evaluator, params or fake.parts()[1], data, split="val", **options)


def one_by_one(scenes):
    """(I, U) and query of every sample by torch and NumPy, an image and a sentence at a time."""
    graphdef, params = fake.parts()
    model = nnx.merge(graphdef, params)
    rows = []
    for batch in fake.EvalData(scenes, 1):
        seen = model.prefill_image(batch.views, np.array(fake.PREFIX))
        for asked in batch.rounds:
            found = model.predict_cached(seen, jax.device_put(asked.questions))
            for k in range(len(asked.samples[0])):
                query = int(np.argmax(np.asarray(found.scores)[0, k]))
                logits = np.asarray(model.refine_masks(found.mask_logits[:, k, query : query + 1], found.mask_features))
                full = interpolate(torch.tensor(logits), (fake.SIDE,) * 2)
                h, w = batch.views.resized_hw[0]
                full = interpolate(full[..., :h, :w], batch.sizes[0])[0, 0].numpy()
                assert np.abs(full).min() > 1e-5  # else the comparison of masks below would be a coin toss
                truth = asked.truth[0][k]
                rows.append((query, int(((full > 0) & truth).sum()), int(((full > 0) | truth).sum())))
    return rows


def interpolate(x, size):
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)


def same(ours, theirs):
    """Everything equal, scores to 1e-5."""
    for a, b in zip(ours.records, theirs.records, strict=True):
        for name in ("score", "best_score"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert {k: v for k, v in a.items() if "score" not in k} == {k: v for k, v in b.items() if "score" not in k}
    assert ours.result == theirs.result


def test_equals_one_by_one_and_batch_size_changes_nothing(evaluator):
    two = run(evaluator, 2)
    rows = [(r["query"], r["intersection"], r["union"]) for r in two.records]
    assert rows == one_by_one(SCENES)
    assert len({r["query"] for r in two.records}) > 1
    same(run(Evaluator(fake.parts()[0]), 3), two)


def test_oracle_is_at_least_as_good_as_the_selection(evaluator):
    found = run(evaluator)
    assert any(r["oracle_iou"] > r["iou"] for r in found.records)
    for r in found.records:
        assert r["oracle_iou"] == max(r["iou"], r["best_iou"])
    assert found.result["oracle_ciou"] > found.result["ciou"]
    assert found.result["selection_gap"] == found.result["oracle_giou"] - found.result["giou"] > 0


def test_files_hold_what_recomputes_them(evaluator, tmp_path, capsys):
    run(evaluator)  # so that nothing is left to compile
    about = {"checkpoint": {"digest": "abc", "step": 7}, "prompt": {"question": 2, "answer": 1}}
    found = run(evaluator, out=tmp_path / "eval", about=about, no_target_threshold=0.25)
    result = json.loads((tmp_path / "eval" / "val.json").read_text())
    assert result == found.result
    assert set(result) >= {"protocol", "n", "ciou", "giou", "oracle_ciou", "selection_gap", "p_at", "families"}
    assert result["n"] == 13 and result["checkpoint"] == {"digest": "abc", "step": 7}
    assert list(result["p_at"]) == ["0.5", "0.6", "0.7", "0.8", "0.9"]
    assert set(result["families"]) == {"attribute", "relation"}
    records = [json.loads(line) for line in (tmp_path / "eval" / "val.jsonl").read_text().splitlines()]
    assert metrics.summarise(records).items() <= result.items()
    assert result["prompt"] == {"question": 2, "answer": 1} and result["no_target_threshold"] == 0.25
    for r in records:
        assert r["text_form"] == "lower" and r["no_target_threshold"] == 0.25 and r["failure"] == ""
        assert r["area"] + r["truth_area"] == r["intersection"] + r["union"] and r["truth_area"] >= r["intersection"]
    truths = [int(t.sum()) for _, _, masks in SCENES for t in masks]
    assert [r["truth_area"] for r in records] == truths
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {"val.json", "val.jsonl"}
    printed = capsys.readouterr().out
    assert "13 samples" in printed and f"cIoU {result['ciou']:.2f}" in printed


def test_the_model_compiles_once_whatever_the_sizes():
    evaluator = Evaluator(fake.parts()[0])
    run(evaluator, 1)
    assert evaluator.compiles["encode_image"] == evaluator.compiles["predict"] == 1
    assert evaluator.compiles["upsample"] == 2  # 128 x 128 and, for the taller images, 320 x 128
    run(evaluator, 1)
    assert evaluator.compiles.total() == 6


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
        run(evaluator, out=tmp_path, control=control, shuffle_text=not control)
    assert not list(tmp_path.glob("*.json"))


def test_logits_without_numbers_fail_and_are_counted(evaluator, capsys):
    _, params = fake.parts()
    params["gain"] = params["gain"] * np.nan
    found = run(evaluator, params=params)
    assert found.result["failed"] == found.result["n"] == 13 and found.result["failures"] == {"non-finite": 13}
    assert found.result["ciou"] == found.result["giou"] == 0.0
    assert all(r["failed"] and r["intersection"] == 0 and r["union"] > 0 for r in found.records)
    assert all(r["failure"] == "non-finite" and r["area"] == 0 and r["truth_area"] == r["union"] for r in found.records)
    assert "failed 13, 13 of them non-finite" in capsys.readouterr().out
    json.dumps(found.result, allow_nan=False), json.dumps(found.records, allow_nan=False)


def test_sentences_that_refer_to_nothing_are_counted_after_the_asked_protocol(evaluator, tmp_path, capsys):
    """The table of a run is the one that its records audit to, whichever protocol was asked for."""
    scenes = [
        (
            image,
            [s._replace(ann_id=-1) if i % 2 else s for i, s in enumerate(row)],
            truth & (np.arange(len(row)) % 2 == 0)[:, None, None],
        )
        for image, row, truth in SCENES
    ]
    found = run(evaluator, scenes=scenes, protocol=protocols.GREFCOCO, no_target_threshold=-20.0, out=tmp_path)
    assert found.result["protocol"] == "grefcoco" and found.result["n"] == 13
    assert (
        0 < found.result["n_acc"] < 100 and 0 < found.result["t_acc"] < 100 and found.result["n_acc"] != found.result["t_acc"]
    )
    assert all(r["truth_area"] == 0 for r in found.records if r["ann_id"] == -1)
    assert f"N-acc {found.result['n_acc']:.2f}" in capsys.readouterr().out
    audited = audit.tables(audit.read_records(tmp_path / "val.jsonl"))
    assert audited["grefcoco"].items() <= found.result.items()
    plain = run(evaluator, scenes=scenes, no_target_threshold=-20.0)
    assert plain.result["also"]["grefcoco"].items() <= audited["grefcoco"].items()
    assert {name: table["ciou"] for name, table in audit.tables(plain.records).items()} == {
        name: table["ciou"] for name, table in audited.items()
    }


class Unanswered(fake.EvalData):
    """Questions without answers."""

    def _round(self, group, part):
        given = super()._round(group, part)
        ids = [[[k + 1, sample.image_id] for k, sample in enumerate(row)] for row in given.samples]
        return dataclasses.replace(given, questions=PromptQueries.of(ids, (len(self.rows), fake.PHRASES, 4)))


def test_an_answer_without_a_mask_fails_and_says_why(tmp_path, capsys):
    """The model answers the first question about an image and says nothing to the others; of image 4 it gives no numbers."""

    def answer(model, seen, asked):
        b, k = asked.lengths.shape
        answered = asked.input_ids[..., 0] == 1
        good = answered & (asked.input_ids[..., 1] != 4)
        scores = jax.numpy.where(good[..., None], jax.numpy.array([0.2, 0.7]), np.nan)
        bright = jax.numpy.broadcast_to(jax.numpy.array([1.0, -0.5]), (b, k, 2, 2))
        return MaskCandidates(scores, bright, seen.mask_features), answered

    evaluator = Evaluator(fake.parts()[0], answer=answer)
    data = functools.partial(Unanswered, SCENES, 2)
    found = referring.evaluate(evaluator, fake.parts()[1], data, split="val", out=tmp_path)
    said = {
        (r["image_id"], i): r for image in range(1, 6) for i, r in enumerate(r for r in found.records if r["image_id"] == image)
    }
    for (image, number), r in said.items():
        first = number % fake.PHRASES == 0
        assert r["failure"] == ("no <SEG>" if not first else "non-finite" if image == 4 else "")
        assert r["failed"] == bool(r["failure"]) and r["iou"] == 0 if r["failed"] else r["query"] == 1
    assert found.result["failures"] == {"no <SEG>": 7, "non-finite": 1}
    assert "failed 8, 7 of them no <SEG>, 1 of them non-finite" in capsys.readouterr().out


def test_an_empty_split_is_refused_and_nothing_is_written(evaluator, tmp_path):
    with pytest.raises(UserError, match="holds no expression"):
        run(evaluator, scenes=[], out=tmp_path / "eval")
    assert not list((tmp_path / "eval").iterdir())


def test_an_unwritable_folder_is_named(evaluator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        run(evaluator, out=tmp_path / "file" / "eval")


def test_progress_is_printed_while_a_batch_takes_long(evaluator, monkeypatch, capsys):
    monkeypatch.setattr(runner, "HEARTBEAT", 0.05)

    class Slow(fake.EvalData):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.2)
                yield batch

    referring.evaluate(evaluator, fake.parts()[1], functools.partial(Slow, SCENES, 2), split="val")
    lines = [line for line in capsys.readouterr().out.splitlines() if "/13 samples" in line]
    assert len(lines) >= 3 and lines[0].startswith("evaluate val: 0/13 samples, reading images")


def test_examples_are_the_same_in_any_order():
    rng = np.random.default_rng(0)
    records = [
        {"image_id": i, "ann_id": i, "sentence_id": i, "iou": float(v), "failed": False} for i, v in enumerate(rng.random(200))
    ]

    def chosen(order):
        rows = [records[i] for i in order]
        return {kind: [rows[i]["image_id"] for i in indices] for kind, indices in examples.choose(rows, 4).items()}

    first = chosen(range(200))
    assert chosen(rng.permutation(200)) == first
    assert len(first["good"]) == len(first["failed"]) == 4
    assert all(records[i]["iou"] >= 0.8 for i in first["good"]) and all(records[i]["iou"] < 0.5 for i in first["failed"])
    assert not set(first["random"]) & set(first["good"] + first["failed"])


def test_the_examples_of_a_run_have_their_own_masks(evaluator):
    found = run(evaluator, gallery=20)
    shown = [e for rows in found.examples.values() for e in rows]
    assert len(shown) == 13
    for e in shown:
        assert e.image.shape[:2] == e.truth.shape == e.selected.shape == (e.record["height"], e.record["width"])
        assert (e.selected & e.truth).sum() == e.record["intersection"]
        assert (e.best | e.truth).sum() == e.record["best_union"]


def test_reasoning_is_printed_by_texts_and_by_length(evaluator, capsys):
    family = lambda j: ("short", "long")[j % 2]  # noqa: E731
    scenes = [(x, [s._replace(family=family(j), sentence_id=j) for j, s in enumerate(row)], truth) for x, row, truth in SCENES]
    run(evaluator, scenes=scenes)
    printed = capsys.readouterr().out
    assert re.search(r"all texts: n 13, cIoU .*; long: n 5, .*; short: n 8, cIoU", printed)
    assert re.search(r"first text: n 5, cIoU .*; short: n 5, cIoU", printed)


def test_saved_masks_are_those_that_were_counted(evaluator, tmp_path):
    run(evaluator, out=tmp_path, save_masks=True)
    lines = (tmp_path / "val.jsonl").read_text().splitlines()
    assert len(lines) == 13
    truth = [mask for _, _, masks in SCENES for mask in masks]
    for line, wanted in zip(lines, truth, strict=True):
        record = json.loads(line)
        assert record["rle"]["size"] == [record["height"], record["width"]] == list(wanted.shape)
        (mask,) = masks.decode([record["rle"]["counts"]], *record["rle"]["size"])
        assert (mask.astype(bool) & wanted).sum() == record["intersection"]
        assert (mask.astype(bool) | wanted).sum() == record["union"]


class Damaged(fake.EvalData):
    """The third batch cannot be read."""

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 2:
                raise UserError("3.jpg: truncated or damaged image")
            yield batch


def test_a_damaged_image_loses_nothing_and_the_next_start_goes_on(evaluator, tmp_path, capsys):
    whole = run(evaluator, 1, out=tmp_path / "whole")
    out, params = tmp_path / "eval", fake.parts()[1]
    start = functools.partial(referring.evaluate, evaluator, params, split="val", out=out, gallery=2)
    with pytest.raises(UserError, match=r"3.jpg: truncated or damaged image; 2 images are done and kept in .*partial.jsonl"):
        start(functools.partial(Damaged, SCENES, 1))
    assert {p.name for p in out.iterdir()} == {"val.partial.jsonl"}
    with (out / "val.partial.jsonl").open("a") as file:
        file.write('{"place": 4, "rec')  # a kill in the middle of a line
    seen = []

    class Noting(fake.EvalData):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(batch.places)
                yield batch

    resumed = start(functools.partial(Noting, SCENES, 1))
    assert seen[:3] == [[2], [3], [4]]
    assert "continuing after 2 images" in capsys.readouterr().out
    same(resumed, whole)
    assert (out / "val.jsonl").read_bytes() == (tmp_path / "whole" / "val.jsonl").read_bytes()
    assert not (out / "val.partial.jsonl").exists()
    assert len([e for rows in resumed.examples.values() for e in rows]) > 2


def test_what_another_model_left_is_not_continued(evaluator, tmp_path, capsys):
    with pytest.raises(UserError, match="2 images are done"):
        referring.evaluate(
            evaluator, fake.parts()[1], functools.partial(Damaged, SCENES, 1), split="val", out=tmp_path, about={"model": 1}
        )
    found = run(evaluator, 1, out=tmp_path, about={"model": 2})
    assert "of another model, protocol or data set; it is begun anew" in capsys.readouterr().out
    assert found.result["n"] == 13 and found.result["model"] == 2

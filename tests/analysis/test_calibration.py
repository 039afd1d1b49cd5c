"""Thresholds keep what they promise, and the ROC and the reliability are what they are called."""

from __future__ import annotations

import json
from unittest.mock import Mock, call

import numpy as np
import pytest

from flowseg_jax.analysis import calibration
from flowseg_jax.errors import UserError
from tests.helpers.answers import record


def present(score, iou=90, i=0):
    return record(i, 0, iou=iou, score=score)


def absent(score, i=0):
    return record(i, 1, iou=0, score=score, ann_id=-1)


def shuffled(score, i=0):
    return record(i, 2, iou=0, score=score, text="another image's")


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.25, 0.9])
def test_a_threshold_keeps_the_rate_and_no_lower_one_does(rate):
    rng = np.random.default_rng(0)
    scores = rng.random(200).astype(np.float32).round(2)  # with ties
    t = calibration.threshold(scores, rate)
    assert (scores >= t).mean() <= rate
    assert (scores >= t - 2e-6).mean() > rate


def test_thresholds_at_the_ends():
    assert calibration.threshold(np.array([0.2, 0.7]), 0.99) == pytest.approx(0.200001)
    assert calibration.threshold(np.array([0.2, 0.7]), 0.5) == pytest.approx(0.200001)
    assert calibration.threshold(np.array([0.2, 0.7]), 0.49) == pytest.approx(0.700001)
    assert calibration.threshold(np.array([1.0, 1.0]), 0.1) > 1.0  # nothing can be answered
    assert calibration.threshold(np.array([-np.inf, 0.7]), 0.5) == 0.0  # what is no number is refused anyway


def test_by_hand():
    rows = [present(0.9), present(0.8, iou=10, i=1), present(0.3, i=2), present(None, i=3)]
    rows += [absent(0.6), shuffled(0.2), absent(0.1, i=1), shuffled(0.85, i=4)]
    found = calibration.summarise(rows, 0.25)
    assert (found["present"], found["absent"], found["shuffled"]) == (4, 4, 2)
    assert found["no_target_threshold"] == pytest.approx(0.600001)
    assert (found["false_alarms"], found["kept"]) == (25, 50)
    pairs = [(p, a) for p in (0.9, 0.8, 0.3, -1) for a in (0.6, 0.2, 0.1, 0.85)]
    assert found["auc"] == pytest.approx(100 * np.mean([p > a for p, a in pairs]))
    assert found["roc"][0] == [None, 0, 0] and found["roc"][-1][1:] == [100, 100]
    assert [0.9, 0, 25] in found["roc"] and [0.8, 25, 50] in found["roc"]
    bins = {round(row["low"], 1): (row["n"], row["score"], row["right"]) for row in found["reliability"] if row["n"]}
    assert bins == {0.3: (1, 30, 100), 0.8: (1, 80, 0), 0.9: (1, 90, 100)}
    assert found["calibration_error"] == pytest.approx((70 + 80 + 10) / 3)


def test_ties_count_half_in_the_auc():
    assert calibration.summarise([present(0.5), absent(0.5)], 0.5)["auc"] == 50
    assert calibration.summarise([present(0.5), present(0.6), absent(0.5)], 0.5)["auc"] == 75


def test_a_score_of_one_is_in_the_last_bin():
    assert calibration.reliability([present(1.0)])[-1]["n"] == 1


def test_what_cannot_be_calibrated_is_said():
    with pytest.raises(UserError, match=r"every sentence refers to something.*--shuffle-text"):
        calibration.summarise([present(0.5)], 0.1)
    with pytest.raises(UserError, match="no sentence refers to something"):
        calibration.summarise([absent(0.5)], 0.1)
    for rate in (0, 1, 10):
        with pytest.raises(UserError, match=f"--false-alarms is {rate}: give a share"):
            calibration.summarise([present(0.5), absent(0.5)], rate)


def test_a_control_may_share_a_sentence_with_its_image(tmp_path):
    """Two images may both be asked for "left": that sample is no absent one, and no second present one."""
    real, control = tmp_path / "val.jsonl", tmp_path / "val_shuffled.jsonl"
    real.write_text("".join(json.dumps(present(0.9, i=i)) + "\n" for i in range(3)))
    rows = [shuffled(0.2, i=0), record(1, 2, iou=0, score=0.8), shuffled(0.1, i=2)]
    control.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration.run(real, control, tmp_path / "out", 0.1)
    found = json.loads((tmp_path / "out" / "calibration_val.json").read_text())
    assert (found["present"], found["absent"]) == (3, 2)
    with pytest.raises(UserError, match="is no shuffled-text control"):
        calibration.run(real, real, tmp_path / "out", 0.1)


def test_the_threshold_becomes_a_models_own_with_its_rates_and_where_they_were_measured(tmp_path, monkeypatch, capsys):
    told = Mock()
    monkeypatch.setattr(calibration, "write_no_target", told)
    real, control = tmp_path / "val.jsonl", tmp_path / "val_shuffled.jsonl"
    rows = [*(present(score, i=i) for i, score in enumerate((0.9, 0.8, 0.05))), absent(0.3, i=7), absent(0.2, i=8)]
    real.write_text("".join(json.dumps(row) + "\n" for row in rows))
    control.write_text(json.dumps(shuffled(0.1, i=9)) + "\n")
    calibration.run(real, control, tmp_path / "out", 0.4, "m")
    calibration.run(real, None, tmp_path / "out", 0.4, "m")
    calibration.run(real, None, tmp_path / "out", 0.4)
    texts = ["3 that do not, val.jsonl and val_shuffled.jsonl", "2 that do not, val.jsonl"]
    assert told.mock_calls == [
        call(
            "m",
            threshold=pytest.approx(threshold),
            false_alarms=alarms,
            missed=33.3,
            measured_on=f"3 sentences that fit and {text}",
        )
        for threshold, alarms, text in zip((0.200001, 0.300001), (33.3, 0.0), texts, strict=True)
    ]
    assert capsys.readouterr().out.count("m: this is the model's own threshold now") == 2
    page = (tmp_path / "out" / "calibration_val.html").read_text()
    assert f"3 sentences that refer to something, 2 that do not: {real}." in page and "Some of them do fit" not in page
    with pytest.raises(UserError, match="val_shuffled.jsonl is a shuffled-text control: name the results on real"):
        calibration.run(control, None, tmp_path / "out", 0.4)

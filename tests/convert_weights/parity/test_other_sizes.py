"""The command on a recording of other sizes. There is none of X-SAM's, so the model itself plays the recorder."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import safetensors.numpy

from convert_weights.convert import export_params
from convert_weights.parity import compare, training
from convert_weights.parity.fixture import RUNS, STAGE1
from convert_weights.parity.preprocessing import read_samples
from flowseg_jax.models import flowseg


class Everything(dict):
    """A recording that has every name, without the shapes."""

    def __contains__(self, name) -> bool:
        return True

    def __missing__(self, name) -> np.ndarray:
        return np.zeros((1, 1, 2))


class Recorder:
    """Takes a report's place and keeps our arrays."""

    def __init__(self):
        self.arrays: dict[str, dict[str, np.ndarray]] = defaultdict(dict)

    def compare(self, file, name, ours, theirs, kind, **options) -> None:
        self.arrays[file][name] = np.asarray(ours)

    def used(self, *names) -> None: ...

    def explain(self, *words) -> None: ...


def draw_points(rng, targets: list[list[int]], levels: int, points: int) -> dict[str, np.ndarray]:
    """Random points in X-SAM's layout: passes and pairs one after the other, pairs in any order of the targets."""
    recorded, pairs = {}, sum(map(len, targets))
    kept = int(0.75 * points)
    for j in range(levels):
        level = training.level_name(j, levels)
        for p, of_pass in enumerate(targets):
            recorded[f"match/{level}/pass{p}_points"] = rng.random((1, points, 2)).astype(np.float32)
            recorded[f"match/{level}/pass{p}_target"] = np.array(of_pass)
        recorded[f"points/{level}/candidates"] = rng.random((pairs, 3 * points, 2)).astype(np.float32)
        recorded[f"points/{level}/extra_random"] = rng.random((pairs, points - kept, 2)).astype(np.float32)
    return recorded


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_phi3_with_four_levels_and_odd_grids(phi3, rng, tmp_path):
    """Forward, evaluation, losses and the stage without language; three phrases beside one, every size another."""
    cfg, points = phi3.model(), phi3.losses().num_points
    levels = cfg.mask_decoder.num_layers + 1
    _, params = flowseg.init_model(cfg)
    safetensors.numpy.save_file(export_params("xsam", params, cfg), tmp_path / "weights.safetensors")
    head = {"predictor/weight": rng.normal(size=(5, 96)), "predictor/bias": rng.normal(size=5)}
    inputs = {
        "eval_main.npz": {"llm/loss": np.zeros(()), "post/score_0": np.zeros(())},
        "train_aaai.npz": {"llm/loss": np.zeros(())} | draw_points(rng, [[0]] * 4, levels, points),
        STAGE1: {name: x.astype(np.float32) for name, x in head.items()}
        | {"target/image0_labels": np.array([3]), "target/image1_labels": np.array([0, 2, 1])}
        | draw_points(rng, [[0], [2, 0, 1]], levels, points),
    }
    phi3.config["batches"]["stage1"] = [0, 1]
    recorder, samples = Recorder(), read_samples(phi3, cfg)
    for file, arrays in inputs.items():
        phi3._arrays[file] = Everything(arrays)
    for run in RUNS:
        if run.file in inputs:
            compare.compare_run(phi3, run, samples, recorder)
    compare.compare_stage1(phi3, samples, recorder)

    for file, arrays in inputs.items():
        np.savez(tmp_path / file, **(arrays | recorder.arrays[file]))
    report = compare.compare(tmp_path)
    assert report.ok and max(row.error for row in report.rows) == 0
    names = {(row.file, row.name) for row in report.rows}
    for file, name in (
        ("eval_main.npz", "llm/hidden_states_3"),
        ("eval_main.npz", "post/segmentation_0"),
        ("train_aaai.npz", "decoder/layer5_attn_mask"),
        ("train_aaai.npz", "loss/loss_dice_5"),
        ("train_aaai.npz", "match/final/pass3_query"),
        (STAGE1, "class/pred6_logits"),
        (STAGE1, "match/aux0/pass1_query"),
    ):
        assert (file, name) in names
    shapes = {row.name: row.shape for row in report.rows if row.file == "train_aaai.npz"}
    assert shapes["class/pred6_logits"] == (4, 17, 5) and shapes["pixel_decoder/mask_features"] == (2, 32, 56, 56)
    assert shapes["sam/hidden_states_5"] == (2, 13, 13, 40) and shapes["seg_projector/out"] == (2, 49, 72)

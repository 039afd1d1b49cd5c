"""What the pages plot and list: every axis, line and column, by figures that tell which is which."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from flowseg_jax.analysis import boundary, embedding_swap, layer_trace, mask_grid, page, prompt_sensitivity
from flowseg_jax.analysis.mask_grid import PerfectMask
from flowseg_jax.analysis.runner import SampleResult
from flowseg_jax.cli.analyze import main
from flowseg_jax.data.prompts import REFERRING_ANSWERS, REFERRING_QUESTIONS, PromptTemplates
from flowseg_jax.data.records import Sample
from flowseg_jax.reports import plots
from tests.helpers.answers import record, write


@pytest.fixture
def drawn(monkeypatch):
    """The plots and tables of a page: [what, its data, its axes]."""
    found = []

    def spy(module, name):
        plain = getattr(module, name)

        def draw(*data, **axes):
            found.append((name, data, axes))
            return plain(*data, **axes)

        monkeypatch.setattr(module, name, draw)

    for name in ("lines", "bars", "shares", "heat"):
        spy(plots, name)
    spy(page, "table")
    return found


def of(found, kind):
    return [(data, axes) for name, data, axes in found if name == kind]


def source(samples=(), **changes):
    fields = {"measure": lambda *_: iter(samples), "split": "val", "about": {"images": 7}, "origin": ["Model m"]}
    return SimpleNamespace(**fields | changes)


def sample(image, sentence, family, values, iou, masks=None):
    one = Sample(image, f"{image}.png", image, sentence, 1, f"it {sentence}", family, (0,), 1, "it")
    masks = np.zeros((len(iou), 4, 6), bool) if masks is None else masks
    nothing = np.zeros((4, 6), bool)
    return SampleResult(one, values, np.array(iou), masks, nothing, nothing, np.zeros((4, 6, 3), np.uint8))


def test_layer_trace(drawn, tmp_path):
    figures = {name: np.array([n, n + 0.25, n + 0.5]) for n, name in enumerate(layer_trace.FIGURES)}
    figures["gate"][0] = np.nan
    ious = {"a": [0.25, 0.5, 0.5, 0.75, 0.75, 1.0], "b": [0.5, 0.5, 0.5, 0.25, 0.5, 0.5]}
    samples = [
        sample(image, sentence, "ab"[sentence], figures | {"selected": np.array([3 * sentence, 1, 1])}, ious["ab"[sentence]])
        for image in range(1, 9)
        for sentence in (0, 1)
    ]
    written = layer_trace.run(source(samples), tmp_path).read_text()
    across = {"x": "layers before the prediction", "x_range": (0, 2), "whole": True}
    line = lambda name: [(j, None if np.isnan(value) else value) for j, value in enumerate(figures[name].tolist())]  # noqa: E731
    selected = {"best": [(0, 50.0), (1, 50.0), (2, 75.0)], "selected": [(0, 37.5), (1, 50.0), (2, 62.5)]}
    assert of(drawn, "lines") == [
        ((selected | {"agreement": [(0, 0.0), (1, 100.0), (2, 100.0)]},), across | {"y": "percent", "y_range": (0, 100)}),
        (
            ({"cosine selected": line("cosine_selected"), "cosine best": line("cosine_best"), "margin": line("margin")},),
            across | {"y": "cosine"},
        ),
        (({name: line(name) for name in ("gate", "step", "drift")},), across | {"y": "share"}),
        (({"proposals": line("proposals")},), across | {"y": "queries"}),
        (
            ({"a": [(0, 25.0), (1, 50.0), (2, 75.0)], "b": [(0, 50.0), (1, 50.0), (2, 50.0)]},),
            across | {"y": "percent", "y_range": (0, 100)},
        ),
    ]
    (((head, rows), _),) = of(drawn, "table")
    names = [name.replace("_", " ") for name in layer_trace.FIGURES]
    assert head == ["prediction", *names, "agreement", "iou selected", "iou best"]
    assert rows[0] == [0, "0.000", "1.000", "2.000", "–", "4.000", "5.000", "6.0", "0.0", "37.5", "50.0"]
    assert "16 samples of val, 7 images." in written and written.count("<figure") == 6  # an image's first sentence, six images
    assert all(f"{j}: query {q}, IoU {iou}" in written for j, (q, iou) in enumerate([(0, 25), (1, 50), (1, 75)]))
    assert written.count("final query 1; 6.png") == 1 and "7.png" not in written and "it 1" not in written


def test_boundary(drawn, tmp_path):
    """Nine samples, of which three gain most and three lose most are shown, those that gain first."""
    samples = [
        sample(n, 0, "", {"band": np.float32(0.125), "mask": np.float32(0.5)}, [0.5, 0.5 + change])
        for n, change in enumerate([0.0, 0.25, -0.25, 0.125, -0.125, 0.5, -0.5, 0.0, 0.0625])
    ]
    cfg = SimpleNamespace(boundary=SimpleNamespace(enabled=True))
    evaluation = SimpleNamespace(model=SimpleNamespace(cfg=cfg, params={"boundary": {"alpha": np.array([1.5])}}))
    written = boundary.run(source(samples, evaluation=evaluation), tmp_path).read_text()
    ((bars, axes),) = of(drawn, "bars")
    assert [count for _, count in bars[0]] == [1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 2, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1]
    assert (bars[0][0][0], bars[0][10][0], bars[0][-1][0]) == ("-48", "0", "48") and axes == {"x": "points", "y": "samples"}
    (((head, rows), _),) = of(drawn, "table")
    assert head[1:] == ["n", "band, % of image", "band, % of mask", "IoU", "after", "boundary IoU", "after", "helped", "harmed"]
    assert rows[0][:4] == ["all", 9, 12.5, 25.0] and rows[0][4:6] == [50.0, pytest.approx(50 + 100 / 9 / 16)]
    assert rows[0][6:] == [100.0, 100.0, pytest.approx(400 / 9), pytest.approx(300 / 9)]
    order = [f"{100 * change:+.2f} points of IoU; {n}.png" for n, change in
             ((5, 0.5), (1, 0.25), (3, 0.125), (4, -0.125), (2, -0.25), (6, -0.5))]  # fmt: skip
    at = [written.find(note) for note in order]
    assert -1 not in at and at == sorted(at) and written.count("points of IoU; ") == 6
    assert "before: 50.0, boundary 100.0" in written and "after: 100.0, boundary 100.0" in written
    assert "9 samples of val, 7 images." in written and "alpha is 1.5" in written
    boundary.run(source(samples[:1], evaluation=evaluation), tmp_path)  # a plot has a width where nothing changes
    assert of(drawn, "bars")[1][0][0][0][0] == "-0.095"


def test_mask_grid(drawn, tmp_path, monkeypatch):
    def measured(_, grids):
        assert grids == [24, 32, 48, 96]
        return {side: [PerfectMask("", side, 128), PerfectMask("", 96, 128), PerfectMask("", 0, 0)] for side in grids}

    monkeypatch.setattr(mask_grid, "measure", measured)
    evaluation = SimpleNamespace(model=SimpleNamespace(cfg=SimpleNamespace(mask_grid_size=24)))
    written = mask_grid.run(source(evaluation=evaluation, about={"images": None}), tmp_path).read_text()
    giou = {side: 100 * (side / 128 + 0.75 + 1) / 3 for side in (24, 32, 48, 96)}
    third = 100 / 3
    ((lines, axes),) = of(drawn, "lines")
    assert axes == {"x": "cells along a side", "y": "percent", "x_range": (24, 96), "y_range": (0, 100)}
    assert lines[0] == {
        "P@0.9": [(side, pytest.approx(third)) for side in giou],
        "gIoU": [(side, pytest.approx(value)) for side, value in giou.items()],
    }
    (((head, rows), _),) = of(drawn, "table")
    assert head == ["grid", "n", "cIoU", "gIoU", "P@0.5", "P@0.7", "P@0.9"] and len(rows) == 4
    figures = (100 * (24 + 96) / 256, giou[24], 2 * third, 2 * third, third)
    assert rows[0] == ["24 x 24", 3, *(pytest.approx(figure) for figure in figures)]
    assert rows[-1][4] == pytest.approx(100)
    assert "3 samples of val, all images." in written and "The first row is the model&#39;s own grid" in written
    assert "A perfect mask on the model&#39;s 24 x 24 cells has a gIoU of 64.6" in written
    assert "on 32 x 32 it would be 66.7 and 33.3" in written
    assert mask_grid.summarise([PerfectMask("", 0, 0)])["ciou"] is None


def test_embedding_swap(drawn, tmp_path):
    iou = {"a": [0.75, 0.5, 0.25, 0.0], "b": [0.25, 0.25, 0.25, 0.25]}
    samples = [sample(n, 0, family, {"other": n - 1}, iou[family]) for n, family in ((0, "a"), (1, "a"), (2, "b"))]
    written = embedding_swap.run(source(samples), tmp_path).read_text()
    (((head, rows), _),) = of(drawn, "table")
    assert head == ["", "n", "nothing", "S", "C", "both"]
    assert rows == [
        ["all", 2, 50.0, 37.5, 25.0, 12.5],
        ["a", 1, 75.0, 50.0, 25.0, 0.0],
        ["b", 1, 25.0, 25.0, 25.0, 25.0],
    ]
    assert "2 of 3 samples of val, 7 images: those with" in written
    assert "C the IoU falls by 25.0 points, with its S by 12.5, with both by 37.5" in written


def test_prompt_sensitivity(drawn, tmp_path, monkeypatch):
    rows = lambda _, pairs: [  # noqa: E731
        {"question": q, "answer": a, "n": 9, "ciou": 10.0 * q + a, "giou": 20.0 * q + a, "same": 30.0 * q + a} for q, a in pairs
    ]
    monkeypatch.setattr(prompt_sensitivity, "evaluate", rows)
    evaluation = SimpleNamespace(model=SimpleNamespace(prompts=PromptTemplates(question=2, answer=1)))
    written = prompt_sensitivity.run(source(evaluation=evaluation), tmp_path).read_text()
    questions, answers = range(len(REFERRING_QUESTIONS)), range(len(REFERRING_ANSWERS))
    for (data, axes), scale in zip(of(drawn, "heat"), (10.0, 20.0, 30.0), strict=True):
        assert axes == {"x": "answer", "y": "question", "digits": 1}
        assert data[0] == [[scale * q + a for a in answers] for q in questions]
        assert data[1:] == ([str(q) for q in questions], [str(a) for a in answers])
    (spread, _), ((head, asked), _), ((_, answered), _) = of(drawn, "table")
    assert spread[0][1:] == [f"{name} {key}" for name in ("cIoU", "gIoU") for key in ("mean", "sd", "lowest", "highest")]
    assert spread[1][2] == ["answers, model's question", "22.00", "1.58", "20.00", "24.00", "42.00", "1.58", "40.00", "44.00"]
    assert head == ["", "question"] and asked[2] == ["2", REFERRING_QUESTIONS[2]] and answered[1] == ["1", REFERRING_ANSWERS[1]]
    assert f"9 samples of val, 7 images, {len(questions) * len(answers)} templates" in written
    assert "own are question 2 and answer 1." in written


def test_oracle(drawn, tmp_path):
    rows = [record(1, 0, iou=80), record(2, 0, iou=20, oracle=85, rank=2, family="f"), record(3, 0, iou=60, oracle=70, rank=1)]
    assert main(["oracle", str(write(tmp_path / "a/val.jsonl", rows))]) == 0
    (((shares, kinds), _),) = of(drawn, "shares")
    third = pytest.approx(100 / 3)
    assert kinds == ("good", "boundary", "selection", "generation", "no answer")
    assert shares[:2] == [("all", [third, third, third, 0.0, 0.0]), ("f", [0.0, 0.0, 100.0, 0.0, 0.0])]
    assert of(drawn, "bars") == [(([("1", 1.0), ("2", 1.0), ("3", 1.0)],), {"x": "rank", "y": "samples"})]
    ((head, whole), _), ((_, errors), _), ((_, ranks), _) = of(drawn, "table")
    assert head == ["", "n", "cIoU", "oracle cIoU", "gIoU", "oracle gIoU", "gap"]
    found = [160 / 3, 235 / 3, 160 / 3, 235 / 3, 25.0]
    assert whole[0] == ["all", 3, *(pytest.approx(figure) for figure in found)]
    assert errors[2] == ["selection", 1, third, pytest.approx(80 / 3), pytest.approx(65 / 3)]
    assert ranks == [["share", third, pytest.approx(200 / 3), 100.0, 100.0, 100.0]]


def test_compare_failures(drawn, tmp_path):
    a, b = ([record(n, 0, iou=iou, family="f") for n, iou in enumerate(ious)] for ious in ((5, 15, 95), (75, 25, 100)))
    files = [str(write(tmp_path / f"{name}/val.jsonl", rows)) for name, rows in (("a", a), ("b", b))]
    assert main(["compare-failures", *files]) == 0
    (((grid, down, across), axes),) = of(drawn, "heat")
    assert axes == {"x": "IoU in A", "y": "IoU in B"} and across == down[::-1] and across[:2] == ["0–10", "10–20"]
    cells = {(down[y], across[x]): n for y, row in enumerate(grid) for x, n in enumerate(row) if n}
    assert cells == {("70–80", "0–10"): 1, ("20–30", "10–20"): 1, ("90–100", "90–100"): 1}
    ((head, rows), _), *others = of(drawn, "table")
    assert head == ["", "n", "A", "B", "B - A", "rescue rate", "reverse rate", "net change of P@0.5"] and len(others) == 1
    assert [row[:4] for row in rows] == [
        ["A below 0.5", 2, pytest.approx(10), pytest.approx(50)], ["A below 0.2", 2, pytest.approx(10), pytest.approx(50)],
        ["A at least 0.5", 1, pytest.approx(95), pytest.approx(100)],
        ["all", 3, pytest.approx(115 / 3), pytest.approx(200 / 3)],
    ]  # fmt: skip
    assert [[cell.split(" [")[0] for cell in row[4:]] for row in rows] == [
        ["40.0", "50.0", "–", "–"], ["40.0", "50.0", "–", "–"], ["5.0", "–", "0.0", "–"], ["28.3", "–", "–", "33.3"]
    ]  # fmt: skip


def test_calibrate_no_target(drawn, tmp_path):
    real = [record(n, 0, iou=90 - 60 * (n % 2), score=score) for n, score in enumerate((0.95, 0.75, 0.15, None))]
    control = [record(n, 0, iou=5, score=score, text="another") for n, score in enumerate((0.05, 0.35))]
    files = [str(write(tmp_path / f"a/{name}.jsonl", rows)) for name, rows in (("val", real), ("val_shuffled", control))]
    assert main(["calibrate-no-target", *files, "--false-alarms=0.3"]) == 0
    roc, scores, right = of(drawn, "lines")
    percent = {"x_range": (0, 100), "y_range": (0, 100), "diagonal": True}
    assert roc == (
        ({"ROC": [(0.0, 0.0), (0.0, 25.0), (0.0, 50.0), (50.0, 50.0), (50.0, 75.0), (100.0, 75.0), (100.0, 100.0)]},),
        percent | {"x": "false alarms, %", "y": "present kept, %", "dots": False},
    )
    assert scores[1] == {"x": "score", "y": "share, %", "x_range": (0, 1)}
    present, absent = ({round(at, 2): share for at, share in scores[0][0][name] if share} for name in ("present", "absent"))
    assert present == {at: pytest.approx(100 / 3) for at in (0.15, 0.75, 0.95)} and absent == {0.05: 50.0, 0.35: 50.0}
    assert [axis for axis in right[1].items() if axis[0] in "xy"] == [("x", "mean score, %"), ("y", "right, %")]
    assert {key: right[1][key] for key in percent} == percent and len(right[1]) == 5
    assert [round(x) for x, _ in right[0][0]["right"]] == [15, 75, 95]
    assert [y for _, y in right[0][0]["right"]] == [100.0, 0.0, 100.0]
    ((head, rows), _), ((bins, by_score), _) = of(drawn, "table")
    assert head[1:] == ["--no-target-threshold", "false alarms", "present kept", "AUC"]
    assert rows == [["", "0.350001", 0.0, 50.0, 62.5]]
    assert bins == ["score", "n", "mean score", "right"] and by_score[9] == ["0.9–1.0", 1, pytest.approx(95), 100.0]
    assert by_score[0] == ["0.0–0.1", 0, None, None]
    found = json.loads((tmp_path / "a/analysis/calibration_val.json").read_text())
    assert found["wanted_false_alarms"] == 30.0


def test_a_table_has_its_head_above_its_rows():
    text = str(page.table(["kind", "share", "n"], [["<b>", 12.34, None], ["two", 5.0, 7]]))
    head, body = text.split("<tbody>")
    assert [part.split("</th>")[0] for part in head.split("<th>")[1:]] == ["kind", "share", "n"]
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    assert rows == [["&lt;b&gt;", "12.3", "–"], ["two", "5.0", "7"]]

"""The commands: files in, JSON and a page with pictures out; a mistake is one line."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pytest

from flowseg_jax.analysis import boundary, embedding_swap, layer_trace, oracle, prompt_sensitivity
from flowseg_jax.cli.analyze import main
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import report
from flowseg_jax.evaluation.examples import GallerySample
from tests.helpers.answers import record, write


class Page(html.parser.HTMLParser):
    """Which elements are open at the end, which pictures are linked, and the text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.text = [], [], ""
        self.feed(path.read_text())
        assert self.open == []
        assert all((path.parent / image).is_file() for image in self.images)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


@pytest.fixture
def results(tmp_path):
    """Two evaluations of the same samples; B's kept pictures. A shuffled-text control of B."""
    a = [record(1, 0, iou=10, oracle=90, rank=2, family="<b>"), record(2, 0, iou=90), record(3, 0, iou=70, score=None)]
    b = [record(1, 0, iou=80, family="<b>"), record(2, 0, iou=20, oracle=85, rank=1), record(3, 0, iou=30)]
    control = [record(i, 0, iou=5, score=0.1 * i, text="another <i>") for i in (1, 2, 3)]
    files = [write(tmp_path / name, rows) for name, rows in (("a/val.jsonl", a), ("b/val.jsonl", b))]
    blank = np.zeros((20, 30), bool)
    shown = [GallerySample(r | {"iou": 0.1, "best_iou": 0.9}, np.zeros((20, 30, 3), np.uint8), blank, blank, blank) for r in b]
    report.save_pictures(tmp_path / "b", "val", {"failed": shown[:2]})
    return (*files, write(tmp_path / "b/val_shuffled.jsonl", control))


def test_oracle(results):
    _, second, _ = results
    assert main(["oracle", str(second)]) == 0
    out = second.parent / "analysis"
    page, found = Page(out / "oracle_val.html"), json.loads((out / "oracle_val.json").read_text())
    assert found["errors"]["selection"]["n"] == 1 and found["errors"]["generation"]["n"] == 1
    assert len(page.images) == 4 and "selected 20.0, oracle 85.0, rank of the best 2; 2.jpg" in page.text
    assert "<b>" in page.text


def test_compare_failures(results, tmp_path):
    first, second, _ = results
    assert main(["compare-failures", str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    page, found = (
        Page(tmp_path / "out/failure_comparison_a_b_val.html"),
        json.loads((tmp_path / "out/failure_comparison_a_b_val.json").read_text()),
    )
    assert found["groups"]["all"]["A below 0.5"]["rescued"] == 100 and found["groups"]["<b>"]["all"]["n"] == 1
    assert len(page.images) == 2 * 4 and "IoU 10.0 in A, 80.0 in B" in page.text and "IoU 90.0 in A, 20.0 in B" in page.text


def test_calibrate_no_target(results, capsys):
    first, _, control = results
    assert main(["calibrate-no-target", str(first), str(control), "--false-alarms=0.4"]) == 0
    found = json.loads((first.parent / "analysis/calibration_val.json").read_text())
    assert found["no_target_threshold"] == 0.200001 and found["shuffled"] == 3
    assert "--no-target-threshold=0.200001: 33.3 % false alarms on 3 absent, 66.7 % of 3" in capsys.readouterr().out
    assert "Some of them do fit their new image" in Page(first.parent / "analysis/calibration_val.html").text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["oracle", "nowhere.jsonl"], r"nowhere\.jsonl: cannot be read .*name the \.jsonl that eval\.py wrote"),
        (["oracle", "{file}", "--image", "3"], "there is no flag --image .*; see flowseg analyze oracle --help"),
        (["oracl", "{file}"], "no command 'oracl' \\(did you mean 'oracle'\\?\\)"),
        (["compare-failures", "{file}"], "required: B"),
        (["compare-failures", "{file}", "{control}"], "not the same samples"),
        (
            ["calibrate-no-target", "{control}"],
            "val_shuffled.jsonl is a shuffled-text control: name the results on real sentences",
        ),
        (
            ["calibrate-no-target", "{file}", "{file}"],
            "val.jsonl is no shuffled-text control: make one with eval.py --shuffle-text",
        ),
        (["calibrate-no-target", "{file}"], "every sentence refers to something"),
        (["calibrate-no-target", "{file}", "{control}", "--false-alarms=10"], "--false-alarms is 10"),
        (["layer-trace", "--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(results, arguments, message):
    names = {"file": results[0], "control": results[2]}
    with pytest.raises(UserError, match=message):
        main([argument.format(**names) for argument in arguments])


def test_files_of_an_older_version_and_damaged_indices(results):
    first, second, _ = results
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    del rows[1]["best_rank"]
    with pytest.raises(UserError, match=r"val\.jsonl:2: a sample without best_rank; evaluate again"):
        main(["oracle", str(write(first, rows))])
    (second.parent / "pictures/val/index.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        main(["oracle", str(second)])


def test_results_stay_readable_for_the_report(results):
    """What a diagnostic leaves beside the results is not taken for a result."""
    _, second, _ = results
    main(["oracle", str(second)])
    assert report.read_row("b", second.parent).results == {}


def test_every_page_says_what_was_found_and_links_to_the_report(results, capsys):
    first, second, control = results
    report.write(second.parent / "report.html", [], title="t")
    conclusions = {
        "oracle": (["oracle", str(second)], "26.7 are lost in selection errors"),
        "failure_comparison": (["compare-failures", str(first), str(second)], "B rescues 100.0 % of A's 1 failures and breaks"),
        "calibration": (["calibrate-no-target", str(second), str(control)], "100.0 % of 3 present kept"),
    }
    for name, (arguments, says) in conclusions.items():
        assert main(arguments) == 0
        (file,) = (second.parent / "analysis").glob(f"{name}*.html")
        text = Page(file).text
        assert says in text.partition("Written 20")[0].partition("Selected and best of")[0], name
        assert says in capsys.readouterr().out and 'href="../report.html"' in file.read_text(), name
        assert f"Results {second}" in text


@pytest.mark.parametrize(
    ("finding", "figures", "says"),
    [
        (
            layer_trace.finding,
            [
                {"prediction": j, "agreement": a, "iou_selected": 10.0 * j, "iou_best": 50.0}
                for j, a in enumerate((20, 96, 100))
            ],
            "goes from 0.0 before any layer to 20.0 after 2, that of the best query from 50.0 to 50.0; from prediction 1 on",
        ),
        (
            boundary.finding,
            {"iou": [50.0, 50.5], "boundary_iou": [40.0, 39.0], "helped": 60.0, "harmed": 10.0},
            "by \\+0.50 points, to 50.5, and the boundary IoU by -1.00, to 39.0; it helps 60.0 %",
        ),
        (embedding_swap.finding, {"nothing": 70.0, "S": 60.0, "C": 20.0, "both": 10.0}, "C carries most .* by 50.0 points"),
        (prompt_sensitivity.finding, {"lowest": 60.0, "highest": 64.5}, "between 60.0 and 64.5: .* below 4.5 points"),
        (oracle.finding, {"giou": 96.0, "errors": {k: {"lost": 1.0} for k in oracle.KINDS}}, "hardly anything is lost"),
    ],
)
def test_conclusions_of_what_was_measured(finding, figures, says):
    assert re.search(says, finding(figures))

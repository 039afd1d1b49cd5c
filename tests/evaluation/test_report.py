"""The report: pictures show what they claim, the page is complete, static and escaped, and can be written again from files."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import learning_curve, report, results, summary, validation
from flowseg_jax.evaluation.examples import GallerySample
from flowseg_jax.evaluation.verdict import verdict
from flowseg_jax.reports import overlay, pictures


def example(kind_iou, text="the <b>red</b> circle", sentence=None, i=1):
    image = np.full((40, 60, 3), 200, np.uint8)
    truth = np.zeros((40, 60), bool)
    truth[10:30, 10:30] = True
    record = {
        "image_id": i,
        "file_name": f"{i}.jpg",
        "ann_id": i,
        "sentence_id": i,
        "sentence": sentence or text,
        "text": text,
        "family": "attribute",
        "iou": kind_iou,
        "best_iou": 0.9,
        "score": 0.75,
        "best_score": None,
        "query": 3,
        "best_query": 4,
        "best_rank": 1,
        "failed": False,
    }
    return GallerySample(record, image, truth, np.roll(truth, 15, 1), truth)


def figures(ciou):
    p_at = {f"0.{i}": 100.0 - i for i in range(5, 10)}
    return {"n": 10, "ciou": ciou, "giou": 50.0, "oracle_ciou": 90.0, "oracle_giou": 80.0, "selection_gap": 30.0, "p_at": p_at}


def result(ciou, shuffled=False):
    families = {"attribute": figures(ciou), "relation": figures(ciou - 1)}
    checkpoint = {"digest": "0123456789abcdef", "step": 1200}
    tail = {"families": families, "failed": 0, "checkpoint": checkpoint, "shuffled_text": shuffled}
    return {"protocol": "xsam", **figures(ciou), **tail}


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.open, self.cells, self.options = [], [], [], 0, []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("src", "href") if key in attrs]
        self.cells += tag == "td"
        if tag == "img":
            self.images.append(attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "option":
            self.options.append(data)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_and_pictures_from_files(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    (folder / "val.json").write_text(json.dumps(result(61.25)))
    (folder / "val_shuffled.json").write_text(json.dumps(result(11.0, shuffled=True)))
    shown = {"good": [example(0.93)], "failed": [example(0.1, sentence="a “star”", i=2), example(0.2, i=3)]}
    report.save_pictures(folder, "val", shown)
    rows = [
        report.ReportRow("untrained", {"val": result(5.5)}, note="random parameters"),
        report.read_row("this run", folder),
        report.read_row("this run, other sentences", folder, shuffled=True),
    ]
    path = report.write(tmp_path / "report.html", rows, title="A & B", about=["python train.py --config=<x>"])
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []  # every element is closed
    assert len(page.images) == 3 * 4
    for image in page.images:
        assert (tmp_path / image["src"]).is_file() and image["alt"] == "the <b>red</b> circle"
    assert not [link for link in page.links if "://" in link or link.startswith("/")]
    for words in ("A &amp; B", "--config=&lt;x&gt;", "61.2", "11.0", "5.5", "untrained", "step 1200", "random parameters"):
        assert words in text
    assert "<b>red</b>" not in text
    assert "rank 2" in text and "not a number" in text and "truth: “a “star””" in text
    assert page.cells == 3 * 9 + 3 * 2
    assert text.index('data-kind="good"') < text.index('data-kind="failed"')
    assert (
        text.index("this run: cIoU 61.2, gIoU 50.0 on val") < text.index("<img") < text.index("<details")
    )  # the verdict is first
    assert "Asked the sentences of other images, cIoU is 11.0: it reads" in text and "cIoU: untrained 5.5." in text
    assert "Model this run, checkpoint 0123456789abcdef, step 1200" in text and "flowseg analyze oracle" in text
    assert page.options == ["all", "good", "failed"]  # kinds alone can be chosen from: one model, one split, one family
    plain = report.table(rows)
    assert [line.split()[0] for line in plain.splitlines()] == ["split", "val", "val", "val"]
    assert "61.2" in plain.splitlines()[2]
    report.save_pictures(folder, "val", {"good": [example(0.93)]})  # replaces: no stale files
    names = [*(f"good_1_the-b-red-b-circle_{i}.png" for i in range(4)), "index.json"]
    assert sorted(p.name for p in (folder / "pictures" / "val").iterdir()) == names


def test_the_command_writes_the_page_of_results_that_are_there(tmp_path, capsys):
    folder = tmp_path / "eval"
    report.save_pictures(folder, "val", {"good": [example(0.93)]})
    (folder / "val.json").write_text(json.dumps(result(61.25) | {"model": "mine"}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    assert flowseg(["report", str(folder)]) == 0
    assert "61.2" in (said := capsys.readouterr().out) and said.endswith(f"\n{folder / 'report.html'}\n")
    text = (folder / "report.html").read_text()
    assert "<h1>FlowSeg: mine</h1>" in text and "Learning curve" in text and "base64" not in text
    (tmp_path / "run").mkdir()
    flags = [f"--out={tmp_path / 'page.html'}", "--title=A title", f"--run={tmp_path / 'run'}", "--self-contained"]
    assert flowseg(["report", str(folder), *flags]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<h1>A title</h1>" in text and "Learning curve" not in text and "base64" in text


def test_a_page_that_is_a_single_file(tmp_path):
    folder = tmp_path / "eval"
    report.save_pictures(folder, "val", {"good": [example(0.93)]})
    (folder / "val.json").write_text(json.dumps(result(61.25) | {"model": "mine"}))
    (folder / "analysis").mkdir()
    (folder / "analysis" / "oracle_val.html").write_text("")
    rows = report.read_rows(folder)
    assert [row.label for row in rows] == ["mine"]
    linked, alone = Page(), Page()
    linked.feed(report.write(tmp_path / "report.html", rows, title="t").read_text())
    assert "eval/analysis/oracle_val.html" in linked.links
    alone.feed(report.write(tmp_path / "else" / "report.html", rows, title="t", self_contained=True).read_text())
    assert len(alone.images) == 4
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in alone.links)
    content = base64.b64decode(alone.images[1]["src"].partition(",")[2])
    assert content == (folder / "pictures" / "val" / "good_1_the-b-red-b-circle_1.png").read_bytes()
    (folder / "pictures" / "val" / "good_1_the-b-red-b-circle_1.png").write_bytes(b"<svg onload='alert(1)'>")
    with pytest.raises(UserError, match=r"circle_1\.png is not a picture that an evaluation kept"):
        report.write(tmp_path / "report.html", rows, title="t", self_contained=True)
    with pytest.raises(UserError, match="no results of `flowseg eval` on expressions"):
        report.read_rows(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_at": ...}, "no result on expressions: it has no p_at or no families$"),
        ({"families": ...}, "no result on expressions: it has no p_at or no families$"),
        ({"protocol": 5}, "protocol is 5, expected a text$"),
        ({"protocol": ...}, "protocol is None, expected a text$"),
        ({"shuffled_text": 1}, "shuffled_text is 1, expected true or false$"),
        ({"failed": 0.5}, "failed is 0.5, expected a count$"),
        ({"n": -1}, "n is -1, expected a count$"),
        ({"giou": "1"}, "giou is .1., expected a number$"),
    ],
)
def test_a_table_with_a_field_of_another_kind_is_refused(tmp_path, change, message):
    """`...`: the field is missing."""
    table = {key: value for key, value in (result(1.0) | change).items() if value is not ...}
    (tmp_path / "val.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=rf"val\.json: {message}"):
        results.read_table(tmp_path / "val.json")


def test_a_sample_counts_in_whole_numbers():
    assert results.impossible({"area": 2, "query": -1, "iou": 0.5, "best_iou": None}) == ""
    assert results.impossible({"area": 1.5}) == "area is 1.5, expected a count"
    assert results.impossible({"area": -1}) == "area is -1, expected a count"
    assert results.impossible({"query": 0.5}) == "query is 0.5, expected a whole number"
    assert results.impossible({"best_rank": -2}) == "best_rank is -2, expected a whole number"  # -1: there is none


def test_the_learning_curve(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "loss": 9.0 / i, "accuracy/referring_selection": 0.5, "<b>ciou": float("nan")} for i in range(1, 1000)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1000, "lo')  # killed while it wrote
    found = learning_curve.read(file)
    assert len(found["loss"]) == 999 and found["<b>ciou"][0] == (1, None)
    assert len(learning_curve.thinned(found["loss"])) == 250 and learning_curve.thinned(found["loss"])[-1] == (999, 9.0 / 999)
    text = report.write(
        tmp_path / "report.html", [report.ReportRow("m", {"val": result(1.0)})], title="t", run=tmp_path
    ).read_text()
    assert text.count("<svg") == 2 and "accuracy/referring_selection" in text and "<b>ciou" not in text
    for line in ("[]", "{}", '{"step": true}', '{"step": -1}', '{"step": 1e400}', "x", "[" * 10**5):
        file.write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl:1: no line of metrics"):
            learning_curve.draw(file)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"giou": 20.0, "oracle_giou": 80.0}, "60.0 are lost in the choice among the candidates and 20.0 in their masks"),
        ({"giou": 20.0, "oracle_giou": 30.0}, "what is left to improve is the masks."),
        ({"giou": 74.3, "oracle_giou": 86.9}, "what is left to improve is both alike."),
        ({"giou": 97.0, "oracle_giou": 99.0}, "Hardly anything is missing."),
        ({"giou": 95.5, "oracle_giou": 96.0}, "Hardly anything is missing."),
        ({"giou": 95.0, "oracle_giou": 96.0}, "Of the 5.0 points of gIoU that are missing"),
        ({"giou": 10.0, "oracle_giou": 60.0}, "what is left to improve is both alike."),  # 50 and 40: 1.25 times
        ({"giou": 20.0, "oracle_giou": 65.0}, "what is left to improve is the choice."),  # 45 and 35
        ({"giou": 20.0, "oracle_giou": 55.0}, "what is left to improve is the masks."),
        ({"n": 1234}, "m: cIoU 60.0, gIoU 50.0 on val (1,234 expressions)."),
        ({"failed": 3}, "3 expressions got no answer."),
    ],
)
def test_what_the_numbers_say(changes, says):
    assert says in " ".join(verdict("m", "val", result(60.0) | changes, None, []))


@pytest.mark.parametrize(
    ("ciou", "says"),
    [(29.9, "it reads"), (30.0, "much of"), (53.9, "much of"), (54.0, "does not read"), (60.0, "does not read")],
)
def test_what_the_control_says(ciou, says):
    assert says in " ".join(verdict("m", "val", result(60.0), result(ciou), []))
    assert "does not read" in " ".join(verdict("m", "val", result(0.0), result(0.0), []))


def test_pictures_show_image_truth_selected_and_best(tmp_path):
    folder = report.save_pictures(tmp_path, "val", {"good": [example(0.5)]})
    (entry,) = json.loads((folder / "index.json").read_text())
    captions = [panel["caption"] for panel in entry["panels"]]
    assert captions == ["image", "truth", "selected: IoU 50.0", "best: IoU 90.0"]
    pixels = [np.asarray(Image.open(folder / panel["file"])) for panel in entry["panels"]]
    assert {image.shape for image in pixels} == {(160, 240, 3)}  # four times the size
    middle_of_truth, middle_of_selected = (80, 80), (80, 140)
    assert (pixels[0] == 200).all()
    expected = {1: pictures.TRUTH, 2: pictures.SELECTED, 3: pictures.BEST}
    for i, color in expected.items():
        edge = 40 if i != 2 else 100  # the first column of the mask at this scale
        assert tuple(pixels[i][middle_of_selected if i == 2 else middle_of_truth]) == (200, 200, 200)
        line = [tuple(map(int, pixels[i][80, edge - n])) for n in range(1, 6)]
        assert line == [color, color, (255,) * 3, (0,) * 3, (224,) * 3]  # visible on anything
        assert tuple(pixels[i][20, 20]) == (224, 224, 224)


def test_the_strip_of_a_validation_is_image_truth_selected_and_best():
    sample = example(0.5)
    shown = validation.strip(sample)
    assert shown.dtype == np.uint8 and shown.shape == (160, 4 * 240, 3)
    masks = (sample.truth, pictures.TRUTH), (sample.selected, pictures.SELECTED), (sample.best, pictures.BEST)
    panels = [pictures.panel(sample.image), *(pictures.panel(sample.image, mask, color) for mask, color in masks)]
    np.testing.assert_array_equal(shown, np.concatenate(panels, 1))


def test_overlay_keeps_the_mask_and_fades_the_rest():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (30, 50, 3), np.uint8)
    mask = np.zeros((30, 50), bool)
    mask[5:20, 0:25] = True
    before = image.copy()
    out = overlay.overlay(image, mask, pictures.SELECTED)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(out[mask], image[mask])
    edge = overlay.outline(mask)
    assert edge[4, 10] and edge[4, 25] and edge[12, 25] and not edge[3, 10] and not edge[12, 24]
    np.testing.assert_array_equal(out[edge], np.broadcast_to(pictures.SELECTED, (edge.sum(), 3)))
    white, black = overlay.outline(mask | edge), overlay.outline(mask, 3) & ~overlay.outline(mask, 2)
    assert (out[white] == 255).all() and (out[black] == 0).all()
    rest = out[~mask & ~overlay.outline(mask, 3)]
    assert (rest == rest[:, :1]).all() and rest.min() > 130
    with pytest.raises(ValueError, match="does not fit"):
        overlay.overlay(image, mask[:-1], pictures.SELECTED)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3000, 2)])
def test_pictures_of_odd_sizes(size):
    image = np.zeros((*size, 3), np.uint8)
    for picture in (pictures.panel(image), pictures.panel(image, np.ones(size, bool), pictures.TRUTH)):
        assert max(picture.size) == 240 and min(picture.size) >= 1


def test_slugs():
    assert overlay.slug("Left of the BIG, red/blue one!") == "left-of-the-big-red-blue-one"
    assert overlay.slug("赤い丸") == "expression"
    assert len(overlay.slug("x" * 300)) == 48


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "val.json").write_text("{}")
    with pytest.raises(UserError, match=r"val\.json is not a result of eval\.py"):
        report.read_row("x", tmp_path)


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write pictures"):
        report.save_pictures(tmp_path / "file", "val", {"good": [example(0.9)]})
    with pytest.raises(UserError, match="cannot write"):
        report.write(tmp_path / "file" / "report.html", [], title="x")


def test_the_report_that_an_evaluation_writes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    both = [
        summary.EvaluatedSplit("data/a", "val", result(ciou, shuffled), tmp_path) for ciou, shuffled in ((61.2, 0), (9.0, 1))
    ]
    path = summary.write_report(tmp_path / "report.html", "mine", both, ["Model: m."], run=tmp_path)
    text = path.read_text()
    assert "mine: cIoU 61.2" in text and "Asked the sentences of other images, cIoU is 9.0" in text
    assert "Learning curve" in text and f"flowseg analyze oracle {tmp_path / 'val.jsonl'}" in text
    assert (
        summary.write_report(tmp_path / "none.html", "m", [summary.EvaluatedSplit("d", "val", {"pq": 1.0}, tmp_path)], [])
        is None
    )


def test_a_control_that_is_evaluated_later_stands_beside_its_split(tmp_path):
    real, control = result(61.2), result(9.0, True)
    later = [summary.EvaluatedSplit("data/a", "val", control, tmp_path)]
    write = lambda: summary.write_report(tmp_path / "report.html", "mine", later, []).read_text()  # noqa: E731
    assert "cIoU 61.2" not in write()
    (tmp_path / "val.json").write_text(json.dumps(real))
    assert "mine: cIoU 61.2" in (text := write()) and "Asked the sentences of other images, cIoU is 9.0" in text
    (tmp_path / "val.json").write_text(json.dumps(real | {"checkpoint": {"digest": "0" * 64, "step": 1}}))
    assert "cIoU 61.2" not in write()  # of another model


@pytest.fixture
def given(monkeypatch):
    """What the template of a report is given."""
    found = []
    monkeypatch.setattr(report.page, "write", lambda path, template, **values: found.append(values))
    return found


def test_what_a_report_is_made_of(tmp_path, given):
    """Two models, one with a control; no two figures are alike."""
    folder = tmp_path / "b" / "eval"
    for name, kinds in (("val", {"failed": [example(0.1, i=2)], "good": [example(0.93)]}), ("val_shuffled", {"good": []})):
        report.save_pictures(folder, name, kinds)
    gres = {"n_acc": 12.0, "t_acc": 34.0}
    tested = result(41.0) | {"checkpoint": {}, "failed": 7, "prompt": {"question": 5, "answer": 3}, "families": {}}
    rows = [
        report.ReportRow("a", {"val": result(5.5) | gres, "test": tested}, note="random parameters", folder=tmp_path / "a"),
        report.ReportRow("b", {"test": result(71.0), "val": result(61.0)}, {"val": folder / "pictures" / "val"}, folder=folder),
        report.ReportRow("b, shuffled text", {"val": result(11.0, True)}, folder=folder, shuffled=True),
    ]
    report.write(tmp_path / "report.html", rows, title="t")
    (page,) = given
    assert page["verdict"][0].startswith("b: cIoU 61.0") and page["verdict"][2].startswith(
        "Asked the sentences of other images"
    )
    assert page["verdict"][3] == "For comparison, cIoU: a 5.5." and page["protocols"] == "xsam"
    assert [name for _, name, _ in page["columns"]] == [name for _, name, _ in report._COLUMNS] + ["N-acc", "T-acc"]
    val, test = page["tables"]
    checkpoint = "step 1200, checkpoint 0123456789ab"
    assert (val["split"], [row["label"] for row in val["rows"]]) == ("val", ["a", "b", "b, shuffled text"])
    assert [row["detail"] for row in val["rows"]] == [f"random parameters, {checkpoint}", checkpoint, checkpoint]
    cells = ["10", "5.5", "50.0", "90.0", "80.0", "30.0", "95.0", "93.0", "91.0", "12.0", "34.0"]
    assert val["rows"][0]["cells"] == cells and val["rows"][1]["cells"] == ["10", "61.0", *cells[2:9], "", ""]
    assert test["split"] == "test" and test["rows"][0]["detail"] == "random parameters, prompt 5, answer 3, 7 failed"
    assert len(test["columns"]) == 9 and len(val["columns"]) == 11
    counts = {"attribute": 10, "relation": 10}
    both = lambda ciou: [(f"{ciou:.1f}", "90.0"), (f"{ciou - 1:.1f}", "90.0")]  # noqa: E731
    assert page["families"] == [
        {"split": "val", "counts": counts, "rows": [("a", both(5.5)), ("b", both(61.0)), ("b, shuffled text", both(11.0))]},
        {"split": "test", "counts": counts, "rows": [("b", both(71.0))]},
    ]
    whole = "checkpoint 0123456789abcdef, step 1200"
    assert page["origin"] == [f"Model a, {whole}", "Model a", f"Model b, {whole}", f"Model b, shuffled text, {whole}"]
    assert [figure["kind"] for figure in page["figures"]] == ["good", "failed"]
    good = page["figures"][0]
    assert (good["model"], good["split"], good["family"], good["meant"]) == ("b", "val", "attribute", "")
    assert good["notes"] == ["score 0.750 (query 3), best candidate not a number (query 4, rank 2)", "1.jpg, sentence 1"]
    assert good["panels"][0] == ("image", "b/eval/pictures/val/good_1_the-b-red-b-circle_0.png")
    assert page["filters"] == [("kind", "result", ["good", "failed"], "")]
    assert page["diagnoses"] == [] and page["curves"] == [] and page["about"] == ()
    assert page["hints"][0]["command"] == f"flowseg analyze oracle {folder / 'val.jsonl'}"
    (folder / "analysis").mkdir()
    (folder / "analysis" / "layer_trace_val.html").write_text("")
    rows[1] = dataclasses.replace(rows[1], pictures={"val": folder / "pictures" / "val", "test": folder / "pictures" / "val"})
    report.write(tmp_path / "report.html", rows, title="t")
    assert given[1]["diagnoses"] == [("b/eval/analysis/layer_trace_val.html", "layer trace val")] and given[1]["hints"] == []
    assert given[1]["filters"][0] == ("split", "data set", ["val", "test"], "val")
    report.write(tmp_path / "report.html", [rows[2]], title="t")
    assert given[2]["verdict"] == [] and given[2]["hints"] == [] and given[2]["filters"] == []


def test_which_model_results_are_of():
    whole = {"checkpoint": {"digest": "0123456789abcdef01", "step": 0}}
    assert report.origin("label", whole) == "Model label, checkpoint 0123456789abcdef, step 0"
    assert report.origin("label", {"model": "m", "checkpoint": {"step": None}}) == "Model m"


def test_the_table_of_the_terminal():
    rows = [report.ReportRow("m", {"val": result(5.5)}), report.ReportRow("longer", {"val": result(61.25)})]
    head, first, second = report.table(rows).splitlines()
    assert head.split() == ["split", "model", "n", "cIoU", "gIoU", "oracle", "oracle", "gIoU", "gap", "P@0.5", "P@0.7", "P@0.9"]
    assert first.startswith("val    m       10   5.5") and second.startswith("val    longer  10  61.2")
    assert len({len(line) for line in (head, first, second)}) == 1


def test_the_table_of_an_evaluation():
    boxes = {"pq": 1.0, "sq": 2.0, "rq": 3.0}
    splits = [
        summary.EvaluatedSplit("a", "val", result(61.256) | {"n_acc": 7.0, "t_acc": None}, None),
        summary.EvaluatedSplit("a", "val", result(9.0, True) | {"failed": 3}, None),
        summary.EvaluatedSplit("b", "test", {"failed": 4, "panoptic": {"n": 5, "all": boxes}, "semantic": {"n": 6, "miou": 8.0},
                                             "instance": {"n": 7, "ap": 1.5, "ap50": 2.5, "ap75": 3.5}}, None),
    ]  # fmt: skip
    lines = [line.split("  ") for line in summary.table(splits).splitlines()]
    found = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert found[0] == [
        "data set", "split", "protocol", "n", "cIoU", "gIoU", "oracle cIoU", "oracle gIoU", "gap", "N-acc", "T-acc",
        "PQ", "SQ", "RQ", "mIoU", "AP", "AP50", "AP75", "failed",
    ]  # fmt: skip
    assert found[1] == ["a", "val", "xsam", "10", "61.26", "50.00", "90.00", "80.00", "30.00", "7.00", "-", "0"]
    assert found[2] == ["a", "val, shuffled text", "xsam", "10", "9.00", "50.00", "90.00", "80.00", "30.00", "3"]
    assert found[3] == ["b", "test", "panoptic", "5", "1.00", "2.00", "3.00", "4"]
    assert found[4] == ["b", "test", "semantic", "6", "8.00", "4"]
    assert found[5] == ["b", "test", "instance", "7", "1.50", "2.50", "3.50", "4"]


def test_what_the_learning_curve_plots(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(learning_curve.plots, "lines", lambda curves, **axes: drawn.append((curves, axes)) or "")
    rows = [
        {"step": 2, "loss": 3.0, "accuracy/referring_selection": 0.25, "eval/cIoU": 60.0, "other": 1.0},
        {"step": 8, "loss": 2.0, "accuracy/referring_selection": None, "eval/giou": 50.0},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores, loss = [about for about, _ in learning_curve.draw(file)]
    assert "selected in training, and the validation scores while it trained, percent." in scores and "loss" in loss
    axes = {"x": "step", "x_range": (2.0, 8.0), "dots": False}
    percent = {
        "accuracy/referring_selection": [(2, 25.0), (8, None)], "eval/cIoU": [(2, 60.0)], "eval/giou": [(8, 50.0)]
    }  # fmt: skip
    assert drawn == [
        (percent, axes | {"y": "percent", "y_range": (0, 100)}),
        ({"loss": [(2, 3.0), (8, 2.0)]}, axes | {"y": "loss"}),
    ]
    file.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1, "accuracy/referring_selection": 1}\n')
    assert learning_curve.draw(file)[0][0] == "How often the right query is selected in training, percent."
    file.write_text('{"step": 1, "loss": 1}\n')
    assert learning_curve.draw(file) == []  # a curve of one point
    for points in (300, 301, 600, 601):
        curve = learning_curve.thinned([(n, 1.0) for n in range(points)])
        assert len(curve) == -(-points // -(-points // 300)) and curve[-1][0] == points - 1 and curve == sorted(curve)
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read \(No such file or directory\)"):
        learning_curve.read(tmp_path / "gone.jsonl")


def test_a_prompt_has_a_question_and_an_answer(tmp_path):
    for prompt, lacking in (({"question": 1}, "answer"), ({"answer": 0}, "question"), ({"x": 1}, "question, answer")):
        (tmp_path / "val.json").write_text(json.dumps(result(60.0) | {"prompt": prompt}))
        with pytest.raises(UserError, match=rf"val\.json: prompt lacks {lacking}: evaluate again"):
            results.read_table(tmp_path / "val.json")
    (tmp_path / "val.json").write_text(json.dumps(result(60.0) | {"prompt": {}}))
    assert results.read_table(tmp_path / "val.json")["prompt"] == {}

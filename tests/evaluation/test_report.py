"""The report: pictures show what they claim, the page is complete, static and escaped, and can be written again from files."""

from __future__ import annotations

import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import report
from flowseg_jax.evaluation.examples import GallerySample
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
        self.images, self.links, self.open, self.cells = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("src", "href") if key in attrs]
        self.cells += tag == "td"
        if tag == "img":
            self.images.append(attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

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
    assert len(page.images) == 3
    for image in page.images:
        assert (tmp_path / image["src"]).is_file() and image["alt"] == "the <b>red</b> circle"
    assert not [link for link in page.links if "://" in link or link.startswith("/")]
    for words in ("A &amp; B", "--config=&lt;x&gt;", "61.2", "11.0", "5.5", "untrained", "step 1200", "random parameters"):
        assert words in text
    assert "<b>red</b>" not in text
    assert "rank 2" in text and "not a number" in text and "truth: “a “star””" in text
    assert page.cells == 3 * 9 + 3 * 2
    assert text.index("Good") < text.index("Failed")
    plain = report.table(rows)
    assert [line.split()[0] for line in plain.splitlines()] == ["split", "val", "val", "val"]
    assert "61.2" in plain.splitlines()[2]
    report.save_pictures(folder, "val", {"good": [example(0.93)]})  # replaces: no stale files
    assert sorted(p.name for p in (folder / "pictures" / "val").iterdir()) == ["good_1_the-b-red-b-circle.png", "index.json"]


def test_a_strip_shows_image_truth_selected_and_best(tmp_path):
    folder = report.save_pictures(tmp_path, "val", {"good": [example(0.5)]})
    (file,) = folder.glob("*.png")
    sheet = np.asarray(Image.open(file))
    panel = 240
    middle_of_truth, middle_of_selected = (80, 80), (80, 140)  # the image is shown at four times its size
    left = [i * (panel + 8) for i in range(4)]

    def at(panel, place):
        return tuple(int(v) for v in sheet[place[0], left[panel] + place[1]])

    assert at(0, middle_of_truth) == (200, 200, 200)
    expected = {1: pictures.TRUTH, 2: pictures.SELECTED, 3: pictures.BEST}
    for i, color in expected.items():
        edge = 40 if i != 2 else 100  # the first column of the mask at this scale
        assert at(i, middle_of_selected if i == 2 else middle_of_truth) == (200, 200, 200)
        assert at(i, (80, edge - 1)) == color
        assert at(i, (20, 20)) == (224, 224, 224)


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
    rest = out[~mask & ~edge]
    assert (rest == rest[:, :1]).all() and rest.min() > 130
    with pytest.raises(ValueError, match="does not fit"):
        overlay.overlay(image, mask[:-1], pictures.SELECTED)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3000, 2)])
def test_strips_of_odd_sizes(size):
    image = np.zeros((*size, 3), np.uint8)
    sheet = pictures.comparison_strip(image, [("image", None, pictures.TRUTH), ("truth", np.ones(size, bool), pictures.TRUTH)])
    assert sheet.width >= 240 and sheet.height >= 23


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

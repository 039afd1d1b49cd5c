"""Whatever the inputs say, a page has the elements and attributes that our code writes, and no others."""

from __future__ import annotations

import copy
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.cli.analyze import main
from flowseg_jax.data import masks, preview
from flowseg_jax.data.records import Annotation, Expression, RecordErrors, Turn
from flowseg_jax.data.records import Example as Sample
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import report
from flowseg_jax.evaluation.examples import GallerySample
from flowseg_jax.reports import html as page
from flowseg_jax.reports import plots
from flowseg_jax.reports.html import Html, html, join
from tests.helpers.answers import record, write

HOSTILE = """"'><script>alert(1)</script><img src=x onerror="alert(2)" onload='alert(3)'></td></figure></svg><!-- {0} &amp; """


class Elements(HTMLParser):
    """Every element with the names of its attributes, and every comment, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag):
        self.found.append(f"/{tag}")

    def handle_comment(self, data):
        self.found.append("comment")


def elements(text: str) -> list:
    return Elements(text).found


def leaves(value, place=()):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*place, key))
    else:
        yield place


def put(value, place, new):
    value = copy.deepcopy(value)
    *way, last = place
    node = value
    for key in way:
        node = node[key]
    node[last] = new
    return value


def figures():
    p_at = {f"0.{i}": 100.0 - i for i in range(5, 10)}
    return {"n": 10, "ciou": 61.5, "giou": 50.0, "oracle_ciou": 90.0, "oracle_giou": 80.0, "selection_gap": 30.0, "p_at": p_at}


def table():
    prompt = {"question": 0, "answer": 1}
    checkpoint = {"digest": "0123456789abcdef", "step": 12}
    tail = {
        "families": {"attribute": figures()},
        "failed": 1,
        "checkpoint": checkpoint,
        "prompt": prompt,
        "shuffled_text": False,
    }
    return {"protocol": "gres", **figures(), "n_acc": 1.0, "t_acc": 2.0, **tail}


def written(tmp_path, row) -> str:
    return report.write(tmp_path / "report.html", [row], title="t", about=["a"]).read_text()


def test_the_report_escapes_every_field_of_its_tables(tmp_path):
    usual = elements(written(tmp_path, report.ReportRow("model", {"val": table()}, note="n")))
    places = list(leaves(table()))
    assert len(places) > 25
    for place in places:
        hostile = report.ReportRow("model", {"val": put(table(), place, HOSTILE)}, note="n")
        assert elements(written(tmp_path, hostile)) == usual, place
    family = table() | {"families": {HOSTILE: figures()}}
    assert elements(written(tmp_path, report.ReportRow(HOSTILE, {HOSTILE: family}, note=HOSTILE))) == usual
    text = report.write(
        tmp_path / "report.html", [report.ReportRow("model", {"val": table()}, note="n")], title=HOSTILE, about=[HOSTILE]
    )
    assert elements(text.read_text()) == usual
    assert "alert(1)" in text.read_text()  # it is there, as text


def test_a_table_read_back_has_figures_where_figures_belong(tmp_path):
    """What is no figure is named before a page is written."""
    for place in leaves(table()):
        for value in (HOSTILE, float("nan"), None, [], {}, True, 10**400, 10**30):
            (tmp_path / "val.json").write_text(json.dumps(put(table(), place, value)))
            try:
                row = report.read_row("model", tmp_path)
            except UserError as error:
                assert str(error).startswith(str(tmp_path / "val.json")) and str(place[0]) in str(error)
                assert "\n" not in str(error) and len(str(error)) < 400
            else:
                assert place[0] in ("protocol", "checkpoint", "prompt", "shuffled_text"), (place, value)
                written(tmp_path, row)


def picture(**changes) -> GallerySample:
    blank = np.zeros((20, 30), bool)
    fields = {"iou": 0.1, "best_iou": 0.9, "query": 1, "best_query": 2, "best_rank": 1, "best_score": 0.5, "family": "f"}
    return GallerySample(record(1, 0, iou=10) | fields | changes, np.zeros((20, 30, 3), np.uint8), blank, blank, blank)


TEXTS = ("text", "sentence", "family", "file_name")


def test_pictures_and_diagnoses_escape_every_text_of_a_sample(tmp_path):
    pages, texts = {}, {}
    for name, changes in (
        ("usual", dict.fromkeys(TEXTS, "t")),
        *((key, dict.fromkeys(TEXTS, "t") | {key: HOSTILE}) for key in TEXTS),
    ):
        folder = tmp_path / name.replace("/", "_")
        rows = [record(i, 0, iou=10 * i, oracle=90, rank=1) | changes for i in (1, 2, 3)]
        rows[0] |= {"family": changes["family"] or "f"}
        write(folder / "val.jsonl", rows)
        report.save_pictures(folder, "val", {"failed": [picture(**changes)]})
        (folder / "val.json").write_text(json.dumps(table()))
        for arguments in (["oracle", str(folder / "val.jsonl")], ["compare-failures", *[str(folder / "val.jsonl")] * 2]):
            assert main([*arguments, "--out", str(folder / "out")]) == 0
        texts[name] = [path.read_text() for path in sorted((folder / "out").glob("*.html"))]
        texts[name].append(report.write(folder / "report.html", [report.read_row("m", folder)], title="t").read_text())
        pages[name] = [[x for x in elements(text) if x not in ("br", ("br",))] for text in texts[name]]
        assert len(texts[name]) == 3
    usual = pages.pop("usual")
    for name, found in pages.items():
        for one, other in zip(found, usual, strict=True):
            allowed = [("span", "class"), "/span"]  # a sentence that differs from its text is shown too
            assert {x for x in one if x not in allowed} <= {x for x in other if x not in allowed}, name
            assert not any("onerror" in x or "onload" in x for x in one)
        scripts = [text.partition("<script>")[2].partition("</script>")[0] for text in texts[name]]
        assert [one.count(("script",)) for one in found] == [0, 0, 1]  # the filters of the report
        assert scripts == [text.partition("<script>")[2].partition("</script>")[0] for text in texts["usual"]], name


def test_a_picture_lies_in_its_own_folder(tmp_path):
    report.save_pictures(tmp_path, "val", {"failed": [picture()]})
    path = tmp_path / "pictures/val/index.json"
    entries = json.loads(path.read_text())
    (tmp_path / "val.json").write_text(json.dumps(table()))
    for file in ("../../x.png", "/etc/x.png", "a\0b", "", "..", 3, None):
        path.write_text(json.dumps([put(entries[0], ("panels", 1, "file"), file)]))
        with pytest.raises(UserError, match=r"index.json cannot be read \(entry 0: file is .*, expected the name of a file"):
            written(tmp_path, report.read_row("m", tmp_path))


PLOTS = {
    "bars": lambda s: plots.bars([(s, 3.0), ("c", 0.0)], x=s, y=s),
    "lines": lambda s: plots.lines({s: [(0, 1.0), (1, None), (2, 0.5)]}, x=s, y=s, x_range=(0, 2), diagonal=True),
    "shares": lambda s: plots.shares([(s, [25.0, 75.0])], [s, "b"]),
    "heat": lambda s: plots.heat([[1.0, 2.0], [3.0, 4.0]], [s, "s"], [s, "d"], x=s, y=s),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots(name):
    assert elements(PLOTS[name](HOSTILE)) == elements(PLOTS[name]("a"))
    assert isinstance(PLOTS[name]("a"), Html)


class Layout:
    """A data set with one image with a sentence, one with turns and one that is left out; `text` stands wherever a text can."""

    task, annotation_files = "reasoning", ()

    def __init__(self, text: str):
        self.text, self.source, self.splits, self.categories = text, text, (text,), (text,)

    def size(self, split):
        return 4

    def example(self, split, index, notes):
        notes[self.text] += 1
        if index == 2:
            return None
        if index == 3:
            raise UserError(self.text)
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30)).save(buffer, "PNG")
        annotation = Annotation(1, 0, masks.encode(np.ones((30, 40), bool)), crowd=True)
        said = (Expression(self.text, 1, 1, (0,), self.text, self.text),) if index == 0 else ()
        turns = (Turn(self.text, self.text),) if index == 1 else ()
        return Sample(1, self.text, 30, 40, buffer.getvalue(), (annotation,), said, turns)


def test_the_preview(tmp_path):
    pages = []
    for name, text in (("usual", "t"), ("hostile", HOSTILE)):
        problems = RecordErrors(keep=True)
        path = preview.preview(Layout(text), tmp_path / name, [text], problems)
        pages.append(elements(path.read_text()))
    assert pages[0] == pages[1] and ("b",) in pages[0] and ("span", "class", "style") in pages[0]


def test_html_is_made_in_one_way_only(tmp_path):
    assert html("<b>{}</b>{:.1f}", "<i>", 2) == "<b>&lt;i&gt;</b>2.0"
    assert html("{}", html("<b>{}</b>", "&")) == "<b>&amp;</b>"
    assert join(["<", html("<br>")], ", ") == "&lt;, <br>"
    assert html("{}{}", True, None) == "TrueNone"
    page.write(tmp_path / "p.html", "page.html", title="<t>", body=["<script>", html("<p>{}</p>", "x")])
    text = (tmp_path / "p.html").read_text()
    assert "<script>" not in text and "<title>&lt;t&gt;</title>" in text and "<p>x</p>" in text


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["python3", "-m", "flowseg_jax", "eval", "--out=a b"], "python -m flowseg_jax eval '--out=a b'"),
        (["python3", "-m", "experiments.demo"], "python -m experiments.demo"),
        (["python3", "-m", "pytest", "flowseg"], ""),
        (["python3", "-m"], ""),
        (["python3", "/usr/bin/flowseg", "eval"], "flowseg eval"),
        (["python3", "eval.py", "--data=x"], "python eval.py --data=x"),
        (["python3", "other.py", "eval.py"], ""),
        (["python3"], ""),
    ],
)
def test_a_page_says_by_which_command_of_ours_it_was_written(argv, shown):
    assert page.command(argv) == shown


def test_a_picture_inside_a_page_has_a_largest_size(tmp_path, monkeypatch):
    file, head = tmp_path / "a.png", b"\x89PNG\r\n\x1a\n"
    monkeypatch.setattr(page, "INLINE_BYTES", 20)
    file.write_bytes(head + b"x" * 12)
    assert page.data_uri(file).startswith("data:image/png;base64,iVBORw0KGgp4")
    file.write_bytes(head + b"x" * 13)
    with pytest.raises(UserError, match="a.png is not a picture that an evaluation kept"):
        page.data_uri(file)
    with pytest.raises(UserError, match=r"gone.png cannot be read \(No such file or directory\): evaluate again"):
        page.data_uri(tmp_path / "gone.png")

"""The preview: pictures show targets and ignored parts, the page is complete and escaped, damaged samples are seen."""

from __future__ import annotations

import html.parser
import io

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.cli.data import main
from flowseg_jax.data import formats, masks, preview
from flowseg_jax.data.records import Annotation, Example, Expression, RecordErrors, Turn
from flowseg_jax.errors import UserError
from tests.helpers import minirefcoco as mini


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.open, self.cards, self.words = [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.cards += tag == "figure"
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def png(height, width):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def example(boxes, *, expressions=(), turns=(), ignore=(), category=-1, height=90, width=180):
    annotations = tuple(
        Annotation(i, category, masks.encode(mini.box_mask(height, width, *box)), ignore=i in ignore)
        for i, box in enumerate(boxes)
    )
    return Example(1, "<1>.png", height, width, png(height, width), annotations, tuple(expressions), tuple(turns))


class Fake:
    task, source, splits, annotation_files = "reasoning", "fake & co", ("train",), ()

    def __init__(self, *examples, categories=()):
        self._examples, self.categories = examples, categories

    def size(self, split):
        return len(self._examples)

    def example(self, split, index, notes):
        found = self._examples[index]
        if found is None:
            notes["images without an object: left out"] += 1
        return found


def show(layout, out, **options):
    problems = RecordErrors(keep=True)
    path = preview.preview(layout, out, layout.splits, problems, **options)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    for image in page.images:
        assert (out / image["src"]).is_file()
    return page, " ".join(page.words), problems


def test_a_picture_outlines_each_target_in_its_colour_and_hatches_ignored_parts():
    ask = Expression("both", 1, 1, (0, 1))
    one = example([(10, 10, 50, 50), (100, 10, 150, 50), (10, 70, 170, 85)], expressions=[ask], ignore={2})
    picture = preview.choose(one, np.random.default_rng(0))
    whole, drawn = map(np.asarray, preview.draw(picture))
    assert whole.shape == drawn.shape and (whole == (200, 0, 0)).all()  # the image in its colours, nothing drawn on it
    assert drawn.shape == (180, 360, 3)  # twice the size
    assert tuple(drawn[60, 60]) == tuple(drawn[60, 250]) == (200, 0, 0)
    assert tuple(drawn[60, 18]) == preview.color(0) and tuple(drawn[60, 198]) == preview.color(1)
    grey = (drawn[140:170, 20:340] == preview.IGNORE).all(-1)
    assert 0.4 < grey.mean() < 0.6
    rest = drawn[110:130, 20:340]
    assert (rest == rest[..., :1]).all() and (rest[0, 0] > 130).all()  # faded
    assert preview.color(0) == preview.color(len(preview.COLORS))


def test_images_without_targets_are_shown_as_they_are():
    for said in ({}, {"expressions": [Expression("nothing", 1, 1, ())]}):
        one = example([(10, 10, 50, 50)] if said else [], **said)
        drawn = np.asarray(preview.draw(preview.choose(one, np.random.default_rng(0))))
        assert (drawn == (200, 0, 0)).all()


def test_a_tiny_target_in_a_large_image_is_seen():
    one = example([(1000, 500, 1001, 501)], height=1000, width=2000)
    drawn = np.asarray(preview.draw(preview.choose(one, np.random.default_rng(0))))
    assert (drawn == preview.color(0)).all(-1).any()


def test_all_objects_are_shown_where_nothing_is_said():
    one = example([(0, 0, 90, 90), (90, 0, 180, 90), (0, 0, 5, 5)], category=0, ignore={2})
    assert preview.choose(one, np.random.default_rng(0)).drawn == (0, 1)


def test_page_of_a_layout(tmp_path):
    root = mini.write(tmp_path / "set")
    page, words, problems = show(formats.open_layout("refcoco", root), tmp_path / "out")
    assert not problems.found and page.cards == 5 and len(page.images) == 2 * 5
    for expected in ("refcoco layout refs(unc).p", "train", "3 of 3", "testA", "“chair”", "café chair", "ordinal", "32x32"):
        assert expected in words


def test_page_shows_answers_turns_and_what_was_left_out_all_escaped(tmp_path):
    ask = Expression("<b>why</b>", 1, 1, (0,), "short", "so <i>there</i>")
    layout = Fake(
        example([(10, 10, 50, 50)], expressions=[ask], category=0),
        example([], turns=[Turn("<script>q</script>", "a & b")]),
        None,
        example([], expressions=[Expression("unicorn", 1, 1, ())]),
        categories=("c<d",),
    )
    page, words, problems = show(layout, tmp_path / "out")
    assert not problems.found and page.cards == 4 and len(page.images) == 2 * 3
    for expected in (
        "fake & co",
        "“<b>why</b>”",
        "short",
        "answer: “so <i>there</i>”",
        "<script>q</script>",
        "a & b",
        "c<d",
        "left out (images without an object: left out)",
        "refers to nothing",
        "<1>.png",
    ):
        assert expected in words


def test_samples_and_seed(tmp_path):
    layout = Fake(*(example([(1, 1, 9, 9)]) for _ in range(30)))
    pages = [show(layout, tmp_path / str(i), samples=5, seed=seed)[0] for i, seed in enumerate((0, 0, 1))]
    sources = [[image["src"] for image in page.images] for page in pages]
    assert len(sources[0]) == 2 * 5 and sources[0] == sources[1] != sources[2]


def test_a_damaged_sample_is_shown_as_its_error(tmp_path, capsys):
    root = mini.write(tmp_path / "set")
    (root / "images" / "COCO_train2014_000000000001.jpg").write_bytes(b"broken")
    assert main(["preview", "refcoco", str(root), "--out", str(tmp_path / "out")]) == 1
    assert "1 damaged" in capsys.readouterr().out
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert page.cards == 5 and len(page.images) == 2 * 4
    assert "000000000001.jpg: not an image file" in " ".join(page.words)


def test_damage_found_at_opening_is_shown(tmp_path):
    instances, refs = mini.damaged(lambda instances, refs: mini.entry(refs, 2).update(ann_id=999))
    root = mini.write(tmp_path / "set", instances=instances, refs=refs)
    assert main(["preview", "refcoco", str(root), "--out", str(tmp_path / "out")]) == 1
    assert "expression without an object" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_command_shows_one_split(tmp_path):
    root = mini.write(tmp_path / "set")
    assert main(["preview", "refcoco", str(root), "--out", str(tmp_path / "out"), "--split", "val"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0_val_0.jpg", "0_val_0_image.jpg", "index.html"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "vall"], "unknown split 'vall'"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--out", "set"], "set is not empty; choose a new folder"),
        (["--out", "set/instances.json"], "cannot write the preview to set/instances.json"),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    mini.write(tmp_path / "set")
    with pytest.raises(UserError, match=message) as caught:
        main(["preview", "refcoco", "set", "--out", "out", *words])
    assert "\n" not in str(caught.value)

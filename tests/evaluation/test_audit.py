"""Recomputing tables from samples, and comparing two models."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flowseg_jax.cli.analyze import main
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, metrics
from flowseg_jax.evaluation.protocols import LISA, XSAM


def record(image, sentence, pair, once=None, *, count=1, family="", failed=False, oracle=None):
    once, oracle = once or pair, oracle or pair
    return {
        "image_id": image,
        "ann_id": 10 * image,
        "sentence_id": sentence,
        "text": f"text {image}.{sentence}",
        "text_form": "lower",
        "sentence": f"text {image}.{sentence}",
        "family": family,
        "count": count,
        "failed": failed,
        "failure": "non-finite" if failed else "",
        "area": pair[1],
        "score": 0.5,
        "no_target_threshold": 0.0,
        "intersection": pair[0],
        "union": pair[1],
        "single_cover_intersection": once[0],
        "single_cover_union": once[1],
        "oracle_intersection": oracle[0],
        "oracle_union": oracle[1],
        "oracle_single_cover_intersection": oracle[0],
        "oracle_single_cover_union": oracle[1],
    }


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_lisa_counts_every_sentence_and_adds_the_parts_up():
    """Two merged sentences count twice; the truth is where exactly one polygon lies."""
    rows = [record(1, 0, (50, 100), (40, 100), count=2), record(2, 0, (30, 40)), record(3, 0, (0, 0), count=3)]
    found = audit.tables(rows)
    assert found["xsam"]["n"] == 3 and found["lisa"]["n"] == 6
    assert found["xsam"]["ciou"] == pytest.approx(100 * 80 / 140)
    assert found["lisa"]["ciou"] == pytest.approx(100 * (2 * 40 + 30) / (2 * 100 + 40))
    assert found["lisa"]["giou"] == pytest.approx(100 * (2 * 0.4 + 0.75 + 3 * 1.0) / 6)
    assert found["lisa"]["p_at"]["0.5"] == pytest.approx(100 * 4 / 6) and found["xsam"]["p_at"]["0.5"] == 100
    assert metrics.other_protocols(rows, XSAM)["lisa"] == {key: found["lisa"][key] for key in ("n", "ciou", "giou", "p_at")}


def test_reasoning_has_two_tables_and_the_whole_lies_between_its_parts():
    rows = [record(1, 0, (9, 10), family="short"), record(1, 1, (5, 10), family="short")]
    rows += [record(2, 0, (2, 10), family="long"), record(2, 1, (4, 10), family="long"), record(2, 2, (0, 10), family="long")]
    table = metrics.summarise(rows)
    assert table["n"] == 5 and table["giou"] == pytest.approx(40)
    assert table["first_text"]["n"] == 2 and table["first_text"]["giou"] == pytest.approx(55)
    for part in (table, table["first_text"]):
        values = [part["families"][family]["giou"] for family in ("short", "long")]
        assert min(values) <= part["giou"] <= max(values)
    assert "first text" in audit.render({"xsam": table})
    assert table["selection_gap"] == table["first_text"]["selection_gap"] == 0
    assert "first_text" not in metrics.summarise([record(1, 0, (1, 2), family="attribute")])


def test_the_first_text_is_one_sample_an_image():
    """Questions that differ in case are one record of several sentences; LISA asks the first one of each image."""
    rows = [record(1, 0, (3, 10), count=3, family="long"), record(1, 3, (9, 10), family="long")]
    rows += [record(2, 0, (6, 10), family="short")]
    rows += [record(3, 2, (1, 10), family="short"), record(3, 1, (6, 10), family="short")]
    for protocol, n in ((XSAM, 5), (LISA, 7)):
        table = metrics.summarise(rows, protocol)
        assert table["n"] == n
        first = table["first_text"]
        assert first["n"] == 3 and first["giou"] == pytest.approx(50) and first["ciou"] == pytest.approx(50)
        assert first["oracle_giou"] == pytest.approx(50) and first["p_at"]["0.6"] == pytest.approx(200 / 3)
        assert {family: row["n"] for family, row in first["families"].items()} == {"long": 1, "short": 2}


def test_a_model_does_not_differ_from_itself():
    rows = [record(image, 0, (40 + image, 100)) for image in range(9)]
    for name, difference in audit.compare(rows, rows, XSAM, resamples=50).items():
        assert (difference.low, difference.high, difference.better) == (0, 0, 0), name
        assert str(difference) == "44.00 -> 44.00: +0.00 [+0.00, +0.00], higher in 0.0% of the resamples (no difference shown)"
    worse = audit.compare(rows, [record(image, 0, (30 + image, 100)) for image in range(9)], XSAM, resamples=50)
    assert all(str(difference).endswith("(a difference)") for difference in worse.values())


def test_a_difference_that_is_there_is_shown_and_one_by_chance_is_not():
    rng = np.random.default_rng(0)
    first, better, noise = [], [], []
    for image in range(60):
        for sentence in range(3):
            union = int(rng.integers(500, 1500))
            i = int(union * rng.uniform(0.3, 0.8))
            first.append(record(image, sentence, (i, union)))
            better.append(record(image, sentence, (min(union, i + union // 10), union)))
            noise.append(record(image, sentence, (max(0, min(union, i + int(rng.normal(0, 60)))), union)))
    shown = audit.compare(first, better, XSAM, resamples=500)
    assert shown["ciou"].low > 5 and shown["giou"].low > 5 and shown["ciou"].better == 1.0
    assert shown["ciou"].first == pytest.approx(metrics.summarise(first)["ciou"])
    assert shown["giou"].second == pytest.approx(metrics.summarise(better)["giou"])
    chance = audit.compare(first, noise, LISA, resamples=500)
    assert all(d.low < 0 < d.high for d in chance.values()) and "no difference shown" in str(chance["ciou"])
    assert audit.compare(first, first, XSAM, resamples=50)["ciou"].high == 0.0
    assert audit.compare(first, noise[::-1], XSAM, resamples=50) == audit.compare(first, noise, XSAM, resamples=50)


def test_images_are_drawn_and_not_sentences():
    """All of an image's sentences fail together: the interval is as wide as that of as many images."""
    first = [record(image, s, (50, 100)) for image in range(8) for s in range(50)]
    second = [record(image, s, (90 if image % 2 else 10, 100)) for image in range(8) for s in range(50)]
    one_each = audit.compare(first[::50], second[::50], XSAM, resamples=2000)["giou"]
    many = audit.compare(first, second, XSAM, resamples=2000)["giou"]
    assert many.high - many.low == pytest.approx(one_each.high - one_each.low) and many.high - many.low > 30


def test_commands(tmp_path, capsys):
    rows = [record(1, 0, (50, 100), count=2), record(2, 0, (30, 40), family="short")]
    first = write(tmp_path / "a.jsonl", rows)
    second = write(tmp_path / "b.jsonl", [record(1, 0, (60, 100), count=2), record(2, 0, (30, 40), family="short")])
    assert main(["audit", str(first)]) == 0
    said = capsys.readouterr().out
    assert "xsam" in said and "lisa" in said and "57.14" in said
    assert main(["audit", "--json", str(first)]) == 0
    assert json.loads(capsys.readouterr().out)["lisa"]["n"] == 3
    assert main(["compare", str(first), str(second), "--protocol", "lisa"]) == 0
    assert capsys.readouterr().out.startswith("ciou: 54.17 -> ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"x.jsonl: cannot be read .*name the .jsonl that eval.py wrote"),
        ("", "x.jsonl: holds no sample"),
        ("{", r"x.jsonl:1: not JSON"),
        ('{"image_id": 1}', r"x.jsonl:1: no sample of this version: it lacks ann_id, sentence_id, .*evaluate again"),
        ("[]", "x.jsonl:1: no sample but list"),
        (
            '{"image_id": 1, "failed": false}',
            r"x.jsonl: results on categories, without expressions: `audit` makes their tables",
        ),
    ],
)
def test_files_that_are_no_results(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        audit.read_records(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intersection": "1"}, "x.jsonl:2: intersection '1' and union 100 are no areas; evaluate again"),
        (
            {"oracle_single_cover_intersection": 101},
            "x.jsonl:2: oracle_single_cover_intersection 101 and oracle_single_cover_union 100 are no areas",
        ),
        ({"score": "high"}, "x.jsonl:2: score is 'high'"),
    ],
)
def test_records_that_no_evaluation_writes(tmp_path, change, message):
    rows = [record(1, 0, (50, 100)), record(2, 0, (50, 100)) | change]
    with pytest.raises(UserError, match=message):
        audit.read_records(write(tmp_path / "x.jsonl", rows))


def test_a_sentence_may_hold_any_line_end(tmp_path):
    rows = [record(1, 0, (50, 100)) | {"sentence": "left\u2028\x85of it"}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert audit.read_records(path) == rows


def test_only_the_same_samples_are_compared():
    with pytest.raises(
        UserError, match="not the same samples: 1 are in the first file only, 0 in the second only; compare two"
    ):
        audit.compare([record(1, 0, (1, 2)), record(2, 0, (1, 2))], [record(1, 0, (1, 2))], XSAM)

"""Every protocol on cases small enough to be computed by hand; the arithmetic stands beside them."""

from __future__ import annotations

import dataclasses

import pytest

from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, metrics, protocols
from flowseg_jax.evaluation.protocols import GREFCOCO, GREFCOCO_TARGET_ONLY, LISA, PROTOCOLS, PSALM, XSAM


def record(pair, area=None, *, nothing=False, score=0.9, below=0.0, failure="", **fields):
    """A sample with I and U `pair`; `nothing`: it refers to nothing; `area` of the selected mask, by default U."""
    plain = {
        "image_id": 1,
        "ann_id": -1 if nothing else 7,
        "sentence_id": 0,
        "text": "it",
        "text_form": "lower",
        "sentence": "it",
        "family": "",
        "count": 1,
        "score": score,
        "no_target_threshold": below,
        "area": pair[1] if area is None else area,
        "failed": bool(failure),
        "failure": failure,
    }
    for name in ("", "single_cover_", "oracle_", "oracle_single_cover_"):
        plain |= {f"{name}intersection": pair[0], f"{name}union": pair[1]}
    return plain | fields


def rows(below=0.0):
    """Four samples with a target and three without; the scores of the fourth and the seventh are low."""
    return [
        record((80, 100), 90, below=below, count=2),
        record((30, 60), 40, below=below),
        record((0, 50), 0, below=below),  # nothing answered though there is a target of 50 pixels
        record((45, 60), 50, below=below, score=0.2),
        record((0, 0), 0, nothing=True, below=below),  # rightly nothing
        record((0, 40), 40, nothing=True, below=below, count=3),  # a mask where nothing is
        record((0, 20), 20, nothing=True, below=below, score=0.1),
    ]


def approx(**figures):
    return {key: pytest.approx(value) for key, value in figures.items()}


def test_xsam_counts_every_distinct_sentence():
    found = metrics.summarise(rows(), XSAM)
    # I = 80 + 30 + 0 + 45 = 155; U = 100 + 60 + 50 + 60 + 0 + 40 + 20 = 330; IoU 0.8, 0.5, 0, 0.75, 1 (both empty), 0, 0
    want = approx(n=7, ciou=100 * 155 / 330, giou=100 * 3.05 / 7)
    assert {key: found[key] for key in want} == want
    assert found["p_at"] == approx(**{"0.5": 400 / 7, "0.6": 300 / 7, "0.7": 300 / 7, "0.8": 200 / 7, "0.9": 100 / 7})
    assert "n_acc" not in found and "t_acc" not in found


def test_lisa_counts_every_sentence_against_the_sum_of_the_parts():
    found = metrics.summarise([record((80, 100), count=2, single_cover_intersection=60), record((30, 60))], LISA)
    # twice 60 / 100 (the overlap of 20 pixels is no truth), once 30 / 60
    want = approx(n=3, ciou=100 * (2 * 60 + 30) / (2 * 100 + 60), giou=100 * (2 * 0.6 + 0.5) / 3)
    assert {key: found[key] for key in want} == want


def test_psalm_counts_every_ref_once():
    said = [record((80, 100), count=3, text_form="joined"), record((0, 0), text_form="joined"), record((10, 40))]
    found = metrics.summarise(said, PSALM)
    # three sentences in one prompt are one sample: 0.8; both empty: 1; 0.25
    want = approx(n=3, ciou=100 * 90 / 140, giou=100 * 2.05 / 3)
    assert {key: found[key] for key in want} == want


def test_grefcoco_never_says_no_target_but_by_an_empty_mask():
    found = metrics.summarise(rows(), GREFCOCO)
    # sentences: 2 of (80, 100), 1 of (30, 60), 1 of (0, 50), 1 of (45, 60); to nothing: 1 right, 3 of U 40, 1 of U 20
    # I = 160 + 30 + 0 + 45 = 235; U = 200 + 60 + 50 + 60 + 0 + 120 + 20 = 510
    # IoU = 2 * 0.8 + 0.5 + 0 + 0.75 + 1 + 0 + 0 = 3.85 of 10
    # N-acc: 1 of 5; T-acc: 4 of 5 (the third answers nothing); P@0.7 of the five with a target: 0.8, 0.8 and 0.75
    want = approx(n=10, ciou=100 * 235 / 510, giou=38.5, n_acc=20, t_acc=80)
    assert {key: found[key] for key in want} == want
    assert found["p_at"] == approx(**{"0.7": 60, "0.8": 40, "0.9": 0})


def test_grefcoco_with_a_threshold():
    found = metrics.summarise(rows(below=0.5), GREFCOCO)
    # The fourth now says "no target" of a target: I = 0, U = 60 stays (truth or mask). The seventh does so rightly: U = 0.
    # I = 160 + 30 = 190; U = 200 + 60 + 50 + 60 + 0 + 120 + 0 = 490; IoU = 1.6 + 0.5 + 0 + 0 + 1 + 0 + 1 = 4.1 of 10
    want = approx(n=10, ciou=100 * 190 / 490, giou=41, n_acc=40, t_acc=60)
    assert {key: found[key] for key in want} == want
    assert found["p_at"] == approx(**{"0.7": 40, "0.8": 40, "0.9": 0})
    # The oracle selects otherwise, but what a score refuses it refuses too: the fourth's 45 of 60 do not count.
    assert found["oracle_ciou"] == pytest.approx(100 * 190 / 490)
    # A score of exactly the threshold is an answer.
    at = metrics.summarise([record((1, 2), score=0.5, below=0.5)], GREFCOCO)
    assert at["giou"] == 50 and at["t_acc"] == 100


def test_grefcoco_target_only_leaves_the_others_out():
    found = metrics.summarise(rows(below=0.5), GREFCOCO_TARGET_ONLY)
    # Distinct sentences with a target: (80, 100), (30, 60), (0, 50), (45, 60). X-SAM never says "no target".
    want = approx(n=4, ciou=100 * 155 / 270, giou=100 * 2.05 / 4)
    assert {key: found[key] for key in want} == want
    with pytest.raises(UserError, match="grefcoco-target-only counts none of the 1 samples"):
        metrics.summarise([record((0, 0), nothing=True)], GREFCOCO_TARGET_ONLY)


def test_both_empty_by_protocol():
    """A target whose every pixel is ignored, and nothing answered: 1, but 0 after ReLA."""
    same = [record((0, 0), 0), record((1, 1))]
    values = {name: metrics.summarise(same, protocol)["giou"] for name, protocol in PROTOCOLS.items()}
    assert values == {"xsam": 100, "lisa": 100, "psalm": 100, "grefcoco": 50, "grefcoco-target-only": 100}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_failure_is_zero_and_is_counted_with_its_reason(protocol):
    """Also where its counts are those of a mask, and where nothing was to be found."""
    said = [record((9, 10), failure="no <SEG>"), record((0, 0), 0, nothing=True, failure="non-finite"), record((10, 10))]
    said.append(record((0, 0), 0, nothing=True))
    table = metrics.summarise(said, protocol)
    left_out = protocol is GREFCOCO_TARGET_ONLY
    assert table["failed"] == 1 if left_out else 2
    assert table["failures"] == {"no <SEG>": 1} if left_out else {"no <SEG>": 1, "non-finite": 1}
    assert table["giou"] == 50  # two of four, or one of two
    assert table["ciou"] == 50  # I = 0 + 10, U = 10 + 10
    if protocol is GREFCOCO:
        assert table["n_acc"] == table["t_acc"] == 50


def test_without_samples_to_nothing_there_is_no_n_acc():
    table = metrics.summarise([record((1, 2))], GREFCOCO)
    assert "n_acc" not in table and table["t_acc"] == 100
    assert list(audit.tables([record((1, 2))])) == ["xsam", "lisa"]
    only = metrics.summarise([record((0, 0), 0, nothing=True)], GREFCOCO)
    assert "t_acc" not in only and only["n_acc"] == 100 and only["p_at"] == {}


def test_the_text_that_was_shown_decides_what_is_audited():
    assert list(audit.tables(rows())) == ["xsam", "lisa", "grefcoco", "grefcoco-target-only"]
    joined = [r | {"text_form": "joined"} for r in rows()]
    assert list(audit.tables(joined)) == ["psalm"]
    assert list(metrics.other_protocols(rows(), GREFCOCO)) == ["xsam", "lisa", "grefcoco-target-only"]
    with pytest.raises(UserError, match="protocol psalm shows .* they answer xsam, lisa, .* with --protocol=psalm"):
        audit.compare(rows(), rows(), PSALM)


def test_the_rendered_table_has_the_columns_that_there_are():
    said = audit.render(audit.tables(rows()))
    head, *lines = said.splitlines()
    assert head.split() == "protocol n cIoU gIoU o-cIoU o-gIoU N-acc T-acc P@0.5 P@0.6 P@0.7 P@0.8 P@0.9".split()
    row = next(line for line in lines if line.startswith("grefcoco "))
    assert row.split() == "grefcoco all 10 46.08 38.50 46.08 38.50 20.00 80.00 60.00 40.00 0.00".split()
    assert head.index("P@0.7") + len("P@0.7") == row.index("60.00") + len("60.00")
    assert "N-acc" not in audit.render(audit.tables([record((1, 2))]))


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_two_models_are_compared_by_every_protocol(protocol):
    first = [r | {"image_id": i, "text_form": protocol.text} for i, r in enumerate(rows(below=0.5))]
    second = [r | {"intersection": r["intersection"] // 2, "single_cover_intersection": r["intersection"] // 2} for r in first]
    found = audit.compare(first, second, protocol, resamples=20)
    for name in ("ciou", "giou"):
        assert found[name].first == pytest.approx(metrics.summarise(first, protocol)[name])
        assert found[name].second == pytest.approx(metrics.summarise(second, protocol)[name])


def test_a_published_table_whose_whole_lies_outside_its_parts_is_refused():
    """The row of X-SAM's paper for the test split of ReasonSeg: 57.8 over all, 47.7 of short and 56.0 of long questions."""
    table = {"giou": 57.8, "families": {"short": {"giou": 47.7}, "long": {"giou": 56.0}}}
    with pytest.raises(ValueError, match=r"gIoU 57.8 does not lie between those of its parts, \[47.7, 56.0\]"):
        metrics.check_between(table)
    metrics.check_between(table | {"giou": 52.0})
    metrics.check_between({"giou": 50.00000000000001, "families": {"short": {"giou": 50.0}}})  # rounding is no contradiction


def test_every_table_of_reasoning_questions_is_checked(monkeypatch):
    checked = []
    monkeypatch.setattr(metrics, "check_between", lambda table: checked.append(table["n"]))
    asked = [record((9, 10), family="short", image_id=1), record((2, 10), family="long", image_id=2)]
    asked.append(record((4, 10), family="long", image_id=2, sentence_id=1))
    metrics.summarise(asked)
    assert checked == [3, 2]  # all questions; the first of each image
    metrics.summarise([record((9, 10), family="attribute")])
    assert checked == [3, 2]


def test_protocols_are_frozen_data_and_an_unknown_one_lists_them():
    assert {name: protocol.name for name, protocol in PROTOCOLS.items()} == {name: name for name in PROTOCOLS}
    with pytest.raises(dataclasses.FrozenInstanceError):
        XSAM.both_empty = 0.0
    with pytest.raises(UserError, match=r"'palm' \(did you mean 'psalm'\?\); there are xsam, lisa, psalm, grefcoco, grefcoco-"):
        protocols.get_protocol("palm")

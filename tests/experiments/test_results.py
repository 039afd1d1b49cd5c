"""The published tables: from the committed files to the printed figures, recomputed by code that shares nothing with ours."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest

from experiments import results
from flowseg_jax.checkpoints.find import SHIPPED_MODEL
from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation.benchmark import params_digest
from flowseg_jax.system.paths import ROOT
from tests.helpers.answers import record, write

RESULTS = sorted((ROOT / "results").glob("shipped*/*.json"))


@pytest.fixture(scope="module")
def made():
    return results.tables()


@pytest.mark.parametrize("page", results.PAGES)
def test_the_pages_hold_what_the_command_writes(page, made):
    text = (ROOT / page).read_text()
    assert "<!-- results: " in text and results.fill(text, made) == text


def cells(page: str) -> list[list[str]]:
    """The lines of all tables of a page."""
    lines = (ROOT / page).read_text().splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def by_hand(path: Path, family: str | None = None) -> dict[str, float]:
    with path.with_suffix(".csv").open() as file:
        next(file)
        rows = [line for line in csv.reader(file) if family in (None, line[1])]
    i, u, oracle_i, oracle_u = ([int(row[k]) for row in rows] for k in (2, 3, 4, 5))
    ratio = lambda tops, bottoms: [a / b if b else 1.0 for a, b in zip(tops, bottoms, strict=True)]  # noqa: E731
    ious, oracle = ratio(i, u), ratio(oracle_i, oracle_u)
    mean = lambda values: 100 * sum(values) / len(rows)  # noqa: E731
    # The standard error of a ratio of sums over images (Cochran, Sampling Techniques, 6.4).
    ciou, images = sum(i) / sum(u), {}
    for row, top, bottom in zip(rows, i, u, strict=True):
        images[row[0]] = images.get(row[0], 0.0) + top - ciou * bottom
    n = len(images)
    error = math.sqrt(n / (n - 1) * sum(rest**2 for rest in images.values())) / sum(u)
    return {
        "n": len(rows),
        "ciou": 100 * sum(i) / sum(u),
        "giou": mean(ious),
        "oracle": 100 * sum(oracle_i) / sum(oracle_u),
        "oracle giou": mean(oracle),
        "gap": mean(oracle) - mean(ious),
        "0.5": mean([value >= 0.5 for value in ious]),
        "0.9": mean([value >= 0.9 for value in ious]),
        "standard error": 100 * error,
    }


def test_the_table_of_the_readme_is_what_was_counted():
    printed = {row[0]: row[1:] for row in cells("README.md")}
    names = {"val": "val", "val, with the text of other images": "val_shuffled", "testA": "testA"}
    names["testB (combinations of attributes that training lacks)"] = "testB"
    for label, split in names.items():
        found = by_hand(ROOT / "results/shipped" / f"{split}.json")
        n, ciou, giou, oracle = printed[label]
        ciou, low, high = map(float, re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", ciou).groups())
        assert int(n) == found["n"]
        spread = 1.96 * found["standard error"]  # of a normal distribution: the resamples' is nearly one
        assert (low, high) == pytest.approx((ciou - spread, ciou + spread), abs=0.15 * spread), label
        for shown, figure in ((ciou, "ciou"), (float(giou), "giou"), (float(oracle), "oracle")):
            assert shown == pytest.approx(found[figure], abs=0.0501), (label, figure)


def test_the_tables_of_the_results_are_what_was_counted():
    rows, seen = cells("docs/results.md"), 0
    for path in RESULTS:
        about = json.loads(path.read_text())
        if about["protocol"] == "grefcoco":
            continue  # the next test
        label = f"{about['protocol']}, {results.SPLITS[path.stem].partition(' (')[0]}"
        printed = next(row[1:] for row in rows if row[0].replace("`", "") == label)
        expected = [value for name, value in by_hand(path).items() if name != "standard error"]
        assert list(map(float, printed)) == pytest.approx(expected, abs=0.0501), label
        seen += 1
    assert seen == 7
    families = [row for row in rows if row[0] in ("attribute", "ordinal", "relation", "negation", "superlative", "two-hop")]
    families = [row for row in families if len(row) == 7]
    assert len(families) == 6
    for family, *printed in families:
        found = by_hand(ROOT / "results/shipped/val.json", family)
        expected = [found[name] for name in ("n", "ciou", "giou", "oracle", "0.5", "0.9")]
        assert list(map(float, printed)) == pytest.approx(expected, abs=0.0501), family


def test_the_table_of_the_no_target_split_is_what_was_counted():
    path = ROOT / "results/shipped_no_target/val.json"
    threshold = json.loads(path.read_text())["no_target_threshold"]
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    refused = {kind: [r["area"] == "0" or float(r["score"]) < threshold for r in rows if r["present"] == kind] for kind in "01"}
    n_acc, t_acc = 100 * sum(refused["0"]) / len(refused["0"]), 100 - 100 * sum(refused["1"]) / len(refused["1"])
    assert {r["family"] for r in rows if r["present"] == "0"} == {"no-target"}
    printed = next(row[1:] for row in cells("docs/results.md") if row[0].replace("`", "") == "grefcoco, val")
    expected = [len(refused["0"]), len(refused["1"]), threshold, n_acc, t_acc]
    assert list(map(float, printed)) == pytest.approx(expected, abs=0.0501)
    assert float(printed[2]) == pytest.approx(threshold, abs=0.000501)


@pytest.mark.parametrize(
    "models",
    [
        {"stage 3 after stages 1 and 2": "stages", "stage 3 alone": "stages_alone"},
        {"SmolLM2, frozen": "smollm2_frozen", "SmolLM2 with adapters": "smollm2_lora"},
    ],
    ids=lambda models: next(iter(models.values())),
)
def test_the_tables_that_compare_models_are_what_was_counted(models):
    rows = {row[0]: row[1:] for row in cells("docs/results.md") if len(row) == 6}
    setups = set()
    for label, folder in models.items():
        paths = [ROOT / "results" / folder / f"{split}.json" for split in ("val", "val_shuffled")]
        found, control = map(by_hand, paths)
        n, ciou, *figures = rows[label]
        ciou, low, high = map(float, re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", ciou).groups())
        spread = 1.96 * found["standard error"]
        assert int(n) == found["n"] == control["n"]
        assert (low, high) == pytest.approx((ciou - spread, ciou + spread), abs=0.15 * spread), label
        expected = (found["ciou"], control["ciou"], found["giou"], found["oracle"])
        assert [ciou, *map(float, figures)] == pytest.approx(expected, abs=0.0501), label
        abouts = [json.loads(path.read_text()) for path in paths]
        assert [about["shuffled_text"] for about in abouts] == [False, True] and not any(about["failed"] for about in abouts)
        assert len({about["checkpoint"]["digest"] for about in abouts}) == 1
        setups.add((abouts[0]["data"], abouts[0]["images"], abouts[0]["checkpoint"]["step"]))
    assert len(setups) == 1  # the same expressions, after the same number of steps


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_result_is_of_the_model_that_is_shipped_and_its_lines_are_its_figures(path, shipped_digest):
    about, found = json.loads(path.read_text()), by_hand(path)
    assert about["checkpoint"]["digest"] == shipped_digest
    assert about["images"] is None and about["failed"] == 0  # all of the split
    for ours, theirs in (("ciou", "ciou"), ("giou", "giou"), ("oracle_ciou", "oracle"), ("oracle_giou", "oracle giou")):
        assert about[ours] == pytest.approx(found[theirs], abs=1e-9)


@pytest.fixture(scope="module")
def shipped_digest():
    return params_digest(read_model_config(SHIPPED_MODEL))


def test_an_evaluation_is_kept(tmp_path):
    rows = [record(1, 0, iou=80, oracle=90), record(1, 1, iou=0, oracle=100, rank=3), record(2, 0, iou=50, family="x")]
    about = json.loads((ROOT / "results/shipped/val.json").read_text()) | {"n": 3}
    (tmp_path / "from").mkdir()
    write(tmp_path / "from/val.jsonl", rows)
    (tmp_path / "from/val.json").write_text(json.dumps(about))
    results.keep(tmp_path / "from", tmp_path / "to")
    found = results.read(tmp_path / "to")["val"]
    assert found.about == about
    assert found.figures() == pytest.approx(
        {"n": 3, "ciou": 130 / 3, "giou": 130 / 3, "oracle_ciou": 80, "oracle_giou": 80, "gap": 110 / 3, "p5": 200 / 3, "p9": 0}
    )
    assert found.figures("x")["ciou"] == 50
    low, high = found.interval(200)
    assert (low, high) == (pytest.approx(40), pytest.approx(50))  # images 1 and 1, or 2 and 2
    (tmp_path / "to/val.csv").write_text("image_id,family\n")
    with pytest.raises(UserError, match=r"it says 3 samples, the \.csv has 0"):
        results.read(tmp_path / "to")
    (tmp_path / "to/val.csv").unlink()
    with pytest.raises(UserError, match=r"val\.csv is missing"):
        results.read(tmp_path / "to")
    with pytest.raises(UserError, match=r"holds none of val\.json"):
        results.keep(tmp_path, tmp_path / "to")
    with pytest.raises(UserError, match=r"absent holds no result: keep an evaluation there with --keep=OUT --as=absent"):
        results.read(tmp_path / "absent")

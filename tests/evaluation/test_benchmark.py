"""`eval.py` as its user runs it: benchmarks by name, where results go, what is refused before anything is computed."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest

from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.data import prepare
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, benchmark
from flowseg_jax.evaluation.fusion import MASK2FORMER
from flowseg_jax.evaluation.protocols import PSALM
from flowseg_jax.models.language_config import LanguageConfig
from tests.helpers import minirefcoco as mini
from tests.helpers import small, wild

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `model` and, in `data`, a prepared miniature called refcoco."""
    root = tmp_path_factory.mktemp("evaluation")
    layout = mini.write(root / "layout")
    prepared = prepare.prepare(layout, root / "data" / "refcoco", tokenizer_vocab=300, log=lambda _: None)
    cfg = small.lean()
    cfg = dataclasses.replace(
        cfg,
        llm=dataclasses.replace(
            LanguageConfig.tiny(300), hidden_size=28, num_hidden_layers=1, head_dim=14, intermediate_size=36
        ),
    )
    save_pretrained(root / "model", small.params(cfg), cfg.to_dict(), prepared.tokenizer_directory, dtype=None)
    return root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags(place, *more):
    return [f"--checkpoint={place / 'model'}", f"--data-root={place / 'data'}", "--batch-size=2", *more]


def test_benchmarks_by_name(place, tmp_path, capsys):
    benchmarks = "--benchmark=refcoco/val,refcoco/testA"
    flowseg(["eval", *flags(place, benchmarks, f"--out={tmp_path}", "--protocol=psalm", "--save-masks")])
    for split in ("val", "testA"):
        result = json.loads((tmp_path / "refcoco" / f"{split}.json").read_text())
        records = audit.read_records(tmp_path / "refcoco" / f"{split}.jsonl")
        assert result["protocol"] == "psalm" and result["n"] == len(records) and result["checkpoint"]["digest"]
        assert result["prompt"] == {"question": 0, "answer": 0} and all(r["rle"]["counts"] for r in records)
        assert list(audit.tables(records)) == ["psalm"]
        assert (tmp_path / "refcoco" / "pictures" / split / "index.json").is_file()
    said = capsys.readouterr().out
    assert "evaluate testA: psalm, n" in said
    header, val, test = said[said.index("data set") :].splitlines()[:3]
    assert header.split("  ")[:2] == ["data set", "split"] and header.endswith("failed") and "oracle cIoU" in header
    assert val.split()[:3] == ["refcoco", "val", "psalm"] and test.split()[:3] == ["refcoco", "testA", "psalm"]
    assert f"{result['ciou']:.2f}" in test.split() and str(result["n"]) in test.split()
    assert said.endswith(f"results: {tmp_path}\nopen {tmp_path}/report.html\n")
    report = (tmp_path / "report.html").read_text()
    assert "Model: " in report and "psalm" in report and "refcoco/pictures/testA/" in report


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            ["--benchmark=refcoc/val"],
            r"unknown benchmark 'refcoc' \(did you mean 'refcoco'\?\); there are .*grefcoco.*reasonseg",
        ),
        (["--benchmark=reasonseg/test"], r"the benchmark reasonseg is not prepared; make it with .*--layout reasonseg"),
        (["--benchmark=refcoco/tset"], r"unknown split 'tset'.*it has .*val"),
        (["--benchmark=refcoco"], r"'refcoco' is not NAME/SPLIT, for instance refcoco/val"),
        (["--benchmark=refcoco/val", "--data=x"], "--benchmark and --data both name data sets"),
        (
            ["--benchmark=refcoco/val", "--protocol=lise"],
            r"unknown protocol 'lise' \(did you mean 'lisa'\?\); there are xsam, lisa",
        ),
        (["--benchmark=refcoco/val", "--fsdp=5"], r"mesh .*'fsdp': 5.* does not fit 1 device"),
        (["--benchmark=refcoco/val", "--checkpoint=nowhere"], "no model directory .*nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_said_at_once(place, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        flowseg(["eval", *flags(place, f"--out={tmp_path}", *wrong)])
    assert not list(tmp_path.iterdir())


class Prepared:
    """A data set that writes down which splits it was asked for."""

    directory, digest, categories, things = Path("d"), "data's", ("a", "b", "c"), (True, False, True)

    def __init__(self, task: str):
        self.task, self.asked = task, []

    def check_split(self, split: str) -> None:
        self.asked.append(split)


@pytest.fixture
def parts(monkeypatch):
    """A model, and the parts of evaluations, which only write down what they are asked."""
    sides = {"sam": SimpleNamespace(image_size=64), "siglip": SimpleNamespace(image_size=16)}
    has = {"has_language_model": True, "has_mask_decoder": True, "num_visual_tokens": 7, "num_classes": 0}
    evaluator = SimpleNamespace(round_up=lambda n: n + 1, mesh="a mesh", place=lambda params: f"placed {params}")
    checkpoint, prompts = {"digest": "d", "step": 3}, PromptTemplates(question=2, answer=1)
    cfg = SimpleNamespace(**sides, **has, components="full")
    model = benchmark.EvalModel(cfg, evaluator, "params", checkpoint, "a tokenizer", prompts, 5, "m")
    found = SimpleNamespace(model=model, data=Mock(), evaluate=Mock(), run=Mock(), pictures=Mock(), task=Mock())
    monkeypatch.setattr(benchmark, "EvalDataset", found.data)
    monkeypatch.setattr(benchmark, "GenericDataset", found.data)
    monkeypatch.setattr(benchmark, "GenericTask", found.task)
    monkeypatch.setattr(benchmark.referring, "evaluate", found.evaluate)
    monkeypatch.setattr(benchmark.runner, "evaluate", found.run)
    monkeypatch.setattr(benchmark.report, "save_pictures", found.pictures)
    monkeypatch.setattr(benchmark, "setup_hash", lambda *of: of)
    monkeypatch.setattr(benchmark.sharding, "local_row_indices", lambda batch, mesh: (batch, mesh))
    return found


ROWS = {"batch": 9, "sides": (64, 16), "visual_tokens": 7, "rows": (9, "a mesh")}  # 8 at a time, rounded up


def test_what_an_evaluation_of_expressions_is_made_of(parts, tmp_path):
    model, data = parts.model, Prepared("referring")
    evaluation = benchmark.ReferringEvaluation(model, data, 8, "psalm", 0.25)
    assert evaluation.run("val", tmp_path, images=3, save_masks=True) is parts.evaluate.return_value
    ((called, options),) = parts.evaluate.call_args_list
    about = {
        "model": "m",
        "checkpoint": model.checkpoint,
        "setup": (model.cfg, model.prompts, "a tokenizer"),
        "data": "data's",
        "images": 3,
        "answer": "written, at most 5 tokens",
        "prompt": {"question": 2, "answer": 1},
    }
    assert called[:2] == (model.evaluator, "params")
    assert options == {
        "split": "val", "out": tmp_path, "protocol": PSALM, "shuffle_text": False, "about": about, "no_target_threshold": 0.25,
        "gallery": 6, "save_masks": True,
    }  # fmt: skip
    kept = parts.evaluate.return_value.examples
    assert parts.pictures.mock_calls == [call(tmp_path, "val", kept)]
    called[2]()
    (asked,) = parts.data.call_args_list
    assert asked.args == (data, "val", "a tokenizer") and data.asked == ["val"]
    given = {"prompts": model.prompts, "max_images": 3, "generate": True, "control_seed": None}
    assert asked.kwargs == ROWS | given | {"by_ref": True, "filled_polygons": True}

    plain = dataclasses.replace(evaluation, model=dataclasses.replace(model, answer_tokens=0), protocol="xsam")
    plain.run("test", tmp_path, shuffle_text=True)
    assert parts.pictures.mock_calls[1:] == [call(tmp_path, "test_shuffled", kept)]
    called, options = parts.evaluate.call_args_list[1]
    assert options["shuffle_text"] is True and options["about"]["answer"] == "given" and options["about"]["images"] is None
    called[2]()
    asked = parts.data.call_args_list[1].kwargs
    assert asked["control_seed"] == 0 and not (asked["generate"] or asked["by_ref"] or asked["filled_polygons"])
    plain.run("test", tmp_path, pictures=False)
    assert parts.evaluate.call_args_list[2].kwargs["gallery"] == 0 and len(parts.pictures.mock_calls) == 2


def test_what_an_evaluation_of_categories_is_made_of(parts, tmp_path):
    model, data = parts.model, Prepared("generic")
    evaluation = benchmark.GenericEvaluation(model, data, 8, names=2)
    assert evaluation.run("val", tmp_path, images=3, save_masks=True) is parts.run.return_value
    assert parts.task.mock_calls == [call(model.evaluator, evaluation.category_prompts, data.things, MASK2FORMER, True)]
    ((called, options),) = parts.run.call_args_list
    assert called[:2] == (parts.task.return_value, "placed params")
    about = {"split": "val", "checkpoint": model.checkpoint, "setup": (model.cfg, model.prompts, "a tokenizer")}
    about |= {"data": "data's", "images": 3, "conversations": 2}  # three categories, two at a time
    settings = about | {"thresholds": dataclasses.asdict(MASK2FORMER)}
    assert options == {"name": "val", "out": tmp_path, "about": about, "settings": settings}
    called[2](skip=(1,))
    (asked,) = parts.data.call_args_list
    assert asked.args == (data, "val", "a tokenizer", evaluation.category_prompts) and data.asked == ["val"]
    assert asked.kwargs == ROWS | {"prompts": model.prompts, "max_images": 3, "skip": (1,)}
    model.cfg.has_language_model, model.cfg.num_classes = False, 3
    evaluation.run("val", None)
    assert parts.run.call_args.kwargs["about"]["conversations"] == 0 and evaluation.category_prompts.count == 1


@pytest.mark.parametrize(
    ("task", "changes", "names", "message"),
    [
        ("referring", {}, 0, "d: referring data has no categories to evaluate on"),
        ("generic", {"has_mask_decoder": False, "components": "vlm"}, 0, "holds only the components 'vlm': it makes no masks"),
        ("generic", {"has_language_model": False, "num_classes": 4}, 0, "has 3 categories, the model's linear head has 4"),
        ("generic", {}, -1, "names a conversation must not be negative, got -1"),
    ],
)
def test_what_has_no_categories_is_refused(parts, task, changes, names, message):
    vars(parts.model.cfg).update(changes)
    with pytest.raises(UserError, match=message):
        benchmark.GenericEvaluation(parts.model, Prepared(task), names=names)


def as_one_and_as_two(place, out: Path, *chosen: str) -> list[str]:
    """Evaluates as one process into `one` and as two into `two`; what the two said."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    common = [sys.executable, str(ROOT / "eval.py"), *flags(place, *chosen)]

    def start(*more):
        return subprocess.Popen([*common, *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    joined = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
    runs = [start(f"--out={out / 'two'}", *joined, f"--process-id={i}") for i in (0, 1)]
    runs.append(start(f"--out={out / 'one'}"))
    said = [run.communicate(timeout=250)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(said)
    return said[:2]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(place, tmp_path):
    said = as_one_and_as_two(place, tmp_path, "--benchmark=refcoco/train")
    assert "cIoU" in said[0] and "cIoU" not in said[1]
    two, one = (audit.read_records(tmp_path / name / "refcoco" / "train.jsonl") for name in ("two", "one"))
    for ours, theirs in zip(two, one, strict=True):
        for key, value in ours.items():
            assert value == (pytest.approx(theirs[key], rel=1e-5) if "score" in key else theirs[key]), key
    assert sorted(p.name for p in (tmp_path / "two" / "refcoco").rglob("*.png")) == sorted(
        p.name for p in (tmp_path / "one" / "refcoco").rglob("*.png")
    )


@pytest.mark.slow
def test_two_processes_evaluate_categories_as_one(place, tmp_path):
    wild.panoptic(tmp_path / "files")
    prepare.prepare(tmp_path / "files", place / "data" / "things", layout="coco-panoptic", log=lambda line: None)
    said = as_one_and_as_two(place, tmp_path, "--benchmark=things/val")
    assert "panoptic, n" in said[0] and "panoptic, n" not in said[1]
    two, one = (json.loads((tmp_path / name / "things" / "val.json").read_text()) for name in ("two", "one"))
    assert two == one and one["n"] > 3
    two, one = ((tmp_path / name / "things" / "val.jsonl").read_text() for name in ("two", "one"))
    assert two == one

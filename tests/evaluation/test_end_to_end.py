"""From files to numbers: prepared, evaluated with --save-masks, and every record and table made once more by `judge`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from flowseg_jax.cli.analyze import main as evaluation_main
from flowseg_jax.cli.data import main as data_main
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.train_dataset import open_tokenizer
from flowseg_jax.evaluation import audit, protocols
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.models import flowseg
from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.outputs import ImageCache, MaskCandidates
from tests.helpers import judge, small, wild

SIDE, CELL, QUERIES, BELOW = 64, 2, 6, 0.3
ROOT = Path(__file__).resolve().parents[2]
OF_THE_MODEL = {"image_id", "query", "score", "best_query", "best_score", "best_rank", "rle", "best_rle"}  # of a record
LAYOUTS = {
    "refcoco": lambda root: wild.refs(root, general=False),
    "grefcoco": lambda root: wild.refs(root, general=True),
    "reasonseg": wild.reasoning,
}


class Painter(flowseg.FlowSeg):
    """Candidate q: where the image is brighter than a threshold of q; the last one is empty. Scores follow the question.

    In a blue image the logits of every second candidate are no numbers.
    """

    def __init__(self):
        self.gain = nnx.Param(jnp.full((1,), 8.0))

    def prefill_image(self, views, prefix):
        b, grid = views.sam_images.shape[0], SIDE // CELL
        cells = views.sam_images.astype(jnp.float32).reshape(b, grid, CELL, grid, CELL, 3).mean((2, 4)) / 255
        features = jnp.stack([cells.max(-1), cells[..., 2] - cells[..., 0], jnp.ones((b, grid, grid))], -1)
        none = jnp.zeros((b, 1), jnp.int32)
        return ImageCache(features, (), KVCache(*[jnp.zeros((1, b, 1, 1))] * 2, none, none))

    def predict_cached(self, seen, questions):
        b, k = questions.query_valid.shape
        blue = seen.mask_features[..., 1].max((1, 2)) > 0.2
        thresholds = jnp.array([0.1, 0.25, 0.4, 0.55, 0.7, 1.2])
        embeds = self.gain[0] * jnp.stack([jnp.ones(QUERIES), jnp.zeros(QUERIES), -thresholds], -1)
        broken = blue[:, None] & (jnp.arange(QUERIES) % 2 == 0)
        embeds = jnp.where(broken[..., None], jnp.nan, embeds)
        said = questions.phrase_ids[:, None] == jnp.arange(k)[None, :, None]
        signature = (said * questions.input_ids[:, None]).sum(-1)
        scores = (signature[..., None] * 37 + jnp.arange(QUERIES) * 29) % 101 / 101
        scores *= (signature[..., None] % 4 + 1) / 4  # some questions have low scores alone
        embeds = jnp.broadcast_to(embeds[:, None], (b, k, QUERIES, 3))
        return MaskCandidates(scores, embeds, seen.mask_features)

    def refine_masks(self, mask_logits, mask_features):
        return mask_logits


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Makes each layout and prepares it once, by the command."""
    made: dict[str, tuple[Path, PreparedDataset]] = {}

    def make(layout):
        if layout not in made:
            root = tmp_path_factory.mktemp(layout)
            LAYOUTS[layout](root / "files")
            places = ["--source", str(root / "files"), "--out", str(root / "prepared")]
            assert data_main(["prepare", "--layout", layout, *places, "--tokenizer-vocab", "300"]) == 0
            made[layout] = root / "files", PreparedDataset.open(root / "prepared")
        return made[layout]

    return make


@pytest.fixture(scope="module")
def evaluated(prepared, tmp_path_factory):
    """(files, folder of results, result, records) of a layout, each protocol once."""
    evaluator, made = Evaluator(nnx.split(Painter())[0]), {}

    def make(layout, protocol, below=0.0):
        if (layout, protocol) not in made:
            (root, data), out = prepared(layout), tmp_path_factory.mktemp("results")
            made[layout, protocol] = root, out, *run(evaluator, data, protocol, out, below)
        return made[layout, protocol]

    return make


def run(evaluator, data, protocol, out, below):
    cfg = small.lean()
    cfg = dataclasses.replace(cfg, sam=dataclasses.replace(cfg.sam, image_size=SIDE))
    params = nnx.to_pure_dict(nnx.split(Painter())[1])
    tokenizer = open_tokenizer(data, PromptTemplates())
    subject = EvalModel(cfg, evaluator, params, {"digest": "d", "step": 1}, tokenizer, PromptTemplates())
    ReferringEvaluation(subject, data, 3, protocol, below).run("val", out, save_masks=True, pictures=False)
    lines = (out / "val.jsonl").read_text().splitlines()
    return json.loads((out / "val.json").read_text()), [json.loads(line) for line in lines]


def asked_in(root, layout, protocol):
    """{what tells a sample from the others: the sample}."""
    found = judge.of_reasoning(root, "val") if layout == "reasonseg" else judge.of_refs(root, "val", protocol == "psalm")
    named = {(asked.file_name, asked.text): asked for asked in found}
    assert len(named) == len(found)
    return named


def same(found, wanted, where=""):
    """Equal to 1e-9, with the same keys."""
    assert found.keys() == wanted.keys(), where
    for key, value in wanted.items():
        if isinstance(value, dict):
            same(found[key], value, f"{where}/{key}")
        else:
            assert found[key] == pytest.approx(value, abs=1e-9), f"{where}/{key}"


def judged(root, layout, protocol, below, answered, result, records, failed=lambda record: False):
    """{protocol: its table} by the judge, after every record and every figure of the result was held against it."""
    asked = asked_in(root, layout, protocol)
    assert {(r["file_name"], r["text"]) for r in records} == asked.keys() and len(records) == len(asked)
    rows = []
    for r in records:
        one = asked[r["file_name"], r["text"]]
        assert layout == "reasonseg" or r["image_id"] == one.image_id
        rows.append(judge.Row.of(one, r, failed(r)))
        wanted = judge.record(rows[-1], protocol, below)
        same({key: r[key] for key in wanted}, wanted, r["file_name"])
        assert r.keys() == wanted.keys() | OF_THE_MODEL
    tables = {name: judge.table(rows, name, below) for name in answered}
    same({key: result[key] for key in tables[protocol]}, tables[protocol], protocol)
    headline = ("n", "ciou", "giou", "p_at", "n_acc", "t_acc")
    also = {name: {key: t[key] for key in headline if key in t} for name, t in tables.items() if name != protocol}
    same(result["also"], also, "also")
    return tables


RUNS = pytest.mark.parametrize(
    ("layout", "protocol", "below", "answered"),
    [
        ("refcoco", "xsam", 0.0, {"xsam", "lisa"}),
        ("refcoco", "lisa", 0.0, {"xsam", "lisa"}),
        ("refcoco", "psalm", 0.0, {"psalm"}),
        ("grefcoco", "grefcoco", BELOW, {"xsam", "lisa", "grefcoco", "grefcoco-target-only"}),
        ("reasonseg", "xsam", 0.0, {"xsam", "lisa"}),
    ],
)


@RUNS
def test_every_number_is_that_of_the_judge(evaluated, capsys, layout, protocol, below, answered):
    root, out, result, records = evaluated(layout, protocol, below)
    broken = lambda r: int(r["file_name"].lstrip("i").split(".")[0]) in wild.BROKEN  # noqa: E731
    tables = judged(root, layout, protocol, below, answered, result, records, lambda r: broken(r) and r["query"] % 2 == 0)
    capsys.readouterr()
    assert evaluation_main(["audit", str(out / "val.jsonl"), "--json"]) == 0
    same(json.loads(capsys.readouterr().out), tables, "audit")
    for name, difference in audit.compare(records, records, protocols.get_protocol(protocol), resamples=20).items():
        assert (difference.first, difference.low, difference.high) == (pytest.approx(tables[protocol][name]), 0, 0)


@pytest.mark.slow
@RUNS
def test_the_commands_say_what_the_judge_says(prepared, tmp_path, layout, protocol, below, answered):
    """The same with the shipped checkpoint, by eval.py in a process of its own."""
    root, data = prepared(layout)
    flags = [f"--data={data.directory}", "--split=val", "--save-masks", f"--protocol={protocol}", f"--out={tmp_path}"]
    command = [sys.executable, "eval.py", *flags, f"--no-target-threshold={below}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    judged(root, layout, protocol, below, answered, json.loads((tmp_path / "val.json").read_text()), records)


def test_the_files_hold_what_they_should(evaluated):
    """Rasters that all differ, several objects, holes, crowds, ignored pixels, nothing, failures, empty and whole masks."""
    kinds = {}
    for layout, protocol, below in (("refcoco", "xsam", 0.0), ("grefcoco", "grefcoco", BELOW), ("reasonseg", "xsam", 0.0)):
        root, _, _, records = evaluated(layout, protocol, below)
        asked = asked_in(root, layout, protocol)
        kinds[layout] = [(asked[r["file_name"], r["text"]], r) for r in records]
    every = [one for rows in kinds.values() for one in rows]
    differ = lambda t: len({t[raster].tobytes() for raster in ("union", "sum", "fill_points")}) == 3  # noqa: E731
    for layout in ("refcoco", "grefcoco"):
        assert sum(differ(a.truth) for a, _ in kinds[layout]) >= len(kinds[layout]) / 4
        assert sum(a.count > 1 for a, _ in kinds[layout]) > 10
    sizes = {(r["height"], r["width"]) for _, r in every}
    assert {(1, 1), (1, 700), (700, 1), (700, 500)} <= sizes
    assert sum(a.ann_id == -1 for a, _ in every) > 10 and sum(a.ignored.any() for a, _ in every) > 5
    assert sum(r["failed"] for _, r in every) > 10 and sum(r["area"] == 0 and not r["failed"] for _, r in every) > 10
    assert sum(r["iou"] > 0.5 for _, r in every) > 10 and sum(0 < r["iou"] < 0.5 for _, r in every) > 10
    assert sum(r["oracle_iou"] > r["iou"] for _, r in every) > 30
    for key in ("intersection", "union"):
        assert sum(r[key] != r[f"single_cover_{key}"] for _, r in every) > 20
        assert sum(r[key] != r[f"best_{key}"] for _, r in every) > 20
        assert sum(r[f"oracle_{key}"] != r[f"oracle_single_cover_{key}"] for _, r in every) > 20
    instances = json.loads((evaluated("grefcoco", "grefcoco")[0] / "instances.json").read_text())["annotations"]
    assert {type(a["segmentation"][0]).__name__ for a in instances if isinstance(a["segmentation"], list)} == {"list", "dict"}
    assert sum(a["iscrowd"] for a in instances) >= 2
    refused = [r["score"] < BELOW and not r["failed"] and r["area"] > 0 for _, r in kinds["grefcoco"]]
    assert 10 < sum(refused) < len(refused) / 2

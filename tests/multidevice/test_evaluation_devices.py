"""An evaluation gives the same numbers on any number of devices, with the parameters whole or sharded."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from flowseg_jax import sharding
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.data import collate, images, prepare
from flowseg_jax.data.eval_dataset import EvalBatch, QueryRound
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.records import Sample
from flowseg_jax.data.tokenizer import load_tokenizer, train_tokenizer
from flowseg_jax.evaluation.benchmark import EvalModel, GenericEvaluation
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.fusion import Thresholds
from flowseg_jax.evaluation.tasks.referring import evaluate
from flowseg_jax.models import flowseg
from flowseg_jax.types import IMAGE_TOKEN_INDEX, PAD
from tests.helpers import small, wild
from tests.inference import test_batch

CFG = small.lean()
PHRASES, LENGTH, SCENES = 2, 5, 11


class Data:
    """Random images with one to five random questions each, and random discs as truth."""

    prefix = np.array([3, *[IMAGE_TOKEN_INDEX] * CFG.num_visual_tokens], np.int32)

    def __init__(self, batch, *, only=None, skip=()):
        rng = np.random.default_rng(0)
        scenes = []
        for place in range(SCENES):
            count = int(rng.integers(1, 6))
            size = tuple(int(n) for n in rng.integers(20, 90, 2))
            pixels = rng.integers(0, 256, (3, *size)).astype(np.uint8).transpose(1, 2, 0)
            truth = rng.random((count, 5, 6)).repeat(18, 1).repeat(15, 2)[:, : size[0], : size[1]] > 0.5
            tokens = rng.integers(5, small.VOCAB, (count, LENGTH)).tolist()
            scenes.append((place, pixels, size, truth, tokens))
        self.scenes = [s for s in scenes if (only is None or s[0] in only) and s[0] not in skip]
        self.samples, self.batch = sum(len(s[3]) for s in self.scenes), batch

    def __iter__(self):
        for at in range(0, len(self.scenes), self.batch):
            group = self.scenes[at : at + self.batch]
            rounds = -(-max(len(truth) for *_, truth, _ in group) // PHRASES)
            yield EvalBatch(
                collate.collate_images(
                    [self.pixels(s[1]) for s in group], self.batch, (CFG.sam.image_size, CFG.siglip.image_size)
                ),
                [self.round(group, slice(r * PHRASES, (r + 1) * PHRASES)) for r in range(rounds)],
                [s[0] for s in group],
                [np.zeros((1, *s[2]), bool) for s in group],
                [s[1] for s in group],
                [s[2] for s in group],
                (128, 128),
            )

    @staticmethod
    def pixels(image):
        from PIL import Image

        picture = Image.fromarray(image)
        fitted, scaled = images.resize_and_pad(picture, CFG.sam.image_size)
        nothing = np.zeros((0, 1, 1), np.uint8)
        return collate.ProcessedImage(fitted, scaled, images.resize_to_square(picture, CFG.siglip.image_size), nothing)

    def round(self, group, part):
        said, samples = [], []
        for place, *_, tokens in group:
            here = list(enumerate(tokens))[part]
            ids = [PAD, *[0] * (LENGTH - 2), PAD], [*[PAD] * (LENGTH - 1), 0]

            def encode(t, k, ids=ids):
                return collate.TokenizedConversation(t, t, *([k if i == 0 else PAD for i in one] for one in ids))

            said.append([encode(t, k) for k, (_, t) in enumerate(here)])
            samples.append(
                [Sample(place, f"{place}.jpg", place, place, n, f"{place} {n}", "", (0,), 1, f"{place} {n}") for n, _ in here]
            )
        truth = [s[3][part] for s in group]
        shape = (self.batch, PHRASES, PHRASES * LENGTH)
        return QueryRound(collate.collate_queries(said, shape, len(self.prefix), 0, ["row"] * len(said)), samples, truth, truth)


@pytest.fixture(scope="module", autouse=True)
def _small_parameters_are_divided_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 256)
        yield


def evaluator(cfg, devices, fsdp):
    graphdef, described = flowseg.abstract_model(cfg)
    mesh = sharding.make_mesh({"data": -1, "fsdp": fsdp}, jax.devices()[:devices])
    partition = unflatten_params({k: v.spec for k, v in flatten_params(sharding.param_shardings(described, mesh)).items()})
    return Evaluator(sharding.mark_fsdp_axes(nnx.merge(graphdef, described), mesh), mesh, partition)


@functools.cache
def records(devices, fsdp, batch):
    params = small.params(CFG)
    return evaluate(evaluator(CFG, devices, fsdp), params, functools.partial(Data, batch), split="val").records


@pytest.mark.parametrize("devices, fsdp, batch", [(8, 1, 8), (4, 4, 4), (2, 1, 6)])
def test_any_number_of_devices(devices, fsdp, batch):
    for ours, theirs in zip(records(devices, fsdp, batch), records(1, 1, 2), strict=True):
        for name, value in ours.items():
            if "score" in name:
                assert value == pytest.approx(theirs[name], rel=1e-5)
            else:
                assert value == theirs[name], name


def test_predictions_on_any_number_of_devices(tmp_path):
    """The same files, byte for byte (with the model of the package: `tests/inference/test_batch.py -m slow`)."""
    train_tokenizer(["the red circle", "Segment in this picture."], tmp_path / "tokenizer", vocab=300)
    (tmp_path / "images").mkdir()
    listed = test_batch.write_list(tmp_path / "images")
    for devices in (1, 2, 8):
        test_batch.predictor(tmp_path / "tokenizer", jax.devices()[:devices]).run(listed, tmp_path / str(devices), shard_size=9)
    one, two, eight = (test_batch.files(tmp_path / str(devices)) for devices in (1, 2, 8))
    assert one == two == eight and len(one) == 6


def test_the_numbers_say_something():
    found = records(1, 1, 2)
    assert len({record["query"] for record in found}) > 1 and all(record["union"] for record in found)
    assert any(0 < record["intersection"] < record["union"] for record in found)
    assert json.dumps(found, allow_nan=False)


@pytest.fixture(scope="module")
def categories(tmp_path_factory):
    """(devices, fsdp, batch) -> the result and the records of a panoptic set; the last batch has a row to spare."""
    root = tmp_path_factory.mktemp("panoptic")
    wild.panoptic(root / "files")
    data = prepare.prepare(root / "files", root / "prepared", layout="coco-panoptic", log=lambda line: None)
    train_tokenizer(data.categories, root / "tokenizer", vocab=300)
    tokenizer = load_tokenizer(root / "tokenizer")
    llm = dataclasses.replace(small.config().llm, vocab_size=tokenizer.vocab)
    cfg = dataclasses.replace(small.lean(negatives_group_size=1, llm=llm), generic_pass="with_flow")

    def run(devices, fsdp, batch):
        model = EvalModel(cfg, evaluator(cfg, devices, fsdp), small.params(cfg), {}, tokenizer, PromptTemplates())
        return GenericEvaluation(model, data, batch, thresholds=Thresholds(0.1, 0.3)).run("val", None, save_masks=True)

    return run


def test_categories_on_any_number_of_devices(categories):
    ours, theirs = categories(8, 4, 8), categories(1, 1, 3)
    for a, b in zip(ours.records, theirs.records, strict=True):
        assert [row[2] for row in a.pop("found")] == [row[2] for row in b["found"]]
        assert a == {key: value for key, value in b.items() if key != "found"}
    assert ours.result == theirs.result
    assert any(r["matched"] or r["extra"] for r in theirs.records) and theirs.result["n"] > 3

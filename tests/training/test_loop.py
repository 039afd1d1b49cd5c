"""A run: it learns a batch by heart, compiles once, resumes to the bit, and refuses to become another run."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints import run_checkpoint
from flowseg_jax.checkpoints.find import find_model, model_name
from flowseg_jax.checkpoints.pretrained import load_pretrained, read_model_config
from flowseg_jax.data import prepare, train_examples
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import validation
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation
from flowseg_jax.evaluation.validation import Validation
from flowseg_jax.models import flowseg
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.synthetic.refcoco_writer import CATEGORIES
from flowseg_jax.training import loop, program
from tests.helpers import minirefcoco as mini
from tests.helpers import small
from tests.helpers.trees import same
from tests.training.test_metric_writers import events


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return prepare.prepare(mini.write(root / "layout"), root / "prepared", tokenizer_vocab=300, log=lambda _: None)


@pytest.fixture(scope="module")
def config(prepared) -> ConfigDict:
    config = configs.read("configs/shapes_tiny.py")
    cfg = dataclasses.replace(small.lean(negatives_group_size=1), num_classes=len(prepared.categories))
    cfg = dataclasses.replace(
        cfg,
        llm=dataclasses.replace(
            LanguageConfig.tiny(300), hidden_size=28, num_hidden_layers=1, head_dim=14, intermediate_size=36
        ),
    )
    config.model = ConfigDict(cfg.to_dict())
    config.update(num_steps=6, log_every=1, checkpoint_every=2, batch_size=2)
    config.data.update(dir=str(prepared.directory), shapes_images=0, text_length=120, max_phrases=2, max_masks=4)
    config.optimizer.losses.update(num_points=24, logits_chunk_size=64)
    return config


TIMED = ("speed/", "input/", "goodput")  # how long it took, which no two runs share


def lines(workdir) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]


class Watching:
    """A validation that looks at one parameter and costs nothing."""

    def __init__(self, cfg, mesh, datasets, split, images, tokenizer, prompts):
        assert split == "val" and images == 3 and tokenizer.vocab == 300 and datasets[0].splits

    def __call__(self, params):
        queries = np.abs(params["mask_decoder"]["queries_features"]).sum()
        return {"eval/ciou": float(queries), "eval/giou": 1.0}, {"eval/1_circle": np.zeros((4, 6, 3), np.uint8)}


def watched(config: ConfigDict) -> ConfigDict:
    """The run, validated after every other step."""
    config = configs.from_json(configs.to_json(config))
    config.update(eval_every=2, eval_images=3)
    return config


def counted(config: ConfigDict, workdir) -> int:
    """Trains, and counts how often the step is traced."""
    traced = []
    make = program.make_train_step

    def counting(*args):
        step = make(*args)

        def traced_step(state, batch):
            traced.append(1)
            return step(state, batch)

        return traced_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_train_step", counting)
        loop.train(config, workdir, validation=Watching)
    return len(traced)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """An uninterrupted run of six steps, validated after every other one, and how often its step was compiled."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, counted(watched(config), workdir)


def test_one_compilation_a_run_and_every_step_logged(finished):
    workdir, traced = finished
    assert traced == 1
    rows = lines(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {
        "loss",
        "loss/language",
        "loss/referring_class",
        "loss/referring_mask",
        "loss/referring_dice",
        "optimizer/learning_rate",
    } <= rows[0].keys()
    parts = sum(value for name, value in rows[0].items() if name.startswith("loss/"))
    assert rows[0]["loss"] == pytest.approx(parts, rel=1e-5)
    assert (workdir / "tensorboard").is_dir()


def test_resuming_gives_the_same_losses_to_the_bit(config, finished, tmp_path, capsys):
    """Also where the run was not validated until it was killed: validation changes nothing of the training."""
    workdir, _ = finished

    class Interrupting(loop.MetricReporter):
        def log(self, step, metrics):
            super().log(step, metrics)
            if step == 4:
                raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MetricReporter", Interrupting)
        with pytest.raises(RuntimeError, match="killed"):
            loop.train(config, tmp_path)
    longer_log = watched(config)
    longer_log.checkpoint_every = 3  # may change
    assert counted(longer_log, tmp_path) == 1
    assert "continuing from the checkpoint of step" in capsys.readouterr().out
    unwatched = [{k: v for k, v in row.items() if row["step"] > 2 or not k.startswith("eval/")} for row in lines(workdir)]
    assert lines(tmp_path) == unwatched


def test_validations_are_written_and_the_best_checkpoint_is_kept(finished):
    workdir, _ = finished
    found = {row["step"]: row["eval/ciou"] for row in lines(workdir) if "eval/ciou" in row}
    best = max(found, key=found.get)
    assert sorted(found) == [2, 4, 6] and len({*found.values()}) == 3
    assert find_model(f"{workdir}@best", None).name == str(best)
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept == {"4", "6", str(best)}
    tags = {(e.step, v.tag) for e in events(workdir / "tensorboard") for v in e.summary.value}
    assert {(4, "eval/ciou"), (4, "eval/1_circle"), (6, "eval/1_circle"), (4, "loss/language"), (4, "goodput")} <= tags


def test_a_changed_model_is_an_error_that_names_the_keys(config, finished):
    changed = configs.from_json(configs.to_json(config))
    changed.model.mask_decoder.num_queries = 6
    with pytest.raises(UserError, match=r"other values of model\.mask_decoder\.num_queries"):
        loop.train(changed, finished[0])


@pytest.fixture(scope="module")
def trained(finished):
    return EvalModel.load(finished[0] / "model")


def test_the_trained_model_can_be_evaluated(prepared, trained, tmp_path):
    result = ReferringEvaluation(trained, prepared).run("val", tmp_path, pictures=False).result
    assert result["n"] == prepared.splits["val"]["samples"]
    assert result["checkpoint"]["step"] == 6
    assert json.loads((tmp_path / "val.json").read_text()) == result


def test_a_validation_has_the_numbers_of_an_evaluation_of_that_checkpoint(config, prepared, finished, trained, monkeypatch):
    directory = find_model(f"{finished[0]}@4", None)
    loaded = load_pretrained(directory, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained.params))
    assert loaded.extra["step"] == 4 and (loaded.tokenizer_dir / "tokenizer.json").is_file()
    model = dataclasses.replace(trained, params=trained.evaluator.place(loaded.params))
    expected = ReferringEvaluation(model, prepared).evaluate("val", None).result
    monkeypatch.setattr(validation, "make_evaluator", lambda cfg, mesh: trained.evaluator)  # compiled already
    config, built = watched(config), program.TrainProgram.build(config)
    config.eval_images = 0
    data = loop.open_train_data(config, built)
    validate = loop.open_validation(config, built, data, Validation)
    scores, pictures = validate(model.params)
    assert scores == {f"eval/{name}": expected[name] for name in validation.SCORES}
    assert scores["eval/ciou"] != ReferringEvaluation(trained, prepared).evaluate("val", None).result["ciou"]
    assert 0 < len(pictures) <= validation.PICTURES and all(x.dtype == np.uint8 and x.ndim == 3 for x in pictures.values())
    again = validate(trained.params)[1]
    assert list(again) == list(pictures)  # the same samples, whatever the model answers
    for key, value, make, message in (
        ("eval_split", "vall", Validation, "eval_split: no expressions in a split 'vall' of .*prepared: name another split"),
        ("eval_data", "nowhere", Validation, "nowhere: not a prepared data set"),
        ("eval_split", "val", None, "eval_every is set, and nothing to validate by"),
    ):
        changed = configs.from_json(configs.to_json(config))
        changed[key] = value
        with pytest.raises(UserError, match=message):
            loop.open_validation(changed, built, data, make)
    with pytest.raises(UserError, match="eval_every: a model of the components 'vlm' answers no expressions"):
        Validation(small.config(components="vlm"), built.mesh, [prepared], "val", 0, None, data.tokenizer)


def test_checkpoints_of_a_run_are_models(finished, tmp_path, capsys):
    trained_run, _ = finished
    training = tmp_path / "mine"
    training.mkdir()
    for name in ("checkpoints", "tokenizer"):  # as it is before its end
        (training / name).symlink_to(trained_run / name)
    newest = find_model(None, str(training))
    assert newest.name == "6" and capsys.readouterr().out == "mine: the checkpoint of step 6\n"
    assert find_model(f"{training}@latest", None) == newest == find_model(f"{training}@6", None)
    assert newest.parts[-3:] == ("mine", "checkpoints", "6")
    assert model_name(newest) == "mine@6"
    final, read = load_pretrained(trained_run / "model"), load_pretrained(newest)
    assert same(final.params, read.params) and final.extra == read.extra and final.model_config == read.model_config
    assert read.tokenizer_dir == newest.parent.parent / "tokenizer" and (read.tokenizer_dir / "tokenizer.json").is_file()
    assert not same(final.params, load_pretrained(find_model(f"{training}@4", None)).params)
    for which, message in (
        ("5", "mine has no checkpoint '5'; it has (2, )?4, 6, latest, best$"),
        ("bst", "mine has no checkpoint 'bst'; it has"),
    ):
        with pytest.raises(UserError, match=message):
            find_model(f"{training}@{which}", None)
    with pytest.raises(UserError, match="no run .*nowhere$"):
        find_model(f"{tmp_path}/nowhere@best", None)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_model(f"{tmp_path}@latest", None)
    with pytest.raises(UserError, match="holds no trained model yet, and no checkpoint"):
        find_model(None, str(tmp_path))
    assert find_model(None, str(trained_run)) == trained_run / "model"  # a finished run


def test_a_damaged_checkpoint_and_one_of_an_earlier_version_are_said(finished, tmp_path):
    trained_run, _ = finished
    path = tmp_path / "mine" / "checkpoints" / "4"
    (path / "meta").mkdir(parents=True)
    meta = json.loads((trained_run / "checkpoints/4/meta/metadata").read_text())
    (path / "meta/metadata").write_text(json.dumps(meta | {"step": 5}))
    with pytest.raises(UserError, match=r"checkpoint .*/4 cannot be read: its JSON has changed since it was written"):
        read_model_config(path)
    meta = {key: value for key, value in meta.items() if key not in ("extra", run_checkpoint.json_files.ITSELF)}
    (path / "meta/metadata").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"cannot be used as a model, an older flowseg_jax wrote it: continue the run first"):
        read_model_config(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 3, "no multiple of model.negatives_group_size 2"),
        ("optimizer.grad_accum_steps", 4, "batch_size 2 cannot be split over 1 device.* make it a multiple of 4"),
        ("optimizer.frozen_dtype", "half", "frozen_dtype is 'half': choose float32, bfloat16, int8"),
        ("optimizer.grad_accum_steps", 0, "grad_accum_steps=0 must be at least 1"),
        ("data.text_length", 20, "more than the text length 20"),
        ("mesh.data", 5, "does not fit 1 device"),
        ("optimizer.param_groups", (("llm/.*", 1.0),), "covers no group for background_embed"),
        ("model.num_classes", 1, "model.num_classes is 1"),
        ("model.llm.vocab_size", 299, r"model.llm.vocab_size is 299, the tokenizer .* has 300 ids"),
        ("data.tokenizer", "nowhere", "nowhere: no such tokenizer directory"),
    ],
)
def test_values_that_do_not_fit_are_refused(config, tmp_path, key, value, message):
    changed = configs.from_json(configs.to_json(config))
    if "group" in message and key == "batch_size":
        changed.model.negatives_group_size = 2
    changed.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        loop.train(changed, tmp_path)
    assert not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").iterdir())


def test_what_is_remarked_of_the_data_is_said(config, monkeypatch, capsys):
    monkeypatch.setattr(
        train_examples.TrainExampleBuilder,
        "_check",
        lambda self, member: setattr(self, "remark", "3 of 4 images are without a target"),
    )
    loop.open_train_data(config, program.TrainProgram.build(config))
    assert "WARNING: 3 of 4 images are without a target\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["shapes_tiny", "shapes_shipped.py:coarse", "shapes_shipped", "shapes_smollm2", "shapes_smollm2.py:full"]
)
def test_the_configs_ask_for_data_that_their_model_can_read(name, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        loop, "load_or_build_shapes", lambda directory, images, seed, **options: asked.update(options, seed=seed)
    )
    file, _, argument = name.removesuffix(".py").partition(".py:")
    config, _ = configs.load([f"--config=configs/{file}.py" + (f":{argument}" if argument else "")])
    run_config = loop.RunConfig.from_config(config)
    loop.load_dataset(config)
    if config.data.tokenizer:
        assert "tokenizer_vocab" not in asked
    else:
        assert asked["tokenizer_vocab"] == run_config.model.llm.vocab_size
        assert run_config.model.num_classes == len(CATEGORIES)
    assert ("mix" in asked) == (asked["seed"] != 0) == name.startswith("shapes_shipped")  # the benchmark itself stays unseen


@pytest.mark.slow
def test_a_batch_is_learnt_by_heart(config, prepared):
    """Four hundred steps on the same two images: every target is found, and selected, with IoU above 0.9."""
    cfg = small.config(generic_pass="off", num_classes=3, negatives_group_size=1)
    batch = small.batch(cfg)
    steps = 400
    experiment = small.experiment(cfg, batch)
    experiment.steps = steps
    experiment.optimizer.update(learning_rate=3e-3, weight_decay=0.0)
    experiment.optimizer.losses.update(num_points=64, language_weight=0.1)
    run = program.TrainProgram.build(experiment, jax.devices()[:1])
    graphdef, params = flowseg.init_model(cfg, 0)
    state, batch = small.start(run, params), run.to_device(batch)
    step = run.compile()
    for _ in range(steps):
        state, _ = step(state, batch)
    found = jax.jit(lambda p, b: flowseg.bind_params(graphdef, p).predict(b))(state.params, batch)
    query = np.asarray(found.scores).argmax(-1)
    side = found.mask_logits.shape[-1]
    truth = np.unpackbits(np.asarray(batch.packed_masks), axis=-1).astype(bool)
    truth = truth[
        :, :, truth.shape[2] // side // 2 :: truth.shape[2] // side, truth.shape[3] // side // 2 :: truth.shape[3] // side
    ]
    for b in range(2):
        for k in range(2):
            mask = np.asarray(found.mask_logits)[b, k, query[b, k]] > 0
            wanted = truth[b, int(batch.phrase_target[b, k])]
            assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9

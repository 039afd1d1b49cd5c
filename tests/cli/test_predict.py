"""`flowseg predict`: what its flags become, one image after the other and in batches, with a model that only writes it down."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY, MagicMock, Mock, call

import jax
import pytest
from PIL import Image

from flowseg_jax.cli import predict
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError
from flowseg_jax.inference import inputs
from flowseg_jax.system import host


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """A folder with one image and a list; models are found by name, and no process is set up."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    Path("list.jsonl").write_text('{"image": "a.png", "text": ["x", "y"]}\n')
    monkeypatch.setattr("flowseg_jax.checkpoints.find.find_model", lambda *where: "model of {} and {}".format(*where))
    for name in ("use_host_devices", "enable_compilation_cache"):
        monkeypatch.setattr(host, name, Mock())


@pytest.fixture
def parts(monkeypatch):
    """The parts of a prediction, one image after the other."""
    writer = MagicMock()
    writer.return_value.__exit__.return_value = None
    found = SimpleNamespace(
        config=Mock(), load=Mock(), writer=writer, latency=Mock(return_value="warm"), log=Mock(), run=Mock()
    )
    found.run.return_value = SimpleNamespace(last=("ready", ("x",)), failed=0)
    monkeypatch.setattr("flowseg_jax.checkpoints.pretrained.read_model_config", found.config)
    monkeypatch.setattr("flowseg_jax.inference.loading.load", found.load)
    monkeypatch.setattr("flowseg_jax.inference.outputs.PredictionWriter", found.writer)
    monkeypatch.setattr("flowseg_jax.inference.one_by_one.run", found.run)
    monkeypatch.setattr("flowseg_jax.inference.one_by_one.latency", found.latency)
    monkeypatch.setattr("flowseg_jax.system.console.log", found.log)
    return found


ALL = ("overlay", "rle", "answers", "candidates")


@pytest.mark.parametrize(
    ("flags", "method", "options", "kinds", "texts", "where"),
    [
        ("--image=a.png --text=x --text=y --top-k=3 --no-target-threshold=0.25", "predict",
         {"top_k": 3, "no_target_threshold": 0.25}, ALL, ("x", "y"), "--text"),
        ("--image=a.png --text=x --score-threshold=0.5 --save=png", "predict",
         {"score_threshold": 0.5}, ("png",), ("x",), "--text"),
        ("--image=a.png --text=x --generate --max-tokens=9", "generate", {"max_new_tokens": 9}, ALL, ("x",), "--text"),
        ("--image=a.png --chat=x --max-tokens=0", "chat", {"max_new_tokens": 0}, ALL, ("x",), "--chat"),
        ("--image=. --text=x", "predict", {}, ("overlay", "rle"), ("x",), "--text"),
        ("--input=list.jsonl", "predict", {}, ("overlay", "rle"), ("x", "y"), "list.jsonl:1"),
    ],
)  # fmt: skip
def test_one_by_one(parts, flags, method, options, kinds, texts, where):
    assert flowseg(["predict", *flags.split(), "--checkpoint=c", "--workdir=w", "--out=o", "--quantize=int8"]) == 0
    assert host.enable_compilation_cache.mock_calls == [call()] and not host.use_host_devices.mock_calls
    assert parts.config.mock_calls == [call("model of c and w")]  # before anything is loaded
    assert parts.load.mock_calls[0] == call("model of c and w", quantize="int8")
    many = "--image=a.png" not in flags
    assert parts.writer.call_args == call("o", kinds, table=many)
    model, writer = parts.load.return_value, parts.writer.return_value
    job = inputs.PredictionJob(Path("a.png"), texts, where)
    assert parts.run.mock_calls == [call(model, [job], ANY, writer, strict=not many)]
    respond = parts.run.call_args.args[2]
    assert (respond.func, respond.keywords) == (getattr(model, method), options)
    said = [*[call(str(Path("o/predictions.jsonl")))] * many, *[call("warm")] * (method == "predict")]
    assert parts.log.mock_calls == said
    if method == "predict":
        assert parts.latency.mock_calls == [call(model, "ready", ("x",), respond)]


def test_an_image_that_failed_is_no_success_and_has_no_latency(parts):
    parts.run.return_value = SimpleNamespace(last=None, failed=1)
    assert flowseg(["predict", "--image=a.png", "--text=x"]) == 1
    assert not parts.latency.mock_calls and parts.writer.call_args.args[0] == "runs/predictions"


def test_folders_are_entered_when_they_are_to_be(parts, monkeypatch):
    asked = Mock(return_value=[])
    monkeypatch.setattr("flowseg_jax.inference.inputs.jobs_from_images", asked)
    for flags in ([], ["--recursive"]):
        flowseg(["predict", "--image=.", "--text=x", *flags])
    assert asked.mock_calls == [call(".", ["x"], "--text", recursive=on) for on in (False, True)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--text=x", "give --image=FILE, --image=DIR or --input=FILE.jsonl, one of them"),
        ("--image=a.png --input=list.jsonl --text=x", "give --image=FILE, --image=DIR or --input=FILE.jsonl, one of them"),
        ("--image=a.png --chat=x --text=y", "--chat asks free questions, --text and --generate segment"),
        ("--image=a.png --chat=x --generate", "--chat asks free questions, --text and --generate segment"),
        ("--input=list.jsonl --text=x", "--input has its own texts: leave --text and --chat out"),
        ("--input=list.jsonl --chat=x", "--input has its own texts: leave --text and --chat out"),
        ("--image=a.png", "--text is missing: say what to segment"),
        ("--image=a.png --text=x --max-tokens=5", "--max-tokens belongs to --generate and --chat"),
        ("--image=a.png --text=x --top-k=0", "top_k is 0"),
        ("--image=a.png --text=x --top-k=2 --score-threshold=0", "both say which candidates are kept"),
        ("--image=a.png --text=x --save=gif", "--save: unknown kind 'gif'"),
        *(
            (f"--image=a.png --text=x {flag}", f"{flag.partition('=')[0]} belongs to --images, which")
            for flag in (
                "--batch-size=2", "--format=jsonl", "--shard-size=5", "--fsdp=1", "--distributed", "--coordinator=a:1",
                "--num-processes=1", "--process-id=0",
            )
        ),
        *(
            (f"--images=. --text=x {flag}", f"leave {flag.partition('=')[0]} out")
            for flag in ("--image=a.png", "--input=list.jsonl", "--generate", "--chat=x", "--max-tokens=0", "--save=rle")
        ),
        ("--images=. --text=x --out=gs://bucket/o", "--out=gs://bucket/o: results grow image by image; name a folder"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(parts, flags, message):
    with pytest.raises(UserError, match=message):
        flowseg(["predict", *flags.split()])
    assert not parts.load.mock_calls


@pytest.fixture
def batches(monkeypatch):
    """The parts of a prediction in batches."""
    where = "flowseg_jax.inference"
    found = {
        name: Mock(return_value=name)
        for name in (
            f"{where}.batch.selection", f"{where}.image_list.open_list", "flowseg_jax.evaluation.benchmark.EvalModel.load",
            "flowseg_jax.data.prompts.check_expressions", "flowseg_jax.checkpoints.model_card.ModelCard.of_model",
            f"{where}.batch.BatchPredictor",
        )
    }  # fmt: skip
    found["flowseg_jax.checkpoints.pretrained.read_model_config"] = Mock(return_value={"extra": "extra"})
    for name, fake in found.items():
        monkeypatch.setattr(name, fake)
    parts = SimpleNamespace(**{name.rpartition(".")[2]: fake for name, fake in found.items()})
    parts.load.return_value = SimpleNamespace(tokenizer="the tokenizer")
    parts.of_model.return_value = Mock()
    parts.BatchPredictor.return_value = SimpleNamespace(run=Mock(return_value=SimpleNamespace(failed=0)))
    return parts


def test_in_batches(batches):
    flags = "--images=in --checkpoint=c --text=x --text=y --top-k=3 --batch-size=4 --format=parquet --shard-size=7 --fsdp=2"
    assert flowseg(["predict", *flags.split(), "--quantize=bfloat16", "--recursive", "--out=o"]) == 0
    assert host.use_host_devices.mock_calls == [call(4)] and host.enable_compilation_cache.mock_calls == [call()]
    directory, model, card = "model of c and None", batches.load.return_value, batches.of_model.return_value
    assert batches.selection.mock_calls == [call("extra", directory, top_k=3)]
    assert batches.open_list.mock_calls == [call("in", ["x", "y"], recursive=True)]
    assert batches.load.mock_calls == [call(directory, fsdp=2, devices=jax.local_devices(), quantize="bfloat16")]
    assert batches.check_expressions.mock_calls == [call(["x", "y"], "the tokenizer", "--text")]
    assert batches.of_model.mock_calls[0] == call("extra", directory) and card.tell.mock_calls == [call(directory)]
    assert batches.BatchPredictor.mock_calls == [call(model, batches.selection.return_value, card, 4)]
    run = batches.BatchPredictor.return_value.run
    assert run.mock_calls == [call(batches.open_list.return_value, "o", kind="parquet", shard_size=7)]


def test_in_batches_by_default(batches):
    batches.BatchPredictor.return_value.run.return_value.failed = 1
    assert flowseg(["predict", "--images=list.jsonl"]) == 1
    assert host.use_host_devices.mock_calls == [call(8)] and predict.BATCH_SIZE == 8
    assert batches.open_list.mock_calls == [call("list.jsonl", (), recursive=False)]
    assert batches.load.call_args.kwargs["fsdp"] == 1 and not batches.check_expressions.mock_calls
    assert batches.BatchPredictor.call_args.args[3] == 8
    assert batches.BatchPredictor.return_value.run.mock_calls == [call(ANY, "runs/predictions", kind="jsonl", shard_size=None)]

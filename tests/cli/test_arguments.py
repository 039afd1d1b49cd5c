"""What each flag becomes: the call into the package that a command makes, every flag given and no two of a value."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY, Mock, call

import pytest

from convert_weights.job import ConversionRequest
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.cli.train import config_name
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation.summary import EvaluatedSplit
from flowseg_jax.inference.export import ExportShapes
from flowseg_jax.synthetic import multi_task
from flowseg_jax.system import host
from flowseg_jax.training.profiling import Profile

LAYOUT = "--split-by=umd --images=i --file=f --max-characters=9"
LAYOUT_OPTIONS = {"split_by": "umd", "images": Path("i"), "file": "f", "max_characters": 9}


def convert(source, out, **options):
    options = {"settings": ["a=1", "b=2"], "seed": 3, "overwrite": True, **options}
    return ConversionRequest("xsam", source, out, **options)


CALLS = [
    (
        f"data prepare --source=s --out=o --layout=jsonl {LAYOUT} --splits a b --on-error=record --num-workers=3"
        " --tokenizer-vocab=512",
        "flowseg_jax.data.prepare.prepare",
        call(
            Path("s"), Path("o"), layout="jsonl", **LAYOUT_OPTIONS, splits=["a", "b"], tokenizer_vocab=512,
            on_error="record", processes=3,
        ),
    ),
    ("data add-special-tokens --source=s --out=o", "flowseg_jax.data.tokenizer.extend_tokenizer", call(Path("s"), Path("o"))),
    (
        "data make-shapes --out=o --num-images=5 --seed=6 --preset=hard --mix attribute=0.4 two-hop=0.6 --objects 4 7 --size=64"
        " --quality=80 --palette=few --num-workers=2",
        "flowseg_jax.synthetic.generator.generate",
        call(
            Path("o"), 5, 6, mix={"attribute": 0.4, "two-hop": 0.6}, objects=(4, 7), preset="hard", size=64, quality=80,
            palette="few", workers=2,
        ),
    ),
    (
        "data make-shapes --out=o --num-images=5",
        "flowseg_jax.synthetic.generator.generate",
        call(Path("o"), 5, 0, mix=None, objects=None, preset="default", size=128, quality=92, palette="all", workers=None),
    ),
    (
        "data make-multitask --out=o --seed=6 --scale=0.5 --palette=few",
        "flowseg_jax.synthetic.multi_task.write_datasets",
        call(Path("o"), seed=6, palette="few", **{name: n // 2 for name, n in multi_task.DEFAULTS.items()}),
    ),
    ("data make-toy --out=o --num-images=5 --seed=6", "flowseg_jax.synthetic.toy_dataset.write", call(Path("o"), 5, 6)),
    ("adapters merge m a o", "flowseg_jax.training.adapters.merge_directories", call("m", "a", "o")),
    ("adapters import p m o --component=sam", "convert_weights.peft.import_adapters", call("p", "m", "o", "sam")),
    ("seal d", "flowseg_jax.checkpoints.pretrained.seal", call("d")),
    ("upgrade old new", "flowseg_jax.checkpoints.upgrade.upgrade", call("old", "new")),
    (
        "convert xsam s o --tokenizer=t --config=c --llm=l --siglip=g --mode=sr --chat=h --set a=1 --set b=2 --dtype=float16"
        " --seed=3 --mesh=fsdp=8,tensor=2 --overwrite",
        "convert_weights.run.convert",
        call(
            convert(
                "s", "o", tokenizer="t", config="c", llm="l", siglip="g", mode="sr", chat="h", dtype="float16",
                mesh={"fsdp": 8, "tensor": 2},
            ),
            check=False,
        ),
    ),
    ("convert xsam s --check --set a=1 --set b=2 --seed=3 --overwrite", "convert_weights.run.convert",
     call(convert("s", None), check=True)),
    (
        "convert xsam m o --export --layout=aaai --dtype=float32 --overwrite",
        "convert_weights.run.export",
        call(ANY, "m", "o", layout="aaai", dtype="float32", overwrite=True),
    ),
    (
        "export --checkpoint=m --out=o --batch=2 --phrases=3 --text=99 --platforms=cpu,tpu",
        "flowseg_jax.inference.export.export",
        call("model of m and None", "o", ExportShapes(2, 3, 99), ["cpu", "tpu"]),
    ),
    ("analyze oracle r/val.jsonl", "flowseg_jax.analysis.oracle.run", call(Path("r/val.jsonl"), Path("r/analysis"))),
    ("analyze oracle r/val.jsonl --out=o", "flowseg_jax.analysis.oracle.run", call(Path("r/val.jsonl"), Path("o"))),
    (
        "analyze compare-failures r/val.jsonl q/val.jsonl",
        "flowseg_jax.analysis.failure_comparison.run",
        call(Path("r/val.jsonl"), Path("q/val.jsonl"), Path("q/analysis")),
    ),
    (
        "analyze calibrate-no-target r/val.jsonl r/c.jsonl --false-alarms=0.2 --model=m --out=o",
        "flowseg_jax.analysis.calibration.run",
        call(Path("r/val.jsonl"), Path("r/c.jsonl"), Path("o"), 0.2, "m"),
    ),
    (
        "analyze calibrate-no-target r/val.jsonl",
        "flowseg_jax.analysis.calibration.run",
        call(Path("r/val.jsonl"), None, Path("r/analysis"), 0.1, None),
    ),
    ("plan --state-only --topology=v5e:4x4", "flowseg_jax.aot.plan.state_text", call(ANY, "v5e:4x4")),
    ("plan --shardings=fsdp=16", "flowseg_jax.aot.shardings.text", call(ANY, {"fsdp": 16})),
    ("train --print-config", "flowseg_jax.experiment.to_json", call(ANY)),
    ("train --list-keys", "flowseg_jax.config_help.list_keys", call(ANY)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    """Models are found by name, and no process is set up."""
    monkeypatch.setattr("flowseg_jax.checkpoints.find.find_model", lambda *where: "model of {} and {}".format(*where))
    for name in ("use_host_devices", "enable_compilation_cache"):
        monkeypatch.setattr(f"flowseg_jax.system.host.{name}", Mock())


@pytest.mark.parametrize(("words", "function", "expected"), CALLS, ids=[words.split(" -")[0] for words, *_ in CALLS])
def test_a_command_calls(monkeypatch, capsys, words, function, expected):
    fake = Mock(return_value="what it found")
    monkeypatch.setattr(function, fake)
    assert flowseg(words.split()) == 0
    assert fake.mock_calls[:1] == [expected]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch=2 --format=hf", "--batch belongs to --format=jax, not to --format=hf"),
        ("--dtype=float32", "--dtype belongs to --format=hf, not to --format=jax"),
        ("--push-to-hub=a/b", "--push-to-hub belongs to --format=hf, not to --format=jax"),
    ],
)
def test_flags_of_the_other_format_of_an_export(flags, message):
    with pytest.raises(UserError, match=message):
        flowseg(["export", "--out=o", *flags.split()])


def test_an_export_of_adapters_says_what_is_not_in_it(monkeypatch, capsys):
    fake = Mock(side_effect=[("o", ["boundary"]), ("o", [])])
    monkeypatch.setattr("convert_weights.peft.export_adapters", fake)
    for _ in range(2):
        assert flowseg(["adapters", "export", "a", "m", "o"]) == 0
    assert fake.mock_calls[0] == call("a", "m", "o", "llm")
    said = "o: the adapters of llm"
    assert capsys.readouterr().out.splitlines() == [f"{said}; trained too, and not in it: boundary", said]


def test_an_export_for_transformers(monkeypatch, capsys):
    made, sent = Mock(return_value=Path("o")), Mock(return_value="https://hub/a/b")
    monkeypatch.setattr("convert_weights.export.export_for_huggingface", made)
    monkeypatch.setattr("flowseg_jax.checkpoints.hub.upload_export", sent)
    words = ["export", "--format=hf", "--workdir=w", "--out=o"]
    assert flowseg(words) == flowseg([*words, "--dtype=float16", "--push-to-hub=a/b"]) == 0
    model = "model of None and w"
    assert made.mock_calls == [call(model, "o", None), call(model, "o", "float16")]
    assert sent.mock_calls == [call(Path("o"), model, "a/b")]
    assert capsys.readouterr().out.splitlines() == ["o", "o", "https://hub/a/b"]


def test_an_export_by_default(monkeypatch):
    monkeypatch.setattr("flowseg_jax.inference.export.export", fake := Mock())
    assert flowseg(["export", "--out=o"]) == 0
    assert fake.mock_calls == [call("model of None and None", "o", ExportShapes(1, 8, 256), ["cpu", "tpu", "cuda"])]
    with pytest.raises(UserError, match="batch is 0"):
        flowseg(["export", "--out=o", "--batch=0"])


def test_what_is_said_of_what_was_made(monkeypatch, capsys):
    for words, function, line in (
        ("data upgrade a b", "flowseg_jax.data.upgrade.upgrade", "b: the same data set in today's format"),
        ("data make-toy --out=o", "flowseg_jax.synthetic.toy_dataset.write", "wrote 20 images and o/toy.jsonl"),
        ("data add-special-tokens --source=s --out=o", "flowseg_jax.data.tokenizer.extend_tokenizer", "o: 7 ids"),
        ("adapters merge m a o", "flowseg_jax.training.adapters.merge_directories", "7: m with the adapters of a"),
        ("adapters import p m o", "convert_weights.peft.import_adapters", "7: the adapters of p"),
        ("upgrade a b", "flowseg_jax.checkpoints.upgrade.upgrade", "7: the model of a in format 3"),
        ("train --print-config", "flowseg_jax.experiment.to_json", "7"),
    ):
        monkeypatch.setattr(function, fake := Mock(return_value=7))
        assert flowseg(words.split()) == 0 and len(fake.mock_calls) == 1
        assert capsys.readouterr().out == f"{line}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert xsam m --export", "--export takes one model directory and OUT"),
        ("convert xsam a b c --export", "--export takes one model directory and OUT"),
        ("convert xsam m o --export --check", "--export takes one model directory and OUT"),
        ("convert xsam s o --layout=hf", "--layout chooses the names of an export: give --export too"),
        ("convert xsam s", "xsam: expected one SOURCE and one OUT, got s$"),
        ("convert xsam s o p", "xsam: expected one SOURCE and one OUT, got s o p"),
        ("convert xsam s o p --check", "xsam: expected one SOURCE and one OUT"),
        ("convert flowseg llm=a llm=b o", "flowseg: a component is given twice"),
        ("convert flowseg llm=a", "flowseg: expected one SOURCE and one OUT, got llm=a"),
        ("data make-multitask --out=o --scale=0", "--scale must be a number above 0, got 0.0"),
        ("data make-multitask --out=o --scale=inf", "--scale must be a number above 0, got inf"),
        ("data make-shapes --out=o --num-images=1 --mix attribute", "--mix takes FAMILY=SHARE, got 'attribute'"),
        ("train --profile=5", "--profile=5: give START:STEPS"),
    ],
)
def test_what_makes_no_call(monkeypatch, words, message):
    for function in ("convert_weights.run.convert", "convert_weights.run.export", "flowseg_jax.training.loop.train"):
        monkeypatch.setattr(function, fake := Mock())
    with pytest.raises(UserError, match=message):
        flowseg(words.split())
    assert not fake.mock_calls


def test_components_are_told_from_paths(monkeypatch):
    monkeypatch.setattr("convert_weights.run.convert", fake := Mock())
    for words in ("flowseg llm=a=b sam=c o", "flowseg ./x=1 o", "flowseg s o --check", "flowseg s --check", "xsam k=v o"):
        assert flowseg(["convert", *words.split()]) == 0
    asked = [(one.args[0].source, one.args[0].out) for one in fake.call_args_list]
    assert asked == [({"llm": "a=b", "sam": "c"}, "o"), ("./x=1", "o"), ("s", None), ("s", None), ("k=v", "o")]


def test_what_a_run_is_called():
    for flags, name in (
        ([], "shapes_tiny"), (["--config=configs/a.py"], "a"), (["--config", "b.json"], "b"), (["--workdir=x"], "shapes_tiny"),
        (["--seed", "--config=c:7"], "c"), (["--config.seed=1"], "shapes_tiny"),
    ):  # fmt: skip
        assert config_name(flags) == name


def test_preview_opens_a_layout_and_draws_one_split_or_all(monkeypatch, capsys):
    opened, drawn = Mock(return_value=SimpleNamespace(splits=("a", "b"))), Mock(return_value=Path("o/index.html"))
    monkeypatch.setattr("flowseg_jax.data.formats.open_layout", opened)
    monkeypatch.setattr("flowseg_jax.data.preview.preview", drawn)
    words = f"data preview jsonl s --out=o {LAYOUT} --samples=3 --seed=4".split()
    assert flowseg(words) == flowseg([*words, "--split=b"]) == 0
    assert opened.mock_calls[0] == call("jsonl", Path("s"), ANY, **LAYOUT_OPTIONS)
    layout = opened.return_value
    assert drawn.mock_calls == [call(layout, Path("o"), of, ANY, samples=3, seed=4) for of in (("a", "b"), ("b",))]
    assert capsys.readouterr().out == "o/index.html\n" * 2


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_a_plan_of_an_evaluation(monkeypatch, capsys, fits, code):
    found = SimpleNamespace(fits=fits, text=lambda: "a table", to_json=lambda: {"n": 1})
    monkeypatch.setattr("flowseg_jax.aot.eval_plan.plan_eval", fake := Mock(return_value=found))
    assert (
        flowseg(["plan", "--eval"]) == flowseg(["plan", "--eval", "--topology=v5e:2x2", "--xla-opt-level=O2", "--json"]) == code
    )
    assert fake.mock_calls == [call(ANY, "cpu:1", effort="O0"), call(ANY, "v5e:2x2", effort="O2")]
    assert capsys.readouterr().out.splitlines() == ["a table", "a table", '{"n": 1}']


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_a_plan_that_does_not_fit_is_no_success(monkeypatch, capsys, fits, code):
    report = SimpleNamespace(fits=fits, text=lambda: "a table", to_json=lambda: {"fits": fits})
    fake = Mock(return_value=report)
    monkeypatch.setattr("flowseg_jax.aot.plan.plan", fake)
    flags = ["--topology=v5e:4x4", "--xla-opt-level=O2", "--json", "--workdir=ignored"]
    assert flowseg(["plan", *flags]) == flowseg(["train", "--plan", *flags]) == code
    assert fake.mock_calls == [call(ANY, "v5e:4x4", effort="O2")] * 2
    assert capsys.readouterr().out.splitlines() == ["a table", f'{{"fits": {str(fits).lower()}}}'] * 2


def test_a_training_run_has_its_directory_its_profile_and_the_devices_of_its_batch(monkeypatch):
    from flowseg_jax.evaluation.validation import Validation

    fake = Mock()
    monkeypatch.setattr("flowseg_jax.training.loop.train", fake)
    flags = ["--config=shapes_tiny", "--config.batch_size=24", "--config.optimizer.grad_accum_steps=3"]
    assert flowseg(["train", *flags, "--config.model.negatives_group_size=2", "--profile=5:2"]) == 0
    assert flowseg(["train", "--workdir=w"]) == 0
    assert fake.mock_calls == [
        call(ANY, Path("runs/shapes_tiny"), Profile(5, 2), Validation),
        call(ANY, "w", None, Validation),
    ]
    assert fake.mock_calls[0].args[0].batch_size == 24
    assert host.use_host_devices.mock_calls[0] == call(4) and len(host.enable_compilation_cache.mock_calls) == 2


def test_the_page_is_served_where_it_is_told_to(monkeypatch, tmp_path, capsys):
    from flowseg_jax.checkpoints import find
    from flowseg_jax.system.paths import ROOT

    page = SimpleNamespace(build=Mock(return_value="blocks"), scenes=Mock(return_value=["a"]), serve=Mock())
    monkeypatch.setitem(sys.modules, "flowseg_jax.app.page", page)  # it needs an extra
    monkeypatch.setattr("flowseg_jax.app.page", page, raising=False)
    model = SimpleNamespace(card=Mock())
    model.card.lines.side_effect = [["A card."], []]
    monkeypatch.setattr("flowseg_jax.inference.loading.load", Mock(return_value=model))
    monkeypatch.setattr(find, "find_model", lambda checkpoint, _: Path(checkpoint) if checkpoint else find.SHIPPED_MODEL)
    assert flowseg(["app"]) == flowseg(["app", "--checkpoint=c", "--host=0.0.0.0", "--port=0"]) == 0
    assert page.scenes.mock_calls == [call(ROOT / "examples" / "scenes")] * 2
    assert page.build.mock_calls == [call(model, ["a"], None, ["A card."]), call(model, ["a"], "c", ["The model of c."])]
    assert page.serve.mock_calls == [call("blocks", "127.0.0.1", 7860), call("blocks", "0.0.0.0", 0)]
    assert "the page is on http://127.0.0.1:7860/ (Ctrl-C ends it)" in capsys.readouterr().out


@pytest.fixture
def evaluated(monkeypatch):
    """The parts of an evaluation."""
    data = SimpleNamespace(task="referring", directory=Path("d"), check_split=Mock())
    opened = Mock(return_value=data)
    parts = SimpleNamespace(data=data, opened=opened, model=Mock(), referring=Mock(), generic=Mock(), report=Mock())
    parts.report.return_value = Path("page")
    where = "flowseg_jax.evaluation"
    monkeypatch.setattr("flowseg_jax.data.dataset.PreparedDataset.open", opened)
    monkeypatch.setattr("flowseg_jax.checkpoints.pretrained.read_model_config", Mock())
    monkeypatch.setattr("flowseg_jax.checkpoints.find.model_name", lambda directory: "m")
    monkeypatch.setattr(f"{where}.benchmark.EvalModel.load", parts.model)
    monkeypatch.setattr(f"{where}.benchmark.ReferringEvaluation", parts.referring)
    monkeypatch.setattr(f"{where}.benchmark.GenericEvaluation", parts.generic)
    monkeypatch.setattr(f"{where}.summary.table", lambda splits: " ".join(one.split for one in splits))
    monkeypatch.setattr(f"{where}.summary.write_report", parts.report)
    return parts


def test_an_evaluation_of_expressions(evaluated, tmp_path, capsys):
    out = tmp_path / "out"
    flags = "--data=d --split=val,test --protocol=lisa --max-images=7 --batch-size=3 --shuffle-text --save-masks --fsdp=2"
    flags += f" --no-target-threshold=0.25 --generate --checkpoint=c --quantize=int8 --out={out}"
    assert flowseg(["eval", *flags.split()]) == 0
    assert evaluated.opened.mock_calls == [call("d")] * 2
    assert evaluated.data.check_split.mock_calls == [call("val"), call("test")]
    assert host.use_host_devices.mock_calls == [call(3)] and host.enable_compilation_cache.mock_calls == [call()]
    (loaded,) = evaluated.model.mock_calls  # once for all splits
    assert loaded.args == ("model of c and None",) and loaded.kwargs["fsdp"] == 2 and loaded.kwargs["answer_tokens"] == 64
    assert loaded.kwargs["expressions"] is True and loaded.kwargs["quantize"] == "int8"
    assert evaluated.referring.call_args_list == [call(evaluated.model.return_value, evaluated.data, 3, "lisa", 0.25)] * 2
    options = {"shuffle_text": True, "images": 7, "save_masks": True}
    assert evaluated.referring.return_value.run.mock_calls == [call(split, out, **options) for split in ("val", "test")]
    assert evaluated.report.mock_calls == [call(out / "report.html", "m", ANY, ["Model: m."], None)]
    result = evaluated.referring.return_value.run.return_value.result
    assert evaluated.report.call_args.args[2] == [EvaluatedSplit("d", split, result, out) for split in ("val", "test")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["val test", f"results: {out}", "open page"]


def test_an_evaluation_of_categories(evaluated, tmp_path):
    evaluated.data.task = "generic"
    words = ["eval", "--data=d", f"--workdir={tmp_path}", "--batch-size=3"]
    assert flowseg(words) == 0
    (loaded,) = evaluated.model.mock_calls
    assert loaded.args == (f"model of None and {tmp_path}",) and loaded.kwargs["fsdp"] == 1
    assert loaded.kwargs["answer_tokens"] == 0 and loaded.kwargs["expressions"] is False
    assert evaluated.generic.call_args_list == [call(evaluated.model.return_value, evaluated.data, 3)]
    assert evaluated.generic.return_value.run.mock_calls == [call("val", tmp_path / "eval", images=None, save_masks=False)]
    assert evaluated.report.mock_calls == [call(tmp_path / "eval" / "report.html", "m", ANY, ["Model: m."], tmp_path)]
    assert loaded.kwargs["quantize"] is None
    for wrong in ("--shuffle-text --no-target-threshold=0.5", "--protocol=lisa --generate"):
        named = ", ".join(flag.partition("=")[0] for flag in wrong.split())
        with pytest.raises(UserError, match=f"^d: has categories and no expressions: .*; leave out {named}$"):
            flowseg([*words, *wrong.split()])
    with pytest.raises(UserError, match="--benchmark and --data both name data sets"):
        flowseg([*words, "--benchmark=refcoco/val"])


def test_where_results_go_and_what_is_evaluated_by_default(monkeypatch, evaluated, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    made = Mock(return_value=SimpleNamespace(directory="shapes"))
    monkeypatch.setattr("flowseg_jax.training.loop.load_dataset", made)
    evaluated.report.return_value = None  # nothing to show
    assert flowseg(["eval"]) == flowseg(["eval", "--quantize=int8"]) == flowseg(["eval", "--workdir=w", "--quantize=int8"]) == 0
    assert evaluated.opened.mock_calls == [call("shapes")] * 3 and made.call_args.args[0].batch_size > 0
    where = [one.args[0].parent for one in evaluated.report.mock_calls]
    assert where == [Path("runs/eval/m"), Path("runs/eval/m-int8"), Path("w/eval-int8")]
    assert "open" not in capsys.readouterr().out
    assert evaluated.referring.call_args_list[0] == call(evaluated.model.return_value, evaluated.data, 8, "xsam", 0.0)
    with pytest.raises(UserError, match="name one with --out beside --workdir=gs://bucket/run"):
        flowseg(["eval", "--workdir=gs://bucket/run"])
    assert flowseg(["eval", "--workdir=gs://bucket/run", "--out=o"]) == 0  # its learning curve is not here
    assert evaluated.report.call_args == call(Path("o/report.html"), "m", ANY, ["Model: m."], None)


def test_an_evaluation_of_benchmarks_that_another_process_reports(monkeypatch, evaluated, tmp_path):
    sets = [SimpleNamespace(task=task, directory=Path(task), check_split=Mock()) for task in ("generic", "referring")]
    named = Mock(return_value=[("coco/val", sets[0], "val"), ("refcoco/val", sets[1], "val")])
    monkeypatch.setattr("flowseg_jax.evaluation.benchmark.parse_benchmarks", named)
    monkeypatch.setattr("flowseg_jax.system.distributed.is_primary", lambda: False)
    assert flowseg(["eval", "--benchmark=list", "--data-root=sets", f"--out={tmp_path}"]) == 0
    assert named.mock_calls == [call("list", Path("sets"))] and not evaluated.report.mock_calls
    assert evaluated.model.call_args.kwargs["expressions"] is True  # one of them has some
    assert evaluated.generic.call_args_list == [call(evaluated.model.return_value, sets[0], 8)]
    assert evaluated.generic.return_value.run.call_args.args == ("val", tmp_path / "coco/val")
    assert evaluated.referring.return_value.run.call_args.args == ("val", tmp_path / "refcoco/val")


def test_an_analysis_of_the_benchmark_that_is_made_if_it_is_missing(monkeypatch, evaluated):
    made, read = Mock(return_value=SimpleNamespace(directory="shapes")), Mock()
    monkeypatch.setattr("flowseg_jax.training.loop.load_dataset", made)
    monkeypatch.setattr("flowseg_jax.checkpoints.pretrained.read_model_config", read)
    monkeypatch.setattr("flowseg_jax.analysis.runner.AnalysisRunner", Mock())
    for module in ("layer_trace", "embedding_swap", "mask_grid", "prompt_sensitivity"):
        monkeypatch.setattr(f"flowseg_jax.analysis.{module}.run", ran := Mock())
        command = {"embedding_swap": "swap-embeddings"}.get(module, module.replace("_", "-"))
        assert flowseg(["analyze", command]) == 0 and ran.call_args.args[1] == Path("runs/analysis/m")
    assert evaluated.opened.mock_calls == [call("shapes")] * 4 and read.mock_calls == [call("model of None and None")] * 4
    assert host.enable_compilation_cache.mock_calls == [call()] * 4
    read.side_effect = UserError("no model")
    with pytest.raises(UserError, match="no model"):
        flowseg(["analyze", "mask-grid"])
    assert len(made.mock_calls) == 4  # a mistyped model is told before the benchmark is made


def test_an_analysis_that_runs_a_model(monkeypatch, evaluated):
    made, ran = Mock(), Mock()
    monkeypatch.setattr("flowseg_jax.analysis.runner.AnalysisRunner", made)
    monkeypatch.setattr("flowseg_jax.analysis.boundary.run", ran)
    assert flowseg("analyze boundary --checkpoint=c --data=d --split=test --max-images=0 --batch-size=2".split()) == 0
    assert flowseg("analyze boundary --workdir=w --data=d --out=o".split()) == 0
    model, data = evaluated.model.return_value, evaluated.data
    assert evaluated.model.mock_calls == [call("model of c and None"), call("model of None and w")]
    assert evaluated.referring.call_args_list == [call(model, data, 2), call(model, data, 8)]
    evaluation = evaluated.referring.return_value
    assert made.mock_calls == [call(evaluation, "test", None), call(evaluation, "val", 100)]
    assert ran.mock_calls == [call(made.return_value, Path("runs/analysis/m")), call(made.return_value, Path("o"))]

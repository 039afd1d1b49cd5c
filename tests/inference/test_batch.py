"""Many images in batches: the answers of one by one, whatever their sizes; a kill and broken images lose nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as parquet
import pytest
from flax import nnx
from PIL import Image

from flowseg_jax.checkpoints.find import SHIPPED_MODEL
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import evaluator
from flowseg_jax.evaluation.benchmark import EvalModel
from flowseg_jax.inference import batch, image_list, inputs, shards
from flowseg_jax.inference.selection import SelectionConfig
from flowseg_jax.sharding import make_mesh
from tests.helpers import fake_gcs
from tests.inference.test_segmentor import SIDE, Thresholds, model, picture, tokenizer_directory  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(60, 90), (90, 60), (48, 48), (1, 1), (140, 90)]
TEXTS = ["it", "the red circle", "that", "x y z", "a red one", "of this picture", "circle", "the", "red", "the circle it"]


def predictor(directory, devices=None):
    """The stand-in of `test_segmentor` as a model for batches, with the tokenizer in a directory."""
    graphdef, state = nnx.split(Thresholds())
    cfg = SimpleNamespace(
        sam=SimpleNamespace(image_size=SIDE),
        siglip=SimpleNamespace(image_size=16),
        num_visual_tokens=4,
        has_language_model=True,
    )
    tokenizer, mesh = load_tokenizer(directory), make_mesh({"data": -1}, devices)
    one = EvalModel(
        cfg,
        evaluator.Evaluator(graphdef, mesh),
        nnx.to_pure_dict(state),
        {"digest": "a"},
        tokenizer,
        PromptTemplates(randomize=False),
    )
    return batch.BatchPredictor(one, SelectionConfig(top_k=1, no_target_threshold=0.0), batch_size=3, threads=2)


@pytest.fixture(scope="module")
def many(tokenizer_directory):  # noqa: F811
    """What it compiles is shared by all tests here."""
    return predictor(tokenizer_directory)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return write_list(tmp_path_factory.mktemp("images"))


def write_list(root):
    """23 lines: images of all sizes with one to ten texts, and everything that can be wrong with one."""
    lines = []
    for number, size in enumerate(SIZES):
        Image.fromarray(picture(*size)).save(root / f"{number}.png")
    for number in range(16):
        texts = TEXTS[: 1 + 3 * number % 10]
        lines.append(json.dumps({"image": f"{number % 5}.png", "text": texts if number % 3 else texts[0]}))
    (root / "broken.png").write_bytes(b"no image")
    os.mkfifo(root / "pipe.png")
    for bad in (
        "{",
        '{"image": "broken.png", "text": "it"}',
        '{"image": "pipe.png", "text": "it"}',
        '{"image": "none", "text": ""}',
    ):
        lines.insert(5, bad)
    lines += [
        '{"image": "0.png", "text": "a <SEG>"}',
        '{"image": "\\udcff.png", "text": "it"}',
        "",
        '{"image": "1.png", "text": "it"}',
    ]
    (root / "list.jsonl").write_text("\n\n".join(lines))
    return image_list.open_list(root / "list.jsonl", ())


def read(out, kind="jsonl"):
    assert not list(out.glob(".partial*"))
    return [json.loads(line) for path in sorted(out.glob("predictions-*")) for line in path.read_text().splitlines()]


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("selection", [{"top_k": 1}, {"score_threshold": 0.3, "no_target_threshold": 0.6}])
def test_equal_to_one_by_one(many, listed, model, tmp_path, selection):  # noqa: F811
    chosen_by = SelectionConfig(**{"no_target_threshold": 0.0, **selection})
    summary = dataclasses.replace(many, selection=chosen_by).run(listed, tmp_path, shard_size=6)
    records = read(tmp_path)
    assert summary == batch.BatchSummary(answered=17, total=23, failed=6)
    assert len(list(tmp_path.glob("predictions-*-of-00004.jsonl"))) == 4
    assert [r["index"] for r in records] == sorted(r["index"] for r in records)
    expected = []
    for place in range(len(listed)):
        try:
            job = listed.job(place)
            expected += [{"index": place} | p.to_json() for p in model.segment(job.image, job.texts, **selection)]
        except UserError as error:
            expected.append({"index": place, "failure": str(error)})
    for ours, theirs in zip(records, expected, strict=True):
        if "failure" in theirs:
            assert theirs.pop("failure").removeprefix("text: ") in ours["failure"]
        if "top_k" in selection:
            theirs = {key: value for key, value in theirs.items() if key != "candidates"}
        assert {key: ours[key] for key in theirs} == theirs
    assert sum(not record.get("found", True) for record in records) > 0 or "top_k" in selection
    failed = [json.loads(line) for path in sorted(tmp_path.glob("failures-*")) for line in path.read_text().splitlines()]
    assert failed == [record for record in records if "failure" in record]
    assert {r["index"] for r in failed} == {5, 6, 7, 8, 20, 21} and "list.jsonl:17: not JSON" in failed[3]["failure"]


def test_a_kill_loses_nothing(many, listed, tmp_path, monkeypatch, capsys):
    """It is cut off in the middle of a line; the same call goes on there, and the files are those of an unbroken run."""
    many.run(listed, tmp_path / "whole", shard_size=9)
    add, written = shards.PredictionShards.add, []

    def killed(self, found):
        if len(written) > 3:
            with open(self._partial(2), "ab") as file:
                file.write(b'{"place": 19, "rec')
            raise KeyboardInterrupt
        written.extend(found)
        add(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(shards.PredictionShards, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            many.run(listed, tmp_path / "out", shard_size=9)
    assert any(tmp_path.glob("out/.partial*")) and written
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(shards.PredictionShards, "add", lambda self, found: (asked.extend(found), add(self, found)))
        many.run(listed, tmp_path / "out")
    assert sorted(asked + written) == list(range(23))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert f"{23 - len(written)} of 23 images are to be answered" in capsys.readouterr().out
    before = files(tmp_path / "out")
    many.run(listed, tmp_path / "out")  # complete: nothing is computed
    assert files(tmp_path / "out") == before and "images in" not in capsys.readouterr().out


def test_a_folder_of_another_run_is_refused(many, listed, tmp_path):
    with shards.PredictionShards.open(tmp_path, {"list": "a", "selection": {}}, total=5, kind="jsonl"):
        pass
    with pytest.raises(UserError, match=r"run.json: .* another images, list, model, selection: choose another --out"):
        many.run(listed, tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run.json is not what `flowseg predict --images` wrote"):
        many.run(listed, tmp_path)
    with pytest.raises(UserError, match="no format 'csv'"):
        many.run(listed, tmp_path, kind="csv")


def test_what_cannot_be_computed_together_is_computed_alone(many, listed, tmp_path, monkeypatch):
    """As when memory does not hold a batch: its images are answered one by one, and one that fails alone is listed."""
    whole = many.model.evaluator
    size = SIZES[2]

    def predict(params, prefix, views, sizes, *rest):
        if len(sizes) > 1 or sizes[0] == size:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return type(whole).predict_candidates(whole, params, prefix, views, sizes, *rest)

    many.run(listed, tmp_path / "whole")
    monkeypatch.setattr(whole, "predict_candidates", predict, raising=False)
    many.run(listed, tmp_path / "alone")
    for ours, theirs in zip(read(tmp_path / "alone"), read(tmp_path / "whole"), strict=False):
        if ours["index"] == 2:
            assert "RuntimeError: RESOURCE_EXHAUSTED" in ours["failure"] and "2.png" in ours["image"]
            break
        assert ours == theirs


def test_parquet(many, listed, tmp_path):
    many.run(listed, tmp_path / "lines", shard_size=10)
    many.run(listed, tmp_path / "columns", kind="parquet", shard_size=10)
    rows = [row for path in sorted((tmp_path / "columns").glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    plain = lambda value: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value  # noqa: E731
    assert rows == [{key: plain(value) for key, value in line.items()} for line in read(tmp_path / "lines")]


def test_folders(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.png", ".hidden.png", ".git/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "round").symlink_to(tmp_path)
    flat, deep = (image_list.open_list(tmp_path, ["x", "y"], recursive=recursive) for recursive in (False, True))
    assert [flat.job(i).image.name for i in range(len(flat))] == ["a.JPG", "b.png"] and flat.digest != deep.digest
    assert [os.fspath(deep.job(i).image.relative_to(tmp_path)) for i in range(len(deep))] == ["a.JPG", "b.png", "deep/er/c.png"]
    assert deep.job(2).texts == ("x", "y")
    assert [job.image for job in inputs.jobs_from_images(tmp_path, ["x"], "", recursive=True)] == [
        deep.job(i).image for i in range(3)
    ]
    with pytest.raises(UserError, match="no image file; --recursive enters the folders"):
        image_list.open_list(tmp_path / "deep", ["x"])
    with pytest.raises(UserError, match="no such folder"):
        image_list.open_list(tmp_path / "none", ["x"])


def test_a_bucket(many, tmp_path):
    with fake_gcs.serve() as bucket:
        root = many_images_in(bucket)
        (root / "list.jsonl").write_text('{"image": "0.png", "text": "it"}\n{"image": "none.png", "text": "it"}\n')
        many.run(image_list.open_list(f"{bucket}/photos", ["it"], recursive=True), tmp_path / "folder")
        found = read(tmp_path / "folder")
        assert [r["image"].removeprefix(str(root)) for r in found] == ["/0.png", "/1.png", "/in/2.png"]
        many.run(image_list.open_list(f"{bucket}/photos/list.jsonl", ()), tmp_path / "lines")
        first, second = read(tmp_path / "lines")
        assert first == found[0] and "none.png: cannot read the image" in second["failure"]


def many_images_in(bucket):
    from io import BytesIO

    from flowseg_jax.system.paths import resolve_path

    root = resolve_path(f"{bucket}/photos")
    for name in ("0.png", "1.png", "in/2.png"):
        stream = BytesIO()
        Image.fromarray(picture()).save(stream, "PNG")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(stream.getvalue())
    return root


def test_images_of_one_size_go_in_whole_batches(many):
    """However many went before: only what waits for others of its size counts against the bound."""
    rows = many._rows((8, 8))
    groups = many._groups(SimpleNamespace(shape="a", bucket=(8, 8)) for _ in range(2 * batch.MOST_WAITING * rows))
    assert [len(group) for group in groups] == [rows] * (2 * batch.MOST_WAITING)


def test_the_last_line_tells_the_rate_of_the_whole_run(many, monkeypatch, capsys):
    clock, beat = iter([5.0, 15.0, 16.0, 16.0]), SimpleNamespace()  # begin, two batches of which the first compiles, end
    monkeypatch.setattr(batch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(batch, "heartbeat", lambda message: contextlib.nullcontext(beat))
    said = []

    def answers(self, listed, places):
        yield {0: [{}], 1: [{}]}
        said.append(beat.message)
        yield {2: [{}], 3: [{"failure": "x"}]}
        said.append(beat.message)

    monkeypatch.setattr(batch.BatchPredictor, "answers", answers)
    assert many._fill(None, SimpleNamespace(places=range(4), total=4, add=lambda found: None)) == 3
    assert said == ["predict: 2/4 images, 0.2/s, 10 s left, 0 failed", "predict: 4/4 images, 2.0/s, 0 s left, 1 failed"]
    assert "predict: 4 images in 11 s, 0.4/s, compilation included; 1 failed" in capsys.readouterr().out


def test_twenty_failures_are_told_and_the_others_listed(many, monkeypatch, capsys):
    answers = [{n: [{"failure": f"no {n}"} if n % 2 else {}]} for n in range(44)]
    monkeypatch.setattr(batch.BatchPredictor, "answers", lambda self, listed, places: iter(answers))
    assert many._fill(None, SimpleNamespace(places=range(44), total=50, add=lambda found: None)) == 22
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "predict: 44 of 50 images are to be answered by this process"
    assert lines[1:-1] == [f"failed: no {n}" + "; further ones are only listed" * (n == 39) for n in range(1, 40, 2)]
    assert lines[-1].endswith("22 failed")


def test_an_index_holds_a_few_bytes_a_line(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text("".join(f'{{"image": "{i}.png", "text": "it"}}\n' for i in range(20_000)))
    listed = image_list.open_list(path, ())
    assert len(listed) == 20_000 and listed.job(19_999).image == tmp_path / "19999.png"
    held = [value for value in vars(listed).values() if hasattr(value, "itemsize")]
    assert sum(len(value) * value.itemsize for value in held) == 16 * len(listed)
    assert not any(isinstance(value, list | dict | tuple) for value in vars(listed).values())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images=IN"], "--text is missing"),
        (["--images=IN/list.jsonl", "--text=x"], "has its own texts"),
        (["--images=IN", "--text=x", "--save=png"], "leave --save out"),
        (["--images=IN", "--text=x", "--image=IN"], "leave --image out"),
        (["--images=IN", "--text=x", "--out=gs://bucket/out"], "name a folder"),
        (["--image=IN", "--text=x", "--batch-size=4"], "--batch-size belongs to --images"),
        (["--images=IN", "--text=x", "--top-k=2", "--score-threshold=0.5"], "give one of them"),
    ],
)
def test_mistakes_of_the_call(tmp_path, flags, message):
    (tmp_path / "list.jsonl").write_text("{}")
    with pytest.raises(UserError, match=message):
        flowseg(["predict", *(flag.replace("IN", str(tmp_path)) for flag in flags)])


# ----------------------------------------------------------------------------------------- the command, in processes of its own


def start(out, *flags, devices=1):
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "flowseg_jax", "predict", f"--out={out}", *flags]
    environment = os.environ | {"XLA_FLAGS": xla, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Sixty lines about the shipped scenes, and the files of an unbroken run over them."""
    root = tmp_path_factory.mktemp("scenes")
    shipped = sorted((ROOT / "examples" / "scenes").glob("*.png"))
    lines = [
        {"image": str(shipped[i % len(shipped)]), "text": ["red circle", "the star", "blue"][: 1 + i % 3]} for i in range(60)
    ]
    lines[7]["image"] = "none.png"
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [f"--images={root / 'list.jsonl'}", "--batch-size=4", "--shard-size=16"]
    whole = start(root / "whole", *flags)
    assert "59 of 60 images are answered" in whole.communicate(timeout=250)[0] and whole.returncode == 1
    return flags, files(root / "whole")


@pytest.mark.slow
def test_a_kill_9_in_the_middle(scenes, tmp_path):
    flags, whole = scenes
    running = start(tmp_path / "out", *flags)
    deadline = time.monotonic() + 250
    while not any(path.stat().st_size for path in (tmp_path / "out").glob(".partial*")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert len(list((tmp_path / "out").glob("predictions-*"))) < 4
    again = start(tmp_path / "out", *flags)
    assert "of 60 images are to be answered" in again.communicate(timeout=250)[0] and again.returncode == 1
    assert {name: content for name, content in files(tmp_path / "out").items() if name != ".lock"} == whole


@pytest.mark.slow
@pytest.mark.parametrize("devices, processes", [(2, 1), (8, 1), (2, 2)])
def test_the_shipped_model_on_any_number_of_devices(scenes, tmp_path, devices, processes):
    from tests.training.test_two_processes import pair

    flags, whole = scenes
    joined = pair() if processes == 2 else [()]
    running = [start(tmp_path / "out", *flags, *more, devices=devices) for more in joined]
    said = [process.communicate(timeout=280)[0] for process in running]
    assert [process.returncode for process in running] == [1] * processes, said
    ours, theirs = files(tmp_path / "out"), whole
    assert ours.keys() == theirs.keys()
    differing = 0
    for name in (name for name in whole if name.startswith("predictions")):
        for a, b in zip(ours[name].splitlines(), theirs[name].splitlines(), strict=True):
            a, b = json.loads(a), json.loads(b)
            assert a.pop("score", 0) == pytest.approx(b.pop("score", 0), rel=1e-5)
            differing += a != b
    assert differing == 0


@pytest.mark.slow
def test_the_shipped_model_answers_as_one_by_one(scenes):
    from flowseg_jax.inference import loading

    flags, whole = scenes
    one = loading.load(SHIPPED_MODEL)
    listed = image_list.open_list(flags[0].partition("=")[2], ())
    lines = [json.loads(line) for name in sorted(whole) if name.startswith("pred") for line in whole[name].splitlines()]
    records = {(line["index"], line.get("text")): line for line in lines}
    for place in range(len(listed)):
        job = listed.job(place)
        if place != 7:
            for prediction in one.segment(job.image, job.texts, top_k=1):
                found = records[place, prediction.text]
                assert found["score"] == pytest.approx(prediction.score, rel=1e-5)
                assert found["rle"] == prediction.to_json()["rle"] and found["found"] == prediction.found

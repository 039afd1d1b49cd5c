"""predict on files: any image, the JSON's masks are the overlay's, EXIF is applied, bad input leaves no files."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from pycocotools import mask as coco

from flowseg_jax.checkpoints.pretrained import save_pretrained, seal
from flowseg_jax.cli.main import main as run_flowseg
from flowseg_jax.data import collate
from flowseg_jax.data.prompts import Conversation, PromptTemplates
from flowseg_jax.data.records import Turn
from flowseg_jax.data.tokenizer import load_tokenizer, train_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import postprocess
from flowseg_jax.inference import inputs, loading, one_by_one, outputs
from flowseg_jax.inference import segmentor as predict
from flowseg_jax.inference.selection import Candidate, SelectionConfig, mask_nms, select_prediction
from flowseg_jax.models import flowseg, generate
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.outputs import ImageCache, MaskCandidates
from flowseg_jax.reports import overlay, pictures
from flowseg_jax.types import PromptQueries

SIDE, GRID, QUERIES = 48, 12, 4


class Thresholds(flowseg.FlowSeg):
    """Candidate q: where the image is brighter than (q + 1) / 5. Longer texts prefer darker thresholds."""

    def __init__(self):
        self.gain = nnx.Param(jnp.ones((1,)))

    def prefill_image(self, views, prefix):
        b = views.sam_images.shape[0]
        gray = (
            views.sam_images.astype(jnp.float32).mean(-1).reshape(b, GRID, SIDE // GRID, GRID, SIDE // GRID).mean((2, 4)) / 255
        )
        return ImageCache(jnp.stack([gray, jnp.ones_like(gray)], -1), (), KVCache.empty(2, b, 1, 48, jnp.dtype("float32")))

    def predict_cached(self, seen, questions):
        thresholds = (jnp.arange(QUERIES) + 1.0) / 5
        embeds = self.gain[0] * jnp.stack([jnp.ones(QUERIES), -thresholds], -1)
        k = questions.query_valid.shape[1]
        length = (questions.phrase_ids[:, None] == jnp.arange(k)[:, None]).sum(-1)
        scores = 1 / (1 + jnp.abs(jnp.arange(QUERIES) - length[..., None] % QUERIES))
        return MaskCandidates(scores, jnp.broadcast_to(embeds, (*scores.shape, 2)), seen.mask_features)

    def refine_masks(self, mask_logits, mask_features):
        return mask_logits + 0.01 * mask_features[:, None, ..., 0]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the red circle", "Segment in this picture."], directory, vocab=300)
    return directory


def segmentor(tokenizer_directory, gain=1.0):
    graphdef, state = nnx.split(Thresholds())
    params = nnx.to_pure_dict(state)
    params["gain"] = params["gain"] * gain
    return predict.Segmentor(
        graphdef, params, load_tokenizer(tokenizer_directory), sam_size=SIDE, siglip_size=16, visual_tokens=4
    )


@pytest.fixture(scope="module")
def model(tokenizer_directory):
    return segmentor(tokenizer_directory)


def picture(height=60, width=90):
    """A bright disc in the upper left part of a dark image."""
    y, x = np.mgrid[:height, :width]
    gray = np.where(np.hypot(y - height / 3, x - width / 4) < height / 5, 235, 20)
    return np.uint8(np.repeat(gray[..., None], 3, -1))


def decode(candidate):
    rle = candidate["rle"]
    assert isinstance(rle["counts"], str)
    return coco.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)


def predict_file(model, image, text, out, **selection):
    """What the command does with one image and one text; the JSON's path."""
    with outputs.PredictionWriter(out, ("overlay", "rle"), table=False) as writer:
        jobs = inputs.jobs_from_images(image, [text], "--text")
        done = one_by_one.run(model, jobs, functools.partial(model.predict, **selection), writer, strict=True)
    return done.paths[0]


def test_a_file_becomes_an_overlay_and_a_json(model, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    path = predict_file(model, tmp_path / "photo.png", "the Red circle", tmp_path / "out", top_k=3)
    assert path == tmp_path / "out" / "photo_the-red-circle.json"
    assert sorted(p.name for p in path.parent.iterdir()) == ["photo_the-red-circle.json", "photo_the-red-circle.png"]
    answer = json.loads(path.read_text())
    assert (answer["height"], answer["width"], answer["text"]) == (60, 90, "the Red circle")
    assert answer["found"] is True and len(answer["candidates"]) == 3 and answer["rle"] == answer["candidates"][0]["rle"]
    scores = [c["score"] for c in answer["candidates"]]
    assert scores == sorted(scores, reverse=True) and answer["score"] == scores[0]
    mask = decode(answer)
    assert mask.shape == (60, 90) and answer["area"] == mask.sum() == coco.area(
        {**answer["rle"], "counts": answer["rle"]["counts"].encode()}
    )
    disc = picture()[..., 0] > 128
    assert (mask & disc).sum() / (mask | disc).sum() > 0.8
    areas = {c["query"]: c["area"] for c in answer["candidates"]}
    assert [areas[q] for q in sorted(areas)] == sorted(areas.values(), reverse=True)
    np.testing.assert_array_equal(
        np.asarray(Image.open(path.with_suffix(".png"))), overlay.overlay(picture(), mask, pictures.SELECTED)
    )


def test_exif_rotation_is_applied(model, tmp_path):
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "b.png")
    turned, plain = (
        json.loads(predict_file(model, tmp_path / n, "it", tmp_path / "out").read_text()) for n in ("a.png", "b.png")
    )
    assert (turned["height"], turned["width"]) == (60, 90)
    assert turned["candidates"] == plain["candidates"]


@pytest.mark.parametrize(
    "size, mode", [((1, 1), "RGB"), ((50, 8000), "RGB"), ((31, 47), "L"), ((31, 47), "CMYK"), ((31, 47), "RGBA")]
)
def test_any_image_works(model, tmp_path, size, mode):
    suffix = "png" if mode != "CMYK" else "jpg"
    Image.new(mode, size[::-1], 200 if mode == "L" else tuple([200] * len(mode))).save(tmp_path / f"x.{suffix}")
    answer = json.loads(predict_file(model, tmp_path / f"x.{suffix}", "all of it", tmp_path / "out").read_text())
    assert (answer["height"], answer["width"]) == size
    assert decode(answer).shape == size
    if mode in ("RGB", "L") and size != (50, 8000):  # at 48 pixels that one is a line that its padding outshines
        assert answer["area"] == size[0] * size[1]


def test_no_more_candidates_than_queries(model):
    assert len(model(Image.fromarray(picture()), "the red circle", top_k=99).candidates) == QUERIES
    with pytest.raises(UserError, match="top_k is 0"):
        model(Image.fromarray(picture()), "the red circle", top_k=0)


@pytest.mark.parametrize(
    "content, message", [(b"not an image", "not an image"), (b"", "empty"), (None, "no such image"), ("cut", "truncated")]
)
def test_bad_images_leave_nothing_behind(model, tmp_path, content, message):
    file = tmp_path / "x.jpg"
    if content == "cut":
        Image.fromarray(picture(300, 300)).save(file)
        content = file.read_bytes()[:600]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.jpg.*{message}"):
        predict_file(model, file, "it", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, message", [("", "empty"), ("  ", "empty"), ("a <SEG> b", "<SEG>"), ("</p>", "</p>")])
def test_texts_that_cannot_be_asked(model, tmp_path, text, message):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=message):
        predict_file(model, tmp_path / "x.png", text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message):
        model.predict(None, [text])  # before the encoded image is looked at


def test_outputs_that_are_no_numbers(tokenizer_directory, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="holds no numbers"):
        predict_file(segmentor(tokenizer_directory, np.nan), tmp_path / "x.png", "it", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder(model, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        predict_file(model, tmp_path / "x.png", "it", tmp_path / "file" / "out")


def random_params(cfg):
    rng = np.random.default_rng(0)
    abstract = flowseg.params_dict(flowseg.abstract_model(cfg)[1])
    return jax.tree.map(lambda x: (0.05 * rng.normal(size=x.shape)).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def model_directory(tokenizer_directory, tmp_path_factory):
    """A tiny FlowSeg of random numbers."""
    cfg = FlowSegConfig.tiny(vocab_size=load_tokenizer(tokenizer_directory).vocab)
    params = random_params(cfg)
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return save_pretrained(directory, params, cfg.to_dict(), tokenizer_directory, extra={"prompts": {"question": 1}})


def test_a_model_directory_answers(model_directory, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    answer = json.loads(predict_file(loading.load(model_directory), tmp_path / "x.png", "it", tmp_path).read_text())
    assert len(answer["candidates"]) == 5 and len({c["query"] for c in answer["candidates"]}) == 5
    assert all(0 <= c["score"] <= 1 for c in answer["candidates"])
    assert decode(answer).shape == (60, 90)


def test_several_texts_share_a_look_at_the_image(model_directory):
    import flowseg_jax

    segmentor = flowseg_jax.load(model_directory)
    texts = ["it", "the red circle", "that thing over there"] * 3  # more than fit one row
    image = Image.fromarray(picture())
    together = segmentor.segment(image, texts, top_k=2)
    assert [answer.text for answer in together] == texts
    for answer in (together[0], together[1], together[8]):
        alone = segmentor(image, answer.text, top_k=2)
        assert [c.query for c in answer.candidates] == [c.query for c in alone.candidates]
        np.testing.assert_allclose([c.score for c in answer.candidates], [c.score for c in alone.candidates], rtol=1e-4)
        assert np.mean(answer.candidates[0].mask != alone.candidates[0].mask) < 1e-3
    with pytest.raises(UserError, match="list of texts"):
        segmentor.segment(image, "the red circle")


def test_a_tokenizer_larger_than_the_model_is_refused(model_directory, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    train_tokenizer(
        ["the quick brown fox jumps over a lazy dog while many more words follow"] * 3, directory / "tokenizer", vocab=320
    )
    seal(directory)
    with pytest.raises(UserError, match=r"has \d+ ids, the model's embedding table \d+"):
        loading.load(directory)


def test_a_threshold_of_the_model_directory(model_directory, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    config = json.loads((directory / "config.json").read_text())
    for below, problem in ((1.0, None), ("high", "no_target_threshold .* 'high'"), (2, "no_target_threshold .* 2")):
        config["extra"]["no_target_threshold"] = below
        (directory / "config.json").write_text(json.dumps(config))
        seal(directory)
        if problem:
            with pytest.raises(UserError, match=problem):
                loading.load(directory)
            continue
        segmentor = loading.load(directory)
        encoded = segmentor.encode_image(Image.fromarray(picture()))
        assert not segmentor.predict(encoded, ["it"])[0].found
        assert segmentor.predict(encoded, ["it"], no_target_threshold=0)[0].mask.any(), "what is asked for wins"


# ------------------------------------------------------------------------------------------------------- candidates to answers


def bands(*edges):
    """Nested masks: from each edge on to the right."""
    x = np.arange(100)
    return [Candidate(q, 0.9 - q / 10, np.broadcast_to(x >= edge, (7, 100))) for q, edge in enumerate(edges)]


def test_near_duplicates_and_empty_masks_are_left_out():
    """IoU 0.8 is a duplicate, 79/100 is none; what is compared with is kept itself."""
    assert [c.query for c in mask_nms(bands(0, 20, 21, 36, 100))] == [0, 2]
    assert mask_nms([]) == []


def answer_of(candidates, **selection):
    return select_prediction("x.png", "it", np.zeros((7, 100, 3), np.uint8), candidates, SelectionConfig(**selection))


def test_what_is_the_answer():
    nested = bands(60, 0, 99)
    assert answer_of(nested).mask.sum() == 7 * 40 and len(answer_of(nested).candidates) == 3
    union = answer_of(nested, score_threshold=0.8)
    assert union.mask.all() and [c.query for c in union.candidates] == [0, 1]
    assert answer_of(nested, no_target_threshold=0.9).found
    for selection in (
        {"no_target_threshold": 0.91},
        {"score_threshold": 0.91},
        {"no_target_threshold": 0.91, "score_threshold": 0.1},
    ):
        none = answer_of(nested, **selection)
        assert (none.found, none.mask.any(), none.score) == (False, False, 0.9)
        assert none.to_json()["area"] == 0 and none.to_json()["found"] is False
    assert "rle" not in json.dumps(answer_of(nested).to_json(rle=False))


@pytest.mark.parametrize(
    "selection", [{"top_k": 0}, {"score_threshold": 1.1}, {"no_target_threshold": -0.1}, {"score_threshold": np.nan}]
)
def test_selections_that_make_no_sense(selection):
    with pytest.raises(UserError, match=f"{next(iter(selection))} is"):
        SelectionConfig(**selection)


# ------------------------------------------------------------------------------------------------------- folders, JSONL, flags


@pytest.fixture
def command(monkeypatch, model):
    """The command with a model that is there already; returns (exit code, the lines of predictions.jsonl)."""
    monkeypatch.setattr(loading, "load", lambda directory, quantize=None: model)

    def run_it(out, *flags):
        code = run_flowseg(["predict", f"--out={out}", *flags])
        table = out / "predictions.jsonl"
        return code, [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []

    return run_it


@pytest.fixture
def folder(tmp_path):
    """Three images of different sizes, a broken one between them, and what is none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("a.png", (60, 90)), ("c.png", (40, 200)), ("d.jpg", (90, 60))):
        Image.fromarray(picture(*size)).save(folder / name)
    (folder / "b.jpg").write_bytes(b"no image")
    for name in ("notes.txt", "paper.pdf", "weights.h5"):
        (folder / name).write_text("none")
    return folder


def test_a_folder_is_answered_around_a_broken_file(command, folder, tmp_path, capsys):
    code, lines = command(tmp_path / "out", f"--image={folder}", "--text=it", "--text=the red circle", "--save=overlay,png")
    assert code == 1
    names = [(line["image"].rpartition("/")[2], line.get("text")) for line in lines]
    both = ["it", "the red circle"]
    assert names == [*(("a.png", t) for t in both), ("b.jpg", None), *((n, t) for n in ("c.png", "d.jpg") for t in both)]
    assert "not an image" in lines[2]["failure"] and "rle" not in lines[0]
    assert lines[0]["files"] == ["a_it.png", "a_it.mask.png"]
    written = {f for line in lines for f in line.get("files", ())} | {"predictions.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    mask = np.asarray(Image.open(tmp_path / "out" / "a_it.mask.png"))
    assert mask.shape == (60, 90) and set(np.unique(mask)) == {0, 255} and (mask > 0).sum() == lines[0]["area"]
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if line.startswith("failed: ") and "b.jpg" in line]) == 1
    assert re.search(r"3 of 4 images answered .*images/s\); 1 failed", said)


def test_of_an_animation_the_first_frame_is_answered_and_hidden_files_are_none(command, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    first = Image.fromarray(picture())
    first.save(folder / "a.gif", save_all=True, append_images=[Image.new("RGB", first.size)])
    for name in ("._a.gif", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    Image.fromarray((np.arange(5400).reshape(60, 90) % 4096).astype(np.uint16)).save(folder / "deep.png")
    code, lines = command(tmp_path / "out", f"--image={folder}", "--text=it", "--save=rle")
    assert code == 0 and [line["image"].rpartition("/")[2] for line in lines] == ["a.gif", "deep.png"]
    said = capsys.readouterr().out
    assert f"note: {folder / 'a.gif'}: images of several frames or pages: the first one is read" in said
    assert f"note: {folder / 'deep.png'}: grey images of more than 8 bits, values up to 4095: divided by 16" in said


def test_one_image_alone_and_in_a_folder(folder, model_directory, monkeypatch, tmp_path):
    """With the network itself, byte for byte."""
    segmentor = loading.load(model_directory)
    monkeypatch.setattr(loading, "load", lambda directory, quantize=None: segmentor)
    texts = ["--text=it", "--text=the red circle"]
    assert run_flowseg(["predict", f"--image={folder}", *texts, f"--out={tmp_path / 'many'}", "--save=rle"]) == 1
    assert run_flowseg(["predict", f"--image={folder / 'c.png'}", *texts, f"--out={tmp_path / 'one'}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "many" / "predictions.jsonl").read_text().splitlines()]
    many = [{**line, "files": None} for line in lines if line["image"].endswith("c.png")]
    alone = [json.loads((tmp_path / "one" / f"c_{name}.json").read_text()) for name in ("it", "the-red-circle")]
    assert many == [{**answer, "files": None} for answer in alone]


def test_a_jsonl_has_texts_of_its_own(command, folder, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"image": "in/a.png", "text": "it", "id": 3}\n\n'
        '{"image": "in/a.png", "text": ["It!", "the red circle"]}\n{"image": "in/none.png", "text": "it"}\n'
    )
    code, lines = command(tmp_path / "out", f"--input={tmp_path / 'in.jsonl'}")
    assert code == 1 and [line.get("text") for line in lines] == ["it", "It!", "the red circle", None]
    assert [line.get("files") for line in lines] == [["a_it.png"], ["a_it_2.png"], ["a_the-red-circle.png"], None]
    assert decode(lines[0]).sum() == lines[0]["area"] > 0 and "none.png" in lines[3]["failure"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "in.jsonl:2: not JSON"),
        ("[1]", "in.jsonl:2: expected an object"),
        ('{"image": "a.png", "texts": "it"}', r"in.jsonl:2: text is missing \(did you mean 'texts'"),
        ('{"image": 1, "text": "it"}', "in.jsonl:2: image must be a path"),
        ('{"image": "a.png", "text": [1]}', "in.jsonl:2: text must be"),
        ('{"image": "a.png", "text": []}', "in.jsonl:2: a text is empty"),
        ('{"image": "a.png", "text": "x <SEG>"}', "in.jsonl:2: .*<SEG>"),
    ],
)
def test_mistakes_in_a_jsonl(command, tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text('{"image": "a.png", "text": "it"}\n' + line)
    with pytest.raises(UserError, match=message):
        command(tmp_path / "out", f"--input={tmp_path / 'in.jsonl'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text=x"], "--image"),
        (["--image=IN", "--input=x.jsonl", "--text=x"], "one of them"),
        (["--image=IN"], "--text is missing"),
        (["--image=IN/nowhere.png", "--text=x"], "nowhere.png: no such image"),
        (["--image=IN/empty", "--text=x"], "holds no image file"),
        (["--input=IN/none.jsonl"], "none.jsonl: cannot read"),
        (["--input=IN/empty.jsonl"], "has no line"),
        (["--input=IN/empty.jsonl", "--text=x"], "its own texts"),
        (["--image=IN/a.png", "--text=x", "--save=overlay,rl"], "'rl'.*did you mean 'rle'"),
        (["--image=IN/a.png", "--text=x", "--top-k=2", "--score-threshold=0.5"], "give one of them"),
        (["--image=IN/a.png", "--text=x", "--score-threshold=2"], "score_threshold is 2"),
        (["--image=IN/a.png", "--text=x", "--max-tokens=3"], "--max-tokens belongs to"),
        (["--image=IN/a.png", "--text=x", "--chat=y"], "give one of them"),
        (["--image=IN/a.png", "--text=a <p> b"], "--text: .*<p>"),
        (["--image=IN/b.jpg", "--text=x"], "b.jpg: not an image"),
    ],
)
def test_mistakes_of_the_call(command, folder, tmp_path, flags, message):
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=message):
        command(tmp_path / "out", *(flag.replace("IN", str(folder)) for flag in flags))
    assert not (tmp_path / "out").exists()


def test_the_latency_line_compiles_nothing(model, folder, capsys):
    ready, texts = model.preprocess(folder / "a.png"), ["it", "the red circle"]
    model.predict(model.encode_image(ready), texts)
    before = model._predict._cache_size(), model._prefill._cache_size()
    line = one_by_one.latency(model, ready, texts, model.predict)
    number = r"(\d+\.\d)"
    found = re.match(f"warm latency: first expression {number} ms, each further one {number} ms; encoding .* {number} ms", line)
    first, further, encoding = map(float, found.groups())
    assert abs(first - further - encoding) < 0.11 and before == (model._predict._cache_size(), model._prefill._cache_size())


# --------------------------------------------------------------------------------------- answers that the model writes itself

TWO = "<p>the star</p> <SEG>, <p>it</p> <SEG>."
ASKED = {  # text -> what the model is made to answer
    "the red circle": "<SEG>.",
    "it": TWO,
    "that": "there is none.",
}
CHATS = {"what do you see?": "a picture.", "where is it?": "<p>it</p> <SEG>.", "show me": "<SEG>."}


@pytest.fixture(scope="module")
def taught(tokenizer_directory):
    """A tiny FlowSeg whose language head is solved for: it gives the answers above about `picture()`, word by word."""
    tokenizer, prompts = load_tokenizer(tokenizer_directory), PromptTemplates(randomize=False)
    cfg = FlowSegConfig.tiny(vocab_size=tokenizer.vocab)
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, tie_word_embeddings=False))
    graphdef, _ = flowseg.abstract_model(cfg)
    params = random_params(cfg)
    params["llm"]["embed_tokens"] = np.random.default_rng(1).normal(size=params["llm"]["embed_tokens"].shape).astype(np.float32)
    make = functools.partial(
        predict.Segmentor,
        graphdef,
        tokenizer=tokenizer,
        sam_size=96,
        siglip_size=cfg.siglip.image_size,
        visual_tokens=cfg.num_visual_tokens,
    )
    seen = make(params).encode_image(Image.fromarray(picture())).cache

    @jax.jit
    def read(seen, questions):
        llm = flowseg.bind_params(graphdef, params).llm
        embeds = llm.embed(questions.input_ids, seen.kv_cache.keys.dtype)
        return llm.extend(seen.kv_cache, embeds, questions.position_ids, questions.segment_ids)[0]

    questions = {prompts.referring(text, 0).turns[0].question: answer for text, answer in ASKED.items()} | CHATS
    hidden, follows = [], []
    for question, answer in questions.items():
        asked, said = (
            tokenizer.encode(x) for x in (question + prompts.template.assistant_prefix, answer + prompts.template.suffix)
        )
        none = [-1] * len(asked + said)
        encoded = collate.TokenizedConversation([*asked, *said], none, none, none)
        packed = collate.collate_queries([[encoded]], (1, 1, 64), len(np.asarray(seen.kv_cache.position_ids)[0]), 0, ["x"])
        hidden.append(np.asarray(read(seen, packed))[0, len(asked) - 1 : len(asked + said) - 1])
        follows += said
    wanted = 20.0 * np.eye(tokenizer.vocab)[follows]
    params["llm"]["lm_head"] = np.linalg.lstsq(np.concatenate(hidden).astype(float), wanted, rcond=None)[0].T.astype(np.float32)
    return make(params), params, graphdef, tokenizer


def assert_alike(actual, expected):
    assert [c.query for c in actual.candidates] == [c.query for c in expected.candidates]
    np.testing.assert_allclose([c.score for c in actual.candidates], [c.score for c in expected.candidates], rtol=1e-4)
    assert np.mean(actual.mask != expected.mask) < 1e-3


def squeezed(text):
    return text.replace(" ", "")


def test_an_answer_that_it_writes_is_the_one_that_it_is_handed(taught):
    segmentor = taught[0]
    encoded = segmentor.encode_image(Image.fromarray(picture()))
    several, one, none = segmentor.generate(encoded, ["it", "the red circle", "that"], top_k=3)
    assert squeezed(one.text) == "<SEG>." and one.complete and len(one.predictions) == 1
    assert one.predictions[0].phrase == "the red circle"
    assert_alike(one.predictions[0], segmentor.predict(encoded, ["the red circle"], top_k=3)[0])
    assert squeezed(several.text) == squeezed(TWO) and [p.phrase for p in several.predictions] == ["the star", "it"]
    assert squeezed(none.text) == "thereisnone." and none.complete and not none.predictions
    assert (none.failure, one.failure) == ("no <SEG>", None)
    cut = segmentor.generate(encoded, ["that"], max_new_tokens=2)[0]
    assert not cut.complete and squeezed("thereisnone.").startswith(squeezed(cut.text))


def test_each_seg_has_the_phrase_that_the_answer_gives_it(taught):
    """Against the same words handed over, the spans of the answer numbered 0 and 1, that of the question left over."""
    segmentor, params, graphdef, tokenizer = taught
    encoded = segmentor.encode_image(Image.fromarray(picture()))
    prompts = PromptTemplates(randomize=False)
    turn = Turn(prompts.referring("it", 0).turns[0].question, TWO)
    conversation = collate.encode_conversation(Conversation((turn,), (2, 0, 1), (0, 1)), prompts, tokenizer, "x")
    prefix = encoded.cache.kv_cache.position_ids.shape[1]
    questions = collate.collate_queries([[conversation]], (1, 4, 64), prefix, 0, ["x"])
    found = jax.jit(lambda params: flowseg.bind_params(graphdef, params).predict_cached(encoded.cache, questions))(params)
    best = postprocess.top_k_masks(found, 3)
    for k, prediction in enumerate(segmentor.generate(encoded, ["it"], top_k=3)[0].predictions):
        assert [c.query for c in prediction.candidates] == best.query[0, k].tolist()
        np.testing.assert_allclose([c.score for c in prediction.candidates], best.score[0, k], rtol=1e-4)


def test_chat(taught):
    segmentor = taught[0]
    encoded = segmentor.encode_image(Image.fromarray(picture()))
    words, grounded, nameless = segmentor.chat(encoded, list(CHATS))
    assert [squeezed(a.text) for a in (words, grounded, nameless)] == [squeezed(answer) for answer in CHATS.values()]
    assert [p.phrase for p in grounded.predictions] == ["it"] and not words.predictions
    assert not nameless.predictions, "a <SEG> that stands for no phrase has no mask"
    assert [a.failure for a in (words, grounded, nameless)] == [None, None, "<SEG> without a phrase"]
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        segmentor.chat(encoded, ["show me"], max_new_tokens=0)


def test_the_command_tells_what_the_model_wrote(taught, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loading, "load", lambda directory, quantize=None: taught[0])
    Image.fromarray(picture()).save(tmp_path / "x.png")
    texts = [f"--text={text}" for text in ASKED]
    assert run_flowseg(["predict", f"--image={tmp_path / 'x.png'}", "--generate", *texts, f"--out={tmp_path / 'out'}"]) == 0
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert sorted(files) == ["x_it", "x_it_2", "x_that", "x_the-red-circle"]
    assert [files[name]["phrase"] for name in ("x_it", "x_it_2")] == ["the star", "it"]
    none = files["x_that"]
    assert (none["failure"], none["found"], none["score"], none["area"]) == ("no <SEG>", False, None, 0)
    assert not decode(none).any() and "there" in capsys.readouterr().out
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == [
        "x.answers",
        "x.candidates",
        "x_it",
        "x_it_2",
        "x_the-red-circle",
    ]
    run_flowseg(
        [
            "predict",
            f"--image={tmp_path / 'x.png'}",
            *(f"--chat={question}" for question in CHATS),
            f"--out={tmp_path / 'chat'}",
        ]
    )
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "chat").glob("*.json")}
    assert squeezed(files["x_what-do-you-see"]["answer"]) == "apicture." and "failure" not in files["x_what-do-you-see"]
    assert sorted(path.stem for path in (tmp_path / "chat").glob("*.png")) == ["x.answers", "x.candidates", "x_where-is-it"]
    assert files["x_show-me"]["failure"] == "<SEG> without a phrase"
    assert capsys.readouterr().out.count("note: 1 <SEG> of this answer stands for no phrase") == 1


def test_an_evaluation_counts_what_it_did_not_write_as_failed(taught):
    segmentor, params, graphdef, tokenizer = taught
    encoded = segmentor.encode_image(Image.fromarray(picture()))
    prompts = PromptTemplates(randomize=False)
    texts = ["that", "the red circle"]
    ids = [tokenizer.encode(prompts.referring(text, 0).turns[0].question + prompts.template.assistant_prefix) for text in texts]
    asked = PromptQueries.of([ids], (1, 4, 32))  # two questions are padding
    special_tokens = generate.SpecialTokenIds(tokenizer.phrase_start, tokenizer.phrase_end, tokenizer.seg)
    eos = tokenizer.encode(prompts.template.suffix)

    @jax.jit
    def answer(params, seen):
        model = flowseg.bind_params(graphdef, params)
        return generate.generate_and_segment(model, seen, asked, special_tokens=special_tokens, max_new_tokens=8, eos_ids=eos)

    found, has_seg = answer(params, encoded.cache)
    assert has_seg.tolist() == [[False, True, False, False]]
    assert np.isnan(found.scores[0, 0]).all()
    best = segmentor.predict(encoded, ["the red circle"], top_k=1)[0].candidates[0]
    assert int(found.scores[0, 1].argmax()) == best.query
    np.testing.assert_allclose(found.scores[0, 1].max(), best.score, rtol=1e-4)

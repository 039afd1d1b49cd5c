"""predict on files: any image, the JSON's masks are the overlay's, EXIF is applied, bad input leaves nothing behind."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from pycocotools import mask as coco

from flowseg_jax import predict
from flowseg_jax.data import drawing
from flowseg_jax.data.tokenizer import load_tokenizer, train_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import pictures
from flowseg_jax.model_directory import save_model
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language import Cache, LanguageConfig

SIDE, GRID, QUERIES = 48, 12, 4


class Thresholds(nnx.Module):
    """Candidate q: where the image is brighter than (q + 1) / 5. Longer texts prefer darker thresholds."""

    def __init__(self):
        self.gain = nnx.Param(jnp.ones((1,)))

    def see(self, views, prefix):
        b = views.images.shape[0]
        gray = views.images.astype(jnp.float32).mean(-1).reshape(b, GRID, SIDE // GRID, GRID, SIDE // GRID).mean((2, 4)) / 255
        return flowseg.Seen(gray[..., None], (), Cache.empty(LanguageConfig.tiny(8), b, 1, jnp.dtype("float32")))

    def ask(self, seen, questions):
        thresholds = (jnp.arange(QUERIES) + 1.0) / 5
        logits = self.gain[0] * (seen.mask_features[..., 0][:, None, None] - thresholds[None, None, :, None, None])
        k = questions.asked.shape[1]
        length = (questions.phrase_ids[:, None] == jnp.arange(k)[:, None]).sum(-1)
        scores = 1 / (1 + jnp.abs(jnp.arange(QUERIES) - length[..., None] % QUERIES))
        logits = jnp.broadcast_to(logits, (*scores.shape, *logits.shape[-2:]))
        return flowseg.Segmentation(scores, logits, seen.mask_features)

    def refine(self, mask_logits, mask_features):
        return mask_logits + 0.01 * jnp.moveaxis(mask_features, -1, 1)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the red circle", "Segment in this picture."], directory, vocab=300)
    return directory


def segmentor(tokenizer_directory, gain=1.0):
    graphdef, state = nnx.split(Thresholds())
    params = nnx.to_pure_dict(state)
    params["gain"] = params["gain"] * gain
    return predict.Segmentor(graphdef, params, load_tokenizer(tokenizer_directory), image=SIDE, vision=16, visual_tokens=4)


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


def test_a_file_becomes_an_overlay_and_a_json(model, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    path = predict.predict(model, tmp_path / "photo.png", "the Red circle", tmp_path / "out", top_k=3)
    assert path == tmp_path / "out" / "photo_the-red-circle.json"
    assert sorted(p.name for p in path.parent.iterdir()) == ["photo_the-red-circle.json", "photo_the-red-circle.png"]
    answer = json.loads(path.read_text())
    assert (answer["height"], answer["width"], answer["text"]) == (60, 90, "the Red circle")
    assert len(answer["candidates"]) == 3 and answer["rle"] == answer["candidates"][0]["rle"]
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
        np.asarray(Image.open(path.with_suffix(".png"))), drawing.overlay(picture(), mask, pictures.SELECTED)
    )


def test_exif_rotation_is_applied(model, tmp_path):
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "b.png")
    turned, plain = (
        json.loads(predict.predict(model, tmp_path / n, "it", tmp_path / "out").read_text()) for n in ("a.png", "b.png")
    )
    assert (turned["height"], turned["width"]) == (60, 90)
    assert turned["candidates"] == plain["candidates"]


@pytest.mark.parametrize(
    "size, mode", [((1, 1), "RGB"), ((50, 8000), "RGB"), ((31, 47), "L"), ((31, 47), "CMYK"), ((31, 47), "RGBA")]
)
def test_any_image_works(model, tmp_path, size, mode):
    suffix = "png" if mode != "CMYK" else "jpg"
    Image.new(mode, size[::-1], 200 if mode == "L" else tuple([200] * len(mode))).save(tmp_path / f"x.{suffix}")
    answer = json.loads(predict.predict(model, tmp_path / f"x.{suffix}", "all of it", tmp_path / "out").read_text())
    assert (answer["height"], answer["width"]) == size
    assert decode(answer).shape == size
    if mode in ("RGB", "L") and size != (50, 8000):  # at 48 pixels that one is a line that its padding outshines
        assert answer["area"] == size[0] * size[1]


def test_no_more_candidates_than_queries(model):
    assert len(model(Image.fromarray(picture()), "the red circle", top_k=99).candidates) == QUERIES
    with pytest.raises(UserError, match="top_k is 0"):
        model(Image.fromarray(picture()), "the red circle", top_k=0)


@pytest.mark.parametrize(
    "content, message", [(b"not an image", "not an image"), (b"", "empty"), (None, "cannot read"), ("cut", "truncated")]
)
def test_bad_images_leave_nothing_behind(model, tmp_path, content, message):
    file = tmp_path / "x.jpg"
    if content == "cut":
        Image.fromarray(picture(300, 300)).save(file)
        content = file.read_bytes()[:600]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.jpg.*{message}"):
        predict.predict(model, file, "it", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, message", [("", "empty"), ("  ", "empty"), ("a <SEG> b", "<SEG>"), ("</p>", "</p>")])
def test_texts_that_cannot_be_asked(model, tmp_path, text, message):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=message):
        predict.predict(model, tmp_path / "x.png", text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_no_numbers(tokenizer_directory, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="holds no numbers"):
        predict.predict(segmentor(tokenizer_directory, np.nan), tmp_path / "x.png", "it", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder(model, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        predict.predict(model, tmp_path / "x.png", "it", tmp_path / "file" / "out")


@pytest.fixture(scope="module")
def model_directory(tokenizer_directory, tmp_path_factory):
    """A tiny FlowSeg of random numbers."""
    cfg = FlowSegConfig.tiny(vocab=load_tokenizer(tokenizer_directory).vocab)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.05 * rng.normal(size=x.shape)).astype(np.float32), flowseg.at_rest(flowseg.describe(cfg)[1])
    )
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return save_model(directory, params, cfg.to_dict(), tokenizer_directory, extra={"prompts": {"question": 1}})


def test_a_model_directory_answers(model_directory, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    answer = json.loads(predict.predict(predict.load(model_directory), tmp_path / "x.png", "it", tmp_path).read_text())
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
    with pytest.raises(UserError, match=r"has \d+ ids, the model's embedding table \d+"):
        predict.load(directory)

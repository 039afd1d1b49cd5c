"""How an answer came about: what explain says is what predict answers, and what the model computes layer by layer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from flowseg_jax.checkpoints.find import SHIPPED_MODEL
from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.errors import UserError
from flowseg_jax.inference import loading
from flowseg_jax.inference.selection import Candidate, Prediction
from flowseg_jax.system.paths import ROOT

SCENE = ROOT / "examples" / "scenes" / "00.png"
TEXTS = ["the big red triangle", "the large diamond"]


@pytest.fixture(scope="module")
def model():
    return loading.load()


@pytest.fixture(scope="module")
def explanations(model):
    return model.explain(SCENE, TEXTS)


def test_the_last_layer_is_the_answer(model, explanations):
    predictions = model.segment(str(SCENE), TEXTS)
    assert model.num_layers == 6
    for expected, found in zip(predictions, explanations, strict=True):
        assert found.prediction.to_json() == expected.to_json()
        last, best = found.layers[-1], expected.candidates[0]
        assert len(found.layers) == 7 and last.query == best.query and last.score == pytest.approx(best.score, abs=1e-5)
        np.testing.assert_array_equal(found.after_boundary, expected.mask)
        np.testing.assert_array_equal(found.before_boundary, last.mask)
        assert not ((found.before_boundary != found.after_boundary) & ~found.band).any() and found.band.any()
        assert found.scores.argmax() == best.query and found.scores.shape == (20,)
        assert found.layers[0].gate is None and found.layers[0].drift == 0
        assert all(0 < layer.gate < 1 and layer.drift > 0.01 for layer in found.layers[1:])
        assert all(layer.margin >= 0 for layer in found.layers)


def test_the_owner_of_a_pixel_inside_the_answer_is_its_query_or_a_twin(explanations):
    for found in explanations:
        y, x = (int(v.mean()) for v in np.nonzero(found.prediction.mask))
        query, probability = found.owner(x, y)
        assert probability > 0.5 and found.query_mask(query)[y, x]
        both = found.query_mask(query) & found.prediction.mask
        assert both.sum() > 0.5 * found.prediction.mask.sum()  # another query may hold the same object
    with pytest.raises(IndexError, match="outside the image of 128 x 128"):
        explanations[0].owner(128, 0)


def test_images_may_be_arrays(model, explanations):
    array = np.asarray(Image.open(SCENE).convert("RGB"))
    (found,) = model.segment(array, TEXTS[:1])
    np.testing.assert_array_equal(found.mask, explanations[0].prediction.mask)
    for wrong in (array.astype(np.float32), array[..., :2], array[0, 0]):
        with pytest.raises(UserError, match=r"expected an array uint8 \[H, W, 3\] or \[H, W\]"):
            model.segment(wrong, TEXTS)


def prediction(mask: np.ndarray, score: float | None = 0.75) -> Prediction:
    image = np.full((*mask.shape, 3), 200, np.uint8)
    return Prediction("dir/cat.jpg", "the Cat!", image, score, mask, [Candidate(3, 0.75, mask)])


def test_a_prediction_describes_itself():
    mask = np.zeros((20, 30), bool)
    mask[4:9, 10:13] = True
    found = prediction(mask)
    assert repr(found) == "Prediction('the Cat!' in dir/cat.jpg: found, score 0.750, 15 pixels)"
    assert repr(prediction(mask & False)) == "Prediction('the Cat!' in dir/cat.jpg: not found, score 0.750)"
    assert found._repr_png_().startswith(b"\x89PNG")
    assert found.overlay().shape == (20, 30, 3) and (found.overlay()[5, 11] == 200).all()
    result = found.to_coco(7, 2)
    assert (result["image_id"], result["category_id"], result["area"], result["score"]) == (7, 2, 15, 0.75)
    rle = {**result["segmentation"], "counts": result["segmentation"]["counts"].encode()}
    np.testing.assert_array_equal(coco.decode(rle), mask)
    assert result["bbox"] == coco.toBbox(rle).tolist() == [10, 4, 3, 5]
    assert prediction(mask & False, None).to_coco(1)["bbox"] == [0, 0, 0, 0]


def test_a_prediction_saves_itself(tmp_path):
    found = prediction(np.eye(20, 30, dtype=bool))
    written = found.save(tmp_path / "out")
    assert [p.name for p in written] == ["cat-the-cat.png", "cat-the-cat.json"]
    assert json.loads(written[1].read_text())["area"] == 20
    assert found.save(tmp_path / "one.png") == [tmp_path / "one.png"] and Image.open(tmp_path / "one.png").size == (30, 20)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/deep cannot be written"):
        found.save(tmp_path / "file" / "deep")


def test_what_the_shipped_model_was_never_trained_on_is_not_found(model, tmp_path):
    (banana,) = model.segment(SCENE, ["banana"])
    assert not banana.found and banana.unknown_words == ("banana",) and banana.score > 0.5
    assert model.segment(SCENE, ["banana"], no_target_threshold=0)[0].found
    model.save_pretrained(tmp_path / "copy")
    assert read_model_config(tmp_path / "copy") == read_model_config(SHIPPED_MODEL)

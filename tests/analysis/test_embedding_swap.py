"""What comes from which other expression, and what is said of it."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax.analysis import embedding_swap
from flowseg_jax.analysis.runner import SampleResult
from flowseg_jax.data.records import Sample
from flowseg_jax.errors import UserError
from flowseg_jax.models.outputs import MaskCandidates


@pytest.fixture
def truth():
    """One image, five phrases: left half, left half but for a row, right half, nothing, and a slot that is not used."""
    masks = np.zeros((1, 5, 4, 4), np.float32)
    masks[0, 0, :, :2] = masks[0, 1, 1:, :2] = masks[0, 2, :, 2:] = masks[0, 4, :, 2:] = 1
    return masks


ASKED = np.array([[True, True, True, True, False]])


def test_another_is_the_first_with_another_object(truth):
    """An expression for nothing is another one too; nothing is no other object than nothing."""
    assert embedding_swap.other_target(truth, ASKED).tolist() == [[2, 2, 0, 0, -1]]
    assert embedding_swap.other_target(truth[:, :2], ASKED[:, :2]).tolist() == [[-1, -1]]
    nothing = np.zeros((1, 2, 4, 4), np.float32)
    assert embedding_swap.other_target(nothing, ASKED[:, :2]).tolist() == [[-1, -1]]


def test_one_two_or_none_are_exchanged(truth):
    """A model whose masks show its phrase in the units and its output in the tens; the second candidate wins."""
    phrases, segs = jnp.arange(1.0, 6)[None, :, None], 10 * jnp.arange(1.0, 6)[None, :, None]

    def candidates(mask_features, levels, phrases, segs):
        embeds = (phrases + segs)[..., None]
        scores = jnp.broadcast_to(jnp.array([0.1, 0.9]), (1, 5, 2))
        return MaskCandidates(scores, jnp.concatenate([-embeds, embeds], 2), mask_features)

    model = SimpleNamespace(
        encode_text_cached=lambda *_: (phrases, segs),
        decode_masks=candidates,
        refine_masks=lambda masks, features: masks + 100,
    )
    seen, questions = (
        SimpleNamespace(mask_features=jnp.ones((1, 2, 2, 1)), levels=None),
        SimpleNamespace(query_valid=jnp.asarray(ASKED)),
    )
    values, masks = embedding_swap.swapped(model, seen, questions, jnp.asarray(truth), jnp.ones((1, 4, 4)))
    assert masks.shape == (1, 5, 4, 2, 2)
    assert masks[0, :4, :, 0, 0].tolist() == [
        [111, 131, 113, 133], [122, 132, 123, 133], [133, 113, 131, 111], [144, 114, 141, 111]
    ]  # fmt: skip
    assert values["other"].tolist() == [[2, 2, 0, 0, -1]]


def test_means():
    sample = Sample(1, "1.png", 1, 1, 1, "it", "", (0,), 1, "it")
    rows = [
        SampleResult(sample, {"other": 1}, np.array(iou), None, None, None, None)
        for iou in ([1, 0.5, 0.2, 0], [0.6, 0.5, 0, 0])
    ]
    assert embedding_swap.summarise(rows) == {
        "n": 2,
        "iou": pytest.approx({"nothing": 80, "S": 50, "C": 10, "both": 0}),
    }


def test_without_two_objects_there_is_nothing_to_exchange(tmp_path):
    sample = Sample(1, "1.png", 1, 1, 1, "it", "", (0,), 1, "it")
    alone = SampleResult(sample, {"other": -1}, np.zeros(4), None, None, None, None)
    for measured in ([], [alone]):
        with pytest.raises(UserError, match="no image of val has expressions for two different objects: there is nothing"):
            embedding_swap.run(SimpleNamespace(measure=lambda *_, rows=measured: rows, split="val"), tmp_path)
    assert list(tmp_path.iterdir()) == []

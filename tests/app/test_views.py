"""What the page shows: pictures, rows and code, made without a browser."""

from __future__ import annotations

import ast
import json

import numpy as np
import pytest

from flowseg_jax.app import views
from flowseg_jax.errors import UserError
from flowseg_jax.inference.explanation import Explanation, LayerChoice
from flowseg_jax.inference.selection import Candidate, Prediction

HEIGHT, WIDTH = 20, 30


def explanation(text="the cat", left=5, band=True):
    image = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:10, left : left + 10] = True
    logits = np.full((3, 4, 6), -4.0, np.float32)
    logits[1, 1, left // 5 : left // 5 + 2] = 3.0
    layers = [LayerChoice(j, 0.5, 0.1, None if j == 0 else 0.6, 0.1 * j, np.roll(mask, j, 1)) for j in range(3)]
    prediction = Prediction("a.png", text, image, 0.9, mask, [Candidate(1, 0.9, mask), Candidate(2, 0.2, ~mask)])
    after = np.roll(mask, 1, 0)
    return Explanation(
        prediction, layers, np.array([0.1, 0.9, 0.2], np.float32), logits, mask, after, mask | after if band else None
    )


def test_texts_are_lines():
    assert views.read_texts(" the cat \n\n a dog\n") == ["the cat", "a dog"]
    assert len(views.read_texts("x\n" * 16)) == 16 and views.read_texts("y" * 300) == ["y" * 300]
    for wrong, message in (("", "one expression per line"), ("\n \n", "one expression per line"), ("x\n" * 17, "at most 16"),
                           ("y" * 301, "at most 300")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            views.read_texts(wrong)


def test_small_pictures_grow_in_whole_steps_and_large_ones_shrink():
    small = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    shown = views.on_page(small)
    assert shown.shape == (256, 384, 3) and (shown[:128, :128] == small[0, 0]).all()
    assert views.on_page(np.zeros((500, 4000, 3), np.uint8)).shape == (128, 1024, 3)
    assert views.on_page(np.zeros((1, 9000, 3), np.uint8)).shape == (1, 1024, 3)
    assert views.on_page(np.zeros((600, 800, 3), np.uint8)).shape == (600, 800, 3)


def test_every_answer_has_its_colour_on_one_picture():
    predictions = [explanation(left=0).prediction, explanation("the dog", left=15).prediction]
    shown = views.combined(predictions)
    zoom = shown.shape[0] // HEIGHT
    for number, p in enumerate(predictions):
        y, x = (int(v.mean()) for v in np.nonzero(p.mask))
        want = (0.65 * 120 + 0.35 * np.array(views.color_of(number))).astype(np.uint8)
        assert (shown[y * zoom, x * zoom] == want).all()
    rows = views.answer_rows(predictions)
    assert [row[1:] for row in rows] == [["the cat", "found", 0.9, 50], ["the dog", "found", 0.9, 50]]
    assert rows[0][0] != rows[1][0] and rows[0][0] == "#d55e00"
    captions = [caption for _, caption in views.candidates(predictions)]
    assert captions[:2] == ["the cat · #1 · query 1 · 0.900", "the cat · #2 · query 2 · 0.200"]


def test_a_click_names_the_owner_for_every_expression():
    _, rows = views.at_point([explanation(), explanation("the dog", left=20)], 7, 7)
    assert rows[0] == ["the cat", 1, round(1 / (1 + np.exp(-3.0)), 3), 0.9]
    assert rows[1][0] == "the dog" and rows[1][2] < 0.1  # nothing of that pass is there


def test_layers_and_boundary():
    found = explanation()
    picture, rows = views.layer(found, 0, (1, 2, 3))
    assert rows[0][1] == 0 and ["SR gate (1 keeps vision, 0 takes language)", "-"] in rows
    other, rows = views.layer(found, 2, (1, 2, 3))
    assert rows[1] == ["selected query", 2] and (picture != other).any()
    captions = [caption for _, caption in views.boundary(found, (1, 2, 3))]
    assert captions == ["before BAR", "the band it may change", "after BAR: 20 pixels changed"]
    assert views.boundary(explanation(band=False), (1, 2, 3)) == []


def test_code_and_json_hold_whatever_was_written():
    text = 'it\'s "quoted"\\ {x}'
    code = views.as_python("runs/x'y", "a'b.png", [text], {"top_k": 5})
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    segment = next(call for call in calls if getattr(call.func, "attr", "") == "segment")
    assert ast.literal_eval(segment.args[0]) == "a'b.png" and ast.literal_eval(segment.args[1]) == [text]
    load = next(call for call in calls if getattr(call.func, "id", "") == "load")
    assert ast.literal_eval(load.args[0]) == "runs/x'y" and segment.keywords[0].arg == "top_k"
    assert "load()" in views.as_python(None, "a.png", ["x"], {})
    assert json.loads(views.as_json([explanation(text).prediction]))[0]["text"] == text

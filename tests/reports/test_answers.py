"""Answers and candidates on one picture: the text is legible on an image of one pixel and on one of ten thousand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.reports import answers

TEXTS = ["the square that is not yellow", "x" * 400]


@pytest.mark.parametrize("size", [(1, 1), (32, 128), (3, 2500), (2500, 3), (700, 1500)])
def test_text_has_one_size_whatever_the_image(size):
    image = np.full((*size, 3), 128, np.uint8)
    masks = [np.zeros(size, bool), np.ones(size, bool)]
    sheet = np.asarray(answers.with_legend(image, [*zip(TEXTS, masks, strict=True)]))
    height, width = answers.on_page(image).shape[:2]
    assert sheet.shape == (height + answers.MARGIN + 2 * answers.LINE, max(width, answers.SMALLEST), 3)
    strip = np.asarray(
        answers.candidate_strip(image, [(text, [("#1 0.93", mask)] * 7) for text, mask in zip(TEXTS, masks, strict=True)])
    )
    assert strip.shape[1] >= answers.SMALLEST and max(strip.shape[:2]) <= 1600
    for picture, top in ((sheet, height + answers.MARGIN // 2), (strip, 0)):
        line = picture[top : top + answers.LINE, 2 * answers.MARGIN + answers.FONT :].min(-1) < 100
        rows, columns = (np.flatnonzero(line.any(axis)) for axis in (1, 0))
        assert 10 <= rows[-1] - rows[0] <= 20 and columns[-1] - columns[0] > 150  # letters of about 15 pixels
        second = picture[-answers.LINE :, -answers.MARGIN :].min(-1) if picture is sheet else picture[:1, -1:].min(-1)
        assert (second == 255).all()  # a long text is shortened


def test_sizes_on_a_page():
    """Small pictures grow in whole steps, the longest side of large ones is 1,024."""
    for size, zoom in (((384, 5), 1), ((5, 383), 2), ((192, 192), 2), ((1, 1), 384), ((9000, 1), 1)):
        assert answers.zoom(np.zeros((*size, 3), np.uint8)) == zoom
    for size, shown in (((2, 192), (4, 384)), ((1024, 3), (1024, 3)), ((3, 2048), (2, 1024)), ((4096, 100), (1024, 25))):
        assert answers.on_page(np.zeros((*size, 3), np.uint8)).shape == (*shown, 3)
    assert answers.on_page(np.zeros((2000, 1), np.uint8).repeat(3, 1).reshape(2000, 1, 3)).shape == (1024, 1, 3)
    assert answers.color_of(9) == answers.COLORS[1]


def swatch(sheet: np.ndarray, top: int) -> tuple[int, ...]:
    """The one colour of the square of 15 pixels before a text; around it is white."""
    square = sheet[top + 4 : top + 20, 8:24]
    assert (square == square[0, 0]).all() and (sheet[top + 3, 8:24] == 255).all() and (sheet[top + 20, 8:24] == 255).all()
    assert (sheet[top + 4 : top + 20, 7] == 255).all() and (sheet[top + 4 : top + 20, 24] == 255).all()
    return tuple(map(int, square[0, 0]))


def test_a_legend_has_a_line_for_each_answer():
    image = np.full((40, 20, 3), 200, np.uint8)
    masks = np.zeros((2, 40, 20), bool)
    masks[0, :10], masks[1, 30:] = True, True
    sheet = np.asarray(answers.with_legend(image, [("first", masks[0]), ("second", masks[1])]))
    assert sheet.shape == (400 + 8 + 2 * 24, 384, 3)
    np.testing.assert_array_equal(sheet[:400, 92:292], answers.combined(image, list(masks)))  # in the middle
    assert (sheet[:400, :92] == 255).all() and (sheet[:400, 292:] == 255).all()
    assert [swatch(sheet, top) for top in (404, 428)] == [answers.color_of(0), answers.color_of(1)]
    for top in (404, 428):
        dark = np.argwhere(sheet[top : top + 24, 24:].min(-1) < 100)
        assert dark[:, 1].min() in range(7, 11) and dark[:, 0].min() >= 4
    tinted = answers.combined(image, list(masks))
    assert not (tinted[50, 50] == tinted[350, 50]).all() and (tinted[200, 50] == tinted[200, 50, 0]).all()  # the rest is grey


def test_candidates_stand_side_by_side_under_their_text():
    image = np.full((100, 50, 3), 200, np.uint8)
    masks = [np.zeros((100, 50), bool) for _ in range(7)]
    for n, mask in enumerate(masks):
        mask[10 * n : 10 * n + 30, 10:40] = True
    rows = [("a", [(str(n), mask) for n, mask in enumerate(masks)]), ("b", [("0", masks[0])])]
    sheet = np.asarray(answers.candidate_strip(image, rows))
    cell, height = 100 + 8, 2 * 24 + 200 + 8
    assert sheet.shape == (2 * height, 5 * cell + 8, 3)
    assert [swatch(sheet, top) for top in (0, height)] == [answers.color_of(0), answers.color_of(1)]
    for row, (_, candidates) in enumerate(rows):
        top = row * height + 24
        for place, (_, mask) in enumerate(candidates[:5]):
            left = 8 + place * cell
            drawn = answers.overlay.overlay(image, mask, answers.color_of(row))
            big = Image.fromarray(drawn).resize((100, 200), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(sheet[top : top + 200, left : left + 100], big)
            assert (sheet[top : top + 200, left + 100 : left + 108] == 255).all()
            caption = sheet[top + 200 : top + 224, left : left + 100].min(-1) < 100
            assert caption.any() and np.flatnonzero(caption.any(0))[0] <= 3 and np.flatnonzero(caption.any(1))[0] >= 4
    assert (sheet[height + 24 :, 8 + cell :] == 255).all()
    narrow = answers.candidate_strip(np.zeros((100, 4, 3), np.uint8), [("a", [("0", np.zeros((100, 4), bool))] * 5)])
    assert narrow.size == (5 * (100 + 8) + 8, 2 * 24 + 200 + 8)  # a caption has room under a narrow picture


def test_a_text_is_cut_where_its_room_ends():
    drawn = []
    font = answers.ImageFont.load_default(answers.FONT)
    canvas = SimpleNamespace(text=lambda at, text, color, font: drawn.append((at, text, color)))
    fits = font.getlength("two words")
    answers._write(canvas, (3, 5), " two \n words ", fits)
    answers._write(canvas, (3, 5), "two words", fits - 1)
    answers._write(canvas, (3, 5), "two words", 0)
    assert drawn[0] == ((3, 8), "two words", (0, 0, 0)) and drawn[2][1] == "…"
    assert drawn[1][1].endswith("…") and 4 < len(drawn[1][1]) < 10 and font.getlength(drawn[1][1]) <= fits - 1

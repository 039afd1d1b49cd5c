"""Answers and candidates on one picture: the text is legible on an image of one pixel and on one of ten thousand."""

from __future__ import annotations

import numpy as np
import pytest

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

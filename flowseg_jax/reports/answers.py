"""Several answers about one image on one picture, and their candidates side by side. Text has one size on every image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from flowseg_jax.reports import overlay

Picture = UInt8[np.ndarray, "y x 3"]
Mask = Bool[np.ndarray, "y x"]

# Eight colours that most people tell apart on any picture (Okabe and Ito, 2008); expressions take them in turn.
COLORS = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (240, 228, 66),
    (0, 0, 0),
)
LONGEST, SMALLEST = 1024, 384  # sides of a picture as it is shown, pixels
FONT, LINE, MARGIN = 15, 24, 8  # of text: size, height of a line, space around it; pixels
PANEL = 200  # longest side of a candidate
SHOWN = 5  # candidates of an expression


def color_of(number: int) -> tuple[int, int, int]:
    """The colour of the expression with that number, from 0."""
    return COLORS[number % len(COLORS)]


def zoom(picture: Picture) -> int:
    """How many pixels a pixel of a small picture takes, along each side."""
    return max(1, -(-SMALLEST // max(picture.shape[:2])))


def on_page(picture: Picture) -> Picture:
    """A picture at a size that shows its detail: small ones in whole steps without blur, large ones reduced."""
    height, width = picture.shape[:2]
    if max(height, width) > LONGEST:
        scale = LONGEST / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    return picture.repeat(zoom(picture), 0).repeat(zoom(picture), 1)


def combined(image: Picture, masks: Sequence[Mask]) -> Picture:
    """All masks on one picture, each tinted and outlined in its colour; what is in none of them stays grey."""
    out = overlay.fade(image, np.any(masks, 0))
    for number, mask in enumerate(masks):
        out = overlay.tint(out, mask, color_of(number))
    return on_page(out)


def with_legend(image: Picture, answers: Sequence[tuple[str, Mask]]) -> Image.Image:
    """`combined` with a line under it for each answer: (caption, mask)."""
    picture = Image.fromarray(combined(image, [mask for _, mask in answers]))
    width = max(picture.width, SMALLEST)
    sheet = Image.new("RGB", (width, picture.height + MARGIN + LINE * len(answers)), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for number, (caption, _) in enumerate(answers):
        top = picture.height + MARGIN // 2 + number * LINE
        draw.rectangle((MARGIN, top + 4, MARGIN + FONT, top + 4 + FONT), color_of(number))
        _write(draw, (2 * MARGIN + FONT, top), caption, width - 3 * MARGIN - FONT)
    return sheet


def candidate_strip(image: Picture, rows: Sequence[tuple[str, Sequence[tuple[str, Mask]]]]) -> Image.Image:
    """A row for each expression: its text, and under it its best candidates with captions.

    Args:
        image: what they are of.
        rows: (text, [(caption, mask)]); of the candidates the first SHOWN are drawn.
    """
    scale = PANEL / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    cell = max(size[0], PANEL // 2) + MARGIN
    across = max(1, *(min(SHOWN, len(candidates)) for _, candidates in rows))
    width, height = max(across * cell + MARGIN, SMALLEST), 2 * LINE + size[1] + MARGIN
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, candidates) in enumerate(rows):
        top = number * height
        draw.rectangle((MARGIN, top + 4, MARGIN + FONT, top + 4 + FONT), color_of(number))
        _write(draw, (2 * MARGIN + FONT, top), text, width - 3 * MARGIN - FONT)
        for place, (caption, mask) in enumerate(candidates[:SHOWN]):
            left = MARGIN + place * cell
            drawn = Image.fromarray(overlay.overlay(image, mask, color_of(number))).resize(size, Image.Resampling.LANCZOS)
            sheet.paste(drawn, (left, top + LINE))
            _write(draw, (left, top + LINE + size[1]), caption, cell - MARGIN)
    return sheet


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, room: int) -> None:
    """Black text on one line, shortened to `room` pixels."""
    font, text = ImageFont.load_default(FONT), " ".join(text[:1000].split())
    if font.getlength(text) > room:
        while text and font.getlength(f"{text}…") > room:
            text = text[:-1]
        text = f"{text}…"
    draw.text((at[0], at[1] + 3), text, (0, 0, 0), font)

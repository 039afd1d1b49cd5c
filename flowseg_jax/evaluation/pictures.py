"""Masks drawn on images: the overlay of a prediction and the four-panel strip of the report."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

TRUTH = (46, 160, 67)
SELECTED = (214, 64, 159)
BEST = (47, 111, 235)

_PANEL = 240  # longest side of a panel, pixels
_GAP, _CAPTION = 8, 22


def slug(text: str) -> str:
    """A file name of at most 48 characters for an expression."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "expression"


def _grow(mask: Bool[np.ndarray, "y x"]) -> Bool[np.ndarray, "y x"]:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    tall = padded[:-2] | padded[1:-1] | padded[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def outline(mask: Bool[np.ndarray, "y x"], width: int = 1) -> Bool[np.ndarray, "y x"]:
    """The pixels outside the mask within `width` steps of it."""
    grown = mask
    for _ in range(width):
        grown = _grow(grown)
    return grown & ~mask


def overlay(
    image: UInt8[np.ndarray, "y x 3"], mask: Bool[np.ndarray, "y x"], color: tuple[int, int, int] = SELECTED
) -> UInt8[np.ndarray, "y x 3"]:
    """The mask's pixels as they are, outlined in `color`, on surroundings faded to grey.

    A tint would be lost on a picture of any colours, and would hide what was found.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"mask {mask.shape} does not fit image {image.shape}")
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    out = np.repeat((0.45 * grey + 0.55 * 245)[..., None], 3, -1).astype(np.uint8)
    out[mask] = image[mask]
    out[outline(mask, max(1, round(max(mask.shape) / 120)))] = color
    return out


def _panel_size(height: int, width: int) -> tuple[int, int]:
    scale = _PANEL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def strip(
    image: UInt8[np.ndarray, "y x 3"],
    panels: Sequence[tuple[str, Bool[np.ndarray, "y x"] | None, tuple[int, int, int]]],
) -> Image.Image:
    """Panels side by side, each with a caption under it: (caption, mask or None for the bare image, colour)."""
    size = _panel_size(*image.shape[:2])
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    cell = max(size[0], 120)  # a narrow image still leaves room for its caption
    sheet = Image.new("RGB", (len(panels) * (cell + _GAP) - _GAP, size[1] + _CAPTION), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (caption, mask, color) in enumerate(panels):
        left = i * (cell + _GAP)
        picture = small
        if mask is not None:
            scaled = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 127
            picture = overlay(small, scaled, color)
        sheet.paste(Image.fromarray(picture), (left + (cell - size[0]) // 2, 0))
        draw.text((left + cell // 2, size[1] + 5), caption, fill=(60, 60, 60), font=font, anchor="ma")
    return sheet

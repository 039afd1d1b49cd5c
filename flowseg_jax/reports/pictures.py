"""The four-panel strip of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from flowseg_jax.reports.overlay import overlay

TRUTH = (46, 160, 67)
SELECTED = (214, 64, 159)
BEST = (47, 111, 235)

_PANEL = 240  # longest side of a panel, pixels
_GAP, _CAPTION = 8, 22


def _panel_size(height: int, width: int) -> tuple[int, int]:
    scale = _PANEL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def comparison_strip(
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

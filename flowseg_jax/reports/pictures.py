"""The pictures of a sample: the image, and masks drawn on it, each a small picture of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from flowseg_jax.reports.overlay import overlay

TRUTH = (46, 160, 67)
SELECTED = (214, 64, 159)
BEST = (47, 111, 235)

_PANEL = 240  # longest side of a panel, pixels


def panel(
    image: UInt8[np.ndarray, "y x 3"], mask: Bool[np.ndarray, "y x"] | None = None, color: tuple[int, int, int] = TRUTH
) -> Image.Image:
    """The image with a mask outlined on it, or by itself, at most 240 pixels high and wide."""
    height, width = image.shape[:2]
    scale = _PANEL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    if mask is None:
        return Image.fromarray(small)
    scaled = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 127
    return Image.fromarray(overlay(small, scaled, color))


def save_panels(
    folder: Path,
    stem: str,
    image: UInt8[np.ndarray, "y x 3"],
    masks: list[tuple[str, Bool[np.ndarray, "y x"], tuple[int, int, int]]],
) -> list[tuple[str, str]]:
    """Writes the image and each mask on it to `<folder>/<stem>_<number>.png`.

    Args:
        folder: which exists. stem: of the file names.
        image: the image.
        masks: (caption, mask, colour of its outline).

    Returns:
        (caption, file name) of each, that of the image first.
    """
    pictures = [("image", panel(image)), *((caption, panel(image, mask, color)) for caption, mask, color in masks)]
    named = [(caption, f"{stem}_{number}.png", picture) for number, (caption, picture) in enumerate(pictures)]
    for _, file, picture in named:
        picture.save(folder / file)
    return [(caption, file) for caption, file, _ in named]

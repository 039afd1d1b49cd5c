"""Masks drawn on images."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Bool, UInt8


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


def line_width(mask: Bool[np.ndarray, "y x"]) -> int:
    """How wide the coloured line of `draw_outline` is, in pixels: as the image's size asks for."""
    return max(1, round(max(mask.shape) / 120))


def border(mask: Bool[np.ndarray, "y x"]) -> Bool[np.ndarray, "y x"]:
    """The pixels of the coloured line of `draw_outline`."""
    return outline(mask, line_width(mask))


def draw_outline(out: UInt8[np.ndarray, "y x 3"], mask: Bool[np.ndarray, "y x"], color: tuple[int, int, int]) -> None:
    """Draws three lines around a mask into `out`: the colour, then white, then black.

    One of them differs from whatever the object and its surroundings look like.
    """
    width = line_width(mask)
    thin = max(1, width // 2)
    colored = mask | outline(mask, width)
    white = colored | outline(colored, thin)
    out[outline(white, thin)] = 0
    out[white & ~colored] = 255
    out[colored & ~mask] = color


def overlay(
    image: UInt8[np.ndarray, "y x 3"], mask: Bool[np.ndarray, "y x"], color: tuple[int, int, int]
) -> UInt8[np.ndarray, "y x 3"]:
    """The mask's pixels as they are, outlined as by `draw_outline`, on surroundings faded to grey.

    A tint would be lost on a picture of any colours, and would hide what was found.
    """
    out = fade(image, mask)
    draw_outline(out, mask, color)
    return out


def fade(image: UInt8[np.ndarray, "y x 3"], mask: Bool[np.ndarray, "y x"]) -> UInt8[np.ndarray, "y x 3"]:
    """The mask's pixels as they are, all others faded to grey."""
    if image.shape[:2] != mask.shape:
        raise ValueError(f"mask {mask.shape} does not fit image {image.shape}")
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    out = np.repeat((0.45 * grey + 0.55 * 245)[..., None], 3, -1).astype(np.uint8)
    out[mask] = image[mask]
    return out


def tint(
    image: UInt8[np.ndarray, "y x 3"], mask: Bool[np.ndarray, "y x"], color: tuple[int, int, int], share: float = 0.35
) -> UInt8[np.ndarray, "y x 3"]:
    """The mask's pixels mixed with `share` of a colour, and outlined in it: for several masks on one picture."""
    out = image.copy()
    out[mask] = ((1 - share) * image[mask] + share * np.array(color)).astype(np.uint8)
    out[border(mask)] = color
    return out

"""Paints a scene: gradient background, clutter lines, textured objects, sensor noise."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from flowseg_jax.synthetic.scene import REFERENCE_SIZE, Scene, SceneObject

PAINT = {
    "red": (208, 32, 36),
    "orange": (243, 138, 20),
    "yellow": (246, 222, 46),
    "green": (40, 152, 58),
    "blue": (34, 74, 212),
    "purple": (140, 44, 172),
    "black": (24, 24, 26),
    "white": (244, 244, 242),
}
DARK_PAINT = frozenset({"red", "blue", "purple", "black"})  # their texture marks are lighter than the paint, else darker
CLUTTER_LINES = 6
RIM, RIM_GREY = 0.8, 60.0  # opacity of an object's rim and the grey that half of its colour comes from
NOISE = 5.0  # standard deviation, in 0..255


def _marks(item: SceneObject, x: np.ndarray, y: np.ndarray, scale: float, rng: random.Random) -> np.ndarray | float:
    """How much of each pixel [h, w] is covered by the texture's marks, 0..1; the edges are one pixel soft."""
    if item.texture == "plain":
        return 0.0
    angle = rng.uniform(0, math.pi)
    period = (6.0 if item.size == "large" else 5.2) * scale
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + rng.random()
    if item.texture == "striped":
        return np.clip((0.22 - np.abs(u - np.round(u))) * period + 0.5, 0, 1)
    v = (y * math.cos(angle) - x * math.sin(angle)) / period + rng.random()
    distance = np.hypot(u - np.round(u), v - np.round(v))
    return np.clip((0.31 - distance) * period + 0.5, 0, 1)


def _background(rng: random.Random, size: int) -> np.ndarray:
    """A linear gradient [size, size, 3] float32 between two dull mid tones, on which both black and white stand out."""

    def tone() -> list[float]:
        grey = rng.uniform(95, 165)
        return [grey + rng.uniform(-18, 18) for _ in range(3)]

    start, end = np.array(tone(), np.float32), np.array(tone(), np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    at = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    ramp = at[None, :] * math.cos(angle) + at[:, None] * math.sin(angle)
    ramp = np.clip(ramp / math.sqrt(2) + 0.5, 0, 1)[..., None]
    return start + (end - start) * ramp


def _clutter(rng: random.Random, canvas: Image.Image, scale: float) -> None:
    draw = ImageDraw.Draw(canvas)
    size = canvas.width
    for _ in range(CLUTTER_LINES):
        ends = [rng.uniform(0, size) for _ in range(4)]
        grey = rng.uniform(60, 200)
        colour = tuple(int(grey + rng.uniform(-25, 25)) for _ in range(3))
        draw.line(ends, fill=colour, width=max(1, round(rng.choice((1, 1, 2)) * scale)))


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Paints the scene as an RGB image of its size."""
    size, scale = scene.size, scene.size / REFERENCE_SIZE
    canvas = Image.fromarray(_background(rng, size).astype(np.uint8))
    _clutter(rng, canvas, scale)
    pixels = np.asarray(canvas, np.float32).copy()
    for item, patch in zip(scene.items, scene.patches, strict=True):
        h, w = patch.alpha.shape
        y, x = np.mgrid[:h, :w].astype(np.float32)
        paint = np.array([c + rng.uniform(-10, 10) for c in PAINT[item.colour]], np.float32)
        mark = paint + (255 - paint) * 0.55 if item.colour in DARK_PAINT else paint * 0.42
        marks = np.broadcast_to(_marks(item, x, y, scale, rng), (h, w))[..., None]
        fill = paint + (mark - paint) * marks
        fill += (paint * 0.5 + RIM_GREY * 0.5 - fill) * (RIM * patch.rim[..., None])
        region = pixels[patch.top : patch.top + h, patch.left : patch.left + w]
        region += (fill - region) * patch.alpha[..., None]
    noise = np.random.default_rng(rng.getrandbits(64))
    pixels += noise.standard_normal(pixels.shape, np.float32) * NOISE
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))

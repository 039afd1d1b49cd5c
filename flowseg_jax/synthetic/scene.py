"""Scenes of the `shapes` benchmark: which objects stand where, and which of their pixels can be seen.

A scene draws all its objects from a few shapes, colours and textures, so that every object has look-alikes and finding *an*
object is easy while choosing *the* object is hard. Objects may cover each other a little. Everything that language can refer
to (position, area) is measured on the visible pixels, which is what a person sees.

Lengths are pixels; constants are given for a 128 pixel image and scale with the image size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "semicircle")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")


@dataclass(frozen=True)
class Palette:
    """The looks that the objects of a set are drawn from."""

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = COLOURS
    textures: tuple[str, ...] = TEXTURES


PALETTES = {
    "all": Palette(),
    "few": Palette(("circle", "square", "triangle", "star"), ("red", "yellow", "green", "blue"), ("plain",)),
}

REFERENCE_SIZE = 128
RADII = {"small": (9.0, 11.5), "large": (15.0, 18.5)}  # radius of the disc with the object's area
MIN_GAP = 0.86  # smallest distance of two centres in units of the sum of the radii
MIN_VISIBLE_PIXELS = 40
MIN_VISIBLE_SHARE = 0.6
SUPERSAMPLE = 4


def is_held_out(colour: str, shape: str, texture: str) -> bool:
    """Whether a combination belongs to the 24 (of 192) that appear in testB images only.

    The rule is a Latin pattern: every colour-shape, colour-texture and shape-texture pair also occurs in training, so testB
    asks for a new combination of known words. It does not depend on the seed: sets of different seeds are comparable.
    """
    return (COLOURS.index(colour) + SHAPES.index(shape) + 3 * TEXTURES.index(texture)) % 8 == 0


@dataclass(frozen=True)
class SceneObject:
    """One object as it is drawn: attributes, centre (x, y), area-equivalent radius, rotation in radians."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Patch:
    """The rendered silhouette of one object, placed with its corner at (left, top).

    `alpha` [h, w] float32 in 0..1 is the coverage, `rim` the same for a thin line inside the outline, which keeps overlapping
    objects of one colour apart.
    """

    left: int
    top: int
    alpha: np.ndarray
    rim: np.ndarray


@dataclass(frozen=True)
class Scene:
    """Objects in drawing order (later ones cover earlier ones) and what remains visible of each.

    `masks` bool [n, size, size] are disjoint; `centres` [n, 2] are the (x, y) centroids and `areas` [n] the pixel counts of the
    visible masks; pixel i spans i..i+1.
    """

    size: int
    items: tuple[SceneObject, ...]
    patches: tuple[Patch, ...]
    masks: np.ndarray
    centres: np.ndarray
    areas: np.ndarray


def _regular(corners: int, start: float, inner: float | None = None) -> list[tuple[float, float]]:
    radii = (1.0,) if inner is None else (1.0, inner)
    count = corners * len(radii)
    steps = [(radii[i % len(radii)], start + 2 * math.pi * i / count) for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in steps]


def _outline(shape: str) -> list[tuple[float, float]]:
    up = -math.pi / 2  # image y points down
    match shape:
        case "circle":
            return _regular(36, 0.0)
        case "square":
            return _regular(4, math.pi / 4)
        case "triangle":
            return _regular(3, up)
        case "diamond":
            return [(0.0, -1.35), (0.85, 0.0), (0.0, 1.35), (-0.85, 0.0)]
        case "star":
            return _regular(5, up, inner=0.45)
        case "cross":
            a, b = 0.34, 1.0
            return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        case "heart":
            ts = [2 * math.pi * i / 40 for i in range(40)]
            ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in ts]
            return [(math.sin(t) ** 3, -y / 16 - 0.1) for t, y in zip(ts, ys, strict=True)]
        case "semicircle":
            arc = [math.pi + math.pi * i / 24 for i in range(25)]
            return [(math.cos(a), math.sin(a) + 0.42) for a in arc]
    raise ValueError(f"unknown shape {shape!r}")


def _unit_area(points: list[tuple[float, float]]) -> np.ndarray:
    """Scales an outline [k, 2] to the area of the unit disc, so that `radius` means the same for every shape."""
    p = np.asarray(points)
    q = np.roll(p, -1, axis=0)
    area = abs(float(np.sum(p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]))) / 2
    return p * math.sqrt(math.pi / area)


OUTLINES = {shape: _unit_area(_outline(shape)) for shape in SHAPES}
REACH = {shape: float(np.abs(points).max()) for shape, points in OUTLINES.items()}


def silhouette(item: SceneObject, scale: float) -> Patch:
    """Rasterises one object with anti-aliasing; `scale` is the image size in units of 128."""
    c, s = math.cos(item.angle), math.sin(item.angle)
    points = OUTLINES[item.shape] @ np.array([[c, s], [-s, c]]) * item.radius + (item.x, item.y)
    left, top = (int(v) for v in np.floor(points.min(axis=0)) - 1)
    right, bottom = (int(v) for v in np.ceil(points.max(axis=0)) + 1)
    canvas = Image.new("L", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE))
    corners = ((points - (left, top)) * SUPERSAMPLE - 0.5).ravel().tolist()
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    rim = Image.new("L", canvas.size)
    ImageDraw.Draw(rim).line([*corners, *corners[:4]], fill=255, width=round(1.6 * SUPERSAMPLE * scale))
    alpha, rim = (np.asarray(layer.reduce(SUPERSAMPLE), np.float32) / 255 for layer in (canvas, rim))
    return Patch(left, top, alpha, rim)


def draw_attributes(
    rng: random.Random, count: int, allow: Callable[[str, str, str], bool], palette: str = "all"
) -> list[tuple[str, str, str]]:
    """Draws `count` (colour, shape, texture) triples from a few looks of a palette; `allow` says which triples may occur."""
    looks = PALETTES[palette]
    shapes = rng.sample(looks.shapes, rng.choice((2, 2, 3)))
    colours = rng.sample(looks.colours, rng.choice((2, 3, 3)))
    textures = rng.sample(looks.textures, min(rng.choice((1, 2, 2)), len(looks.textures)))
    triples = [(c, s, t) for c in colours for s in shapes for t in textures if allow(c, s, t)]
    return [rng.choice(triples) for _ in range(count)] if len(triples) > 1 else []


def place(rng: random.Random, triples: list[tuple[str, str, str]], size: int) -> list[SceneObject] | None:
    """Gives every triple a size class, a radius and a free place; None when the scene is too crowded."""
    scale = size / REFERENCE_SIZE
    items: list[SceneObject] = []
    for colour, shape, texture in triples:
        label = rng.choice(SIZES)
        radius = rng.uniform(*RADII[label]) * scale
        border = radius * REACH[shape] + 1
        for _ in range(30):
            x, y = rng.uniform(border, size - border), rng.uniform(border, size - border)
            if all(math.hypot(x - o.x, y - o.y) > MIN_GAP * (radius + o.radius) for o in items):
                break
        else:
            return None
        items.append(SceneObject(shape, colour, texture, label, x, y, radius, rng.uniform(-0.16, 0.16)))
    return items


def compose(items: list[SceneObject], size: int) -> Scene | None:
    """Stacks the objects and measures what stays visible; None when one of them is covered too much."""
    patches = tuple(silhouette(item, size / REFERENCE_SIZE) for item in items)
    owner = np.full((size, size), -1, np.int8)
    full = []
    for i, patch in enumerate(patches):
        h, w = patch.alpha.shape
        if patch.left < 0 or patch.top < 0 or patch.left + w > size or patch.top + h > size:
            return None
        inside = patch.alpha >= 0.5
        full.append(int(inside.sum()))
        owner[patch.top : patch.top + h, patch.left : patch.left + w][inside] = i
    masks = owner[None] == np.arange(len(items), dtype=np.int8)[:, None, None]
    areas = masks.sum(axis=(1, 2))
    least = MIN_VISIBLE_PIXELS * (size / REFERENCE_SIZE) ** 2
    if np.any(areas < least) or np.any(areas < MIN_VISIBLE_SHARE * np.asarray(full)):
        return None
    at = np.arange(size) + 0.5
    xs = masks.sum(axis=1) @ at / areas
    ys = masks.sum(axis=2) @ at / areas
    return Scene(size, tuple(items), patches, masks, np.stack([xs, ys], axis=1), areas)

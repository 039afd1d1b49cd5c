"""Draws `docs/figures/example.png`: a scene of `examples/scenes` and what the shipped model answers to three expressions.

python docs/figures/make_example.py [OUT.png]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import flowseg_jax
from flowseg_jax.reports.overlay import overlay

ROOT = Path(__file__).resolve().parents[2]
MODEL, IMAGE = ROOT / "checkpoints" / "shapes_tiny", ROOT / "examples" / "scenes" / "06.png"
TEXTS = ("green triangle", "the square that is not yellow", "the little triangle right of the big striped yellow square")
PANEL, GAP, CAPTION = 300, 16, 86  # pixels: side of a panel, space between two, height of the text below
OUTLINE, PAPER, INK = (255, 0, 160), (255, 255, 255), (30, 30, 30)


def draw(out: Path) -> None:
    """Segments `TEXTS` and writes the picture to `out`."""
    segmentor = flowseg_jax.load(MODEL)
    predictions = segmentor.segment(IMAGE, TEXTS)
    panels = [(predictions[0].image, "image")]
    panels += [(overlay(p.image, p.mask, OUTLINE), f"“{p.text}” (score {p.score:.2f})") for p in predictions]
    canvas = Image.new("RGB", (len(panels) * (PANEL + GAP) - GAP, PANEL + CAPTION), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    for column, (pixels, caption) in enumerate(panels):
        left = column * (PANEL + GAP)
        canvas.paste(Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.BICUBIC), (left, 0))
        pen.multiline_text((left + 2, PANEL + 8), textwrap.fill(caption, 34), INK, font, spacing=6)
    canvas.quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "out", nargs="?", type=Path, default=Path(__file__).with_name("example.png"), help="file that is written"
    )
    draw(parser.parse_args().out)

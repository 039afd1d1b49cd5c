"""An example of your own data, to try fine-tuning with: twenty images that teach a word no model knows.

Each image has one star among other shapes, and the expressions call it "the zib". The masks come as polygons, run-length
codes and PNG files in turn, the three forms that a line of `toy.jsonl` may have.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from flowseg_jax.errors import UserError
from flowseg_jax.synthetic import polygons
from flowseg_jax.synthetic.render import render
from flowseg_jax.synthetic.scene import REFERENCE_SIZE, Scene, compose, draw_attributes, place

WORD, SHAPE = "zib", "star"
EXPRESSIONS = ("the {}", "find the {}", "a {}")
UNSEEN = 4  # images of the split "val"


def scene(rng: random.Random) -> Scene:
    """Six objects, one of which is a star."""
    while True:
        triples = draw_attributes(rng, 6, lambda *_: True)
        if triples and sum(shape == SHAPE for _, shape, _ in triples) == 1:
            items = place(rng, triples, REFERENCE_SIZE)
            if items and (drawn := compose(items, REFERENCE_SIZE)):
                return drawn


def write(directory: Path, images: int = 20, seed: int = 0) -> None:
    """Writes `toy.jsonl`, the images and the masks into a new directory.

    Raises:
        UserError: the directory exists, or too few images.
    """
    if images <= UNSEEN:
        raise UserError(f"a toy data set needs more than {UNSEEN} images, got {images}")
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made ({error.strerror})") from None
    lines = []
    for number in range(images):
        rng = random.Random(f"lesson {seed} {number}")
        drawn = scene(rng)
        name = f"{number:03d}.png"
        render(drawn, rng).save(directory / name)
        mask = drawn.masks[next(i for i, item in enumerate(drawn.items) if item.shape == SHAPE)]
        outlines = polygons.polygons(mask)
        if number % 3 == 0 and outlines:
            stored = outlines
        elif number % 3 == 1:
            stored = {"size": list(mask.shape), "counts": polygons.run_lengths(mask)["counts"]}
        else:
            stored = f"{number:03d}_mask.png"
            Image.fromarray(mask).save(directory / stored)
        line = {"image": name, "expressions": [text.format(WORD) for text in EXPRESSIONS], "mask": stored}
        lines.append(line | ({"split": "val"} if number >= images - UNSEEN else {}))
    (directory / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

"""Writes `examples/scenes`: the first scenes of the benchmark's val split, as PNGs, and `scenes.jsonl` with their expressions.

    python examples/make_scenes.py [OUT]

`scenes.jsonl` has the layout of a data set of your own (docs/data.md): one line per object, with its expressions and its mask.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pycocotools.mask as coco
from PIL import Image

from flowseg_jax.synthetic.generator import PRESETS, GeneratorConfig, assign_splits, make_record

SCENES = 12
IMAGES, SEED = 6000, 0  # those of configs/shapes_tiny.py, so the scenes are images of the benchmark that eval.py evaluates on


def compressed(segmentation: list | dict, size: int) -> dict[str, Any]:
    """COCO's compressed run-length code of polygons or run lengths."""
    code = coco.frPyObjects(segmentation, size, size)
    code = coco.merge(code) if isinstance(code, list) else code
    return {"size": [size, size], "counts": code["counts"].decode("ascii")}


def write(out: Path, scenes: int = SCENES) -> None:
    """Writes `scenes` images and `scenes.jsonl` to `out`, replacing those that are there."""
    out.mkdir(parents=True, exist_ok=True)
    mix, objects = PRESETS["default"]
    config = GeneratorConfig(SEED, size=128, objects=objects, mix=mix, quality=92)
    val = [index for index, split in enumerate(assign_splits(IMAGES, SEED)) if split == "val"][:scenes]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for number, index in enumerate(val):
            record = make_record(index, "val", config=config, folder=Path(folder))
            name = f"{number:02d}.png"
            Image.open(Path(folder) / record.file_name).save(out / name, optimize=True)
            for expressions in record.refs:
                mask = compressed(record.annotations[expressions[0].target]["segmentation"], record.size)
                texts = [expression.text for expression in expressions]
                lines.append({"image": name, "expressions": texts, "mask": mask, "split": "val"})
    (out / "scenes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "scenes", help="folder that is written")
    write(parser.parse_args().out)

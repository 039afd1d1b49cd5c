"""The digest of a prepared set: whatever an evaluation may read is in it."""

from __future__ import annotations

import dataclasses

import pytest

from flowseg_jax.data import prepare, shards
from flowseg_jax.data.records import Annotation, Example, Expression, Turn
from tests.helpers import minicoco
from tests.helpers import minirefcoco as mini

EXAMPLE = Example(
    3,
    "a.jpg",
    4,
    5,
    b"image",
    (Annotation(7, 1, "rle", rle_single_cover="one", rle_filled_polygons="two"), Annotation(8, 0, "rle2", crowd=True)),
    (Expression("a dog", 1, 2, (0, 1), "attribute", "an answer"),),
    (Turn("who?", "me"),),
)


def other(value):
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return value + "x"
        case bytes():
            return value + b"x"
        case tuple():
            return value[:-1]
    raise TypeError(value)


def variants(thing):
    """(what changed, `thing` with one value changed) of every field, and of every field of what is inside."""
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        yield field.name, dataclasses.replace(thing, **{field.name: other(value)})
        if isinstance(value, tuple) and dataclasses.is_dataclass(value[0]):
            for name, inner in variants(value[0]):
                yield f"{field.name}.{name}", dataclasses.replace(thing, **{field.name: (inner, *value[1:])})


def test_every_field_of_an_example_counts():
    found = {name: shards.content(changed) for name, changed in variants(EXAMPLE)}
    assert len(found) == 8 + 7 + 6 + 2
    found["nothing"] = shards.content(EXAMPLE)
    assert len(set(found.values())) == len(found)
    assert shards.content(dataclasses.replace(EXAMPLE)) == found["nothing"]


def test_text_that_moves_from_one_field_to_the_next_counts():
    moved = dataclasses.replace(EXAMPLE.annotations[0], rle="rleo", rle_single_cover="ne")
    changed = dataclasses.replace(EXAMPLE, annotations=(moved, *EXAMPLE.annotations[1:]))
    assert shards.content(changed) != shards.content(EXAMPLE)


def prepared(root, **tables):
    return prepare.prepare(mini.write(root / "layout", **tables), root / "out", splits=["val"], log=lambda line: None)


def test_a_mask_that_only_one_protocol_draws_counts(tmp_path):
    """Moved by a tenth of a pixel, an outline covers the same pixels but is cut to other whole points."""

    def at(y):
        def change(instances, refs):
            target = next(r["ann_id"] for r in refs if r["split"] == "val")
            (entry,) = (a for a in instances["annotations"] if a["id"] == target)
            entry["segmentation"] = [[6.0, y, 20.0, y, 20.0, 15.0, 6.0, 15.0]]

        instances, refs = mini.damaged(change)
        return {"instances": instances, "refs": refs}

    sets = [prepared(tmp_path / name, **at(y)) for name, y in (("a", 6.0), ("b", 5.9), ("c", 6.0))]
    masks = [one.source("val")[0].annotations for one in sets]
    (union, filled), (union2, filled2) = (
        [{*(getattr(a, key) for a in m)} for key in ("rle", "rle_filled_polygons")] for m in masks[:2]
    )
    assert union == union2 and filled != filled2
    assert sets[0].digest != sets[1].digest and sets[0].digest == sets[2].digest


@pytest.mark.parametrize("key", ["name", "isthing"])
def test_categories_count(tmp_path, key):
    found = []
    for name in ("a", "b"):
        tables = {split: minicoco.panoptic(split) for split in minicoco.SPLITS}
        for table in tables.values() if name == "b" else ():
            table["categories"][1][key] = {"name": "somebody", "isthing": 0}[key]
        root = minicoco.write(tmp_path / name, "panoptic", **tables)
        found.append(prepare.prepare(root, tmp_path / f"{name}_out", layout="coco-panoptic", log=lambda line: None).digest)
    assert found[0] != found[1]

"""Lines of a prepared set's index: what they may hold, at the smallest and largest values."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest

from flowseg_jax.data import dataset, prepare, shards
from flowseg_jax.data import index as index_module
from flowseg_jax.data.index import parse_line
from flowseg_jax.types import PAD
from tests.helpers import minirefcoco

LINE = {
    "image_id": 5,
    "file_name": "a.jpg",
    "image_digest": "d1",
    "size": [3, 4],
    "categories": [1, PAD],
    "samples": [[11, 12, 13, "red", "color", [0, 1], 2, "an answer"]],
    "refs": [],
}
LARGEST = (1 << 62) - 1
NUMBERS = [("image_id",), ("size", 0), ("size", 1), *(("samples", 0, place) for place in (0, 1, 2, 6))]


def entry(path=(), value=None):
    line = copy.deepcopy(LINE)
    node = line
    for key in path[:-1]:
        node = node[key]
    if path:
        node[path[-1]] = value
    return parse_line(json.dumps(line).encode(), 2, "jsonl")


def test_a_line_is_read_back_field_by_field():
    found = entry()
    assert (found.image_id, found.file_name, found.height, found.width, found.image_digest) == (5, "a.jpg", 3, 4, "d1")
    (sample,) = found.samples
    assert (sample.ann_id, sample.ref_id, sample.sentence_id, sample.sentence, sample.family) == (11, 12, 13, "red", "color")
    assert (sample.annotations, sample.count, sample.answer, sample.image_id) == ((0, 1), 2, "an answer", 5)
    assert found.refs == () and tuple(found.categories) == (1, PAD)


@pytest.mark.parametrize("path", NUMBERS, ids=str)
def test_numbers_are_whole_and_bounded(path):
    for fits in (LARGEST, -LARGEST):
        entry(path, fits)
    for wrong in (LARGEST + 1, -LARGEST - 1, 1.0, True, "1", None):
        with pytest.raises((ValueError, TypeError)):
            entry(path, wrong)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        *((("categories", 0), value) for value in (2, PAD - 1, True, 0.0)),
        *((("samples", 0, 5), value) for value in ([2], [-1], [0.0], [True], 0)),
        *((path, 3) for path in (("file_name",), ("image_digest",), *(("samples", 0, place) for place in (3, 4, 7)))),
        (("size",), [3]),
        (("samples", 0), LINE["samples"][0][:-1]),
    ],
    ids=str,
)
def test_what_no_index_holds_is_refused(path, wrong):
    with pytest.raises((ValueError, TypeError)):
        entry(path, wrong)


def test_shards_are_closed_again(tmp_path, monkeypatch):
    """However many a split has, so many stay open."""
    monkeypatch.setattr(shards, "EXAMPLES", 1)
    monkeypatch.setattr(dataset, "OPEN_SHARDS", 1)
    prepared = prepare.prepare(minirefcoco.write(tmp_path / "layout"), tmp_path / "set", log=lambda _: None)
    assert len(prepared.metadata["shards"]["train"]) == 3
    source = prepared.source("train")
    images = [source[place].image_id for place in range(3)]
    opened = len(os.listdir("/proc/self/fd"))
    assert [source[place].image_id for place in (2, 1, 0, 2, 0)] == [images[place] for place in (2, 1, 0, 2, 0)]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_an_index_is_read_like_a_list(tmp_path, monkeypatch):
    """From either end, in parts and in steps; few lines at a time."""
    prepared = prepare.prepare(minirefcoco.write(tmp_path / "layout"), tmp_path / "set", log=lambda _: None)
    index = prepared.index("train")
    whole = list(index)
    monkeypatch.setattr(index_module, "LINES_AT_ONCE", 2)
    assert len(index) == len(whole) == 3 and [entry.image_id for entry in whole] == [1, 2, 5] and list(index) == whole
    for place in range(-3, 3):
        assert index[place] == index[np.int64(place)] == whole[place]
    for part in (
        slice(None),
        slice(1, None),
        slice(0, 2),
        slice(None, None, 2),
        slice(None, None, -1),
        slice(-2, None),
        slice(2, 1),
    ):
        assert index[part] == whole[part]
    for place in (3, -4):
        with pytest.raises(IndexError, match=f"image {place} of 3"):
            index[place]
    columns = index.columns("samples", "objects")
    assert columns.dtype == np.int64
    assert columns.tolist() == [[len(entry.samples), len(entry.categories)] for entry in whole]

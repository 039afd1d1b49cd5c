"""Files of results, a fixed number of images each: which images are whose, and what is continued."""

from __future__ import annotations

import json
import sys

import pytest

from flowseg_jax.errors import UserError
from flowseg_jax.inference import shards
from flowseg_jax.inference.shards import PredictionShards

SETTINGS = {"model": "m"}


def opened(out, **options):
    return PredictionShards.open(out, SETTINGS, **{"total": 7, "kind": "jsonl", "size": 3} | options)


def records(place: int) -> dict:
    return {place: [{"failure": f"no {place}"}] if place == 4 else [{"text": "é"}, {"text": "b"}]}


def names(out) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_shards_appear_when_they_are_whole_and_a_run_goes_on_behind_them(tmp_path):
    with opened(tmp_path) as run:
        assert (run.places.tolist(), run.total, run.before) == ([0, 1, 2, 3, 4, 5, 6], 7, 0)
        for place in (2, 0, 1, 4):
            run.add(records(place))
    assert names(tmp_path) == [".partial-00001.jsonl", "predictions-00000-of-00003.jsonl", "run.json"]
    with (tmp_path / ".partial-00001.jsonl").open("a") as file:
        file.write('{"place": 5, "rec')  # a kill
    with opened(tmp_path, size=None) as run:
        assert (run.places.tolist(), run.before) == ([3, 5, 6], 3)
        for place in (6, 5, 3):
            run.add(records(place))
        assert run.failures() == 1
    whole = [f"predictions-0000{n}-of-00003.jsonl" for n in range(3)]
    assert names(tmp_path) == ["failures-00001-of-00003.jsonl", *whole, "run.json"]
    lines = [json.loads(line) for name in whole for line in (tmp_path / name).read_text().splitlines()]
    assert [one["index"] for one in lines] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6] and lines[0]["text"] == "é"
    assert json.loads((tmp_path / "failures-00001-of-00003.jsonl").read_text()) == {"index": 4, "failure": "no 4"}
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS | {"images": 7, "format": "jsonl", "shard_size": 3}
    with opened(tmp_path) as run:
        assert (run.places.tolist(), run.before) == ([], 7)


def test_a_shard_that_was_killed_before_its_end_is_finished(tmp_path):
    with opened(tmp_path, total=1) as run:
        path = run._partial(0)
        run.add(records(0))
    (tmp_path / "predictions-00000-of-00001.jsonl").unlink()
    path.write_text(shards.record_line(0, records(0)[0]) + "\n" + shards.record_line(5, []) + "\n")  # one of no image of it
    with opened(tmp_path, total=1) as run:
        assert run.places.tolist() == []
    assert names(tmp_path) == ["predictions-00000-of-00001.jsonl", "run.json"]


def test_bytes_that_are_no_text_cost_their_image_alone(tmp_path):
    with opened(tmp_path, total=2) as run:
        path = run._partial(0)
        run.add(records(0))
    path.write_bytes(path.read_bytes() + shards.record_line(1, records(1)[1]).encode("latin-1") + b"\n")
    with opened(tmp_path, total=2) as run:
        assert run.places.tolist() == [1]
        run.add(records(1))
    (file,) = tmp_path.glob("predictions-*")
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 0, 1, 1]


def test_how_many_images_a_file_has_where_nobody_says(tmp_path):
    for total, size in ((7, 7), (1000, 1000), (1001, 1000)):
        with opened(tmp_path / str(total), total=total, size=None):
            assert json.loads((tmp_path / str(total) / "run.json").read_text())["shard_size"] == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 4}, "run.json: the folder holds a run with another shard_size: choose another --out"),
        ({"total": 8}, "the folder holds a run with another images: choose"),
        ({"kind": "parquet"}, "the folder holds a run with another format: choose"),
        ({"kind": "jsonn"}, r"--format: no format 'jsonn' \(did you mean 'jsonl'\?\)"),
    ],
)
def test_another_run_is_refused(tmp_path, changes, message):
    with opened(tmp_path):
        pass
    with pytest.raises(UserError, match=message), opened(tmp_path, **changes):
        pass


def test_what_is_no_run(tmp_path, monkeypatch):
    for text in ("{", "[]", '{"shard_size": 0}', "{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match="run.json (cannot be read|is not what `flowseg predict --images` wrote)"):
            with opened(tmp_path):
                pass
    (tmp_path / "run.json").write_text('{"shard_size": 1}')
    assert shards._read_run(tmp_path / "run.json") == {"shard_size": 1}
    (tmp_path / "run.json").unlink()
    (tmp_path / "predictions-00000-of-00001.jsonl").write_text("")
    with pytest.raises(UserError, match="holds predictions without their run.json: choose another --out"), opened(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="--format=parquet needs the extra parquet: pip install pyarrow"):
        with opened(tmp_path / "new", kind="parquet"):
            pass
    assert not (tmp_path / "new").exists()

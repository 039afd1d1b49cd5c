"""What grows with data and hosts, measured small: it runs, and a host writes its share of a checkpoint."""

import json

import pytest

from benchmarks import growth
from flowseg_jax.data.dataset import PreparedDataset


@pytest.mark.parametrize("kind", growth.KINDS)
def test_a_synthetic_set_is_a_prepared_set(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "BLOCK", 64)
    growth.write_set(tmp_path / "set", kind, 640)
    prepared = PreparedDataset.open(tmp_path / "set")
    index, source = prepared.index("train"), prepared.source("train")
    assert len(index) == len(list(index)) == len(source) == 640
    assert (
        sum(len(entry.samples) for entry in index)
        == prepared.splits["train"]["samples"]
        == (3840 if kind == "referring" else 0)
    )
    assert source[639].annotations == source[0].annotations


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_growth_is_measured(tmp_path):
    from benchmarks import checkpoint_growth

    growth.main(["--largest=4", f"--dir={tmp_path}", f"--json={tmp_path / 'growth.json'}"])
    results = json.loads((tmp_path / "growth.json").read_text())["results"]
    assert [row["kind"] for row in results] == ["chat", "referring"] and results[1]["open files"] < 400
    checkpoint_growth.main(["--mib=32", "--hosts", "1", "2", f"--json={tmp_path / 'checkpoint.json'}"])
    one, *two = json.loads((tmp_path / "checkpoint.json").read_text())["results"]
    assert all(row["save"]["bytes"] < 0.7 * one["save"]["bytes"] for row in two)

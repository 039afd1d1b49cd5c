"""Plans beside the committed ones."""

import json

import pytest

from benchmarks import priced
from flowseg_jax.errors import UserError


def plan(tmp_path, **parts):
    """A step's plan as `flowseg plan --json` ends, and one of an evaluation."""
    step = {"topology": "v5e:4x4", "priced_cycles": sum(parts.values())}
    step["priced_by_part"] = {part: {"cycles": count, "flops": 1} for part, count in parts.items()}
    programs = {"round": {"priced_cycles": 1000, "priced_by_part": {"llm forward": 1000}}}
    paths = tmp_path / "step.log", tmp_path / "eval.log"
    for path, found in zip(paths, (step, {"topology": "v5e:4x4", "programs": programs}), strict=True):
        path.write_text(f"compiling ...\n{json.dumps(found)}\n")
    return [str(path) for path in paths]


def test_a_part_that_costs_another_price_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(priced, "ROOT", tmp_path)
    monkeypatch.setattr(priced, "TABLE", tmp_path / "priced.json")
    assert priced.main([*plan(tmp_path, sam=60_000_000, llm=39_500_000, optimizer=500_000), "--write"]) == 0
    committed = json.loads((tmp_path / "priced.json").read_text())
    assert committed["step on v5e:4x4"] == {"together": 100_000_000, "sam": 60_000_000, "llm": 39_500_000, "optimizer": 500_000}
    assert committed["round on v5e:4x4"] == {"together": 1000, "llm forward": 1000}
    assert priced.main(plan(tmp_path, sam=61_000_000, llm=38_900_000, optimizer=900_000)) == 0  # less than 2 %; 1 % of all
    capsys.readouterr()
    assert priced.main(plan(tmp_path, sam=58_800_000, llm=39_500_000, losses=2_000_000)) == 1
    out = capsys.readouterr().out
    assert "step on v5e:4x4: 100.3 million cycles" in out and "round on v5e:4x4: 0.0 million cycles, as committed" in out
    assert "losses: 2.0 million cycles, 0.0 committed" in out and "sam: 58.8 million cycles, 60.0 committed" in out
    assert "llm" not in out and "optimizer" not in out


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '{"topology": "v5e:4x4", "priced_by_part": null}'])
def test_what_is_no_priced_plan_is_refused(tmp_path, text):
    (tmp_path / "x.log").write_text(text)
    with pytest.raises(UserError, match="does not end with the JSON of a priced plan"):
        priced.main([str(tmp_path / "x.log")])

"""`python -m benchmarks`: verdicts, exit codes, the committed table; every component at tiny size beside its peer (slow)."""

from __future__ import annotations

import functools
import json
import subprocess
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import batch_prediction, components, load, measure, ratio, startup, table
from benchmarks.command_line import components_parser
from benchmarks.components import COMPONENTS, Bar, Pair
from benchmarks.components.sizes import SIZES, dummy_batch, one_of, prefix
from flowseg_jax.errors import UserError
from flowseg_jax.types import IMAGE_TOKEN_INDEX


def result(component="msda", dtype="float32", ratio=0.45, quality="A", cpu="a", **changes):
    versions = dict.fromkeys(("jax", "jaxlib", "torch", "transformers", "scipy"), "1")
    environment = {"date": "2026-01-01", "cpu": cpu, "cores": 2, "cpu_flags": ["avx2"], "versions": versions}
    return {
        "component": component,
        "dtype": dtype,
        "peer": COMPONENTS[component].peer,
        "mode": "eager",
        "ratio": ratio,
        "seconds": 0.1 * ratio,
        "peer_seconds": 0.1,
        "quality": quality,
        "difference": 0.0,
        "peak_gib": 1.0,
        "facts": {},
        "environment": environment,
        **changes,
    }


@pytest.fixture
def flags():
    return lambda *argv: components_parser().parse_args(argv)


def test_a_bar_and_an_aim_make_the_verdict():
    assert [Bar(0.5, 0.4).verdict(x) for x in (0.4, 0.41, 0.5, 0.51)] == ["aim met", "met", "met", "missed"]
    assert [Bar(0.2).verdict(x) for x in (0.1, 0.3)] == ["met", "missed"]
    assert table.verdict(result(ratio=0.45)) == "met"
    assert table.verdict(result(ratio=0.45, quality="C")) == table.BUSY  # met, but nobody knows
    assert table.verdict(result("resize", "bfloat16", ratio=9.0)) == ""
    assert table.verdict(result("siglip", "bfloat16", ratio=1.9)) == "met"
    assert table.verdict(result("siglip", "float32", ratio=1.9)) == "missed"


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ({"ratio": 0.62}, {"ratio": 0.5}, "as committed"),
        ({"ratio": 0.63}, {"ratio": 0.5}, "regressed"),
        ({"ratio": 0.39}, {"ratio": 0.5}, "faster"),
        ({"ratio": 0.9, "quality": "C"}, {}, "machine too busy"),
        ({"ratio": 0.9}, {"quality": "C"}, "machine too busy"),
        ({"ratio": 0.9, "quality": "B"}, {"ratio": 0.5}, "regressed"),
        ({"ratio": 0.9, "cpu": "b"}, {"ratio": 0.5}, "another machine: 0.50"),
        ({"dtype": "bfloat16"}, {}, "not in the table"),
    ],
)
def test_a_check_compares_with_the_committed_ratio(now, before, expected):
    assert table.compared(result(**now), {"msda float32": result(**before)}) == expected


def test_exit_codes():
    assert command.exit_code([], ["met", "missed", ""]) == 0
    assert command.exit_code([], ["met", table.BUSY]) == ratio.TOO_BUSY == 3
    assert command.exit_code([], [table.BUSY, table.REGRESSED]) == 1
    assert command.exit_code(["msda float32"], [table.BUSY, table.REGRESSED]) == 2


def test_the_work_is_what_was_asked_for(flags):
    names = lambda *argv: [(c.name, dtype) for c, dtype in command.work_list(flags(*argv))]  # noqa: E731
    assert names("msda", "siglip", "--dtype=float32,bfloat16") == [
        ("msda", "float32"), ("siglip", "float32"), ("siglip", "bfloat16")
    ]  # fmt: skip
    assert len(names()) == len(COMPONENTS)
    for argv, message in (
        (["msd"], "no component 'msd' .did you mean 'msda'"),
        (["msda", "--dtype=bfloat16"], "none of msda is measured in bfloat16"),
        (["--dtype=float16"], "no dtype 'float16' .did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            names(*argv)
    with pytest.raises(UserError, match="not allowed with"):
        flags("--check", "--write-docs")
    with pytest.raises(UserError, match="--size=tiny has no place"):
        command.main(["msda", "--size=tiny", "--check"])


def test_the_list_names_every_component(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(COMPONENTS)
    assert "Bar / aim: float32 0.5 / 0.4" in next(line for line in lines if line.startswith("msda "))


def test_results_come_from_processes_and_the_worst_decides(monkeypatch, tmp_path, capsys):
    """Without the measuring itself: one component that differs, one too busy, one fine."""
    commands = []

    def run(argv, **options):
        commands.append((argv, options))
        name, dtype = argv[3:5]
        if name == "bar":
            return types.SimpleNamespace(returncode=2, stderr="noise\nerror: no ratio: it differs\n\n")
        if name == "resize":
            return types.SimpleNamespace(returncode=-9, stderr="")
        out = next(arg for arg in argv if arg.startswith("--out=")).removeprefix("--out=")
        open(out, "w").write(json.dumps(result(name, dtype, quality="C" if name in ("msda_grad", "matcher") else "A")))
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "all.json"
    assert command.main(["msda", "--peer=torch-eager", "--rounds=2", f"--json={out}"]) == 0
    ((argv, options),) = commands
    assert "--eager" in argv and "--rounds=2" in argv and options["env"]["GOMP_SPINCOUNT"]
    assert command.main(["msda", "msda_grad"]) == 3
    assert command.main(["msda", "matcher"]) == 3  # a C has no verdict
    assert command.main(["msda", "bar", "msda_grad", "resize", f"--json={out}"]) == 2
    text = capsys.readouterr().out
    assert "no ratio: it differs" in text and "killed by signal 9" in text
    found = json.loads(out.read_text())
    assert [entry["component"] for entry in found["results"]] == ["msda", "msda_grad"]
    assert set(found["failures"]) == {"bar float32", "resize float32"}
    monkeypatch.setattr(table, "read", lambda: {"msda float32": result(ratio=0.1)})
    assert command.main(["msda", "--check"]) == 1
    monkeypatch.setattr(table, "read", lambda: {"msda float32": result(quality="C")})
    assert command.main(["msda", "--check"]) == 3


def test_the_table_is_written_between_its_marks_and_read_back(tmp_path):
    ratios, docs = tmp_path / "ratios.json", tmp_path / "performance.md"
    with pytest.raises(UserError, match="there is no table yet"):
        table.read(ratios)
    docs.write_text(f"# Speed\n{table.BEGIN}\n")
    with pytest.raises(UserError, match="one of them is missing"):
        table.write([result()], ratios, docs)
    assert not ratios.exists()
    docs.write_text(f"# Speed\n{table.BEGIN}\nold\n{table.END}\nthe end\n")
    seven = result("seven_expressions", ratio=0.2, facts={"extrapolate_ours": 5.0, "extrapolate_peer": 6.0})
    table.write([result("siglip", "bfloat16"), seven, result(ratio=0.7)], ratios, docs)
    table.write([result(ratio=0.3)], ratios, docs)
    entries = table.read(ratios)
    assert list(entries) == ["siglip bfloat16", "msda float32", "seven_expressions float32"]
    assert entries["msda float32"]["ratio"] == 0.3
    text = docs.read_text()
    assert text.startswith("# Speed\n") and text.endswith("\nthe end\n") and "old" not in text
    assert "| `msda`: deformable attention alone, 21,504 queries | float32 | torch, eager | 100 | 30 | **0.30** |" in text
    assert "ours 0 s, torch 1 s, ratio 0.17" in text  # 0.2 * 5 / 6
    assert text.count("2026-01-01: a, 2 cores (avx2)") == 1
    assert table.compared(result(ratio=0.3), entries) == "as committed"


def test_the_faster_mode_of_the_peer_is_taken(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda layer: "compiled")
    seconds = {"eager": 1.0, "compiled": 0.5}
    monkeypatch.setattr(measure, "_seconds", lambda call, clock: seconds[call()])
    pair = lambda **changes: Pair(None, lambda wrap: lambda: wrap("eager"), 0.0, **changes)  # noqa: E731

    def chosen(*, eager_only=False, **changes):
        call, mode, about = measure.fastest(pair(**changes), eager_only, time.perf_counter)
        assert about == seconds[call()]
        return call(), mode

    assert chosen() == ("compiled", "torch.compile")
    assert chosen(eager_only=True) == chosen(compiled=False) == ("eager", "eager")
    seconds["compiled"] = 2.0
    assert chosen() == ("eager", "eager")

    def refuse(layer):
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch, "compile", refuse)
    assert chosen() == ("eager", "eager (torch.compile failed: no compiler here)")


def test_cpu_seconds_stand_in_the_table_as_such_and_are_compared_with_their_like():
    of_cpu = result(clock="cpu", ratio=0.3)
    assert "| A, CPU |" in table.markdown([of_cpu]) and "CPU" not in table.markdown([result()])
    committed = {"msda float32": result(ratio=0.3)}
    assert table.compared(of_cpu, committed) == "another clock: 0.30"
    assert table.compared(of_cpu, {"msda float32": of_cpu}) == table.compared(result(ratio=0.3), committed) == "as committed"


def test_slow_calls_are_made_less_often(monkeypatch):
    clock = iter(np.arange(100) * 6.0)
    calls = []
    assert measure._seconds(lambda: calls.append(1), lambda: next(clock)) == 6.0
    assert len(calls) == 3  # the first one, and two that took more than ten seconds together


def test_there_is_no_ratio_for_other_numbers(monkeypatch):
    """The comparison is of both sides' outputs as they are read, tensors and arrays alike."""
    ours = lambda: {"y": jnp.arange(3.0, dtype=jnp.bfloat16)}  # noqa: E731
    theirs = lambda wrap: lambda: {"y": torch.arange(3, dtype=torch.bfloat16) + shift}  # noqa: E731
    monkeypatch.setattr(components, "build", lambda *_: Pair(ours, theirs, 0.01, compiled=False))
    quiet = lambda pids: load.Reading(time.perf_counter(), 0.0, 0.0)  # noqa: E731
    monkeypatch.setattr(ratio, "compare", functools.partial(ratio.compare, sample_seconds=1e-3, read=quiet))
    shift = 0.0
    found = measure.measure(COMPONENTS["msda"], "tiny", "float32", rounds=1)
    assert found["difference"] == 0 and found["ratio"] == found["seconds"] / found["peer_seconds"]
    assert set(found["candidates"]) == {"torch", measure.OURS} and found["environment"]["versions"]["torch"]
    by_cpu = measure.measure(COMPONENTS["msda"], "tiny", "float32", rounds=1, clock="cpu")
    assert (found["clock"], by_cpu["clock"]) == ("wall", "cpu") and by_cpu["quality"] == "A"
    shift = 1.0
    with pytest.raises(UserError, match="no ratio: y of flowseg_jax differs from torch's by 0.33"):
        measure.measure(COMPONENTS["msda"], "tiny", "float32", rounds=1)
    with pytest.raises(UserError, match="msda is measured in float32, not in 'bfloat16'"):
        measure.main(["msda", "bfloat16"])


def test_one_expression_of_several_is_the_row_that_would_stand_alone():
    model, words = SIZES["tiny"].whole, SIZES["tiny"].words
    several, start = dummy_batch(model, 3, words), prefix(SIZES["tiny"].whole)
    one = one_of(several, 1, words)
    assert one.input_ids.shape == (1, start + words)
    assert (one.input_ids == IMAGE_TOKEN_INDEX).sum() == model.num_visual_tokens
    np.testing.assert_array_equal(one.input_ids[0, start:], several.input_ids[0, start + words : start + 2 * words])
    np.testing.assert_array_equal(one.position_ids[0], np.arange(start + words))
    assert set(one.phrase_ids[0]) == set(one.seg_ids[0]) == {-1, 0} and set(one.segment_ids[0]) == {0, 1}
    assert one.phrase_target.tolist() == [[1]]


def test_full_size_is_the_papers_with_1753_visual_tokens():
    full = SIZES["full"]
    assert full.model.num_visual_tokens == 1753 and full.prompt == 1800
    assert (full.seven.sam.num_hidden_layers, full.seven.siglip.num_hidden_layers, full.seven.llm.num_hidden_layers) == (
        4,
        5,
        6,
    )
    assert (full.seven.pixel_decoder.num_layers, full.seven.mask_decoder.num_layers, full.seven.llm.vocab_size) == (1, 2, 8192)
    assert full.seven.llm.hidden_size == 2560 and full.seven.sam.global_attn_indexes == (3,)


def test_startup_is_a_table(monkeypatch, capsys):
    stages = dict.fromkeys((*startup.STAGES, "total"), 1.25) | {"peak_gib": 2.0, "foreign": 0.1}
    monkeypatch.setattr(startup, "measure", lambda size: dict.fromkeys(startup.RUNS, stages))
    assert command.main(["startup", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| tiny, no cache, fresh state | 1.2 | 1.2 | 1.2 | 1.2 | 1.2 | 1.2 | 2.0 | 0.10 |"
    assert len(lines) == 5
    stages["foreign"] = 1.0
    assert command.main(["startup", "tiny"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [(c.name, dtype) for c in COMPONENTS.values() for dtype in c.dtypes])
def test_both_sides_of_a_component_compute_the_same(name, dtype):
    component = COMPONENTS[name]
    pair = components.build(component, "tiny", dtype)
    call = pair.peer(lambda layer: layer)
    outputs = {
        component.peer: measure.Readable(call, lambda found: measure.as_arrays(pair.peer_output(found))).output(),
        measure.OURS: measure.Readable(pair.ours, pair.our_output).output(),
    }
    assert all(np.abs(x).max() > 0 for x in outputs[measure.OURS].values())
    print(name, dtype, ratio.largest_difference(outputs, component.peer, pair.tolerance))


@pytest.mark.slow
def test_a_component_is_measured_from_the_command_line(tmp_path):
    out = tmp_path / "all.json"
    code = command.main(["resize", "--size=tiny", "--rounds=1", f"--json={out}"])
    (found,) = json.loads(out.read_text())["results"]
    assert code == (3 if found["quality"] == "C" else 0)
    assert found["component"] == "resize" and found["ratio"] > 0


@pytest.mark.slow
def test_a_run_starts_from_nothing_and_from_a_checkpoint():
    found = startup.measure("tiny")
    assert set(found) == set(startup.RUNS)
    assert all(run[stage] > 0 for run in found.values() for stage in startup.STAGES)
    assert found["full cache"]["compile"] < found["empty cache"]["compile"]


def test_a_longer_list_of_images_holds_no_more_a_line(tmp_path):
    short, long = (batch_prediction.measure_list(tmp_path, count) for count in (100, 2500))
    assert (short["bytes"], long["bytes"]) == (2000, 50_000) and all(r["index"] >= 0 <= r["resume"] for r in (short, long))

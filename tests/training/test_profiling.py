"""The profiler traces the steps that were asked for, whole and no others, and never ends a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from flowseg_jax.errors import UserError
from flowseg_jax.training.profiling import Profile, Profiler


@jax.jit
def train_step(x):
    with jax.named_scope("profiled_module"):
        return x @ x, x.sum()


def train(profile, directory, steps=range(1, 7), stop_behind=None):
    """A loop as `training.loop` has it; steps of which only metrics outlive the next one."""
    profiler = Profiler(profile, directory)
    x = jnp.eye(8)
    try:
        for step in steps:
            profiler.on_step_start(step)
            if step == stop_behind:
                raise KeyboardInterrupt
            x, metrics = train_step(x)
            profiler.on_step_end(step, metrics)
    except KeyboardInterrupt:
        pass
    finally:
        profiler.close()


def traced(directory):
    """The step numbers in the only trace of a directory, and the trace's name and bytes."""
    (path,) = directory.glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(int(dict(event.stats)["step_num"]) for event in events), path.parent.name, path.read_bytes()


def test_the_device_is_waited_for_before_a_trace_and_at_its_end(monkeypatch, tmp_path):
    """Else it would hold the end of the step before it, and not that of its last one."""
    told = []
    monkeypatch.setattr(jax, "block_until_ready", lambda result: told.append(("wait", result)))
    options = []
    start = lambda directory, **more: options.append((directory, more)) or told.append("start")  # noqa: E731
    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    for directory in (str(tmp_path), "gs://bucket/run"):
        profiler = Profiler(Profile(2, 2), directory)
        for step in range(1, 7):
            profiler.on_step_start(step)
            told.append(step)
            profiler.on_step_end(step, step)
        profiler.close()
    assert told == [1, 2, ("wait", 2), "start", 3, 4, ("wait", 4), "stop", 5, 6] * 2
    (local, more), (remote, less) = options
    assert (local, remote) == (str(tmp_path), "gs://bucket/run")
    assert more["create_perfetto_trace"] and not less["create_perfetto_trace"]  # that one needs a disk
    assert more["profiler_options"].python_tracer_level == 0 and more["profiler_options"].session_id == "steps_3-4"


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:0", "-1:5", "1:2:3", "a:b", "1.5:2", "٣:٤"])
def test_what_is_no_profile_is_refused(text):
    with pytest.raises(UserError, match=r"--profile=.*: give START:STEPS"):
        Profile.parse(text)


def test_a_trace_holds_the_steps_after_start_and_the_named_scopes(tmp_path, capsys):
    train(Profile.parse("2:3"), tmp_path / "profile")
    steps, session, content = traced(tmp_path / "profile")
    assert (steps, session) == ([3, 4, 5], "steps_3-5")
    assert b"profiled_module" in content
    assert list(tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
    assert capsys.readouterr().out.startswith(f"the profile of 3 step(s) is in {tmp_path}/profile")


def test_a_run_that_ends_early_writes_what_it_has(tmp_path, capsys):
    train(Profile(2, 10), tmp_path, stop_behind=5)
    assert traced(tmp_path)[0] == [3, 4, 5]
    assert "the profile of 3 step(s)" in capsys.readouterr().out


def test_a_run_resumed_between_the_steps_traces_the_rest(tmp_path):
    train(Profile(2, 3), tmp_path, steps=range(5, 7))
    assert traced(tmp_path)[0] == [5]


def test_nothing_is_traced_without_a_profile_after_the_steps_and_on_other_processes(tmp_path, capsys, monkeypatch):
    train(None, tmp_path)
    assert capsys.readouterr().out == ""
    train(Profile(0, 2), tmp_path, steps=range(3, 6))
    assert "none of the steps 1 to 2" in capsys.readouterr().out
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    train(Profile(1, 2), tmp_path)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    train(Profile(1, 2), blocked / "profile")
    assert f"the profile could not be written to {blocked}/profile" in capsys.readouterr().out

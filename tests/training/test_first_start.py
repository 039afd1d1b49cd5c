"""The note about a run's first start: written once, read by every later start."""

from __future__ import annotations

import json

import pytest

from flowseg_jax.training import first_start
from flowseg_jax.training.first_start import FILE, FirstStart


def test_the_first_start_is_noted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(first_start.time, "time", lambda: 1000.0)
    first = FirstStart.of(tmp_path)
    monkeypatch.setattr(first_start.time, "time", lambda: 1060.0)
    again = FirstStart.of(tmp_path)
    assert again == first and (again.time, again.seconds_ago()) == (1000.0, 60.0)
    monkeypatch.setattr(first_start.time, "time", lambda: 900.0)  # this host's clock is slow
    assert again.seconds_ago() == 0.0
    assert FirstStart.of(tmp_path / "other").run_id != first.run_id


A_RUN = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"time": 1}', f'{{"run_id": "{A_RUN}"}}', '{"time": 1, "run_id": "../../x"}', '{"time": 1, "run_id": 7}',
        *(f'{{"time": {time}, "run_id": "{A_RUN}"}}' for time in ('"x"', "true", "null", "NaN")),
    ],
)  # fmt: skip
def test_a_note_that_is_none_is_written_anew(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    found = FirstStart.of(tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == {"run_id": found.run_id, "time": found.time}
    assert FirstStart.of(tmp_path) == found and len(found.run_id) == 32
    assert found.run_id != A_RUN and 0 <= found.seconds_ago() < 1000  # nothing of the note is kept


def test_another_process_takes_what_the_first_one_says(tmp_path, monkeypatch):
    monkeypatch.setattr(first_start, "is_primary", lambda: False)
    monkeypatch.setattr(first_start, "all_gather_bytes", lambda mine: [b'{"run_id": "a", "time": 2.0}', mine])
    assert FirstStart.of(tmp_path) == FirstStart("a", 2.0) and list(tmp_path.iterdir()) == []


def test_a_note_of_another_form_is_the_same_run(tmp_path):
    (tmp_path / FILE).write_text(f'{{"time": 0, "run_id": "{A_RUN[:8]}-{A_RUN[8:].upper()}"}}')
    assert FirstStart.of(tmp_path) == FirstStart(A_RUN, 0)

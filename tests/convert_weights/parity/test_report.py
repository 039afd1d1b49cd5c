"""Errors, limits and the account of what was not compared."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from convert_weights.parity.report import ParityReport, Row, relative_error


def test_relative_error():
    """Relative to the maximum of the recorded array; equal infinities are equal; a number that is none is infinitely wrong."""
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert relative_error(np.array([1e-9]), np.array([0.0])) == 1e-9
    assert relative_error(np.array([1e-9]), np.array([2e-9]), scale=1.0) == pytest.approx(1e-9)
    assert relative_error(np.array([np.nan]), np.array([1.0])) == np.inf
    assert relative_error(np.array([1.0]), np.array([np.nan])) == np.inf
    assert relative_error(np.zeros((0, 2)), np.zeros((0, 2))) == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a table has no warning of NumPy between its lines
        assert relative_error(np.array([np.inf, 1.0]), np.array([np.inf, 1.0])) == 0.0


def test_rows():
    report = ParityReport({"a.npz": ["x", "y", "mask", "in", "q/1", "odd"]})
    report.compare("a.npz", "x", np.ones(4), np.full(4, 1 + 1e-5), "activation")
    report.compare("a.npz", "y", np.ones((2, 2)), np.ones(4), "loss")
    report.compare("a.npz", "mask", np.array([1, 0, 1, 1]), np.array([1, 1, 1, 1]), "exact")
    report.used("a.npz", "in")
    report.explain("a.npz", r"q/\d", "a reason")
    ok = {row.name: row.ok for row in report.rows}
    assert ok == {"x": True, "y": False, "mask": False} and not report.ok
    assert report.rows[1].error == np.inf and "[2, 2]" in report.rows[1].note
    assert report.rows[2].error == 0.25
    assert [name for _, name, _ in report.not_compared()] == ["in", "q/1", "odd"]
    assert [why for *_, why in report.not_compared()][:2] == ["an input of the computation", "a reason"]
    assert "1 of 3 arrays within their limits" in report.text()
    assert report.as_json()["arrays"][1]["error"] is None


def test_only_some_elements():
    """`where` selects over the leading axes; padding may hold anything."""
    report = ParityReport({})
    ours, theirs = np.ones((2, 3, 4)), np.ones((2, 3, 4))
    ours[1, 2] = np.nan
    where = np.array([[True] * 3, [True, True, False]])
    report.compare("a.npz", "x", ours, theirs, "activation", where=where)
    assert report.ok


def test_a_limit_belongs_to_a_kind():
    assert [Row("f", "n", kind, (), 5e-4).ok for kind in ("activation", "gradient")] == [False, True]

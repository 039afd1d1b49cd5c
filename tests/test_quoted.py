"""Values from files in messages: bounded before they are formatted."""

import errno
import itertools
import os
import sys

import pytest

from flowseg_jax.errors import NOT_WRITABLE, UserError, brief, did_you_mean, listed, not_writable, plain, quoted


def laughs() -> list:
    """A list of a few hundred references that stands for 10^12 texts."""
    value = ["x"] * 10
    for _ in range(11):
        value = [value] * 10
    return value


def ring() -> list:
    value = []
    value.append(value)
    return value


def deep() -> list:
    value = []
    for _ in range(3 * sys.getrecursionlimit()):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (5, "5"),
        ("5", "'5'"),
        (None, "None"),
        (["11"], "['11']"),
        ({"a": 1}, "{'a': 1}"),
        ("x" * 60, f"'{'x' * 60}'"),
        ("x" * 10**7, f"'{'x' * 60}'..."),
        (b"x" * 10**7, f"b'{'x' * 60}'..."),
        (10**5000, "<a number of 16610 bits>"),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, ...]"),
        ({str(i): i for i in range(10**5)}, "{'0': 0, '1': 1, '2': 2, '3': 3, ...}"),
        (ring(), "[[[[...]]]]"),
        (deep(), "[[[[...]]]]"),
    ],
    ids=itertools.count(),
)
def test_quoted(value, said):
    assert quoted(value) == said


def test_quoted_is_bounded_whatever_it_holds():
    for value in (laughs(), ["\x00" * 100] * 6, {"k" * 1000: ["v" * 1000] * 10}):
        assert len(quoted(value)) <= 60
    assert quoted("a\nb\x1b") == "'a\\nb\\x1b'" and len(quoted("\U000e0001" * 10**6)) < 700


def test_brief_is_one_line():
    assert brief(ValueError("a\n b" + "x" * 10**6)) == "a b" + "x" * 196
    assert brief(KeyError()) == "KeyError"


def test_names_are_listed_up_to_a_number():
    assert listed("abc") == "a, b, c" and listed([*map(str, range(12))]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert len(listed(["x" * 10**6])) == 200
    assert (
        did_you_mean("vall", ["val", "train"]) == " (did you mean 'val'?)" and did_you_mean("q", ["b", "a"]) == " (known: a, b)"
    )
    assert len(did_you_mean("q" * 10**5, (f"{i}" * 100 for i in range(10**5)))) < 7000


def test_where_a_value_is_cut():
    assert quoted(2**127 - 1) == str(2**127 - 1) and quoted(2**127) == "<a number of 128 bits>"
    assert quoted("x" * 5, 5) == "'xxxxx'" and quoted("x" * 6, 5) == "'xxxxx'..." and quoted(b"xxxxxx", 5) == "b'xxxxx'..."
    whole = quoted([1, 2, 3], 9)
    assert whole == "[1, 2, 3]" and quoted([1, 2, 3], 8) == "[1, 2..."
    assert quoted([b"x" * 60]) == "[b'" + "x" * 54 + "..." and quoted([b"xx"]) == "[b'xx']"
    assert quoted(dict.fromkeys("abcd")) == "{'a': None, 'b': None, 'c': None, 'd': None}"
    assert quoted({"a": {"b": {"c": {"d": 1}}}}) == "{'a': {'b': {'c': {...}}}}"
    assert plain("x" * 200) == "x" * 200 and plain("x" * 201) == "x" * 199 + "…" and plain("ab\nc", 3) == "ab…"
    assert plain(5) == "a int" and plain("\t") == "\\t"
    assert listed(range(10)) == ", ".join(["a int"] * 10) and listed("abcd", 2, " + ") == "a + b and 2 more"
    assert brief(ValueError("x" * 201)) == "x" * 200


def test_which_names_are_compared():
    many = [f"n{i:04d}" for i in range(1001)]
    assert did_you_mean("n0999", many) == " (did you mean 'n0999'?)" and "'n1000'" not in did_you_mean("n1000", many)
    assert did_you_mean("x" * 60, ["x" * 60]) == f" (did you mean {'x' * 60!r}?)"
    assert did_you_mean("x" * 60, ["x" * 61]) == f" (known: {'x' * 61})"
    assert did_you_mean("x" * 60 + "y" * 900, ["x" * 60]) == f" (did you mean {'x' * 60!r}?)"
    assert did_you_mean("q", map(str, range(31))).endswith(" and 1 more)") and "more" not in did_you_mean("q", "abcdefghij" * 3)


@pytest.mark.parametrize("code", NOT_WRITABLE)
def test_why_a_file_cannot_be_written(code):
    assert not_writable(OSError(code, os.strerror(code))) == os.strerror(code)
    assert not_writable(OSError(code, os.strerror(code), "a\nb")) == f"{os.strerror(code)}: a\\nb"
    assert not_writable(ValueError(f"a library: {os.strerror(code)} (7)")) == os.strerror(code)
    assert not_writable(UserError(f"told already: {os.strerror(code)}")) is None
    assert not_writable(FileNotFoundError(errno.ENOENT, "No such file or directory")) is None

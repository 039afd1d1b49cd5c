"""Values from files in messages: bounded before they are formatted."""

import itertools
import sys

import pytest

from flowseg_jax.errors import brief, did_you_mean, listed, quoted


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

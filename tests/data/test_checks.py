"""Texts that a data set may hold: their shortest and longest, and what looks like a text and is none."""

from __future__ import annotations

import pytest

from flowseg_jax.data.checks import MAX_CHARACTERS, check_text
from flowseg_jax.errors import UserError


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u200b", "\u00ad", " \u200b ", "\u3000"])
def test_a_text_without_a_character_that_is_seen_is_blank(text):
    with pytest.raises(UserError, match="f:3: .* is blank; write what it says or remove it"):
        check_text(text, "f:3")


def test_white_space_around_a_text_is_taken_off_before_it_is_measured():
    longest = "x" * MAX_CHARACTERS
    assert check_text(f"  {longest}\n", "f") == longest and check_text("\u200b.", "f") == "\u200b."
    with pytest.raises(UserError, match=rf"f: {MAX_CHARACTERS + 1:,} characters, more than {MAX_CHARACTERS:,}: shorten it"):
        check_text(longest + "x", "f")
    assert check_text("ab", "f", 2) == "ab" and check_text(2 * longest, "f", None) == 2 * longest
    with pytest.raises(UserError, match="f: 3 characters, more than 2: "):
        check_text("abc", "f", 2)


def test_a_special_token_is_found_in_any_case_and_a_bracket_alone_is_none():
    for text in ("a <seg> b", "<P>x", "x</p>"):
        with pytest.raises(UserError, match="f: contains the special token .*, which a model would take for one"):
            check_text(text, "f")
    assert check_text("a < b", "f") == "a < b"


def test_half_of_a_pair_is_named_with_its_place():
    with pytest.raises(UserError, match=r"f: half of a character pair \('\\ud83d'\) at character 2; write it anew"):
        check_text("ab\ud83d", "f")
    assert check_text("é \U0001f600", "f") == "é \U0001f600"

"""What a text of a data set must be. Every reader of `formats/` asks here, so `validate`, `prepare` and `preview` agree.

A text is checked where it is read: only there are its file, its line or id, and its field known.
"""

from __future__ import annotations

import re
import unicodedata

from flowseg_jax.data.prompts import CHAT_TEMPLATES
from flowseg_jax.data.tokenizer import SPECIAL_TOKENS
from flowseg_jax.errors import UserError

MAX_CHARACTERS = 2_000  # of one text: about 500 tokens, what the full-size configs have room for after the image
SPECIAL_STRINGS = tuple(
    dict.fromkeys((*SPECIAL_TOKENS, *(token for chat in CHAT_TEMPLATES.values() for token in chat.special_tokens)))
)
_HALF = re.compile("[\ud800-\udfff]")  # half of a pair of UTF-16, which no file of UTF-8 can hold


def visible_text(text: str) -> str:
    """A text as a reader sees it: white space collapsed, without the characters that have no shape."""
    text = "".join(c if c.isprintable() else " " for c in unicodedata.normalize("NFKC", text))
    return " ".join(text.split())


def check_storable(text: str, where: str) -> str:
    """A text that is stored but that the model never reads, such as a file name; returned as it is.

    Args:
        text: from a file.
        where: file, line or id, and field, for the message.

    Raises:
        UserError: it has half of a character pair.
    """
    if not text.isascii() and (found := _HALF.search(text)):
        raise UserError(f"{where}: half of a character pair ({found[0]!a}) at character {found.start()}; write it anew")
    return text


def check_text(text: str, where: str, limit: int | None = MAX_CHARACTERS) -> str:
    """A text that the model reads or writes; returned without the white space around it.

    Args:
        text: from a file.
        where: file, line or id, and field, for the message.
        limit: characters that it may have; None for any number (chats, which training cuts).

    Raises:
        UserError: it is blank, cannot be stored, has a special token in it, which would be taken for one, or is too long.
    """
    check_storable(text, where)
    if not any(c.isprintable() and not c.isspace() for c in text):
        raise UserError(f"{where}: {text[:40]!r} is blank; write what it says or remove it")
    text = text.strip()
    if "<" in text:  # as all special tokens have it
        low = text.lower()
        for token in SPECIAL_STRINGS:
            if token.lower() in low:
                raise UserError(
                    f"{where}: contains the special token {token!r}, which a model would take for one; write it otherwise"
                )
    if limit is not None and len(text) > limit:
        raise UserError(
            f"{where}: {len(text):,} characters, more than {limit:,}: shorten it, or raise --max-characters here and "
            "data.text_length in training"
        )
    return text

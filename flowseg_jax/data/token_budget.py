"""How much room the images of a data set need in a batch, known before any of them is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowseg_jax.data.collate import encode_prefix
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.records import Turn
from flowseg_jax.data.tokenizer import Tokenizer


class TokenBudget:
    """How many tokens an image can need at most, whatever prompt template is drawn.

    A special token splits the text, so a conversation is exactly as long as its prompt template plus its phrases.

    Attributes:
        prefix: tokens before the first conversation, those of the image included.
    """

    def __init__(self, prompts: PromptTemplates, tokenizer: Tokenizer, visual_tokens: int):
        self._tokenizer = tokenizer
        chat = prompts.template

        def longest(turns: Sequence[Turn]) -> int:
            texts = [
                (t.question.format("<p></p>") + chat.assistant_prefix, t.answer.replace("{}", "") + chat.suffix) for t in turns
            ]
            return max(len(tokenizer.encode(q)) + len(tokenizer.encode(a)) for q, a in texts) - 2

        self.prefix = len(encode_prefix(prompts, tokenizer, visual_tokens))
        self._longest = {kind: longest(turns) for kind, turns in prompts.all_templates().items()}
        self._comma = len(tokenizer.encode("<p></p>, <p></p>")) - 4

    def phrase_lengths(self, phrases: Sequence[str]) -> list[int]:
        """Number of ids of each phrase with its two special tokens."""
        return phrase_lengths(self._tokenizer, phrases)

    def conversation(self, phrase: int, task: str = "referring") -> int:
        """At most so many tokens has the conversation about a phrase of that length (`phrase_lengths`), without its prefix."""
        return self._longest[task] + phrase

    def upper_bounds(self, longest: np.ndarray, phrases: np.ndarray, task: str) -> np.ndarray:
        """Tokens of each image with one conversation a phrase: prefix, its phrases' lengths in all, prompt templates.

        Args:
            longest: int64 [n], sum of the lengths of an image's phrases (`phrase_lengths`) and answers (`answer_lengths`).
            phrases: int [n], how many they are.
            task: "referring" or "reasoning", which are worded differently.
        """
        return self.prefix + longest + phrases * self._longest[task]

    def upper_bound(self, phrases: Sequence[int], names: Sequence[int] = (), task: str = "referring") -> int:
        """Tokens for one conversation a phrase and, if there are names, a generic one; lengths from `phrase_lengths`."""
        total = self.prefix + sum(phrases) + len(phrases) * self._longest[task]
        return total + (self.naming(sum(names), len(names)) if names else 0)

    def naming(self, total: Any, names: Any) -> Any:
        """Tokens for a generic conversation after the prefix: its names' lengths in all, and how many they are (> 0)."""
        return self._longest["generic"] + total + (names - 1) * self._comma

    def generic(self, names: Sequence[int]) -> int:
        """Tokens for a generic conversation alone; the names' lengths from `phrase_lengths`."""
        return self.prefix + self.naming(sum(names), len(names))


def phrase_lengths(tokenizer: Tokenizer, phrases: Sequence[str]) -> list[int]:
    """Number of ids of each phrase with its two special tokens."""
    return tokenizer.lengths([f"<p>{' '.join(p.lower().split())}</p>" for p in phrases])


def answer_lengths(tokenizer: Tokenizer, answers: Sequence[str]) -> list[int]:
    """At most so many ids does each explanation add to the answer: its neighbours may be cut into other tokens."""
    return [n + 2 if text else 0 for n, text in zip(tokenizer.lengths(answers), answers, strict=True)]

"""What is said to the language model: chat templates, questions and answers, in our own words.

Index 0 of every list is the fixed prompt template of evaluation; training draws among all of them. An expression is
lower-cased and wrapped `<p>...</p>` without spaces; the answer carries one `<SEG>`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowseg_jax import fields
from flowseg_jax.data.records import Turn
from flowseg_jax.data.tokenizer import PHRASE_END, PHRASE_START, SEG, Tokenizer
from flowseg_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template: `user_prefix` input `assistant_prefix` answer `suffix`, turns joined by `separator`.

    The answer and its suffix are trained, the rest is not. The image stands right after the first `user_prefix`. Each of
    `special_tokens` must be one id in the tokenizer.
    """

    user_prefix: str
    assistant_prefix: str
    suffix: str
    separator: str
    special_tokens: tuple[str, ...]


_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_IM = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATES = {
    "qwen3_instruct": ChatTemplate("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n", _IM),
    "qwen3_wothinking": ChatTemplate(
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>", "\n", _IM
    ),
    "phi3_chat": ChatTemplate(
        "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>", "\n", ("<|user|>", "<|end|>", "<|assistant|>")
    ),
    "llama3_chat": ChatTemplate(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        _LLAMA3,
    ),
}


def as_jinja(chat: ChatTemplate, *, bos: bool) -> str:
    """The template in the language of transformers' `apply_chat_template`, with the tokenizer's bos first or without."""
    user, assistant = (
        json.dumps([before, after]) for before, after in ((chat.user_prefix, chat.assistant_prefix), ("", chat.suffix))
    )
    return (
        ("{{ bos_token }}" if bos else "")
        + "{% for message in messages %}{% set around = "
        + f"{user} if message['role'] == 'user' else {assistant} %}}"
        + f"{{{{ {json.dumps(chat.separator)} if message['role'] == 'user' and not loop.first }}}}"
        + "{{ around[0] + message['content'] + around[1] }}{% endfor %}"
    )


REFERRING_QUESTIONS = (
    "Segment {}.",
    "Which pixels belong to {}?",
    "Find {} and give me its mask.",
    "Show me {}, please.",
    "I am looking for {}. Mark it.",
    "Where is {}? Outline it.",
    "Cut {} out of this photo.",
    "Point out {} with a mask.",
)
REFERRING_ANSWERS = (
    f"{SEG}.",
    f"Here: {SEG}.",
    f"This is it: {SEG}.",
    f"I found it, {SEG}.",
    f"Its mask is {SEG}.",
)
REASONING_QUESTIONS = (  # a whole question, which asks for the thing itself
    "{} Answer with a mask.",
    "{} Segment it.",
    "{} Show me which pixels you mean.",
    "Look closely. {} Mark the answer.",
)
EXPLAIN_QUESTIONS = (
    "{} Answer with a mask and explain why.",
    "{} Segment it, and give the reason.",
    "{} Show me the pixels and say how you know.",
)
EXPLAIN_ANSWERS = (f"{SEG}. {{}}", f"Here: {SEG}. {{}}", f"This is it: {SEG}. {{}}")
GENERIC_QUESTIONS = (
    "Segment all of these: {}.",
    "Mark every object of these kinds: {}.",
    "Which pixels show one of {}?",
    "Give me a mask for each of the following: {}.",
)
GENERIC_ANSWERS = (f"{SEG}.", f"Here they are: {SEG}.", f"All of them: {SEG}.")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns after one image, with the phrase number of each `<p>` span and of each `<SEG>`, in the order of the text."""

    turns: tuple[Turn, ...]
    phrases: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptTemplates:
    """How conversations are written.

    Attributes:
        chat_template: name of the chat template.
        question, answer: which prompt template evaluation uses (and training, when `randomize` is off).
        randomize: training draws the prompt template at random.
    """

    chat_template: str = "qwen3_instruct"
    question: int = 0
    answer: int = 0
    randomize: bool = True

    def __post_init__(self):
        if self.chat_template not in CHAT_TEMPLATES:
            hint = did_you_mean(self.chat_template, CHAT_TEMPLATES)
            raise UserError(f"prompts.chat_template: unknown chat template {self.chat_template!r}{hint}")
        for name, lists in (("question", REFERRING_QUESTIONS), ("answer", REFERRING_ANSWERS)):
            if not 0 <= getattr(self, name) < len(lists):
                raise UserError(f"prompts.{name}: {getattr(self, name)} is not one of the prompt templates 0..{len(lists) - 1}")

    @classmethod
    def of_model(cls, extra: Mapping[str, Any], directory: object) -> PromptTemplates:
        """The prompt templates that a model directory names in its `extra`. UserError for a value that names none."""
        return fields.read(cls, extra.get("prompts", {}), f"{directory}/config.json: extra.prompts")

    @property
    def template(self) -> ChatTemplate:
        return CHAT_TEMPLATES[self.chat_template]

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens that the tokenizer must know as one id each."""
        return self.template.special_tokens

    def eos_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an answer which the model writes: the first of the template's suffix, and the tokenizer's own."""
        own = tokenizer.hf.eos_token_id
        return tuple({*tokenizer.encode(self.template.suffix)[:1], *(() if own is None else (own,))})

    def _choose(self, questions: Sequence[str], answers: Sequence[str], rng: np.random.Generator | None) -> tuple[str, str]:
        if rng is not None and self.randomize:
            return questions[rng.integers(len(questions))], answers[rng.integers(len(answers))]
        return questions[min(self.question, len(questions) - 1)], answers[min(self.answer, len(answers) - 1)]

    def referring(self, phrase: str, number: int, rng: np.random.Generator | None = None) -> Conversation:
        """The conversation that asks for one phrase.

        Args:
            phrase: the expression; lower-cased and stripped here.
            number: the phrase's number, 0..K-1.
            rng: draws the prompt template in training; None for the fixed one.
        """
        question, answer = self._choose(REFERRING_QUESTIONS, REFERRING_ANSWERS, rng)
        return Conversation((Turn(question.format(wrap_phrase(phrase)), answer),), (number,), (number,))

    def generic(self, names: Sequence[str], first: int, rng: np.random.Generator | None = None) -> Conversation:
        """The conversation that asks for all objects of the named categories at once, with one `<SEG>`.

        Args:
            names: category names.
            first: number of the first name's phrase (K); the others count on from it, and the `<SEG>` bears it.
            rng: draws the prompt template in training; None for the fixed one.
        """
        question, answer = self._choose(GENERIC_QUESTIONS, GENERIC_ANSWERS, rng)
        turn = Turn(question.format(", ".join(wrap_phrase(name) for name in names)), answer)
        return Conversation((turn,), tuple(range(first, first + len(names))), (first,))

    def reasoning(
        self, question: str, number: int, long: bool, explanation: str = "", rng: np.random.Generator | None = None
    ) -> Conversation:
        """The conversation that asks what has to be thought about.

        Args:
            question: a whole question, or a phrase that stands for the thing.
            number: its number, 0..K-1.
            long: whether it is a whole question.
            explanation: what the answer says after the mask; empty for the mask alone.
            rng: draws the prompt template in training; None for the fixed one.
        """
        if not (long or explanation):
            return self.referring(question, number, rng)
        templates = (EXPLAIN_QUESTIONS, EXPLAIN_ANSWERS) if explanation else (REASONING_QUESTIONS, REFERRING_ANSWERS)
        request, answer = self._choose(*templates, rng)
        # Not `format`: an explanation may have braces of its own.
        turn = Turn(request.format(wrap_phrase(question)), answer.replace("{}", explanation))
        return Conversation((turn,), (number,), (number,))

    def all_templates(self) -> dict[str, list[Turn]]:
        """Every prompt template of "referring", "reasoning" and "generic", with `{}` in place of the phrases."""
        referring = (REFERRING_QUESTIONS, REFERRING_ANSWERS)
        lists = {
            "referring": [referring],
            "reasoning": [referring, (REASONING_QUESTIONS, REFERRING_ANSWERS), (EXPLAIN_QUESTIONS, EXPLAIN_ANSWERS)],
            "generic": [(GENERIC_QUESTIONS, GENERIC_ANSWERS)],
        }
        if not self.randomize:
            return {kind: [Turn(*self._choose(*pair, None)) for pair in pairs] for kind, pairs in lists.items()}
        return {kind: [Turn(q, a) for qs, answers in pairs for q in qs for a in answers] for kind, pairs in lists.items()}


def wrap_phrase(phrase: str) -> str:
    """`<p>phrase</p>`, lower-cased and stripped, inner whitespace collapsed.

    Raises:
        UserError: nothing is left of the phrase.
    """
    words = " ".join(phrase.lower().split())
    if not words:
        raise UserError("an expression must not be empty")
    return f"{PHRASE_START}{words}{PHRASE_END}"


def check_phrase(phrase: str, tokenizer: Tokenizer, name: str) -> None:
    """Refuses an expression that contains one of the tokenizer's special tokens: it would be taken for it.

    Raises:
        UserError: naming the example and the special token.
    """
    if token := special_token(phrase, tokenizer):
        raise UserError(f"{name}: the expression {phrase!r} contains {token!r}, which is a special token of the tokenizer")


def special_token(phrase: str, tokenizer: Tokenizer) -> str | None:
    """The first of the tokenizer's special tokens that the phrase contains, in upper or lower case."""
    low = phrase.lower()
    return next((token for token in tokenizer.reserved if token.strip() and token.lower() in low), None)


def check_expressions(texts: Sequence[str], tokenizer: Tokenizer, where: str) -> None:
    """Raises a UserError, which names `where`, for texts that are no use: none, empty ones, special tokens."""
    if isinstance(texts, str):
        raise UserError(f"{where}: expected a list of texts, got one string")
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"{where}: a text is empty: say what to segment")
    for text in texts:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"{where}: the text {text!r} has half of a character pair: it is no Unicode")
        check_phrase(text, tokenizer, where)


def template_corpus() -> list[str]:
    """What a tokenizer of our own should cover besides the expressions: prompt templates without special tokens.

    The fixed prompt templates and the chat's words stand in every prompt and are repeated accordingly, the others once.
    """
    lists = (REFERRING_QUESTIONS, REFERRING_ANSWERS, GENERIC_QUESTIONS, GENERIC_ANSWERS)  # of the `shapes` benchmark
    chunks = ["user\n", "assistant\n", *(template for templates in lists for template in templates)]
    fixed = ["user\n", "assistant\n", *(templates[0] for templates in lists)]
    parts = (part for chunk in (*fixed * 4, *chunks) for part in re.split(r"\s*(?:\{\}|" + re.escape(SEG) + ")", chunk))
    return [part for part in parts if part.strip()]

"""How much room the images of a data set need in a batch, known before any of them is read."""

from __future__ import annotations

from collections.abc import Sequence

from flowseg_jax.data.collate import encode_prefix
from flowseg_jax.data.dataset import IndexEntry
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.records import Turn
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.types import PAD, BatchShape


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
        return self._tokenizer.lengths([f"<p>{' '.join(p.lower().split())}</p>" for p in phrases])

    def conversation(self, phrase: int, task: str = "referring") -> int:
        """At most so many tokens has the conversation about a phrase of that length (`phrase_lengths`), without its prefix."""
        return self._longest[task] + phrase

    def answer_length(self, answer: str) -> int:
        """At most so many ids does an explanation add to the answer."""
        return len(self._tokenizer.encode(answer)) + 2 if answer else 0  # its neighbours may be cut into other tokens

    def upper_bound(self, phrases: Sequence[int], names: Sequence[int] = (), task: str = "referring") -> int:
        """Tokens for one conversation a phrase and, if there are names, a generic one; lengths from `phrase_lengths`."""
        total = self.prefix + sum(phrases) + len(phrases) * self._longest[task]
        return total + (self.generic(names) - self.prefix if names else 0)

    def generic(self, names: Sequence[int]) -> int:
        """Tokens for a generic conversation alone; the names' lengths from `phrase_lengths`."""
        return self.prefix + self._longest["generic"] + sum(names) + (len(names) - 1) * self._comma


def check_batch_shape(
    entries: Sequence[IndexEntry],
    phrases_at_most: int,
    shape: BatchShape,
    bound: TokenBudget,
    names: Sequence[str],
    all_objects: bool,
    task: str = "referring",
) -> None:
    """Refuses a shape that some image would overflow, before training instead of in the middle of it.

    Args:
        entries: the images and their expressions.
        phrases_at_most: phrases of one image at a time.
        shape: of the batch.
        bound: how long a text can get.
        names: category names, if a conversation names the image's categories.
        all_objects: every object of an image is a target.
        task: "referring" or "reasoning", which are worded differently.

    Raises:
        UserError: naming the image and what it needs.
    """
    prompts = sorted({s.prompt for e in entries for s in e.samples})
    length = dict(zip(prompts, bound.phrase_lengths(prompts), strict=True))
    name_length = bound.phrase_lengths(names)
    worst, worst_entry = 0, None
    for entry in entries:
        several = len({s.annotations for s in entry.samples if len(s.annotations) > 1})  # each a mask of its own
        masks_needed = len(entry.categories) + min(several, phrases_at_most)
        if all_objects and masks_needed > shape.max_masks:
            raise UserError(
                f"{entry.file_name}: has {masks_needed} objects, but the batch has room for {shape.max_masks} masks; "
                "raise data.max_masks or set data.objects='referred'"
            )
        each = (length[s.prompt] + bound.answer_length(s.answer) for s in entry.samples)
        longest = sorted(each, reverse=True)[:phrases_at_most]
        categories = sorted({c for c in entry.categories if c != PAD}) if names else []
        if len(categories) > shape.max_names:
            raise UserError(
                f"{entry.file_name}: has objects of {len(categories)} categories, but the batch has room for "
                f"{shape.max_names} names; raise data.max_names"
            )
        needed = bound.upper_bound(longest, [name_length[c] for c in categories], task)
        if needed > worst:
            worst, worst_entry = needed, entry
    if worst > shape.text_length:
        raise UserError(
            f"{worst_entry.file_name}: may need {worst} tokens, more than the text length {shape.text_length}; "
            "raise data.text_length or ask fewer phrases per image"
        )

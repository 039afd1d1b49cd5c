"""The card of a model directory: what the model was trained on, what it can be asked, and when it says "not found".

The card stands in config.json as `extra.model_card`, so the directory's checksums cover it; a directory may lack one. Beside
it, `extra.no_target_threshold` is the score below which the answer is "not found": `flowseg analyze calibrate-no-target
--model=DIR` measures and writes it. `flowseg seal` accepts a card that was edited.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from typing import Any

from flowseg_jax.checkpoints.stored_config import update_extra
from flowseg_jax.errors import listed, plain
from flowseg_jax.system import console
from flowseg_jax.system.json_files import expect, number

MOST_CHARACTERS, MOST_WORDS = 2000, 100_000
_WORD = re.compile(r"[^\W\d_]+")


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a model knows; empty where its directory does not say.

    Attributes:
        trained_on, can_be_asked: a sentence each.
        notice: a line that is said when the model is loaded.
        words: all that its training texts were made of; a text with another one is answered "not found". Empty: any.
        no_target: of `no_target_threshold`: `threshold`, `false_alarms` and `missed` (percent), `measured_on`.
    """

    trained_on: str = ""
    can_be_asked: str = ""
    notice: str = ""
    words: tuple[str, ...] = ()
    no_target: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_model(cls, extra: Mapping[str, Any], directory: str | os.PathLike[str]) -> ModelCard:
        """The card in the `extra` of a directory's config.json.

        Raises:
            UserError: it is not one, by its field.
        """
        where = f"{directory}/config.json: extra.model_card"
        card = extra.get("model_card", {})
        expect(isinstance(card, dict), card, where, "a group of keys")
        for name in ("trained_on", "can_be_asked", "notice"):
            text = card.get(name, "")
            expect(isinstance(text, str) and len(text) <= MOST_CHARACTERS, text, f"{where}.{name}", "a text")
        words, no_target = card.get("words", []), card.get("no_target", {})
        fine = isinstance(words, list) and len(words) <= MOST_WORDS and all(isinstance(word, str) for word in words)
        expect(fine, words, f"{where}.words", "a list of words")
        expect(isinstance(no_target, dict), no_target, f"{where}.no_target", "a group of keys")
        for name in ("threshold", "false_alarms", "missed"):
            value = no_target.get(name, 0)
            expect(number(value, least=0, most=100), value, f"{where}.no_target.{name}", "a number from 0 to 100")
        texts = (plain(card.get(name, ""), MOST_CHARACTERS) for name in ("trained_on", "can_be_asked", "notice"))
        return cls(*texts, tuple(words), no_target)

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(word.lower() for word in self.words)

    def unknown_words(self, text: str) -> tuple[str, ...]:
        """The words of a text that the model was never trained on, as far as the card says, each once."""
        if not self._known:
            return ()
        return tuple(dict.fromkeys(word for word in _WORD.findall(text.lower()) if word not in self._known))

    def lines(self) -> list[str]:
        """What it says, for people: a sentence or two a line."""
        found = [self.notice] if self.notice else []
        found += [f"It was trained on {self.trained_on}"] if self.trained_on else []
        found += [f"It can be asked for {self.can_be_asked}"] if self.can_be_asked else []
        if self.no_target:
            threshold, false_alarms, missed = (self.no_target.get(key, 0) for key in ("threshold", "false_alarms", "missed"))
            measured_on = plain(self.no_target.get("measured_on", ""))
            found.append(
                f'Scores below {threshold:.2f} mean "not found": {false_alarms:.1f} % false alarms, {missed:.1f} % missed'
                f" ({measured_on})."
            )
        return found

    def tell(self, directory: str | os.PathLike[str]) -> None:
        """Says `notice` on the console, once for each model of this process."""
        if self.notice:
            _tell_once(f"note: {os.path.basename(os.fspath(directory))}: {self.notice}")


@functools.cache
def _tell_once(line: str) -> None:
    console.note(line)


def write_no_target(
    directory: str | os.PathLike[str], *, threshold: float, false_alarms: float, missed: float, measured_on: str
) -> None:
    """Makes a calibrated threshold the model's own; rates in percent.

    Raises:
        UserError: no model directory, or it cannot be written.
    """
    measured = {"threshold": threshold, "false_alarms": false_alarms, "missed": missed, "measured_on": measured_on}

    def change(extra: dict[str, Any]) -> dict[str, Any]:
        return extra | {
            "no_target_threshold": threshold,
            "model_card": extra.get("model_card", {}) | {"no_target": measured},
        }

    update_extra(directory, change)


def unknown_note(words: tuple[str, ...]) -> str:
    """Why a text with words that the model does not know was not found."""
    return f"the model was never trained on {listed([repr(word) for word in words], 3)}"

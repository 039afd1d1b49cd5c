"""What a `Segmentor` makes of an image before it answers, and what it says where the model writes the answer itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from flowseg_jax.data.tokenizer import SEG
from flowseg_jax.inference.selection import Prediction, empty_prediction
from flowseg_jax.models.outputs import ImageCache
from flowseg_jax.types import ImageInputs


@dataclasses.dataclass(frozen=True)
class PreprocessedImage:
    """A decoded image as the model takes it.

    Attributes:
        name: what to call it. image: uint8 [H, W, 3], upright.
        inputs: it alone, as a batch.
        notes: what is special about its file, in words.
    """

    name: str
    image: UInt8[np.ndarray, "y x 3"]
    inputs: ImageInputs
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An encoded image, which any number of texts can be asked about.

    Attributes:
        name: what to call it. image: uint8 [H, W, 3], upright.
        resized_hw: int32 [1, 2], its size inside SAM's square input.
        cache: what the model keeps of it.
    """

    name: str
    image: UInt8[np.ndarray, "y x 3"]
    resized_hw: np.ndarray
    cache: ImageCache


@dataclasses.dataclass(frozen=True)
class GeneratedAnswer:
    """What the model wrote.

    Attributes:
        question: the text that it answers.
        text: its words, `<p>`, `</p>` and `<SEG>` included.
        complete: it came to an end before it ran out of tokens.
        predictions: one for each `<SEG>` that stands for a phrase.
        failure: why there is none where there should be one.
    """

    question: str
    text: str
    complete: bool
    predictions: Sequence[Prediction]
    failure: str | None = None

    @property
    def without_phrase(self) -> int:
        """How many `<SEG>` it has that stand for no phrase, so that there is no mask for them."""
        return self.text.count(SEG) - len(self.predictions)

    def or_empty(self, encoded: EncodedImage) -> Sequence[Prediction]:
        """The predictions; where there is none, one without a mask that carries the words."""
        return self.predictions or [empty_prediction(encoded.name, self.question, encoded.image, self.text, self.failure)]

"""What the page shows, as images, rows and text. Nothing here knows about the browser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from flowseg_jax.checkpoints.model_card import unknown_note
from flowseg_jax.errors import UserError
from flowseg_jax.inference.explanation import Explanation
from flowseg_jax.inference.selection import Prediction
from flowseg_jax.reports import answers, overlay
from flowseg_jax.reports.answers import color_of, on_page

Picture = UInt8[np.ndarray, "y x 3"]

MOST_TEXTS, MOST_CHARACTERS = 16, 300  # that one request may ask for


def read_texts(text: str) -> list[str]:
    """One expression per line; blank lines do not count.

    Raises:
        UserError: none, more than MOST_TEXTS, or one longer than MOST_CHARACTERS.
    """
    texts = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not texts:
        raise UserError("write what to segment, one expression per line")
    if len(texts) > MOST_TEXTS:
        raise UserError(f"{len(texts)} expressions at once: write at most {MOST_TEXTS}")
    longest = max(texts, key=len)
    if len(longest) > MOST_CHARACTERS:
        raise UserError(f"an expression has {len(longest)} characters: write at most {MOST_CHARACTERS}")
    return texts


def combined(predictions: Sequence[Prediction]) -> Picture:
    """All answers on one picture, each tinted and outlined in its colour; what nothing was found in stays grey."""
    return answers.combined(predictions[0].image, [p.mask for p in predictions])


def answer_rows(predictions: Sequence[Prediction]) -> list[list[Any]]:
    """Per expression: its colour (as `#rrggbb`), text, whether it was found, score and area in pixels."""
    return [
        [
            "#{:02x}{:02x}{:02x}".format(*color_of(number)),
            p.text,
            "found" if p.found else f"not found: {unknown_note(p.unknown_words)}" if p.unknown_words else "not found",
            None if p.score is None else round(p.score, 3),
            int(p.mask.sum()),
        ]
        for number, p in enumerate(predictions)
    ]


def candidates(predictions: Sequence[Prediction]) -> list[tuple[Picture, str]]:
    """A picture and a caption per candidate, expression by expression, highest score first."""
    return [
        (
            on_page(overlay.overlay(p.image, candidate.mask, color_of(number))),
            f"{p.text} · #{rank} · query {candidate.query} · {candidate.score:.3f}",
        )
        for number, p in enumerate(predictions)
        for rank, candidate in enumerate(p.candidates, 1)
    ]


def at_point(explanations: Sequence[Explanation], x: int, y: int) -> tuple[Picture, list[list[Any]]]:
    """What is at a pixel of the image: the mask of the query that owns it, and how every expression scores that query.

    The owner, in an expression's decoder pass, is the query whose mask logit is highest there. A query index has no fixed
    object: an expression changes the queries, so each row names its own owner.

    Returns:
        The picture of the first expression's owner; rows (expression, query, mask probability there, score).
    """
    rows, shown = [], None
    for number, explanation in enumerate(explanations):
        query, probability = explanation.owner(x, y)
        rows.append([explanation.prediction.text, query, round(probability, 3), round(float(explanation.scores[query]), 3)])
        if shown is None:
            shown = overlay.overlay(explanation.prediction.image, explanation.query_mask(query), color_of(number))
    return on_page(shown), rows


def layer(explanation: Explanation, number: int, color: tuple[int, int, int]) -> tuple[Picture, list[list[Any]]]:
    """The selected mask after `number` decoder layers (0: before the first), and the figures of that layer as rows."""
    found = explanation.layers[min(number, len(explanation.layers) - 1)]
    shown = lambda value: "-" if value is None else f"{value:.3f}"  # noqa: E731
    rows = [
        ["decoder layers", number],
        ["selected query", found.query],
        ["its score", shown(found.score)],
        ["margin over the runner-up (cosine)", shown(found.margin)],
        ["SR gate (1 keeps vision, 0 takes language)", shown(found.gate)],
        ["drift of the condition |C(l) - C(0)| / |C(0)|", shown(found.drift)],
    ]
    return on_page(overlay.overlay(explanation.prediction.image, found.mask, color)), rows


def boundary(explanation: Explanation, color: tuple[int, int, int]) -> list[tuple[Picture, str]]:
    """The selected mask before and after boundary refinement, and the band in which it may change; empty without BAR."""
    if explanation.band is None:
        return []
    image = explanation.prediction.image
    changed = int((explanation.before_boundary != explanation.after_boundary).sum())
    return [
        (on_page(overlay.overlay(image, explanation.before_boundary, color)), "before BAR"),
        (on_page(overlay.tint(overlay.fade(image, explanation.band), explanation.band, color)), "the band it may change"),
        (on_page(overlay.overlay(image, explanation.after_boundary, color)), f"after BAR: {changed} pixels changed"),
    ]


def as_json(predictions: Sequence[Prediction]) -> str:
    """The predictions as a JSON array of `Prediction.to_json`."""
    return json.dumps([p.to_json() for p in predictions], indent=1)


def as_python(checkpoint: str | None, image: str, texts: Sequence[str], options: dict[str, Any]) -> str:
    """Python that computes the same, to be pasted; every text is a literal, whatever is in it."""
    load = "load()" if checkpoint is None else f"load({checkpoint!r})"
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    return (
        "from flowseg_jax import load\n\n"
        f"segmentor = {load}\n"
        f"for prediction in segmentor.segment({image!r}, {list(texts)!r}{more}):\n"
        "    print(prediction)\n"
        "    prediction.save('predictions')\n"
    )

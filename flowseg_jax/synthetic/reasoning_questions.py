"""Indirect questions about a scene: they single out objects without naming a shape, colour or texture.

Every question is clear: a person who sees the picture has one answer. `REASONING_QUESTIONS` maps a kind of question to the
function that finds one in a scene, or None where the scene has none of the kind.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flowseg_jax.synthetic.expressions import MARGIN
from flowseg_jax.synthetic.scene import REFERENCE_SIZE, Scene, SceneObject

CLEAR_RATIO = 1.25  # of the largest and the second largest area or distance
# Inner corners count; a heart and a semicircle never have the most (see `_corners`).
CORNERS = {"circle": 0, "heart": 2, "semicircle": 2, "triangle": 3, "square": 4, "diamond": 4, "star": 10, "cross": 12}
LIKE = {
    "red": ("a ripe tomato", "a fire engine"),
    "orange": ("a carrot", "a pumpkin"),
    "yellow": ("a lemon", "a canary"),
    "green": ("fresh grass", "a frog"),
    "blue": ("a cornflower", "a pair of jeans"),
    "purple": ("an aubergine", "a ripe plum"),
    "black": ("coal", "a raven"),
    "white": ("fresh snow", "milk"),
    "circle": ("a coin", "a wheel"),
    "square": ("a field of a chess board", "a side of a die"),
    "triangle": ("a slice of pizza", "the roof of a tent"),
    "diamond": ("a kite", "a baseball infield"),
    "star": ("a sheriff's badge", "the ornament on top of a Christmas tree"),
    "cross": ("a plus sign", "the mark on a first-aid box"),
    "heart": ("a valentine", "the symbol of love"),
    "semicircle": ("a slice of melon", "a protractor"),
    "plain": ("a freshly painted wall", "a bed sheet that nobody has printed on"),
    "striped": ("a sailor's shirt", "a barber's pole"),
    "dotted": ("a face with chickenpox", "a leopard's fur"),
}


@dataclass(frozen=True)
class ReasoningQuestion:
    """A question and what it refers to.

    Attributes:
        targets: indices of the objects, ascending, not all of the scene's.
        short: phrases that mean the same, such as "the thing that would roll away".
        long: the same as whole questions.
        explanation: one sentence that says why.
    """

    targets: tuple[int, ...]
    short: tuple[str, ...]
    long: tuple[str, ...]
    explanation: str


def describe(item: SceneObject) -> str:
    """All attributes of an object: "large striped red star"."""
    return f"{item.size} {item.texture} {item.colour} {item.shape}"


def _question(targets: Sequence[int], short: Sequence[str], long: Sequence[str], explanation: str) -> ReasoningQuestion:
    """`[a|b]` in a text stands for a with one target, for b with several."""
    form = r"\1" if len(targets) == 1 else r"\2"
    texts = [tuple(re.sub(r"\[(.*?)\|(.*?)\]", form, text) for text in group) for group in (short, long, (explanation,))]
    return ReasoningQuestion(tuple(int(t) for t in targets), texts[0], texts[1], texts[2][0])


def _having(scene: Scene, kind: str, value: str) -> list[int]:
    return [i for i, item in enumerate(scene.items) if getattr(item, kind) == value]


def _first(values: np.ndarray) -> int | None:
    """The index of the largest value if it is clearly the largest."""
    order = np.argsort(-values)
    return int(order[0]) if values[order[0]] >= CLEAR_RATIO * values[order[1]] else None


Question = Callable[[Scene, random.Random], ReasoningQuestion | None]


def _same(kind: str, short: Sequence[str], long: Sequence[str], explanation: str) -> Question:
    """Asks for the things that share a value of an attribute; in the texts `{like}` is something that has it."""

    def question(scene: Scene, rng: random.Random) -> ReasoningQuestion | None:
        values = sorted({getattr(item, kind) for item in scene.items})
        if len(values) < 2:
            return None
        value = rng.choice(values)
        words = {"value": value, "like": rng.choice(LIKE[value])}
        texts = ([text.format(**words) for text in group] for group in (short, long))
        return _question(_having(scene, kind, value), *texts, explanation.format(**words))

    return question


_colour = _same(
    "colour",
    ("the thing[|s] with the colour of {like}", "what could be matched with {like} by its paint"),
    (
        "Which thing[|s] would a painter mix the same paint for as for {like}?",
        "What in this picture has the colour of {like}?",
    ),
    "The colour of {like} is {value}, and nothing else in the picture is {value}.",
)
_shape = _same(
    "shape",
    ("the thing[|s] with the outline of {like}", "what could stand for {like} in a drawing"),
    ("A child wants to draw {like}; which thing[|s] could be traced for it?", "What here has the outline of {like}?"),
    "The outline of {like} is a {value}, and no other shape in the picture is one.",
)
_texture = _same(
    "texture",
    ("the thing[|s] whose surface[|s] [looks|look] like {like}", "what is decorated in the way of {like}"),
    ("Which thing[|s] would look right beside {like}, whatever the colours?", "What has a surface like {like}?"),
    "Like {like}, [it is|they are] {value}, and nothing else in the picture is.",
)


def _paint_and_outline(scene: Scene, rng: random.Random) -> ReasoningQuestion | None:
    item = rng.choice(scene.items)
    same_colour, same_shape = (_having(scene, kind, getattr(item, kind)) for kind in ("colour", "shape"))
    targets = [i for i in same_colour if i in same_shape]
    if len(targets) == len(same_colour) or len(targets) == len(same_shape):  # half of the question would do
        return None
    paint, outline = rng.choice(LIKE[item.colour]), rng.choice(LIKE[item.shape])
    return _question(
        targets,
        (f"the thing[|s] with the outline of {outline} and the colour of {paint}",),
        (
            f"Imagine {outline} that has taken on the colour of {paint}; what looks like that?",
            f"Which thing[|s] [has|have] the outline of {outline} and the colour of {paint}?",
        ),
        f"The outline of {outline} is a {item.shape}, and the colour of {paint} is {item.colour}.",
    )


def _roll(scene: Scene, rng: random.Random) -> ReasoningQuestion | None:
    targets = _having(scene, "shape", "circle")
    if not targets or len(targets) == len(scene.items) or _having(scene, "shape", "semicircle"):  # that one would rock
        return None
    return _question(
        targets,
        ("the thing[|s] that would roll away", "what a child could roll along the floor"),
        (
            "If the ground were tilted a little, which thing[|s] would roll away?",
            "What would roll down a slope without stopping?",
        ),
        "A circle has no corners, so it would roll.",
    )


def _corners(scene: Scene, rng: random.Random) -> ReasoningQuestion | None:
    counts = [CORNERS[item.shape] for item in scene.items]
    targets = [i for i, count in enumerate(counts) if count == max(counts)]
    if max(counts) < 3 or len(targets) == len(counts):
        return None
    return _question(
        targets,
        ("the thing[|s] with the most corners",),
        ("Which thing[|s] [has|have] the most corners?", "What would take the longest to draw if every corner took a minute?"),
        f"A {scene.items[targets[0]].shape} has {max(counts)} corners, more than the others have.",
    )


def _room(scene: Scene, most: bool) -> ReasoningQuestion | None:
    if (target := _first(scene.areas if most else 1 / scene.areas)) is None:
        return None
    extreme, weight, more = ("most", "heaviest", "more") if most else ("least", "lightest", "less")
    return _question(
        [target],
        (f"the thing that takes up the {extreme} room", f"what would need the {extreme} paint to cover"),
        (
            f"Which thing takes up the {extreme} room?",
            f"If all of them were cut out of paper, which one would be the {weight}?",
        ),
        f"The {describe(scene.items[target])} covers {more} of the picture than anything else.",
    )


def _night(scene: Scene, rng: random.Random) -> ReasoningQuestion | None:
    targets = _having(scene, "colour", "black")
    if not targets or len(targets) == len(scene.items) or len({scene.items[i].texture for i in targets}) > 1:
        return None  # marks on the paint are brighter: of two patterns one would be easier to see
    return _question(
        targets,
        ("the thing[|s] hardest to spot at night", "what would vanish first when it gets dark"),
        ("Which thing[|s] would be hardest to spot at night?", "When the lights go out, what would be lost to sight first?"),
        "Black reflects the least light, so [it|they] would be hardest to see at night.",
    )


def _fall(scene: Scene, rng: random.Random) -> ReasoningQuestion | None:
    margin = MARGIN * scene.size / REFERENCE_SIZE
    lowest = np.array([np.flatnonzero(mask.any(axis=1))[-1] for mask in scene.masks])
    target = int(np.argmax(lowest))
    for heights in (lowest, scene.centres[:, 1]):
        if heights[target] < max(np.delete(heights, target)) + margin:
            return None
    return _question(
        [target],
        ("the thing that would hit the ground first if everything fell", "what is nearest to the ground"),
        (
            "If all of them fell straight down, which one would hit the ground first?",
            "What would get wet first in a rising flood?",
        ),
        f"The {describe(scene.items[target])} is nearest to the bottom of the picture.",
    )


def _alone(scene: Scene, rng: random.Random) -> ReasoningQuestion | None:
    gaps = [
        min(math.dist(scene.centres[i], scene.centres[j]) for j in range(len(scene.items)) if j != i)
        for i in range(len(scene.items))
    ]
    if (target := _first(np.array(gaps))) is None:
        return None
    return _question(
        [target],
        ("the loneliest thing", "the thing furthest from its nearest neighbour"),
        (
            "Which thing has the longest way to its nearest neighbour?",
            "If these were houses, whose nearest neighbour would be furthest?",
        ),
        f"The {describe(scene.items[target])} is further from its nearest neighbour than anything else.",
    )


def _odd(scene: Scene, rng: random.Random) -> ReasoningQuestion | None:
    found = set()
    for kind in ("shape", "colour", "texture"):
        values = [getattr(item, kind) for item in scene.items]
        single = [i for i, value in enumerate(values) if values.count(value) == 1]
        if len(set(values)) == 2 and len(single) == 1:
            found.add((single[0], kind, values[single[0]]))
    if len({target for target, _, _ in found}) != 1:
        return None
    target, kind, value = min(found)
    return _question(
        [target],
        ("the odd one out", "what does not belong with the rest"),
        ("Which one does not belong with the rest?", "If one had to go so that all are of a kind, which one would it be?"),
        f"All others have another {kind}, which they share; this one alone is {'a ' * (kind == 'shape')}{value}.",
    )


REASONING_QUESTIONS: dict[str, Question] = {
    "colour": _colour,
    "shape": _shape,
    "texture": _texture,
    "paint and outline": _paint_and_outline,
    "roll": _roll,
    "corners": _corners,
    "most room": lambda scene, rng: _room(scene, most=True),
    "least room": lambda scene, rng: _room(scene, most=False),
    "night": _night,
    "fall": _fall,
    "alone": _alone,
    "odd": _odd,
}

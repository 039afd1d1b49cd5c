"""Short conversations about a scene: questions with one true answer each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np

from flowseg_jax.synthetic.expressions import CONE, MARGIN, SIZE_RATIO, WRONG_SIDE
from flowseg_jax.synthetic.reasoning_questions import describe
from flowseg_jax.synthetic.scene import COLOURS, REFERENCE_SIZE, SHAPES, TEXTURES, Scene

MOST_TURNS = 3
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# side -> (axis of the centre, sign that makes the nearest to that side the smallest)
SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
BESIDE = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}

Turn = tuple[str, str]


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("ss") else "s")


def _amount(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun if number == 1 else _plural(noun)}"


def _there_are(number: int, noun: str) -> str:
    return f"There {'is' if number == 1 else 'are'} {_amount(number, noun)}."


def _total(scene: Scene, rng: random.Random) -> Turn:
    question = rng.choice(("How many things are there in the picture?", "How many things can you see?"))
    return question, _there_are(len(scene.items), "thing")


def _how_many(scene: Scene, rng: random.Random) -> Turn:
    kind, values = rng.choice((("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES)))
    present = [getattr(item, kind) for item in scene.items]
    value = rng.choice(values) if rng.random() < 0.25 else rng.choice(present)
    noun = value if kind == "shape" else f"{value} thing"
    return f"How many {_plural(noun)} are there?", _there_are(present.count(value), noun)


def _is_there(scene: Scene, rng: random.Random) -> Turn:
    present = {(item.colour, item.shape) for item in scene.items}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(present))
    else:  # words that occur in the scene, so that the answer takes a look at the pairs
        colour, shape = (rng.choice(sorted(words)) for words in zip(*present, strict=True))
    article = "an" if colour == "orange" else "a"
    answer = "Yes, there is." if (colour, shape) in present else "No, there is not."
    return f"Is there {article} {colour} {shape} in the picture?", answer


def _extreme(scene: Scene, rng: random.Random) -> Turn | None:
    word, areas = rng.choice((("biggest", -scene.areas), ("smallest", scene.areas)))
    order = np.argsort(areas)
    first, second = scene.areas[order[:2]]
    if max(first, second) < SIZE_RATIO * min(first, second):
        return None
    kind = rng.choice(("colour", "shape", "texture"))
    value = getattr(scene.items[order[0]], kind)
    question = {"colour": "What colour is", "shape": "What shape is", "texture": "Is it plain, striped or dotted:"}[kind]
    return f"{question} the {word} thing?", f"It is {'a ' * (kind == 'shape')}{value}."


def _furthest(scene: Scene, rng: random.Random) -> Turn | None:
    side = rng.choice(tuple(SIDES))
    axis, sign = SIDES[side]
    at = scene.centres[:, axis] * sign
    first, second = np.argsort(at)[:2]
    if at[second] - at[first] < MARGIN * scene.size / REFERENCE_SIZE:
        return None
    return f"What is nearest to the {side} of the picture?", f"A {describe(scene.items[first])}."


def _beside(scene: Scene, rng: random.Random) -> Turn | None:
    names = [f"{item.colour} {item.shape}" for item in scene.items]
    scale = scene.size / REFERENCE_SIZE
    options = []
    for anchor in (i for i, name in enumerate(names) if names.count(name) == 1):
        others = [item for i, item in enumerate(scene.items) if i != anchor]
        offsets = np.delete(scene.centres - scene.centres[anchor], anchor, axis=0)
        for relation, (axis, sign) in BESIDE.items():
            along, across = offsets[:, axis] * sign, np.abs(offsets[:, 1 - axis])
            clear = (along >= MARGIN * scale) & (along >= CONE * across)
            if 1 <= clear.sum() <= 2 and np.all(clear | (along <= -WRONG_SIDE * scale)):
                answer = " and ".join(f"a {describe(others[i])}" for i in np.flatnonzero(clear))
                options.append((f"What is {relation} the {names[anchor]}?", f"A{answer[1:]}."))
    return rng.choice(options) if options else None


def _caption(scene: Scene, rng: random.Random) -> Turn:
    kind = rng.choice(("shape", "colour"))
    counts = Counter(getattr(item, kind) for item in scene.items)
    nouns = [_amount(n, value if kind == "shape" else f"{value} thing") for value, n in sorted(counts.items())]
    listed = f"{', '.join(nouns[:-1])} and {nouns[-1]}" if len(nouns) > 1 else nouns[0]
    question = f"Say in one sentence which {kind}s the picture shows, and how many of each."
    return question, f"The picture shows {listed}."


_KINDS: tuple[Callable[[Scene, random.Random], Turn | None], ...] = (
    _total,
    _how_many,
    _is_there,
    _extreme,
    _furthest,
    _beside,
    _caption,
)


def conversation(scene: Scene, rng: random.Random) -> list[Turn]:
    """One to three (question, answer) pairs of different kinds, all true of the scene and clear to see."""
    kinds = rng.sample(_KINDS, len(_KINDS))
    turns = [turn for kind in kinds if (turn := kind(scene, rng))]
    return turns[: rng.randint(1, MOST_TURNS)]

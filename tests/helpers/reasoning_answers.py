"""What a question of the synthetic ReasonSeg means, by code that shares nothing with what writes the questions."""

from __future__ import annotations

import math
from typing import Any

Object = dict[str, Any]

# What a question means is written here a second time, word by word; nothing comes from the code that asks.

MEANS = {
    **dict.fromkeys(("tomato", "fire engine"), ("colour", "red")),
    **dict.fromkeys(("carrot", "pumpkin"), ("colour", "orange")),
    **dict.fromkeys(("lemon", "canary"), ("colour", "yellow")),
    **dict.fromkeys(("grass", "frog"), ("colour", "green")),
    **dict.fromkeys(("cornflower", "jeans"), ("colour", "blue")),
    **dict.fromkeys(("aubergine", "plum"), ("colour", "purple")),
    **dict.fromkeys(("coal", "raven"), ("colour", "black")),
    **dict.fromkeys(("snow", "milk"), ("colour", "white")),
    **dict.fromkeys(("coin", "wheel"), ("shape", "circle")),
    **dict.fromkeys(("chess board", "side of a die"), ("shape", "square")),
    **dict.fromkeys(("pizza", "roof of a tent"), ("shape", "triangle")),
    **dict.fromkeys(("kite", "baseball infield"), ("shape", "diamond")),
    **dict.fromkeys(("sheriff", "Christmas"), ("shape", "star")),
    **dict.fromkeys(("plus sign", "first-aid"), ("shape", "cross")),
    **dict.fromkeys(("valentine", "love"), ("shape", "heart")),
    **dict.fromkeys(("melon", "protractor"), ("shape", "semicircle")),
    **dict.fromkeys(("painted wall", "bed sheet"), ("texture", "plain")),
    **dict.fromkeys(("sailor", "barber"), ("texture", "striped")),
    **dict.fromkeys(("chickenpox", "leopard"), ("texture", "dotted")),
}
ABOUT = {
    "roll": "roll",
    "corner": "corners",
    **dict.fromkeys(("most room", "most paint", "heaviest"), "most"),
    **dict.fromkeys(("least room", "least paint", "lightest"), "least"),
    **dict.fromkeys(("at night", "gets dark", "lights go out"), "night"),
    **dict.fromkeys(("hit the ground", "nearest to the ground", "flood"), "fall"),
    **dict.fromkeys(("loneliest", "neighbour"), "alone"),
    **dict.fromkeys(("odd one", "belong", "of a kind"), "odd"),
}


def best(objects: list[Object], score: Any, ratio: float = 1.0, margin: float = 0.0) -> list[int]:
    """The object with the largest score, which must lead by so much that nobody doubts it."""
    order = sorted(range(len(objects)), key=lambda i: -score(objects[i]))
    first, second = (score(objects[i]) for i in order[:2])
    assert first >= ratio * second and first >= second + margin, (first, second)
    return order[:1]


def odd(objects: list[Object]) -> list[int]:
    found = {
        i
        for kind in ("shape", "colour", "texture")
        for i, o in enumerate(objects)
        if all(p[kind] != o[kind] for p in objects if p is not o) and len({p[kind] for p in objects if p is not o}) == 1
    }
    assert len(found) == 1
    return list(found)


def answer(text: str, objects: list[Object]) -> tuple[str, list[int]]:
    """The kind of a question and the objects that it is about."""
    meant = {MEANS[word] for word in MEANS if word in text}
    if meant:
        kinds = sorted(kind for kind, _ in meant)
        assert len(set(kinds)) == len(kinds)
        for kind, value in meant:  # no part of the question is enough
            fits = [all(o[k] == v for k, v in meant - {(kind, value)}) for o in objects]
            assert sum(fits) > sum(all(o[k] == v for k, v in meant) for o in objects)
        return " and ".join(kinds), [i for i, o in enumerate(objects) if all(o[k] == v for k, v in meant)]
    about = {ABOUT[word] for word in ABOUT if word in text}
    assert len(about) == 1, text
    kind = about.pop()
    match kind:
        case "roll":
            assert not any(o["shape"] == "semicircle" for o in objects)
            return kind, [i for i, o in enumerate(objects) if o["shape"] == "circle"]
        case "corners":
            outer = dict(zip(("triangle", "square", "diamond", "star", "cross"), (3, 4, 4, 5, 8), strict=True))
            inner = outer | {"star": 10, "cross": 12}
            most = [[i for i, o in enumerate(objects) if c.get(o["shape"], 2) == max(c.get(p["shape"], 2) for p in objects)]
                    for c in (outer, inner)]  # fmt: skip
            assert most[0] == most[1]  # whether one counts the inner corners or not
            return kind, most[0]
        case "most":
            return kind, best(objects, lambda o: o["area"], ratio=1.25)
        case "least":
            return kind, best(objects, lambda o: 1 / o["area"], ratio=1.25)
        case "night":
            assert len({o["texture"] for o in objects if o["colour"] == "black"}) == 1
            return kind, [i for i, o in enumerate(objects) if o["colour"] == "black"]
        case "fall":
            lowest = best(objects, lambda o: o["bbox"][1] + o["bbox"][3], margin=5.0)
            assert lowest == best(objects, lambda o: o["centre"][1], margin=5.0)
            return kind, lowest
        case "alone":
            return kind, best(
                objects, lambda o: min(math.dist(o["centre"], p["centre"]) for p in objects if p is not o), ratio=1.24
            )
    return kind, odd(objects)

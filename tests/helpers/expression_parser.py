"""Reads an expression of the benchmark and finds what it refers to; shares nothing with the code that wrote it.

A small grammar (`?` optional, `*` repeated) over words:

    phrase    = "the"? ordinal? adjective* noun modifier*
    modifier  = ("that" | "which") "is" predicate
              | relation phrase
              | ("with" | "without") ("stripes" | "dots")
              | "furthest" "to" "the" side
              | "from" "the"? side                      (completes the ordinal)
    predicate = "not" value | "neither" value "nor" value | relation phrase | ordinal "from" "the"? side | value ("and" value)*

A modifier belongs to the nearest noun, as English is usually read. Attributes and negations filter the objects of a noun first,
then relations, then superlatives and ordinals pick among what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Object = dict[str, Any]  # a scene-graph entry: ann_id, shape, colour, texture, size, centre [x, y], area


class _Rule(Protocol):
    def __call__(self, found: list[Object]) -> list[Object]: ...


_NOUNS = {w: w for w in "circle square triangle diamond star cross heart semicircle".split()} | {"thing": None, "object": None}
_VALUES = {w: ("colour", w) for w in "red orange yellow green blue purple black white".split()}
_VALUES |= {w: ("texture", w) for w in "plain striped dotted".split()}
_VALUES |= {"large": ("size", "large"), "big": ("size", "large"), "small": ("size", "small"), "little": ("size", "small")}
_PATTERNS = {"stripes": "striped", "dots": "dotted"}
_RANKS = {"second": 1, "third": 2, "fourth": 3}


def _x(o: Object) -> float:
    return o["centre"][0]


def _y(o: Object) -> float:
    return o["centre"][1]


def _area(o: Object) -> float:
    return o["area"]


# Sort keys under which the object in question comes first.
_FIRST_FROM: dict[str, Callable[[Object], float]] = {
    "left": _x,
    "right": lambda o: -_x(o),
    "top": _y,
    "bottom": lambda o: -_y(o),
}
_EXTREMES: dict[str, Callable[[Object], float]] = {
    "leftmost": _FIRST_FROM["left"],
    "rightmost": _FIRST_FROM["right"],
    "topmost": _FIRST_FROM["top"],
    "highest": _FIRST_FROM["top"],
    "lowest": _FIRST_FROM["bottom"],
    "bottommost": _FIRST_FROM["bottom"],
    "largest": lambda o: -_area(o),
    "biggest": lambda o: -_area(o),
    "smallest": _area,
}
# How far an object lies in a direction from an anchor, in pixels.
_OFFSETS: dict[str, Callable[[Object, Object], float]] = {
    "left": lambda o, anchor: _x(anchor) - _x(o),
    "right": lambda o, anchor: _x(o) - _x(anchor),
    "above": lambda o, anchor: _y(anchor) - _y(o),
    "below": lambda o, anchor: _y(o) - _y(anchor),
}
_RELATIONS = [
    (form.split(), direction)
    for direction, forms in {
        "left": ("to the left of", "to left of", "left of"),
        "right": ("to the right of", "to right of", "right of"),
        "above": ("above",),
        "below": ("below", "under"),
    }.items()
    for form in forms
]


class NotUnderstood(ValueError):
    """The expression is outside the grammar, or a noun inside it fits no object or several."""


@dataclass
class _Reader:
    words: Sequence[str]
    objects: Sequence[Object]
    margin: float
    at: int = 0

    def peek(self) -> str | None:
        return self.words[self.at] if self.at < len(self.words) else None

    def take(self, *options: str) -> str | None:
        """Consumes the next word when it is one of `options`."""
        word = self.peek()
        if word not in options:
            return None
        self.at += 1
        return word

    def need(self, options: Iterable[str]) -> str:
        options = tuple(options)
        word = self.take(*options)
        if word is None:
            raise NotUnderstood(f"{' '.join(self.words)!r}: expected one of {options} at word {self.at}, got {self.peek()!r}")
        return word

    def phrase(self) -> list[Object]:
        """Reads a noun phrase and returns what it fits."""
        self.take("the")
        first: Callable[[Object], float] | None = None
        rank = 0
        if word := self.take(*_EXTREMES):
            first = _EXTREMES[word]
        ordinal = self.take(*_RANKS)
        filters, relations = [], []
        while word := self.take(*_VALUES):
            filters.append(_equals(*_VALUES[word]))
        noun = _NOUNS[self.need(_NOUNS)]
        if noun is not None:
            filters.append(_equals("shape", noun))
        while self.peek() is not None:
            if self.take("with"):
                filters.append(_equals("texture", _PATTERNS[self.need(_PATTERNS)]))
            elif self.take("without"):
                filters.append(_differs("texture", _PATTERNS[self.need(_PATTERNS)]))
            elif self.take("furthest"):
                self.need(["to"])
                self.need(["the"])
                first = _FIRST_FROM[self.need(_FIRST_FROM)]
            elif self.peek() == "from":
                if ordinal is None:
                    break
                first, rank = self.side(), _RANKS[ordinal]
                ordinal = None
            elif self.take("that", "which"):
                self.need(["is"])
                if word := self.take(*_RANKS):
                    first, rank = self.side(), _RANKS[word]
                elif relation := self.relation():
                    relations.append(relation)
                else:
                    filters += self.predicate()
            elif relation := self.relation():
                relations.append(relation)
            else:
                raise NotUnderstood(f"{' '.join(self.words)!r}: no rule for {self.peek()!r} at word {self.at}")
        if ordinal is not None:
            raise NotUnderstood(f"{' '.join(self.words)!r}: {ordinal!r} from which side?")
        found = list(self.objects)
        for rule in (*filters, *relations):
            found = rule(found)
        if first is None:
            return found
        return sorted(found, key=first)[rank : rank + 1]

    def side(self) -> Callable[[Object], float]:
        self.need(["from"])
        self.take("the")
        return _FIRST_FROM[self.need(_FIRST_FROM)]

    def predicate(self) -> list[_Rule]:
        if self.take("not"):
            return [_differs(*self.value())]
        if self.take("neither"):
            one = _differs(*self.value())
            self.need(["nor"])
            return [one, _differs(*self.value())]
        rules = [_equals(*self.value())]
        while self.take("and"):
            rules.append(_equals(*self.value()))
        return rules

    def value(self) -> tuple[str, str]:
        if self.take("a"):
            return "shape", self.need(noun for noun, shape in _NOUNS.items() if shape)
        return _VALUES[self.need(_VALUES)]

    def relation(self) -> _Rule | None:
        for words, direction in _RELATIONS:
            if list(self.words[self.at : self.at + len(words)]) == words:
                self.at += len(words)
                anchors = self.phrase()
                if len(anchors) != 1:
                    relation = " ".join(words)
                    raise NotUnderstood(f"{' '.join(self.words)!r}: {len(anchors)} objects fit the anchor of {relation!r}")
                offset, anchor, margin = _OFFSETS[direction], anchors[0], self.margin
                return lambda found: [o for o in found if o is not anchor and offset(o, anchor) > margin]
        return None


def _equals(kind: str, value: str) -> _Rule:
    return lambda found: [o for o in found if o[kind] == value]


def _differs(kind: str, value: str) -> _Rule:
    return lambda found: [o for o in found if o[kind] != value]


def resolve(expression: str, objects: Sequence[Object], margin: float = 0.0) -> list[int]:
    """Finds the objects an expression refers to.

    Args:
        expression: text in the grammar above.
        objects: the scene graph.
        margin: offset in pixels from which on an object counts as "left of" (and so on) an anchor; a clear expression gives the
            same answer for every margin in a range around 0.

    Returns:
        The `ann_id` of every object that fits: one for a valid expression. Ties of a superlative or ordinal keep the first.

    Raises:
        NotUnderstood: if the text is outside the grammar, or a noun inside it does not fit exactly one object.
    """
    reader = _Reader(expression.split(), objects, margin)
    found = reader.phrase()
    if reader.peek() is not None:
        raise NotUnderstood(f"{expression!r}: nothing expects {reader.peek()!r}")
    return [o["ann_id"] for o in found]

"""Referring expressions of the `shapes` benchmark: six families, each expression clearly true of exactly one object.

All valid expressions of a scene are enumerated on bit sets (bit i = object i) and then drawn by weight. "Clearly": positions
that are compared differ by at least `MARGIN` pixels, whatever an expression excludes is well on the other side, and the target
of a relation lies in the named direction rather than just barely on that side.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flowseg_jax.synthetic.scene import COLOURS, REFERENCE_SIZE, SHAPES, SIZES, TEXTURES, Scene, is_held_out

FAMILIES = ("attribute", "superlative", "relation", "ordinal", "negation", "two-hop")
NO_TARGET_FAMILY = "no-target"  # refers to nothing; a set has it on demand
NOTHING = -1  # the target of such an expression

MARGIN = 5.0  # pixels of a 128 pixel image between compared positions
WRONG_SIDE = 1.0  # how far (same unit) everything else must be on the wrong side of the anchor
CONE = 0.5  # the offset along the named direction is at least this share of the offset across it
SIZE_RATIO = 1.2  # between the visible areas of the most extreme object and the next

KINDS = ("size", "texture", "colour", "shape")
VALUES = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign

Descriptor = tuple[str | None, str | None, str | None, str | None]  # one value (or None) a kind, in the order of KINDS
Rows = list[tuple]  # rows that begin with their weight


@dataclass(frozen=True)
class GeneratedExpression:
    """`text` refers to object `target`, or to `NOTHING`.

    `rivals` objects (the target included) match the head noun with its attributes; 0 where the text refers to nothing.
    """

    text: str
    family: str
    target: int
    rivals: int


@dataclass(frozen=True)
class _Candidate:
    weight: float
    rivals: int
    phrase: Callable[[Paraphraser], str]


_SUPERLATIVES = {  # what is compared, axis, sign: the words
    ("position", 0, -1): ("leftmost {}", "leftmost {}", "{} furthest to the left"),
    ("position", 0, 1): ("rightmost {}", "rightmost {}", "{} furthest to the right"),
    ("position", 1, -1): ("topmost {}", "highest {}"),
    ("position", 1, 1): ("lowest {}", "lowest {}", "bottommost {}"),
    ("area", 0, 1): ("largest {}", "biggest {}"),
    ("area", 0, -1): ("smallest {}",),
}
_SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}  # axis, sign
_RANKS = ("second", "third", "fourth")


class Paraphraser:
    """Puts descriptors into words. One speaker is one style: with or without articles, with its favourite synonyms."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.article = "the " if rng.random() < 0.75 else ""
        self.words = {
            "large": rng.choice(("large", "large", "big")),
            "small": rng.choice(("small", "small", "little")),
            None: rng.choice(("thing", "thing", "object")),
        }
        self.texture_last = rng.random() < 0.25

    def word(self, value: str | None) -> str:
        return self.words.get(value, value)

    def adjectives(self, what: Descriptor) -> list[str]:
        size, texture, colour, _ = what
        order = (size, colour, texture) if self.texture_last else (size, texture, colour)
        return [self.word(value) for value in order if value is not None]

    def bare(self, what: Descriptor) -> str:
        """ "large striped red circle"."""
        return " ".join([*self.adjectives(what), self.word(what[3])])

    def noun(self, what: Descriptor) -> str:
        return self.article + self.bare(what)

    def described(self, what: Descriptor) -> str:
        """A noun phrase in one of the orders "the red circle", "the circle that is red", "the circle with stripes"."""
        given = [kind for kind in range(3) if what[kind] is not None]
        form = self.rng.random()
        if form < 0.6 or not given:
            return self.noun(what)
        if form < 0.75 and what[1] in ("striped", "dotted"):
            return f"{self.noun((what[0], None, *what[2:]))} with {'stripes' if what[1] == 'striped' else 'dots'}"
        later = self.rng.sample(given, self.rng.choice((1, min(2, len(given)))))
        front = tuple(None if kind in later else value for kind, value in enumerate(what))
        return f"{self.noun(front)} that is {' and '.join(self.word(what[kind]) for kind in later)}"

    def relation(self, direction: str) -> str:
        return self.rng.choice(
            {
                "left": ("left of", "to the left of" if self.article else "to left of"),
                "right": ("right of", "to the right of" if self.article else "to right of"),
                "above": ("above",),
                "below": ("below", "below", "under"),
            }[direction]
        )

    def superlative(self, head: Descriptor, forms: tuple[str, ...]) -> str:
        form = self.rng.choice(forms) if self.article else self.rng.choice([f for f in forms if "the" not in f])
        return self.article + form.format(self.bare(head))

    def ordinal(self, head: Descriptor, word: str, side: str) -> str:
        place = f"from the {side}" if self.article else f"from {side}"
        if self.rng.random() < 0.7:
            return f"{self.article}{word} {self.bare(head)} {place}"
        return f"{self.noun(head)} that is {word} {place}"

    def related(self, head: Descriptor, direction: str, names: Rows) -> str:
        link = self.rng.choice((" ", " ", " that is ")) + self.relation(direction) + " "
        return self.noun(head) + link + self.noun(_pick(self.rng, names))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class ExpressionGenerator:
    """Every valid expression of one scene, by family and target."""

    def __init__(self, scene: Scene):
        self.count = len(scene.items)
        self.attributes = [(i.size, i.texture, i.colour, i.shape) for i in scene.items]
        self.scale = scene.size / REFERENCE_SIZE
        self.centres = scene.centres.tolist()
        self.areas = scene.areas.tolist()
        self._describe()
        self._compare()
        self._relations: dict[int, dict[int, list[tuple]]] = {}
        self._tables: dict[str, dict[int, list[_Candidate]]] = {}

    def _describe(self) -> None:
        """Fills `matches` (descriptor -> bit set) and `unique` (object -> weighted descriptors that fit it alone)."""
        self.matches: dict[Descriptor, int] = defaultdict(int)
        for i, attributes in enumerate(self.attributes):
            for keep in itertools.product((False, True), repeat=4):
                what = tuple(v if k else None for v, k in zip(attributes, keep, strict=True))
                self.matches[what] |= 1 << i
        self.unique: dict[int, list[tuple[float, Descriptor]]] = defaultdict(list)
        self.heads: list[tuple[float, Descriptor, int]] = []
        for what, mask in self.matches.items():
            adjectives = sum(v is not None for v in what[:3])
            weight = 0.5**adjectives * (1.0 if what[3] is not None else 0.35)
            if mask & (mask - 1):
                self.heads.append((weight, what, mask))
            elif any(what):
                self.unique[mask.bit_length() - 1].append((self._brevity(what, mask) * weight**0.5, what))

    def _brevity(self, what: Descriptor, mask: int) -> float:
        """1 for a descriptor that needs all its words, less for a redundant one."""
        dropped = (tuple(None if j == k else v for j, v in enumerate(what)) for k in range(4) if what[k] is not None)
        return 0.4 if any(self.matches[shorter] == mask for shorter in dropped) else 1.0

    def _compare(self) -> None:
        """Fills `there` and `not_there`: for a direction and an anchor, the objects clearly there and clearly not there."""
        self.there: dict[str, list[int]] = {}
        self.not_there: dict[str, list[int]] = {}
        for name, (axis, sign) in DIRECTIONS.items():
            self.there[name], self.not_there[name] = [0] * self.count, [0] * self.count
            for anchor, target in itertools.product(range(self.count), repeat=2):
                along = sign * (self.centres[target][axis] - self.centres[anchor][axis])
                across = abs(self.centres[target][1 - axis] - self.centres[anchor][1 - axis])
                if along >= MARGIN * self.scale and along >= CONE * across:
                    self.there[name][anchor] |= 1 << target
                elif target == anchor or along <= -WRONG_SIDE * self.scale:
                    self.not_there[name][anchor] |= 1 << target

    def _related(self, anchor: int) -> dict[int, list[tuple[float, Descriptor, int, str]]]:
        """Target -> (weight, head, rivals, direction) such that exactly the target is "head direction anchor"."""
        if anchor not in self._relations:
            found = self._relations[anchor] = defaultdict(list)
            for weight, head, mask in self.heads:
                others = mask & ~(1 << anchor)
                if not others & (others - 1):
                    continue
                for name in DIRECTIONS:
                    hit = others & self.there[name][anchor]
                    if hit and not hit & (hit - 1) and not others & ~hit & ~self.not_there[name][anchor]:
                        found[hit.bit_length() - 1].append((weight, head, mask.bit_count(), name))
        return self._relations[anchor]

    def table(self, family: str) -> dict[int, list[_Candidate]]:
        """Target -> candidates of one family."""
        if family not in self._tables:
            self._tables[family] = defaultdict(list)
            getattr(self, "_" + family.replace("-", "_"))(self._tables[family])
        return self._tables[family]

    def draw(self, rng: random.Random, family: str, target: int) -> GeneratedExpression | None:
        """One expression of `family` for `target`, or None when there is none."""
        options = self.table(family).get(target)
        if not options:
            return None
        (choice,) = rng.choices(options, [o.weight for o in options])
        return GeneratedExpression(choice.phrase(Paraphraser(rng)), family, target, choice.rivals)

    def draw_no_target(self, rng: random.Random) -> GeneratedExpression | None:
        """One expression that clearly refers to nothing in this scene, or None where the draw finds none.

        It is about as long as the others, and close to the scene: one word of an object's description is exchanged, the rank is
        higher than the count, or nothing is on that side of the anchor. A combination that training lacks is never asked for:
        it would be learned as absent.
        """
        speaker = Paraphraser(rng)
        draws = (self._absent_kind, self._absent_kind, self._absent_rank, self._absent_relation)
        text = rng.choice(draws)(rng, speaker)
        return text and GeneratedExpression(text, NO_TARGET_FAMILY, NOTHING, 0)

    def _absent_kind(self, rng: random.Random, speaker: Paraphraser) -> str | None:
        what = list(rng.choice(self.attributes))
        for kind in rng.sample(range(3), rng.choice((0, 1, 1, 2))):
            what[kind] = None
        changed = rng.choice([kind for kind in range(4) if what[kind] is not None])
        here = sorted({attributes[changed] for attributes in self.attributes})
        what[changed] = rng.choice(here if rng.random() < 0.7 else VALUES[KINDS[changed]])
        if tuple(what) in self.matches or (None not in what[1:] and is_held_out(what[2], what[3], what[1])):
            return None
        form = rng.random()
        if form < 0.6:
            return speaker.described(tuple(what))
        if form < 0.8:
            head = (None, *what[1:])
            return None if head in self.matches else speaker.superlative(head, rng.choice(list(_SUPERLATIVES.values())))
        return speaker.ordinal(tuple(what), rng.choice(_RANKS), rng.choice(list(_SIDES)))

    def _absent_rank(self, rng: random.Random, speaker: Paraphraser) -> str | None:
        head, mask = rng.choice(list(self.matches.items()))
        if not any(head) or mask.bit_count() > len(_RANKS):
            return None
        return speaker.ordinal(head, rng.choice(_RANKS[mask.bit_count() - 1 :]), rng.choice(list(_SIDES)))

    def _absent_relation(self, rng: random.Random, speaker: Paraphraser) -> str | None:
        anchor, names = rng.choice(list(self.unique.items())) if self.unique else (NOTHING, [])
        head, mask = rng.choice(list(self.matches.items()))
        direction = rng.choice(list(DIRECTIONS))
        others = mask & ~(1 << anchor) if names else 0
        if not others or others & ~self.not_there[direction][anchor]:
            return None
        return speaker.related(head, direction, names)

    def _attribute(self, table: dict[int, list[_Candidate]]) -> None:
        for target, options in self.unique.items():
            for weight, what in options:
                table[target].append(_Candidate(weight, 1, lambda s, what=what: s.described(what)))

    def _superlative(self, table: dict[int, list[_Candidate]]) -> None:
        for weight, head, mask in self.heads:
            for (what, axis, sign), forms in _SUPERLATIVES.items():
                if what == "area":
                    if head[0] is not None:  # "the largest small circle" is hard to read
                        continue
                    last, best = sorted((sign * self.areas[i], i) for i in _bits(mask))[-2:]
                    clear = max(abs(best[0]), abs(last[0])) >= SIZE_RATIO * min(abs(best[0]), abs(last[0]))
                else:
                    last, best = sorted((sign * self.centres[i][axis], i) for i in _bits(mask))[-2:]
                    clear = best[0] - last[0] >= MARGIN * self.scale
                if clear:
                    phrase = lambda s, head=head, forms=forms: s.superlative(head, forms)  # noqa: E731
                    table[best[1]].append(_Candidate(weight, mask.bit_count(), phrase))

    def _ordinal(self, table: dict[int, list[_Candidate]]) -> None:
        for weight, head, mask in self.heads:
            if mask.bit_count() < 3:  # the second of two is a superlative in disguise
                continue
            for side, (axis, sign) in _SIDES.items():
                ranked = sorted((sign * self.centres[i][axis], i) for i in _bits(mask))
                gaps = [b[0] - a[0] >= MARGIN * self.scale for a, b in itertools.pairwise(ranked)] + [True]
                for rank, word in enumerate(_RANKS[: len(ranked) - 1], 1):
                    if not (gaps[rank - 1] and gaps[rank]):
                        continue
                    phrase = lambda s, head=head, word=word, side=side: s.ordinal(head, word, side)  # noqa: E731
                    table[ranked[rank][1]].append(_Candidate(weight * (1, 0.7, 0.4)[rank - 1], mask.bit_count(), phrase))

    def _negation(self, table: dict[int, list[_Candidate]]) -> None:
        for weight, head, mask in self.heads:
            for kind in range(4):
                if head[kind] is not None or (kind == 3 and not any(head)):
                    continue
                values = sorted({self.attributes[i][kind] for i in _bits(mask)})
                for count in (1, 2):
                    for gone in itertools.combinations(values, count):
                        rest = [i for i in _bits(mask) if self.attributes[i][kind] not in gone]
                        if len(rest) == 1:
                            entry = _Candidate(
                                weight * (1 if count == 1 else 0.5),
                                mask.bit_count(),
                                lambda s, head=head, kind=kind, gone=gone: self._without(s, head, kind, gone),
                            )
                            table[rest[0]].append(entry)

    @staticmethod
    def _without(s: Paraphraser, head: Descriptor, kind: int, gone: tuple[str, ...]) -> str:
        that = s.rng.choice(("that", "that", "which"))
        if len(gone) == 1 and gone[0] in ("striped", "dotted") and s.rng.random() < 0.3:
            return f"{s.noun(head)} without {'stripes' if gone[0] == 'striped' else 'dots'}"
        words = [f"a {s.word(v)}" if kind == 3 else s.word(v) for v in gone]
        if len(words) == 1:
            return f"{s.noun(head)} {that} is not {words[0]}"
        return f"{s.noun(head)} {that} is neither {words[0]} nor {words[1]}"

    def _relation(self, table: dict[int, list[_Candidate]]) -> None:
        for anchor, names in self.unique.items():
            for target, relations in self._related(anchor).items():
                for weight, head, rivals, direction in relations:
                    phrase = lambda s, head=head, to=direction, names=names: s.related(head, to, names)  # noqa: E731
                    table[target].append(_Candidate(weight, rivals, phrase))

    def _two_hop(self, table: dict[int, list[_Candidate]]) -> None:
        # The middle object's noun fits several objects, so the words only make sense nested, not as two separate conditions.
        for last, names in self.unique.items():
            for middle, inner in self._related(last).items():
                for target, outer in self._related(middle).items():
                    if target == last:
                        continue
                    for weight, head, rivals, direction in outer:

                        def phrase(
                            s: Paraphraser,
                            head: Descriptor = head,
                            direction: str = direction,
                            names: Rows = names,
                            inner: Rows = inner,
                        ) -> str:
                            _, between, _, second = _pick_row(s.rng, inner)
                            links = s.rng.choice(((" ", " that is "), (" ", " that is "), (" that is ", " "), (" ", " ")))
                            return "".join(
                                (s.noun(head), links[0], s.relation(direction), " ")
                                + (s.noun(between), links[1], s.relation(second), " ")
                                + (s.noun(_pick(s.rng, names)),)
                            )

                        table[target].append(_Candidate(weight, rivals, phrase))


def _pick_row(rng: random.Random, rows: Rows) -> tuple:
    return rng.choices(rows, [row[0] for row in rows])[0]


def _pick(rng: random.Random, names: Rows) -> Descriptor:
    return _pick_row(rng, names)[1]


def draw_families(rng: random.Random, mix: Mapping[str, float], count: int) -> list[str]:
    """`count` independent draws of a family."""
    return rng.choices(list(mix), list(mix.values()), k=count)

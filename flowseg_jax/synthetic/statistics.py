"""What a generated set contains, as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from flowseg_jax.synthetic.expressions import FAMILIES, NO_TARGET_FAMILY, NOTHING, GeneratedExpression

SPLITS = ("train", "val", "testA", "testB")


@dataclass
class Statistics:
    """Counts of images, refs and sentences, and expected hit rates of two readers that do not understand.

    `random_reader` picks any object; `noun_reader` picks among the objects that match the head noun with its attributes, so
    1 - its rate is what comparing objects is worth.
    """

    images: Counter = field(default_factory=Counter)
    refs: Counter = field(default_factory=Counter)
    sentences: Counter = field(default_factory=Counter)  # (split, family) -> count
    objects: int = 0
    noun_hits: Counter = field(default_factory=Counter)  # family -> expected hits
    random_hits: float = 0.0

    def add(self, split: str, objects: int, refs: Iterable[Iterable[GeneratedExpression]]) -> None:
        """Counts one image."""
        self.images[split] += 1
        self.objects += objects
        for expressions in refs:
            self.refs[split] += 1
            for expression in expressions:
                self.sentences[split, expression.family] += 1
                if expression.target == NOTHING:
                    continue
                self.noun_hits[expression.family] += 1 / expression.rivals
                self.random_hits += 1 / objects

    def family(self, family: str) -> int:
        return sum(n for (_, name), n in self.sentences.items() if name == family)

    def share(self, family: str) -> float:
        """Share of all sentences, 0..1."""
        return self.family(family) / self.sentences.total()

    @property
    def noun_reader(self) -> float:
        return self.noun_hits.total() / self.sentences.total()

    @property
    def random_reader(self) -> float:
        return self.random_hits / self.sentences.total()

    def __str__(self) -> str:
        shown = (*FAMILIES, NO_TARGET_FAMILY) if self.family(NO_TARGET_FAMILY) else FAMILIES
        rows = [("split", "images", "refs", "sentences", *shown)]
        for split in SPLITS:
            families = [self.sentences[split, f] for f in shown]
            rows.append(
                (
                    split,
                    self.images[split],
                    self.refs[split],
                    sum(families),
                    *families,
                )
            )
        rows.append(("share", "", "", "", *(f"{100 * self.share(f):.1f}%" for f in shown)))
        rates = (f"{100 * self.noun_hits[f] / max(1, self.family(f)):.0f}%" for f in shown)
        rows.append(("noun reader", "", "", f"{100 * self.noun_reader:.0f}%", *rates))
        widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        mean = self.objects / self.images.total()
        lines.append(f"{mean:.1f} objects an image; a random object is right in {100 * self.random_reader:.0f}% of the cases")
        return "\n".join(lines)

"""Names as other programs wrap them: `_orig_mod.model.norm.weight` is `model.norm.weight`.

`torch.compile`, activation checkpointing, data parallelism, adapters' wrappers and multimodal models put a module around the
model, and so a prefix before its names; a bare model is saved without its own. The prefix that all names share is recognised by
what stands after it, is taken off, and is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from convert_weights import refusals
from convert_weights.families import CheckpointFamily
from convert_weights.plan import detect_family, same_family
from convert_weights.sources import RenamedSource, TensorSource
from convert_weights.table import unnumbered
from flowseg_jax.errors import UserError, listed, plain

# Modules that wrap any module, also in the middle of a name. They have no weights of their own.
WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"))
# Where the prefix names a part of a larger model, what lies outside of it belongs to the other parts.
PART = re.compile(r"language|text|llm|vision|visual|image|mask|grounding", re.IGNORECASE)
LEAD = "model."  # what a bare language model or Mask2Former is saved without
ENOUGH = 0.5  # of a family's names must be found for a prefix to be believed


class Match(NamedTuple):
    """How well a family's names fit after a prefix.

    Attributes:
        found: how many of the family's names (numbers left out) are there.
        share: the same as a share of all of them.
        plain: nothing has to be renamed.
        layout: whose names.
        prefix, lead: what is taken off, and what takes its place.
    """

    found: int
    share: float
    plain: bool
    layout: str
    prefix: str
    lead: str


def unwrapped(source: TensorSource, family: CheckpointFamily) -> TensorSource:
    """A source under the names that the tables of `family` know; itself where they are already.

    Raises:
        UserError: names of adapters or of quantised weights; two models under two prefixes; names that become one.
    """
    refusals.refuse_names(source.name, source.entries)
    names, notes = {name: name for name in source.entries}, []
    wrappers = {part for name in names for part in name.split(".") if part in WRAPPERS}
    if wrappers:
        pairs = [(".".join(part for part in name.split(".") if part not in WRAPPERS), name) for name in names]
        names = _unique(source, pairs)
        notes.append(f"{source.name}: {', '.join(f'{part}.' for part in sorted(wrappers))} taken out of the names")
    looks = detect_family(names)
    if looks is None or same_family(looks, family.name):
        match = _best(source, family, names)
        if match is not None and not match.plain:
            names, note = _without(source, family, names, match)
            notes.append(note)
    return RenamedSource(source, names, notes) if notes else source


def _best(source: TensorSource, family: CheckpointFamily, names: Iterable[str]) -> Match | None:
    """The prefix after which most of the family's names stand, or None."""
    matches = []
    for layout, known in family.names.items():
        for lead in ("", LEAD):
            tails = {name.removeprefix(lead) for name in known if name.startswith(lead)}
            for prefix, found in _prefixes(tails, names).items():
                matches.append(Match(found, found / len(known), prefix == lead, layout, prefix, lead))
    matches = sorted((m for m in matches if m.share > ENOUGH), key=lambda m: (m.found, m.plain), reverse=True)
    if not matches:
        return None
    best = matches[0]
    rivals = {m.prefix for m in matches if (m.found, m.layout, m.lead) == (best.found, best.layout, best.lead)}
    if not best.plain and len(rivals) > 1:
        raise UserError(
            f"{source.name} holds {len(rivals)} models, under {listed(sorted(rivals))}: save the one that is meant by itself"
        )
    return best


def _prefixes(tails: set[str], names: Iterable[str]) -> dict[str, int]:
    """{prefix: how many of `tails` stand after it}."""
    found: dict[str, set[str]] = {}
    depths = {tail.count(".") + 1 for tail in tails}
    for name in names:
        parts = name.split(".")
        for depth in depths:
            tail = unnumbered(".".join(parts[-depth:]))
            if len(parts) >= depth and tail in tails:
                found.setdefault("".join(f"{part}." for part in parts[:-depth]), set()).add(tail)
    return {prefix: len(known) for prefix, known in found.items()}


def _without(
    source: TensorSource, family: CheckpointFamily, names: Mapping[str, str], match: Match
) -> tuple[dict[str, str], str]:
    """Names without their prefix, and what to say of it."""
    prefix, lead = match.prefix, match.lead
    # With `model.language_model.layers...` the head stands beside, as `lm_head.weight` or after a shorter prefix.
    beside = {name for known in family.names.values() for name in known if not name.startswith(LEAD)} if lead else set()
    parts = prefix.split(".")[:-1]
    shorter = ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts), -1, -1)]
    pairs, outside = [], []
    for name, original in names.items():
        head = next((h for h in shorter if name.startswith(h) and unnumbered(name.removeprefix(h)) in beside), None)
        if head is not None:
            pairs.append((name.removeprefix(head), original))
        elif name.startswith(prefix):
            pairs.append((lead + name.removeprefix(prefix), original))
        else:
            outside.append((name, original))
    note = f"{source.name}: " + (f"names without the prefix {plain(prefix)}" if prefix else "names as they are")
    note += f", with {lead} before them" if lead else ""
    if PART.search(prefix):  # the other parts of a larger model
        groups = sorted({".".join(name.split(".")[:2]) for name, _ in outside})
        note += f"; not used: {len(outside)} tensors of its other parts ({listed(groups)})" if outside else ""
    else:  # whatever it is, it is reported as unexpected
        pairs += outside
    return _unique(source, pairs), note


def _unique(source: TensorSource, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    names: dict[str, str] = {}
    for new, old in pairs:
        if new in names:
            raise UserError(f"{source.name} holds both {plain(names[new])} and {plain(old)}: only one can be {plain(new)}")
        names[new] = old
    return names

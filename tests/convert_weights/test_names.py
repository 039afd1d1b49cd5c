"""Prefixes at their limits: how many names must be found, which prefix wins, and what is said of the rest."""

from __future__ import annotations

import types

import numpy as np
import pytest

from convert_weights import names
from convert_weights.convert import get_family
from convert_weights.sources import ArraySource
from flowseg_jax.errors import UserError

X = np.zeros(2, np.float32)


def family(known: dict[str, list[str]], name: str = "siglip2"):
    return types.SimpleNamespace(name=name, names={layout: frozenset(found) for layout, found in known.items()})


def source(*found: str) -> ArraySource:
    return ArraySource(dict.fromkeys(found, X), "it")


def best(known, *found):
    given = source(*found)
    return names._best(given, family(known), given.entries)


def test_more_than_half_of_the_names_must_be_there():
    known = {"hf": ["a.w", "b.w", "c.w", "d.w"]}
    assert best(known, "p.a.w", "p.b.w") is None
    assert best(known, "p.a.w", "p.b.w", "p.c.w") == names.Match(3, 0.75, False, "hf", "p.", "")
    assert best(known, "a.w", "b.w") is None
    assert best(known) is None


def test_the_prefix_with_most_names_wins_and_a_plain_one_among_equals():
    known = {"hf": ["a.w", "b.w", "c.w"]}
    assert best(known, "p.a.w", "p.b.w", "q.a.w", "q.b.w", "q.c.w").prefix == "q."
    assert best(known, "a.w", "b.w", "c.w", "p.a.w", "p.b.w", "p.c.w") == names.Match(3, 1.0, True, "hf", "", "")
    assert best(known, "p.a.w", "p.b.w", "p.c.w", "a.w", "b.w").prefix == "p."
    with pytest.raises(UserError, match=r"^it holds 2 models, under p\., q\.: save the one that is meant by itself$"):
        best(known, "p.a.w", "p.b.w", "p.c.w", "q.a.w", "q.b.w", "q.c.w")
    with pytest.raises(UserError, match=r"holds 3 models, under p\., q\., r\.:"):
        best(known, *(f"{prefix}.{name}" for prefix in "pqr" for name in known["hf"]))


def test_a_name_shorter_than_what_is_looked_for_has_no_prefix():
    assert names._prefixes({"a.b.w"}, ["b.w", "w", "x.a.b.w", "a.b.w"]) == {"x.": 1, "": 1}
    assert names._prefixes({"w"}, ["w"]) == {"": 1}
    assert names._prefixes({"layers.#.w"}, ["p.layers.3.w", "p.layers.4.w"]) == {"p.": 1}  # numbers count once
    assert names._prefixes({"a.w"}, ["p.q.a.w"]) == {"p.q.": 1}


def test_a_lead_takes_the_place_of_the_prefix():
    known = {"hf": ["model.a.w", "model.b.w", "head.w"]}
    found = best(known, "p.a.w", "p.b.w", "head.w")
    assert (found.found, found.prefix, found.lead, found.plain) == (2, "p.", "model.", False)
    mapping, note = names._without(source("p.a.w"), family(known), {n: n for n in ("p.a.w", "p.b.w", "head.w", "q.c.w")}, found)
    assert mapping == {"model.a.w": "p.a.w", "model.b.w": "p.b.w", "head.w": "head.w", "q.c.w": "q.c.w"}
    assert note == "it: names without the prefix p., with model. before them"
    plain = best(known, "model.a.w", "model.b.w", "head.w")
    assert plain.plain and plain.found == 3


def test_other_parts_of_a_larger_model_are_left_out():
    known = {"hf": ["a.w", "b.w"]}
    found = best(known, "x.vision.a.w", "x.vision.b.w", "x.audio.c", "x.audio.d.e", "y.z.z")
    mapping, note = names._without(
        source(), family(known), {n: n for n in ("x.vision.a.w", "x.vision.b.w", "x.audio.c", "x.audio.d.e", "y.z.z")}, found
    )
    assert mapping == {"a.w": "x.vision.a.w", "b.w": "x.vision.b.w"}
    assert note == ("it: names without the prefix x.vision.; not used: 3 tensors of its other parts (x.audio, y.z)")
    _, alone = names._without(source(), family(known), {n: n for n in ("x.vision.a.w", "x.vision.b.w")}, found)
    assert alone == "it: names without the prefix x.vision."


def test_two_names_for_one():
    given = source("a", "b")
    assert names._unique(given, [("x", "a"), ("y", "b")]) == {"x": "a", "y": "b"}
    with pytest.raises(UserError, match=r"^it holds both a and b: only one can be x$"):
        names._unique(given, [("x", "a"), ("x", "b")])


def test_wrappers_are_taken_out_once_and_said():
    given = source("module_a._orig_mod.w", "_forward_module.b")
    found = names.unwrapped(given, get_family("siglip2"))
    assert dict.fromkeys(found.entries) == dict.fromkeys(("module_a.w", "b"))
    assert found.notes == ["it: _forward_module., _orig_mod. taken out of the names"]
    untouched = source("w", "b")
    assert names.unwrapped(untouched, get_family("siglip2")) is untouched


def test_a_prefix_is_taken_off_and_said():
    known = sorted(get_family("siglip2").names["encoder"])
    given = source(*(f"module.{name.replace('#', '0')}" for name in known))
    found = names.unwrapped(given, get_family("siglip2"))
    assert set(found.entries) == {name.replace("#", "0") for name in known}
    assert found.notes == ["it: names without the prefix module."]
    with pytest.raises(UserError, match=r"^it holds an adapter \(1 of 2 tensors: a.base_layer.w\): merge the adapter first"):
        names.unwrapped(source("a.base_layer.w", "b"), get_family("siglip2"))


@pytest.mark.parametrize("name", ["qwen3", "phi3", "llama"])
def test_the_names_of_a_language_model_are_those_of_its_own_kind(name):
    cfg = get_family(name).example_config()
    assert (cfg.model_type, cfg.qk_norm, cfg.vocab_size) == (name, name == "qwen3", 8)

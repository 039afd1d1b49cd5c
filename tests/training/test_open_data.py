"""The data of a run: which sets a config opens, how they are mixed, and what the model must have room for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from flowseg_jax.data.mixture import MixtureComponent
from flowseg_jax.errors import UserError
from flowseg_jax.training import loop
from tests.training.test_run import config_of


def a_set(name, images, *, task="referring", splits=("train", "val"), categories=("x",)):
    directory = Path(name)
    return SimpleNamespace(directory=directory, task=task, splits=dict.fromkeys(splits), images=images, categories=categories)


def test_data_sets_of_a_config_are_opened_mixed_and_said(monkeypatch, capsys):
    sets = {"a": a_set("a", 3000), "b": a_set("b", 5, splits=("train",)), "c": a_set("c", 7, task="chat", splits=("train",))}
    asked = {}

    def mix(pairs, held_out):
        asked.update(pairs=[(str(p.directory), w) for p, w in pairs], held_out=held_out)
        return tuple(
            MixtureComponent(p, "train", tuple(range(p.images)), 10 * (n + 1), 2 * n) for n, (p, _) in enumerate(pairs)
        )

    monkeypatch.setattr(loop.PreparedDataset, "open", lambda directory: sets[directory])
    monkeypatch.setattr(loop, "build_mixture", mix)
    monkeypatch.setattr(loop, "held_out_keys", lambda sources: [str(getattr(s, "directory", s)) for s in sources])
    config = config_of()
    config.data.update(mixture=(("a", 0.5), ("b", 1.5), ("c", 2.0)), held_out=("list.txt",))
    assert [str(m.prepared.directory) for m in loop.load_mixture(config)] == ["a", "b", "c"]
    assert asked == {"pairs": [("a", 0.5), ("b", 1.5), ("c", 2.0)], "held_out": ["list.txt", "a", "b", "c"]}
    assert capsys.readouterr().out.splitlines() == [
        "a: 3,000 images, 16.7% of an epoch",
        "b: 5 images, 33.3% of an epoch, 2 held out for evaluation; it has no evaluation split, so no image is held out for it",
        "c: 7 images, 50.0% of an epoch, 4 held out for evaluation",
    ]
    config.data.update(mixture=(), dir="b", shapes_images=0)
    loop.load_mixture(config)
    assert asked == {"pairs": [("b", 0.0)], "held_out": ["list.txt", "b"]}
    assert capsys.readouterr().out == ""  # one set, of which all is trained on


def test_the_embedded_set_is_made_as_the_config_says(monkeypatch):
    monkeypatch.setattr(loop, "load_or_build_shapes", lambda *args, **options: (args, options))
    config = config_of()
    config.data.update(dir="d", shapes_images=60, seed=4, shapes_mix=(("color", 0.75),), tokenizer="")
    options = {"log": loop.log, "mix": {"color": 0.75}, "tokenizer_vocab": config.model.llm.vocab_size}
    assert loop.load_dataset(config) == (("d", 60, 4), options)
    config.data.update(shapes_mix=(), tokenizer="its own")
    assert loop.load_dataset(config) == (("d", 60, 4), {"log": loop.log})


@pytest.fixture
def opening(monkeypatch):
    """`open_train_data` of (members, model, tokenizer): the arguments of the data, and which set gave the tokenizer."""

    def opened(members, classes=0, language=True, vocab=300, own=300):
        asked = {}
        tokenizer = SimpleNamespace(vocab=own, name="tok")

        def open_tokenizer(prepared, prompts, directory):
            asked["tokenizer"] = (str(prepared.directory), prompts, directory)
            return tokenizer

        def train_data(*args, **options):
            asked.update(args=args, options=options)
            return SimpleNamespace(remarks=["one", "two"])

        monkeypatch.setattr(loop, "load_mixture", lambda config: members)
        monkeypatch.setattr(loop, "open_tokenizer", open_tokenizer)
        monkeypatch.setattr(loop, "TrainDataset", train_data)
        model = SimpleNamespace(
            has_language_model=language, num_classes=classes, llm=SimpleNamespace(vocab_size=vocab), num_visual_tokens=17
        )
        run_config = SimpleNamespace(model=model, prompts="prompts", shape="shape", options="options")
        config = config_of()
        config.data.tokenizer = "elsewhere"
        loop.open_train_data(config, SimpleNamespace(run_config=run_config, local_rows=lambda: [1, 3]))
        asked["same"] = asked["options"].pop("tokenizer") is (tokenizer if language else None)
        return asked

    return opened


def member(name, tokenizer="", **options):
    prepared = a_set(name, 3, **options)
    prepared.tokenizer_directory = tokenizer
    return SimpleNamespace(prepared=prepared)


def test_the_data_are_opened_with_what_the_plan_says(opening, capsys):
    members = (member("a"), member("b", "b/tokenizer"), member("c", "c/tokenizer"))
    asked = opening(members)
    assert asked["tokenizer"] == ("b", "prompts", "elsewhere")  # the first that has one
    assert asked["args"] == (members, "shape", "prompts", 9) and asked["same"]
    assert asked["options"] == {"visual_tokens": 17, "options": "options", "rows": [1, 3]}
    assert capsys.readouterr().out == "WARNING: one\nWARNING: two\n"
    assert opening(members[:1])["tokenizer"][0] == "a"
    asked = opening(members, language=False, own=999)
    assert "tokenizer" not in asked and asked["same"]


def test_ids_and_categories_that_the_model_has_no_room_for(opening):
    with pytest.raises(UserError, match=r"model\.llm\.vocab_size is 300, the tokenizer tok has 301 ids"):
        opening((member("a"),), own=301)
    two = ("x", "y")
    opening((member("a", categories=two), member("b", categories=two), member("c", task="chat", categories=())), classes=2)
    opening((member("a", categories=two), member("b", task="generic", categories=("z",))), classes=0)
    with pytest.raises(UserError, match=r"model\.num_classes is 1, a has 2 categories"):
        opening((member("a", categories=two),), classes=1)
    with pytest.raises(UserError, match="a and b have other categories, and the linear head"):
        opening((member("a", categories=two), member("b", task="generic", categories=("x", "z"))), classes=9)
